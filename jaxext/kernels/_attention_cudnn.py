"""Attention on CUDA: cuDNN's flash attention, through JAX's own `jax.nn.dot_product_attention`.

JAX offers forward and backward as one differentiable function, an op has them as two. The forward op is that
function's vjp without the pullback; the backward op takes the same vjp and puts the result and the statistics that the
forward op kept where the pullback holds its own, so that nobody needs its forward any more and it is dropped. A JAX
whose pullback does not hold exactly these two is refused.

Key lengths go as lengths; other masks, and segment ids as the mask they make, as the bias that cuDNN adds to the
scores. Rows without a visible key are computed beside it: cuDNN gets some keys for them and no cotangent from them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import partial_eval

from jaxext import _jax_compat
from jaxext.kernels import _platform
from jaxext.kernels._attention import ATTENTION, ATTENTION_BACKWARD, Band, _bind, _heads_first, _sizes, _visible
from jaxext.kernels._attention_rows import filled, spread
from jaxext.kernels._op import relaxed
from jaxext.kernels._platform import Lowering

__all__ = ["cudnn_problem", "cudnn_refusal"]

_DTYPES = (jnp.dtype("bfloat16"), jnp.dtype("float16"))
_LEAST_LENGTH = 64
_HOPPER = (9, 0)
# The statistics of a row that takes no part in the backward: exp(score - this) is 0.
_NO_SHARE = 2.0**30
# Added to hidden scores: exp of it is 0, and cuDNN may still subtract two of them.
_HIDDEN = {jnp.dtype("bfloat16"): -(2.0**41), jnp.dtype("float16"): -(2.0**15)}


def cudnn_refusal(
    q: Any,
    k: Any,
    v: Any,
    *rest: Any,
    extras: tuple[str, ...],
    band: Band,
    soft_cap: float | None,
    layout: tuple[str, ...],
    prefix: bool,
    capability: tuple[int, int] | None,
    **others: Any,
) -> str | None:
    """Why cuDNN's attention cannot compute this call on a device of this compute capability (None: one not known)."""
    _, _, queries, keys, depth, value_depth = _sizes(q, k, v, layout)
    if "keep" in extras:
        return "cuDNN has no place for it: dropout with given probabilities"
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
    named = dict(zip(extras, rest))
    return _band_refusal(band, queries, keys) or _bias_refusal(q, named, band, prefix, queries, keys)


def _band_refusal(band: Band, queries: int, keys: int) -> str | None:
    low, high = band
    if band == (None, None):
        return None
    if high != 0 or (low is not None and low > 0):
        return f"keys {low} to {high} from the query; cuDNN takes causal masks and windows that end at the query"
    # JAX aligns them at the first query, cuDNN's versions differ.
    if queries != keys:
        return f"a causal mask over {queries} queries and {keys} keys; they have to be equal in number"
    return None


def _bias_refusal(q: Any, named: dict[str, Any], band: Band, prefix: bool, queries: int, keys: int) -> str | None:
    if "bias" in named and named["bias"].dtype != q.dtype:
        return f"a bias of dtype {named['bias'].dtype}; cuDNN takes the queries' {q.dtype}"
    if "bias" in named and named["bias"].shape[-1] != keys:
        # Its gradient is exactly 0 and would be a sum of roundings.
        return "a bias that does not vary along the keys"
    as_lengths = _as_lengths(tuple(named), band, prefix)
    if named and not as_lengths and (queries % 2 or keys % 2):
        return f"a bias or a mask over {queries} queries and {keys} keys; cuDNN takes even numbers"
    return None


def _as_lengths(extras: tuple[str, ...], band: Band, prefix: bool) -> bool:
    """Whether cuDNN is handed key lengths, not a bias; a window would leave rows behind them without a key."""
    return prefix and extras == ("mask",) and band[0] is None


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


class _Handed(NamedTuple):
    """What cuDNN is handed, [B, ...]; with one dimension of batch, lengths before heads.

    Attributes:
      inputs: query, key, value [B, T, N, H], and a bias [1 or B, 1 or N, T, S], in which the masks are.
      mask: [1 or B, 1 or N, T, S], where there is no bias.
      lengths: int32 [B], the numbers of keys; all where there is none.
      hidden: [1 or B, 1 or T, 1 or N], rows without a visible key; None where there can be none.
    """

    inputs: list[jax.Array]
    mask: jax.Array | None
    lengths: jax.Array | None
    hidden: jax.Array | None


def _handed(
    operands: Sequence[jax.Array],
    *,
    extras: tuple[str, ...],
    band: Band,
    layout: Sequence[str],
    prefix: bool,
    heads_alone: bool = False,
) -> _Handed:
    """`heads_alone`: a bias has a gradient of its own for each head."""
    turned = [x if order == "btnh" else jnp.swapaxes(x, -3, -2) for x, order in zip(operands[:3], layout)]
    batch, (queries, heads), (keys, kv_heads) = turned[0].shape[:-3], turned[0].shape[-3:-1], turned[1].shape[-3:-1]
    inputs = [x.reshape(-1, *x.shape[-3:]) for x in turned]
    named = dict(zip(extras, operands[3:]))
    flat = functools.partial(_one_batch, batch=batch)
    if _as_lengths(extras, band, prefix):
        counted = jnp.sum(jnp.broadcast_to(flat(named["mask"]), (inputs[0].shape[0], 1, 1, keys)), (1, 2, 3), jnp.int32)
        empty = counted == 0
        return _Handed(inputs, None, jnp.where(empty, keys, counted), empty[:, None, None])
    visible, hidden = _visible(queries, keys, (None, None), named, kv_heads), None
    if visible is not None:
        seen = _visible(queries, keys, band, named, kv_heads)
        assert seen is not None
        unseen = jnp.logical_not(jnp.any(flat(_each_head(seen)), -1))
        hidden = jnp.swapaxes(unseen, 1, 2)
        visible = _whole(flat(_each_head(visible)), queries, keys)
    if "bias" not in named:
        return _Handed(inputs, visible, None, hidden)
    bias = _whole(flat(named["bias"]), queries, keys)
    if heads_alone:
        bias = jnp.broadcast_to(bias, (bias.shape[0], heads, queries, keys))
    if visible is not None:
        bias = jnp.where(visible, bias, jnp.asarray(_HIDDEN[bias.dtype], bias.dtype))
    return _Handed([*inputs, bias], None, None, hidden)


def _each_head(visible: jax.Array) -> jax.Array:
    """[..., K or 1, G or 1, T, S] -> [..., N or 1, T, S]."""
    return visible.reshape(*visible.shape[:-4], -1, *visible.shape[-2:])


def _one_batch(x: jax.Array, batch: tuple[int, ...]) -> jax.Array:
    """[..., N, T, S] with the batch's dimensions, each full or 1 -> [B or 1, N, T, S]."""
    leading = x.shape[:-3]
    if any(size != 1 for size in leading):
        x = jnp.broadcast_to(x, (*batch, *x.shape[-3:]))
    return x.reshape(-1, *x.shape[-3:])


def _whole(x: jax.Array, queries: int, keys: int) -> jax.Array:
    return jnp.broadcast_to(x, (*x.shape[:2], queries, keys))


def _differentiated(handed: _Handed, scale: float, band: Band) -> tuple[jax.Array, Callable[..., Any]]:
    """Result and pullback of jax.nn.dot_product_attention."""
    attend = functools.partial(
        _attend,
        mask=handed.mask,
        key_value_seq_lengths=handed.lengths,
        scale=scale,
        is_causal=band[1] is not None,
        local_window_size=None if band[0] is None else (-band[0], 0),
    )
    return jax.vjp(attend, *handed.inputs)


def _attend(*operands: jax.Array, **options: Any) -> jax.Array:
    return jax.nn.dot_product_attention(*operands, **options, implementation="cudnn")


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
    *operands: jax.Array,
    extras: tuple[str, ...],
    scale: float,
    band: Band,
    layout: tuple[str, ...],
    fill: str,
    prefix: bool,
    **others: Any,
) -> tuple[jax.Array, ...]:
    """The op's (out, lse, low): cuDNN's logarithm of the sum is lse, as a maximum over a sum of 1; low is not kept."""
    with relaxed():
        handed = _handed(operands, extras=extras, band=band, layout=layout, prefix=prefix)
        found, pullback = _differentiated(handed, scale, band)
        arrays, _, statistics, _ = _kept(pullback, handed.inputs, found)
        sums, leading = arrays[statistics] / math.log(2), operands[0].shape[:-3]
        if handed.hidden is not None:
            sums = jnp.where(jnp.swapaxes(handed.hidden, 1, 2), -jnp.inf, sums)
            found = filled(found, handed.hidden, handed.inputs[2], fill, "btnh", "btnh")
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
    band: Band,
    layout: tuple[str, ...],
    fill: str,
    prefix: bool,
    **others: Any,
) -> tuple[jax.Array, ...]:
    operands, (out, lse, _, cotangent) = xs[: 3 + len(extras)], xs[3 + len(extras) :]
    with relaxed():
        alone = 3 in wrt
        handed = _handed(operands, extras=extras, band=band, layout=layout, prefix=prefix, heads_alone=alone)
        found, pullback = _differentiated(handed, scale, band)
        arrays, structure, statistics, result = _kept(pullback, handed.inputs, found)
        saved, upstream = (_heads_first(x, "btnh" if layout[3] == "bnth" else "bnth") for x in (out, cotangent))
        upstream, sums = (
            upstream.reshape(found.shape),
            (jnp.sum(lse, -2) * math.log(2)).reshape(arrays[statistics].shape),
        )
        added = None
        if handed.hidden is not None:
            added = spread(upstream, handed.hidden, handed.inputs[2], fill)
            upstream = jnp.where(handed.hidden[..., None], 0, upstream)
            # cuDNN multiplies both.
            saved = jnp.where(handed.hidden[..., None], 0, saved.reshape(found.shape)) if fill == "nan" else saved
            sums = jnp.where(jnp.swapaxes(handed.hidden, 1, 2), _NO_SHARE, sums)
        arrays[statistics], arrays[result] = sums, saved.reshape(found.shape)
        gradients = list(jax.tree.unflatten(structure, arrays)(upstream))
        if added is not None:
            gradients[2] = gradients[2] + added
        orders = (*layout[:3], "btnh")
        return tuple(
            _like(gradients[i], operands[i].shape, orders[i])
            if i < 3
            else _summed(gradients[i], operands[i].shape, operands[0].shape[:-3])
            for i in wrt
        )


def _summed(gradient: jax.Array, shape: tuple[int, ...], batch: tuple[int, ...]) -> jax.Array:
    """A bias' gradient [1 or B, N, T, S], summed where the bias is one for all."""
    leading = batch if gradient.shape[0] == math.prod(batch) else (1,) * len(batch)
    whole = gradient.reshape(*leading, *gradient.shape[1:])
    shared = [i for i, size in enumerate(shape) if size == 1 and whole.shape[i] != 1]
    return jnp.sum(whole, shared, keepdims=True) if shared else whole


_HOW = "cuDNN through jax.nn.dot_product_attention"
ATTENTION.on("cuda", Lowering(_refuses, _forward, how=_HOW))
ATTENTION_BACKWARD.on("cuda", Lowering(_backward_refuses, _backward, how=_HOW))
