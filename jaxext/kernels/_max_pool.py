"""The largest elements of windows over one or two neighbouring dimensions, and where a gradient goes.

XLA compares element by element: each window's position is carried through a reduction of pairs, and a scatter in one
thread adds the gradients. Here a register of channels is compared at once, by all threads. Results are stock's bit for
bit, but for bfloat16 denormals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxext.kernels._op import ArgSpec, Op

__all__ = ["MAX_POOL", "MAX_POOL_GRADIENT", "max_pool_gains"]

_NATIVE = ("float32", "bfloat16")
Sizes = tuple[int, ...]
Pads = tuple[tuple[int, int], ...]

# Below, channels leave most of a register empty, or starting the call costs what it gains. Measured in
# tests/bench/bench_primitives.py.
LEAST_CHANNELS = 4
LEAST_ELEMENTS = 1 << 10


def _pool(x: jax.Array, *, window: Sizes, strides: Sizes, padding: Pads, trailing: int) -> jax.Array:
    before, after = x.ndim - len(window) - trailing, trailing
    ones = ((1,) * before, (1,) * after)
    return jax.lax.reduce_window(
        x,
        x.dtype.type(-np.inf),
        jax.lax.max,
        (*ones[0], *window, *ones[1]),
        (*ones[0], *strides, *ones[1]),
        (*((0, 0),) * before, *padding, *((0, 0),) * after),
    )


def _reference(x: jax.Array, **params: Any) -> Sequence[jax.Array]:
    return (_pool(x, **params),)


def _gradient(gradient: jax.Array, x: jax.Array, **params: Any) -> Sequence[jax.Array]:
    return jax.vjp(lambda x: _pool(x, **params), x)[1](gradient)


def _refuses(*avals: Any, **_: Any) -> str | None:
    x = avals[-1]
    if x.dtype.name not in _NATIVE:
        return f"'x' is {x.dtype}; the kernel takes {', '.join(_NATIVE)}"
    return None


def max_pool_gains(op: Op, x: Any, window: Sizes, strides: Sizes, trailing: int) -> bool:
    """Whether the kernel is faster than XLA for x, with `trailing` dimensions behind those of the window."""
    if op is MAX_POOL and window == strides:
        return False  # XLA's reduction of reshaped windows is as fast; and in float32 it may lose a NaN
    channels = math.prod(x.shape[len(x.shape) - trailing :])
    return channels >= LEAST_CHANNELS and math.prod(x.shape) >= LEAST_ELEMENTS


def _attributes(*, window: Sizes, strides: Sizes, padding: Pads, trailing: int) -> Mapping[str, Any]:
    return {
        "window": np.asarray(window, np.int64),
        "strides": np.asarray(strides, np.int64),
        "before": np.asarray([low for low, _ in padding], np.int64),
        "trailing": np.int64(trailing),
    }


def _core_rank(*, window: Sizes, trailing: int, **_: Any) -> int:
    return len(window) + trailing


def _spec(name: str, shape: Sizes, window: Sizes, strides: Sizes, padding: Pads, *, back: bool) -> ArgSpec:
    params = {"window": window, "strides": strides, "padding": padding, "trailing": 1}

    def make(rng: np.random.Generator, dtype: Any) -> tuple[np.ndarray, ...]:
        # Several elements of a window are equal: one of them is taken.
        x = (rng.integers(-20, 20, shape) / 4).astype(dtype)
        sizes = [
            max(0, 1 + (n + low + high - w) // s)
            for n, w, s, (low, high) in zip(shape[-1 - len(window) : -1], window, strides, padding)
        ]
        pooled = (*shape[: -1 - len(window)], *sizes, shape[-1])
        return (rng.standard_normal(pooled).astype(dtype), x) if back else (x,)

    return ArgSpec(name, make, params)


def _specs(back: bool) -> tuple[ArgSpec, ...]:
    return (
        _spec("halved", (2, 8, 10, 19), (2, 2), (2, 2), ((0, 0), (0, 0)), back=back),
        _spec("overlapping", (2, 13, 12, 64), (3, 3), (2, 2), ((1, 1), (0, 1)), back=back),
        _spec("at every place", (1, 40, 9, 33), (3, 2), (1, 1), ((1, 1), (1, 0)), back=back),
        _spec("apart", (3, 11, 11, 16), (2, 2), (3, 4), ((0, 0), (0, 0)), back=back),
        _spec("one dimension", (3, 50, 20), (5,), (2,), ((4, 2),), back=back),
        _spec("no images", (0, 8, 8, 16), (2, 2), (2, 2), ((0, 0), (0, 0)), back=back),
        _spec("no window fits", (2, 3, 2, 16), (4, 4), (1, 1), ((0, 0), (0, 0)), back=back),
    )


MAX_POOL = Op(
    "max_pool",
    _reference,
    target="max_pool",
    core_rank=_core_rank,
    attributes=_attributes,
    refuses=_refuses,
    needs_batch=True,
    specs=_specs(back=False),
)
MAX_POOL_GRADIENT = Op(
    "max_pool_gradient",
    _gradient,
    target="max_pool_gradient",
    core_rank=_core_rank,
    attributes=_attributes,
    refuses=_refuses,
    needs_batch=True,
    specs=_specs(back=True),
)
