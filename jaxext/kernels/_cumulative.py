"""`lax.cumsum`, `cumprod`, `cummax`, `cummin` and `cumlogsumexp` in one reading.

XLA scans in several passes. Sums of float32 are added in XLA's own order and have its bits, so that a program that
compares them takes the branches it takes on stock JAX. Sums of bfloat16, which XLA rounds at each addition, and
products of floats are carried in double precision: nearer to the exact ones than stock's. Maxima and minima are
stock's, but for denormals, which stock turns to zero. Those of 32-bit integers are stock's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxext.kernels._op import ArgSpec, Op

__all__ = ["CUMULATIVE", "KINDS", "cumulative_gains"]

_FLOATS = ("float32", "bfloat16")
_NATIVE = (*_FLOATS, "int32", "uint32")
KINDS = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")

# Below, starting the call costs what it gains. Measured in tests/bench/bench_primitives.py.
LEAST_ELEMENTS, LEAST_LOGARITHMS = 1 << 12, 1 << 6
LEAST_AXIS = 8


def _reference(x: jax.Array, *, axis: int, kind: str, reverse: bool) -> Sequence[jax.Array]:
    return (getattr(jax.lax, kind)(x, axis=x.ndim + axis, reverse=reverse),)


def _refuses(x: Any, *, kind: str, **_: Any) -> str | None:
    taken = _FLOATS if kind == "cumlogsumexp" else _NATIVE
    if x.dtype.name not in taken:
        return f"'x' is {x.dtype}; the kernel takes {', '.join(taken)}"
    return None


def cumulative_gains(x: Any, axis: int, kind: str) -> bool:
    """Whether the kernel is faster than XLA for x along an axis counted from the end (-1: the last)."""
    least = LEAST_LOGARITHMS if kind == "cumlogsumexp" else LEAST_ELEMENTS
    return math.prod(x.shape) >= least and x.shape[axis] >= LEAST_AXIS


def _attributes(*, axis: int, kind: str, reverse: bool) -> Mapping[str, Any]:
    return {"axis": axis, "kind": np.int64(KINDS.index(kind)), "reverse": reverse}


def _spec(name: str, shape: tuple[int, ...], axis: int, kind: str, reverse: bool = False) -> ArgSpec:
    def make(rng: np.random.Generator, dtype: Any) -> tuple[np.ndarray, ...]:
        # A product of numbers around 1 neither overflows nor vanishes.
        x = rng.standard_normal(shape) if kind != "cumprod" else 1 + 0.05 * rng.standard_normal(shape)
        return (x.astype(dtype),)

    return ArgSpec(name, make, {"axis": axis, "kind": kind, "reverse": reverse})


CUMULATIVE = Op(
    "cumulative",
    _reference,
    target="cumulative",
    core_rank=lambda *, axis, **_: -axis,
    attributes=_attributes,
    refuses=_refuses,
    needs_batch=True,
    specs=(
        _spec("rows", (5, 300), -1, "cumsum"),
        _spec("one long row", (1, 70000), -1, "cumsum", reverse=True),
        _spec("columns", (2, 40, 77), -2, "cumsum"),
        _spec("columns from the end", (2, 40, 64), -2, "cumsum", reverse=True),
        _spec("product", (3, 200), -1, "cumprod"),
        _spec("largest", (3, 70), -1, "cummax"),
        _spec("smallest", (70, 3), -2, "cummin", reverse=True),
        _spec("no rows", (0, 9), -1, "cumsum"),
        _spec("logarithms, rows", (3, 700), -1, "cumlogsumexp"),
        _spec("logarithms, a row from the end", (1, 5000), -1, "cumlogsumexp", reverse=True),
        _spec("logarithms, columns", (2, 300, 77), -2, "cumlogsumexp"),
    ),
)
