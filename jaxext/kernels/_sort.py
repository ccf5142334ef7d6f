"""`lax.sort` by one key as a radix sort; further operands follow their key.

XLA compares elements through a comparator, n log n times. Results are stock's bit for bit: -0 equal to +0, all NaNs
equal and last, equal elements in their order. Only bfloat16 NaNs of several payloads, equal to XLA, keep theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxext.kernels._element import ORDERED
from jaxext.kernels._op import ArgSpec, Op

__all__ = ["SORT", "sort_gains"]

_FOLLOWERS = (*ORDERED, "bool", "float64", "int64", "uint64", "complex64")
_MOST_FOLLOWERS = 8

# Below, starting the call costs what it gains. Measured in tests/bench/bench_primitives.py.
LEAST_ELEMENTS = 1 << 10
LEAST_ROW = 16


def _reference(*operands: jax.Array) -> Sequence[jax.Array]:
    out = jax.lax.sort(operands, dimension=-1, is_stable=True, num_keys=1)
    return tuple(out)


def _refuses(keys: Any, *others: Any) -> str | None:
    if keys.dtype.name not in ORDERED:
        return f"the keys are {keys.dtype}; the kernel takes {', '.join(ORDERED)}"
    if len(others) > _MOST_FOLLOWERS:
        return f"{len(others)} operands follow the keys; the kernel takes at most {_MOST_FOLLOWERS}"
    for other in others:
        if other.dtype.name not in _FOLLOWERS:
            return f"an operand that follows the keys is {other.dtype}; the kernel takes {', '.join(_FOLLOWERS)}"
    if keys.shape[-1] >= 2**31:
        return f"the keys have {keys.shape[-1]} elements a row; the kernel takes fewer than 2**31"
    return None


def sort_gains(keys: Any) -> bool:
    """Whether the kernel is faster than XLA for keys: [..., n]."""
    return math.prod(keys.shape) >= LEAST_ELEMENTS and keys.shape[-1] >= LEAST_ROW


def _spec(name: str, shape: tuple[int, ...], followers: int = 0, levels: int = 0) -> ArgSpec:
    def make(rng: np.random.Generator, dtype: Any) -> tuple[np.ndarray, ...]:
        x = rng.standard_normal(shape) if not levels else rng.integers(0, levels, shape)
        places = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
        return (x.astype(dtype), *(places.copy() for _ in range(followers)))

    return ArgSpec(name, make)


SORT = Op(
    "sort",
    _reference,
    target="sort",
    core_rank=1,
    refuses=_refuses,
    needs_batch=True,
    specs=(
        _spec("with places", (3, 300), followers=1),
        _spec("keys alone", (2, 5000)),
        _spec("ties", (2, 4100), followers=2, levels=5),
        _spec("short", (7, 20), followers=1),
        _spec("no rows", (0, 9)),
    ),
)
