"""Flax's own attention modules, linen and nnx, as train steps of the sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from architectures import BATCH, HEADS, LENGTH, TARGET_LENGTH, WIDTH, Architecture, Step
from flax import nnx


class LinenBlock(nn.Module):
    """Causal self-attention and cross-attention under a padding mask, each between norms."""

    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Any, memory: Any, padding: Any, deterministic: bool = False) -> Any:
        mask = nn.make_causal_mask(x[..., 0])
        options: dict[str, Any] = {
            "num_heads": HEADS,
            "dropout_rate": self.dropout,
            "dtype": self.dtype,
            "param_dtype": self.dtype,
        }
        norm = {"dtype": self.dtype, "param_dtype": self.dtype}
        h = nn.LayerNorm(**norm)(x)
        x = x + nn.MultiHeadDotProductAttention(**options)(h, mask=mask, deterministic=deterministic)
        h = nn.RMSNorm(**norm)(x)
        across = nn.make_attention_mask(jnp.ones(x.shape[:2]), padding)
        x = x + nn.MultiHeadDotProductAttention(**options)(h, memory, mask=across, deterministic=deterministic)
        return nn.LayerNorm(**norm)(x)


def _inputs(dtype: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "x": jnp.asarray(rng.standard_normal((BATCH, TARGET_LENGTH, WIDTH)), dtype),
        "memory": jnp.asarray(rng.standard_normal((BATCH, LENGTH, WIDTH)), dtype),
        "padding": jnp.asarray(np.arange(LENGTH) < np.array([[LENGTH], [LENGTH - 7]])),
        "labels": jnp.asarray(rng.integers(0, WIDTH, (BATCH, TARGET_LENGTH)), jnp.int32),
    }


def _learn(output: Any, batch: Any) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(output, batch["labels"]).mean()


def _linen(dropout: float, dtype: Any) -> Step:
    block, batch = LinenBlock(dropout, dtype), _inputs(dtype)
    arguments = [batch[name] for name in ("x", "memory", "padding")]
    params = block.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, *arguments)

    def loss(params: Any, batch: Any, key: Any) -> jax.Array:
        inputs = (batch[name] for name in ("x", "memory", "padding"))
        return _learn(block.apply(params, *inputs, rngs={"dropout": key}), batch)

    return Step(loss, params, batch)


class NnxBlock(nnx.Module):
    """As `LinenBlock`."""

    def __init__(self, dropout: float, dtype: Any, rngs: nnx.Rngs) -> None:
        options: dict[str, Any] = {"num_heads": HEADS, "in_features": WIDTH, "dropout_rate": dropout, "decode": False}
        options["deterministic"] = False
        types = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.own = nnx.MultiHeadAttention(**options, **types)
        self.cross = nnx.MultiHeadAttention(**options, **types)
        self.first, self.last = nnx.LayerNorm(WIDTH, **types), nnx.LayerNorm(WIDTH, **types)
        self.middle = nnx.RMSNorm(WIDTH, **types)

    def __call__(self, x: Any, memory: Any, padding: Any, rngs: nnx.Rngs) -> Any:
        x = x + self.own(self.first(x), mask=nnx.make_causal_mask(x[..., 0]), rngs=rngs)
        across = nnx.make_attention_mask(jnp.ones(x.shape[:2]), padding)
        return self.last(x + self.cross(self.middle(x), memory, mask=across, rngs=rngs))


def _nnx(dropout: float, dtype: Any) -> Step:
    graph, params, rest = nnx.split(NnxBlock(dropout, dtype, nnx.Rngs(0)), nnx.Param, ...)

    def loss(params: Any, batch: Any, key: Any) -> jax.Array:
        block = nnx.merge(graph, params, rest)
        inputs = (batch[name] for name in ("x", "memory", "padding"))
        return _learn(block(*inputs, rngs=nnx.Rngs(dropout=key)), batch)

    return Step(loss, params, _inputs(dtype))


_BUILDERS: dict[str, Callable[[float, Any], Step]] = {"flax.linen": _linen, "flax.nnx": _nnx}
_CLASSES = {"flax.linen": "MultiHeadDotProductAttention", "flax.nnx": "MultiHeadAttention"}
# nnx modules cannot be counted by interception.
_COUNTS = {"flax.linen": None, "flax.nnx": {"attention": 2, "layer_norm": 2, "rms_norm": 1}}


def all_of_them() -> Iterator[Architecture]:
    """linen's and nnx's attention."""
    for name, build in _BUILDERS.items():
        yield Architecture(name, _CLASSES[name], build, _COUNTS[name])
