"""Attention on CUDA: cuDNN's flash attention, through JAX's own `jax.nn.dot_product_attention`.

JAX offers forward and backward as one differentiable function, an op has them as two. The forward op is that
function's vjp without the pullback; the backward op takes the same vjp and puts the result and the statistics that the
forward op kept where the pullback holds its own, so that nobody needs its forward any more and it is dropped. A JAX
whose pullback does not hold exactly these two is refused.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import partial_eval

from jaxext import _jax_compat
from jaxext.kernels import _platform
from jaxext.kernels._attention import ATTENTION, ATTENTION_BACKWARD, _bind, _heads_first, _sizes
from jaxext.kernels._op import relaxed
from jaxext.kernels._platform import Lowering

__all__ = ["cudnn_problem", "cudnn_refusal"]

_DTYPES = (jnp.dtype("bfloat16"), jnp.dtype("float16"))
_LEAST_LENGTH = 64
_HOPPER = (9, 0)
_UNKNOWN_TO_CUDNN = {
    "mask": "a mask that is an array would be added to the scores as a bias, with a gradient of its size",
    "query_segment_ids": "segment ids",
    "keep": "dropout with given probabilities",
}


def cudnn_refusal(
    q: Any,
    k: Any,
    v: Any,
    *rest: Any,
    extras: tuple[str, ...],
    band: tuple[int | None, int | None],
    soft_cap: float | None,
    layout: tuple[str, ...],
    capability: tuple[int, int] | None,
    **others: Any,
) -> str | None:
    """Why cuDNN's attention cannot compute this call on a device of this compute capability (None: one not known)."""
    _, _, queries, keys, depth, value_depth = _sizes(q, k, v, layout)
    for name, what in _UNKNOWN_TO_CUDNN.items():
        if name in extras:
            return f"cuDNN has no place for it: {what}"
    if soft_cap is not None:
        return "cuDNN has no place for it: soft-capped scores"
    if q.dtype not in _DTYPES:
        return f"dtype {q.dtype}; cuDNN takes bfloat16 and float16"
    if value_depth != depth:
        return f"values of size {value_depth} with queries of size {depth}; JAX's function takes one size"
    widest = 256 if capability is not None and capability >= _HOPPER else 128
    if depth % 8 or not 8 <= depth <= widest:
        return f"head size {depth}; cuDNN takes multiples of 8 up to {widest} on this device"
    if min(queries, keys) < _LEAST_LENGTH or 0 in q.shape:
        return f"{queries} queries and {keys} keys; below {_LEAST_LENGTH} the call stays with XLA"
    return _band_refusal(band, queries, keys) or _bias_refusal(q, rest, layout, queries, keys)


def _band_refusal(band: tuple[int | None, int | None], queries: int, keys: int) -> str | None:
    low, high = band
    if band == (None, None):
        return None
    if high != 0 or (low is not None and low > 0):
        return f"keys {low} to {high} from the query; cuDNN takes causal masks and windows that end at the query"
    # JAX aligns them at the first query, cuDNN's versions differ.
    if queries != keys:
        return f"a causal mask over {queries} queries and {keys} keys; they have to be equal in number"
    return None


def _bias_refusal(q: Any, rest: Sequence[Any], layout: Sequence[str], queries: int, keys: int) -> str | None:
    if not rest:
        return None
    (bias,), heads = rest, q.shape[-3 if layout[0] == "bnth" else -2]
    if bias.dtype != q.dtype:
        return f"a bias of dtype {bias.dtype}; cuDNN takes the queries' {q.dtype}"
    leading = math.prod(bias.shape[:-3])
    if bias.shape[-3:] != (heads, queries, keys) or leading not in (1, math.prod(q.shape[:-3])):
        return f"a bias of shape {tuple(bias.shape)}; cuDNN takes whole ones, [..., {heads}, {queries}, {keys}]"
    if queries % 2 or keys % 2:
        return f"a bias over {queries} queries and {keys} keys; cuDNN takes even numbers"
    return None


def _refuses(*avals: Any, **params: Any) -> str | None:
    own = cudnn_refusal(*avals, **params, capability=_platform.compute_capability())
    if own is not None:
        return own
    types = tuple(_jax_compat.array_type(aval.shape, aval.dtype) for aval in avals)
    return _jax_refuses(types, tuple(sorted(params.items())))


@functools.lru_cache(maxsize=256)
def _jax_refuses(types: tuple[Any, ...], params: tuple[tuple[str, Any], ...]) -> str | None:
    """What JAX itself says: that there is no cuDNN, or one too old for this call."""
    try:
        _jax_compat.trace(lambda *xs: _forward(*xs, **dict(params)), list(types))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return f"JAX's cuDNN attention refuses: {' '.join(str(error).split())}"
    return None


def cudnn_problem() -> str | None:
    """Why attention cannot go to cuDNN in this process, whatever the call; None where it can."""
    plain = jax.ShapeDtypeStruct((1, 128, 1, 64), jnp.bfloat16)
    operands, params = _bind(plain, plain, plain)
    return _refuses(*operands, **params)


def _backward_refuses(*avals: Any, wrt: tuple[int, ...], extras: tuple[str, ...], **params: Any) -> str | None:
    return _refuses(*avals[: 3 + len(extras)], extras=extras, **params)


# --- the call -------------------------------------------------------------------------------------------------------


def _attend(*operands: jax.Array, scale: float, band: tuple[int | None, int | None]) -> jax.Array:
    """jax.nn.dot_product_attention of [B, T, N, H] and a bias [1 or B, N, T, S]."""
    window = None if band[0] is None else (-band[0], 0)
    return jax.nn.dot_product_attention(
        *operands, scale=scale, is_causal=band[1] is not None, local_window_size=window, implementation="cudnn"
    )


def _time_first(operands: Sequence[jax.Array], layout: Sequence[str]) -> list[jax.Array]:
    """Query, key, value as [B, T, N, H], a bias as [1 or B, N, T, S]."""
    turned = [x if order == "btnh" else jnp.swapaxes(x, -3, -2) for x, order in zip(operands[:3], layout)]
    return [x.reshape(-1, *x.shape[-3:]) for x in (*turned, *operands[3:])]


def _like(x: jax.Array, shape: Sequence[int], order: str) -> jax.Array:
    """[B, T, N, H] with the leading dimensions of `shape`, in `order`."""
    return _heads_first(x, "btnh" if order == "bnth" else "bnth").reshape(shape)


def _kept(pullback: Callable[..., Any], inputs: Sequence[jax.Array], out: jax.Array) -> tuple[list[Any], Any, int, int]:
    """The pullback's arrays, its structure, and which of them are the statistics [B, N, T] and the result.

    Raises:
      NotImplementedError: it holds other arrays.
    """
    arrays, structure = jax.tree.flatten(pullback)
    batch, queries, heads, _ = out.shape
    own = [i for i, x in enumerate(arrays) if all(x is not given for given in inputs)]
    statistics = [i for i in own if arrays[i].shape == (batch, heads, queries) and arrays[i].dtype == jnp.float32]
    results = [i for i in own if arrays[i].shape == out.shape and arrays[i].dtype == out.dtype]
    if len(statistics) != 1 or len(results) != 1:
        raise NotImplementedError("its pullback holds other arrays than the statistics and the result")
    return arrays, structure, statistics[0], results[0]


def _forward(
    *operands: jax.Array, scale: float, band: tuple[int | None, int | None], layout: tuple[str, ...], **others: Any
) -> tuple[jax.Array, ...]:
    """The op's (out, lse, low): cuDNN's logarithm of the sum is lse, as a maximum over a sum of 1; low is not kept."""
    with relaxed():
        inputs = _time_first(operands, layout)
        found, pullback = jax.vjp(functools.partial(_attend, scale=scale, band=band), *inputs)
        arrays, _, statistics, _ = _kept(pullback, inputs, found)
        sums, leading = arrays[statistics] / math.log(2), operands[0].shape[:-3]
        _, queries, heads, depth = found.shape
        sizes = (heads, queries) if layout[3] == "bnth" else (queries, heads)
        out = _like(found, (*leading, *sizes, depth), layout[3])
        lse = jnp.stack([sums, jnp.zeros_like(sums)], -2).reshape(*leading, heads, 2, queries)
        low = jnp.zeros(out.shape if out.dtype == jnp.bfloat16 else (*leading, 0), out.dtype)
    return out, lse, low


def _backward(*xs: jax.Array, **params: Any) -> list[jax.Array]:
    closed = _jax_compat.trace(lambda *ys: _gradients(*ys, **params), [jax.typeof(x) for x in xs])
    alive, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.out_avals), instantiate=True)
    kept = core.ClosedJaxpr(alive, closed.consts)  # pyright: ignore[reportPrivateImportUsage]
    return core.jaxpr_as_fun(kept)(*xs)


def _gradients(
    *xs: jax.Array,
    wrt: tuple[int, ...],
    extras: tuple[str, ...],
    scale: float,
    band: tuple[int | None, int | None],
    layout: tuple[str, ...],
    **others: Any,
) -> tuple[jax.Array, ...]:
    operands, (out, lse, _, cotangent) = xs[: 3 + len(extras)], xs[3 + len(extras) :]
    with relaxed():
        inputs = _time_first(operands, layout)
        found, pullback = jax.vjp(functools.partial(_attend, scale=scale, band=band), *inputs)
        arrays, structure, statistics, result = _kept(pullback, inputs, found)
        saved, upstream = (_heads_first(x, "btnh" if layout[3] == "bnth" else "bnth") for x in (out, cotangent))
        arrays[statistics] = (jnp.sum(lse, -2) * math.log(2)).reshape(arrays[statistics].shape)
        arrays[result] = saved.reshape(found.shape)
        gradients = jax.tree.unflatten(structure, arrays)(upstream.reshape(found.shape))
        orders = (*layout[:3], "btnh")
        return tuple(
            (_like(gradients[i], operands[i].shape, orders[i]) if i < 3 else gradients[i].reshape(operands[i].shape))
            for i in wrt
        )


_HOW = "cuDNN through jax.nn.dot_product_attention"
ATTENTION.on("cuda", Lowering(_refuses, _forward, how=_HOW))
ATTENTION_BACKWARD.on("cuda", Lowering(_backward_refuses, _backward, how=_HOW))
