"""Rows of attention whose keys are all hidden: what they give, put beside a kernel that leaves it undefined."""

from __future__ import annotations

import jax
import jax.numpy as jnp

__all__ = ["filled", "spread"]


def filled(out: jax.Array, hidden: jax.Array, value: jax.Array, fill: str, layout: str, value_layout: str) -> jax.Array:
    """`out` with what hidden rows give: zeros, NaN, or the mean of the values ("uniform").

    Args:
      out: [..., T, N, V] where layout is "btnh", [..., N, T, V] where "bnth".
      hidden: Boolean, as `out` without its last dimension, each dimension full or 1.
      value: [..., S, K, V], or [..., K, S, V] by value_layout; K divides N.
    """
    content = jnp.full((), jnp.nan if fill == "nan" else 0.0, out.dtype)
    if fill == "uniform":
        content = _mean(value, out, layout, value_layout)
    return jnp.where(hidden[..., None], content, out)


def _mean(value: jax.Array, out: jax.Array, layout: str, value_layout: str) -> jax.Array:
    """[..., 1, N, V] or [..., N, 1, V]: the mean over the keys, for each query head."""
    mean = jnp.mean(value.astype(jnp.float32), axis=-3 if value_layout == "btnh" else -2).astype(out.dtype)
    heads = out.shape[-2 if layout == "btnh" else -3]
    each = jnp.repeat(mean, heads // mean.shape[-2], axis=-2)
    return jnp.expand_dims(each, -3 if layout == "btnh" else -2)


def spread(cotangent: jax.Array, hidden: jax.Array, value: jax.Array, fill: str) -> jax.Array | None:
    """What `filled` adds to the values' gradient, None for nothing; all in [..., time, heads, size]."""
    if fill == "zeros":
        return None
    groups = cotangent.shape[-2] // value.shape[-2]
    if fill == "nan":
        touched = jnp.any(jnp.broadcast_to(hidden, cotangent.shape[:-1]), -2)
        touched = jnp.any(touched.reshape(*touched.shape[:-1], value.shape[-2], groups), -1)
        return jnp.where(touched[..., None, :, None], jnp.full((), jnp.nan, value.dtype), 0)
    total = jnp.sum(jnp.where(hidden[..., None], cotangent, 0).astype(jnp.float32), -3, keepdims=True)
    total = total.reshape(*total.shape[:-2], value.shape[-2], groups, total.shape[-1]).sum(-2)
    return (total / value.shape[-3]).astype(value.dtype)
