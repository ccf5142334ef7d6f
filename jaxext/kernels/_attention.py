"""Scaled dot-product attention: the reference, the native forward and backward ops, and the public function.

Method: online softmax over key blocks and recomputation in the backward pass, FlashAttention-2 (Dao, 2023,
arXiv:2307.08691). Memory is linear in the sequence length; blocks that a band, segments or a mask hide are skipped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxext.kernels._op import ArgSpec, Op, derive

__all__ = ["ATTENTION", "ATTENTION_BACKWARD", "attention", "attention_op", "attention_refusal"]

Layout = Literal["btnh", "bnth"]
Fill = Literal["zeros", "uniform", "nan"]
Band = tuple[int | None, int | None]

EXTRAS = ("bias", "mask", "query_segment_ids", "key_value_segment_ids", "keep")
"""Optional operands after query, key and value, in this order."""

_NATIVE_DTYPES = (jnp.dtype("float32"), jnp.dtype("bfloat16"))
_FILLS = ("zeros", "uniform", "nan")
_MAX_LEADING = 8
_UNBOUNDED = 2**62


# --- shapes ---------------------------------------------------------------------------------------------------------


def _sizes(q: Any, k: Any, v: Any, layout: Sequence[str]) -> tuple[int, int, int, int, int, int]:
    """(heads, kv heads, queries, keys, head size, value head size)."""
    heads, queries = (q.shape[-3:-1]) if layout[0] == "bnth" else q.shape[-3:-1][::-1]
    kv_heads, keys = (k.shape[-3:-1]) if layout[1] == "bnth" else k.shape[-3:-1][::-1]
    return heads, kv_heads, queries, keys, q.shape[-1], v.shape[-1]


def _expect(ok: bool, argument: str, expected: str, found: Any, remedy: str) -> None:
    if not ok:
        raise ValueError(f"attention: argument '{argument}' must {expected}, but is {found}; {remedy}")


def _check_qkv(q: Any, k: Any, v: Any, layout: Sequence[str]) -> None:
    for name, x in (("query", q), ("key", k), ("value", v)):
        _expect(
            x.ndim >= 3,
            name,
            "have at least 3 dimensions [..., length, heads, head size]",
            f"of shape {x.shape}",
            "add the missing dimensions",
        )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"attention: argument '{name}' must be a floating-point array, but is {x.dtype}; cast it with .astype"
            )
    for name, x in (("key", k), ("value", v)):
        _expect(x.ndim == q.ndim, name, f"have query's {q.ndim} dimensions", f"of shape {x.shape}", "reshape it")
        if x.dtype != q.dtype:
            raise TypeError(
                f"attention: argument '{name}' must have query's dtype {q.dtype}, but is {x.dtype}; cast one of them"
            )
        _expect(
            x.shape[:-3] == q.shape[:-3],
            name,
            f"have query's leading dimensions {q.shape[:-3]}",
            f"of shape {x.shape}",
            "broadcast it",
        )
    heads, kv_heads, _, keys, depth, _ = _sizes(q, k, v, layout)
    value_heads, values = v.shape[-3:-1] if layout[2] == "bnth" else v.shape[-3:-1][::-1]
    _expect(k.shape[-1] == depth, "key", f"have query's head size {depth}", f"of shape {k.shape}", "project it")
    _expect(
        (value_heads, values) == (kv_heads, keys),
        "value",
        f"have key's {kv_heads} heads and length {keys}",
        f"of shape {v.shape}",
        "repeat or slice it",
    )
    _expect(
        heads % kv_heads == 0 if kv_heads else heads == 0,
        "key",
        f"have a number of heads that divides query's {heads}",
        f"of {kv_heads} heads",
        "repeat its heads",
    )


def _check(
    q: Any, k: Any, v: Any, *rest: Any, extras: tuple[str, ...], layout: Any, fill: str, prefix: bool, **_: Any
) -> None:
    _check_qkv(q, k, v, layout)
    if fill not in _FILLS:
        raise ValueError(f"attention: argument 'fill' must be one of {_FILLS}, but is {fill!r}; choose one of them")
    found = rest[extras.index("mask")].shape if "mask" in extras else None
    if prefix and (found is None or found[-3:-1] != (1, 1)):
        raise ValueError(
            f"attention: argument 'prefix' needs a mask of shape [..., 1, 1, S], but is given one of shape {found}; "
            "leave it out"
        )
    heads, queries, keys = (_sizes(q, k, v, layout)[i] for i in (0, 2, 3))
    for name, x in zip(extras, rest):
        core = {"query_segment_ids": (queries,), "key_value_segment_ids": (keys,)}.get(name, (heads, queries, keys))
        full = (*q.shape[:-3], *core)
        # Segment ids name every row: only their leading dimensions may be broadcast.
        may_be_one = len(full) if len(core) > 1 else len(full) - 1
        ok = x.ndim == len(full) and all(
            d == n or (d == 1 and i < may_be_one) for i, (d, n) in enumerate(zip(x.shape, full))
        )
        _expect(ok, name, f"have shape {full}, 1 for a broadcast dimension", f"of shape {x.shape}", "broadcast it")
        if name in ("mask", "keep") and x.dtype != jnp.bool_:
            raise TypeError(
                f"attention: argument '{name}' must be boolean (True: attend), but is {x.dtype}; compare it with 0, or "
                "pass additive values as 'bias'"
            )
        if len(core) == 1 and x.dtype != jnp.int32:
            raise TypeError(f"attention: argument '{name}' must be int32, but is {x.dtype}; cast it with .astype")


# --- reference ------------------------------------------------------------------------------------------------------


def _heads_first(x: jax.Array, layout: str) -> jax.Array:
    return x if layout == "bnth" else jnp.swapaxes(x, -3, -2)


def _grouped(x: jax.Array, kv_heads: int) -> jax.Array:
    """[..., N or 1, T, S] -> [..., K or 1, G or 1, T, S]."""
    n = x.shape[-3]
    split = (1, 1) if n == 1 else (kv_heads, n // kv_heads)
    return x.reshape(*x.shape[:-3], *split, *x.shape[-2:])


def _visible(queries: int, keys: int, band: Band, named: dict[str, jax.Array], kv_heads: int) -> jax.Array | None:
    """Which keys each query attends, broadcastable to [..., K, G, T, S]; None for all."""
    terms = []
    offset = jnp.arange(keys) - jnp.arange(queries)[:, None]
    if band[0] is not None:
        terms.append(offset >= band[0])
    if band[1] is not None:
        terms.append(offset <= band[1])
    if "mask" in named:
        terms.append(_grouped(named["mask"], kv_heads))
    if "query_segment_ids" in named:
        rows, columns = named["query_segment_ids"], named["key_value_segment_ids"]
        terms.append((rows[..., :, None] == columns[..., None, :])[..., None, None, :, :])
    if not terms:
        return None
    visible = terms[0]
    for term in terms[1:]:
        visible = visible & term
    return visible


def _hide(logits: jax.Array, visible: jax.Array, fill: str) -> jax.Array:
    if fill == "uniform":
        # As jax.nn.dot_product_attention: finite, so that a row with every key hidden is uniform.
        return jnp.where(visible, logits, -0.7 * float(jnp.finfo(jnp.float32).max))
    if fill == "nan":
        return jnp.where(visible, logits, -jnp.inf)
    return jnp.where(visible, logits, jnp.where(jnp.any(visible, -1, keepdims=True), -jnp.inf, 0.0))


def _reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *rest: jax.Array,
    extras: tuple[str, ...],
    scale: float,
    band: Band,
    soft_cap: float | None,
    keep_scale: float,
    fill: str,
    layout: tuple[str, ...],
    prefix: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(out, lse, low); the last two are residuals, not differentiable.

    lse: f32 [..., N, 2, T]: the maximum of a row's scores (-inf where all its keys are hidden) and the logarithm of its
      sum relative to that, both base 2; the kernel's maximum may lie below the true one, its sum above accordingly.
    low: as out, what rounding took from it (the backward's sum(out * dout) cancels where one probability is near 1);
      [..., 0] in float32.
    """
    heads, kv_heads, queries, keys, _, value_depth = _sizes(q, k, v, layout)
    leading, dtype, named = q.shape[:-3], q.dtype, dict(zip(extras, rest))
    wide = jnp.promote_types(dtype, jnp.float32)
    q, k, v = (_heads_first(x, order) for x, order in zip((q, k, v), layout))
    if keys == 0 or 0 in q.shape:
        out = _heads_first(jnp.zeros((*leading, heads, queries, value_depth), dtype), layout[3])
        return out, jnp.full((*leading, heads, 2, queries), -jnp.inf, jnp.float32), _rounded_away(out, out)
    q = q.reshape(*leading, kv_heads, heads // kv_heads, queries, q.shape[-1])
    logits = jnp.einsum("...kgtd,...ksd->...kgts", q.astype(wide), k.astype(wide)) * scale
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    if "bias" in named:
        logits = (logits + _grouped(named["bias"], kv_heads)).astype(wide)
    visible = _visible(queries, keys, band, named, kv_heads)
    some = None
    if visible is not None:
        logits = _hide(logits, visible, fill)
        some = jnp.any(jnp.broadcast_to(visible, logits.shape), -1)
    probabilities = jax.nn.softmax(logits, axis=-1)
    maximum = jnp.max(logits, -1)
    log_sum = jnp.log2(jnp.sum(jnp.exp(logits - maximum[..., None]), -1))
    if some is not None:
        maximum = jnp.where(some, maximum, -jnp.inf)
        if fill == "zeros":
            probabilities = jnp.where(some[..., None], probabilities, 0)
    if "keep" in named:
        probabilities = jnp.where(_grouped(named["keep"], kv_heads), probabilities * keep_scale, 0)
    out = jnp.einsum("...kgts,...ksd->...kgtd", probabilities.astype(dtype), v, preferred_element_type=wide)
    out = _heads_first(out.reshape(*leading, heads, queries, value_depth), layout[3])
    sums = jnp.stack(
        [maximum.reshape(*leading, heads, queries) / math.log(2), log_sum.reshape(*leading, heads, queries)], -2
    )
    lse = jax.lax.stop_gradient(sums).astype(jnp.float32)
    return out.astype(dtype), lse, _rounded_away(out, out.astype(dtype))


def _rounded_away(exact: jax.Array, out: jax.Array) -> jax.Array:
    if out.dtype != jnp.bfloat16:
        return jnp.zeros((*out.shape[:-3], 0), out.dtype)
    return jax.lax.stop_gradient(exact.astype(jnp.float32) - out.astype(jnp.float32)).astype(out.dtype)


# --- ops ------------------------------------------------------------------------------------------------------------


def _refuses(q: Any, k: Any, v: Any, *rest: Any, extras: tuple[str, ...], **params: Any) -> str | None:
    if q.dtype not in _NATIVE_DTYPES:
        return f"dtype {q.dtype} has no kernel (float32 and bfloat16 have)"
    if q.ndim - 3 > _MAX_LEADING:
        return f"more than {_MAX_LEADING} leading dimensions"
    if 0 in (q.shape[-1], v.shape[-1]):
        return "head size 0"
    if "bias" in extras and rest[extras.index("bias")].dtype not in _NATIVE_DTYPES:
        return f"bias of dtype {rest[extras.index('bias')].dtype} has no kernel (float32 and bfloat16 have)"
    return None


def _backward_refuses(*avals: Any, wrt: tuple[int, ...], extras: tuple[str, ...], **params: Any) -> str | None:
    return _refuses(*avals[: 3 + len(extras)], extras=extras, **params)


def _attributes(
    *,
    extras: tuple[str, ...],
    scale: float,
    band: Band,
    soft_cap: float | None,
    keep_scale: float,
    fill: str,
    layout: tuple[str, ...],
    prefix: bool,
    wrt: tuple[int, ...] | None = None,
) -> dict[str, Any]:
    low, high = band
    attributes = {
        "extras": ",".join(extras),
        "layout": "".join("n" if order == "bnth" else "t" for order in layout),
        "scale": np.float32(scale),
        "soft_cap": np.float32(soft_cap or 0.0),
        "keep_scale": np.float32(keep_scale),
        "band_low": np.int64(-_UNBOUNDED if low is None else low),
        "band_high": np.int64(_UNBOUNDED if high is None else high),
        "fill": np.int32(_FILLS.index(fill)),
    }
    return attributes if wrt is None else attributes | {"wrt": np.asarray(wrt, np.int64)}


def _roles(n_operands: int, **_: Any) -> Sequence[Any]:
    return ("full",) * 3 + ("broadcast",) * (n_operands - 3)


def attention_refusal(query: Any, key: Any, value: Any, **options: Any) -> str | None:
    """Why the native kernel would not take this call of `attention_op` (None: it would). Takes avals or arrays."""
    operands, params = _bind(query, key, value, **options)
    return ATTENTION.refusal(*operands, **params)


def _bind(
    query: Any,
    key: Any,
    value: Any,
    *,
    bias: Any = None,
    mask: Any = None,
    query_segment_ids: Any = None,
    key_value_segment_ids: Any = None,
    keep: Any = None,
    keep_scale: float = 1.0,
    scale: float = 1.0,
    band: Band = (None, None),
    soft_cap: float | None = None,
    fill: Fill | None = None,
    layout: tuple[str, ...] = ("btnh",) * 4,
    prefix: bool = False,
) -> tuple[list[Any], dict[str, Any]]:
    if (query_segment_ids is None) != (key_value_segment_ids is None):
        missing = "query_segment_ids" if query_segment_ids is None else "key_value_segment_ids"
        raise ValueError(f"attention: argument '{missing}' must be given with the other segment ids; pass both or none")
    extra = dict(zip(EXTRAS, (bias, mask, query_segment_ids, key_value_segment_ids, keep)))
    named = {name: x for name, x in extra.items() if x is not None}
    params = {
        "extras": tuple(named),
        "scale": float(scale),
        "band": tuple(band),
        "soft_cap": None if soft_cap is None else float(soft_cap),
        "keep_scale": float(keep_scale),
        "fill": fill or "zeros",
        "layout": tuple(layout),
        "prefix": prefix,
    }
    return [query, key, value, *named.values()], params


def attention_op(query: jax.Array, key: jax.Array, value: jax.Array, **options: Any) -> jax.Array:
    """Attention with every option of the kernel spelled out; what patterns are replaced with.

    Args:
      query: [..., T, N, H], or [..., N, T, H] where layout says "bnth". Any number of leading dimensions.
      key: [..., S, K, H]; K divides N, query head n reads key head n // (N / K).
      value: [..., S, K, V].
      bias: added to the scaled scores; [..., N, T, S], each dimension full or 1.
      mask: boolean, True where a query attends a key; as bias.
      query_segment_ids, key_value_segment_ids: int32 [..., T] and [..., S]; a query attends keys of its segment.
      keep: boolean as mask: probabilities that dropout keeps, multiplied by keep_scale.
      scale: factor of the scores.
      band: (low, high): query row i attends key j iff low <= j - i <= high; None is unbounded.
      soft_cap: scores become soft_cap * tanh(scores / soft_cap), before bias and mask.
      fill: what a row with every key hidden gives: "zeros" (default), "uniform" (the mean over all values, as a finite
        fill value in stock JAX) or "nan" (as -inf does).
      layout: of query, key, value and the result.
      prefix: the mask is [..., 1, 1, S] and hides no key before one that it shows: it says how many keys there are.

    Returns:
      [..., T, N, V] (or [..., N, T, V]) of query's dtype; sums are in float32.

    Raises:
      ValueError, TypeError: an argument's shape or dtype is wrong.
    """
    operands, params = _bind(query, key, value, **options)
    return ATTENTION(*operands, **params)[0]


# --- public function ------------------------------------------------------------------------------------------------


def _score_array(name: str, x: Any, ndim: int) -> jax.Array:
    """x with `ndim` dimensions: leading ones of size 1 are added or dropped."""
    x = jnp.asarray(x)
    while x.ndim > ndim and x.shape[0] == 1:
        x = x[0]
    _expect(x.ndim <= ndim, name, f"have at most {ndim} dimensions [..., N, T, S]", f"of shape {x.shape}", "reshape it")
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)


def _lengths_mask(name: str, lengths: Any, leading: tuple[int, ...], size: int) -> jax.Array:
    """[..., size]: True below the length."""
    lengths = jnp.asarray(lengths)
    _expect(
        lengths.shape == leading and jnp.issubdtype(lengths.dtype, jnp.integer),
        name,
        f"be an integer array of shape {leading}, one length per sequence",
        f"{lengths.dtype} of shape {lengths.shape}",
        "broadcast or cast it",
    )
    return jnp.arange(size) < lengths[..., None]


def _window(local_window_size: int | tuple[int, int] | None, is_causal: bool) -> Band:
    low: int | None = None
    high: int | None = 0 if is_causal else None
    if local_window_size is None:
        return low, high
    sizes = (local_window_size,) * 2 if isinstance(local_window_size, int) else tuple(local_window_size)
    _expect(
        len(sizes) == 2 and all(isinstance(w, int) and w >= 0 for w in sizes),
        "local_window_size",
        "be a non-negative integer or a pair (left, right) of them",
        repr(local_window_size),
        "pass None for no window",
    )
    return -sizes[0], sizes[1] if high is None else min(high, sizes[1])


_TIME_FIRST = ("btnh",) * 4


def _as_ids(ids: Any) -> jax.Array | None:
    return None if ids is None else jnp.asarray(ids).astype(jnp.int32)


def _mask_and_lengths(mask: Any, lengths: Any, leading: tuple[int, ...], keys: int) -> jax.Array | None:
    """The user's mask, and keys behind `lengths` hidden."""
    if mask is not None:
        mask = _score_array("mask", mask, len(leading) + 3)
    if lengths is None:
        return mask
    inside = _lengths_mask("key_value_seq_lengths", lengths, leading, keys)[..., None, None, :]
    return inside if mask is None else mask & inside


def attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    query_segment_ids: Any = None,
    key_value_segment_ids: Any = None,
    logits_soft_cap: float | None = None,
) -> jax.Array:
    """softmax(query keyᵀ · scale + bias) value, with `jax.nn.dot_product_attention`'s shapes and argument names.

    Args:
      query: [..., T, N, H], float32 or bfloat16 (other floating dtypes run in plain JAX).
      key: [..., S, K, H], K a divisor of N (grouped-query attention).
      value: [..., S, K, V].
      bias: added to the scores; broadcastable to [..., N, T, S].
      mask: boolean, True where attention is allowed; as bias.
      scale: factor of the scores; 1/sqrt(H) if None.
      is_causal: query i attends keys j <= i.
      query_seq_lengths, key_value_seq_lengths: integers [...]; queries and keys behind them are padding: the result
        is 0 for such queries, such keys are not attended.
      local_window_size: query i attends i - left <= j <= i + right.
      query_segment_ids, key_value_segment_ids: integers [..., T] and [..., S]; only equal ids attend each other.
      logits_soft_cap: scores become cap * tanh(scores / cap), before bias and mask.

    Returns:
      [..., T, N, V] of query's dtype; sums are in float32. A row with every key hidden is the mean of all values, as
      in `jax.nn.dot_product_attention`.

    Raises:
      ValueError: a shape does not fit; TypeError: a dtype does not.
    """
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    _check_qkv(query, key, value, _TIME_FIRST)
    _, _, queries, keys, depth, _ = _sizes(query, key, value, _TIME_FIRST)
    out = attention_op(
        query,
        key,
        value,
        bias=None if bias is None else _score_array("bias", bias, query.ndim),
        mask=_mask_and_lengths(mask, key_value_seq_lengths, query.shape[:-3], keys),
        query_segment_ids=_as_ids(query_segment_ids),
        key_value_segment_ids=_as_ids(key_value_segment_ids),
        scale=1.0 / math.sqrt(max(depth, 1)) if scale is None else scale,
        band=_window(local_window_size, is_causal),
        soft_cap=logits_soft_cap,
        fill="uniform",
        prefix=mask is None and key_value_seq_lengths is not None,
    )
    if query_seq_lengths is None:
        return out
    inside = _lengths_mask("query_seq_lengths", query_seq_lengths, query.shape[:-3], queries)
    return jnp.where(inside[..., None, None], out, jnp.zeros((), out.dtype))


# --- argument specs -------------------------------------------------------------------------------------------------


def _spec(
    name: str,
    leading: tuple[int, ...] = (2,),
    *,
    heads: tuple[int, int] = (2, 2),
    lengths: tuple[int, int] = (40, 40),
    sizes: tuple[int, int] = (16, 16),
    extras: dict[str, tuple[int, ...]] | None = None,
    **options: Any,
) -> ArgSpec:
    """Operands of these sizes; `extras` gives the shape of each optional one."""
    shapes = extras or {}
    layout = options.get("layout", ("btnh",) * 4)

    def order(which: int, n: int, length: int, size: int) -> tuple[int, ...]:
        return (*leading, *((n, length) if layout[which] == "bnth" else (length, n)), size)

    def make(rng: np.random.Generator, dtype: Any) -> list[Any]:
        qkv = [
            rng.standard_normal(order(0, heads[0], lengths[0], sizes[0])).astype(dtype),
            rng.standard_normal(order(1, heads[1], lengths[1], sizes[0])).astype(dtype),
            rng.standard_normal(order(2, heads[1], lengths[1], sizes[1])).astype(dtype),
        ]
        draw = {
            "bias": lambda s: rng.standard_normal(s).astype(dtype),
            "mask": lambda s: rng.random(s) < 0.6,
            "keep": lambda s: rng.random(s) < 0.8,
            "query_segment_ids": lambda s: np.sort(rng.integers(0, 3, s)).astype(np.int32),
            "key_value_segment_ids": lambda s: np.sort(rng.integers(0, 3, s)).astype(np.int32),
        }
        return qkv + [draw[e](shapes[e]) for e in EXTRAS if e in shapes]

    given: dict[str, Any] = {"scale": 0.25} | {e: np.zeros(()) for e in EXTRAS if e in shapes} | options
    return ArgSpec(name, make, _bind(None, None, None, **given)[1])


SPECS = (
    _spec("causal", band=(None, 0)),
    _spec("grouped, odd sizes, window", (), heads=(6, 2), lengths=(101, 77), sizes=(37, 19), band=(-20, 9)),
    _spec("heads first", (2, 1), layout=("bnth", "btnh", "bnth", "bnth"), lengths=(33, 65), band=(None, 3)),
    _spec("mask", extras={"mask": (1, 2, 40, 40)}, fill="uniform"),
    _spec("bias", extras={"bias": (1, 2, 40, 40)}, band=(None, 0)),
    _spec("segments", extras={"query_segment_ids": (2, 40), "key_value_segment_ids": (2, 40)}, band=(None, 0)),
    _spec(
        "everything",
        heads=(4, 2),
        lengths=(40, 55),
        sizes=(24, 40),
        extras={
            "bias": (2, 4, 1, 55),
            "mask": (2, 1, 40, 55),
            "query_segment_ids": (1, 40),
            "key_value_segment_ids": (2, 55),
            "keep": (2, 4, 40, 55),
        },
        soft_cap=3.0,
        band=(-30, 10),
        fill="uniform",
        keep_scale=1.25,
    ),
    _spec("one query, wide heads", (), lengths=(1, 70), sizes=(256, 130)),
    _spec("no keys", lengths=(5, 0)),
    _spec("no queries", lengths=(0, 5)),
    _spec("empty rows", lengths=(50, 20), band=(None, -10), fill="nan"),
)

ATTENTION = Op(
    "attention",
    _reference,
    target="attention_forward",
    core_rank=3,
    attributes=_attributes,
    roles=_roles,
    refuses=_refuses,
    check=_check,
    specs=SPECS,
)
ATTENTION_BACKWARD = Op(
    "attention_backward",
    None,
    target="attention_backward",
    core_rank=3,
    attributes=_attributes,
    roles=_roles,
    refuses=_backward_refuses,
)
derive(ATTENTION, ATTENTION_BACKWARD, saved=(0, 1, 2), outputs=(0,))
