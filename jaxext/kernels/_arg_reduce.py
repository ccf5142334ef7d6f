"""`lax.argmax` and `lax.argmin` at the speed of a reading.

XLA reduces pairs of value and place element by element. Here a row's largest value is found in registers, block by
block, and its place looked up in the one block that has it. Results are stock's: the first of equal elements, the first
NaN where there is one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxext.kernels._element import ORDERED
from jaxext.kernels._op import ArgSpec, Op

__all__ = ["ARG_REDUCE", "arg_reduce_gains"]


# Below, starting the call costs what it gains. Measured in tests/bench/bench_primitives.py.
LEAST_ELEMENTS = 1 << 13
LEAST_AXIS = 8


def _reference(x: jax.Array, *, axis: int, largest: bool) -> Sequence[jax.Array]:
    find = jax.lax.argmax if largest else jax.lax.argmin
    return (find(x, x.ndim + axis, np.int32),)


def _refuses(x: Any, *, axis: int, **_: Any) -> str | None:
    if x.dtype.name not in ORDERED:
        return f"'x' is {x.dtype}; the kernel takes {', '.join(ORDERED)}"
    if x.shape[axis] >= 2**31:
        return f"'x' has {x.shape[axis]} elements along the axis; the kernel takes fewer than 2**31"
    return None


def arg_reduce_gains(x: Any, axis: int) -> bool:
    """Whether the kernel is faster than XLA for x along an axis counted from the end (-1: the last)."""
    return math.prod(x.shape) >= LEAST_ELEMENTS and x.shape[axis] >= LEAST_AXIS


def _attributes(*, axis: int, largest: bool) -> Mapping[str, Any]:
    return {"axis": axis, "largest": largest}


def _spec(name: str, shape: tuple[int, ...], axis: int, largest: bool, levels: int = 0) -> ArgSpec:
    def make(rng: np.random.Generator, dtype: Any) -> tuple[np.ndarray, ...]:
        x = rng.standard_normal(shape) if not levels else rng.integers(0, levels, shape)
        return (x.astype(dtype),)

    return ArgSpec(name, make, {"axis": axis, "largest": largest})


ARG_REDUCE = Op(
    "arg_reduce",
    _reference,
    target="arg_reduce",
    core_rank=lambda *, axis, **_: -axis,
    attributes=_attributes,
    refuses=_refuses,
    needs_batch=True,
    specs=(
        _spec("rows", (5, 300), -1, True),
        _spec("long rows", (2, 5000), -1, False, levels=70),
        _spec("columns", (3, 40, 77), -2, False),
        _spec("first axis", (33, 5), -2, True, levels=3),
        _spec("no rows", (0, 9), -1, True),
    ),
)
