"""`lax.top_k` in one reading of each row.

A threshold rises while a row is read; what lies above it is collected, and sorted and cut to k whenever the collection
is full. XLA sorts whole rows, element by element through a comparator, for every dtype but float32. Results are stock's
bit for bit; only bfloat16 NaNs of several payloads, equal to XLA, are told apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxext.kernels._element import ORDERED
from jaxext.kernels._op import ArgSpec, Op

__all__ = ["TOP_K", "top_k_gains"]


# Below, starting the call costs what the selection gains; above this share of a row, most of it has to be sorted
# anyway, and XLA's own selection of float32 is level sooner. Measured in tests/bench/bench_top_k.py.
LEAST_ELEMENTS = 1 << 13
MOST_SHARE = 1 / 4
MOST_FLOAT32_SHARE = 1 / 64
INSERTED = 16  # the largest k that the kernel keeps sorted while it reads


def _reference(x: jax.Array, *, k: int) -> Sequence[jax.Array]:
    return jax.lax.top_k(x, k)


def _refuses(x: Any, *, k: int) -> str | None:
    if x.dtype.name not in ORDERED:
        return f"'x' is {x.dtype}; the kernel takes {', '.join(ORDERED)}"
    if x.shape[-1] >= 2**31:
        return f"'x' has {x.shape[-1]} elements a row; the kernel takes fewer than 2**31"
    return None


def top_k_gains(x: Any, k: int) -> bool:
    """Whether the kernel is faster than XLA for x: [..., n]."""
    share = MOST_FLOAT32_SHARE if x.dtype == np.float32 and k > INSERTED else MOST_SHARE
    return math.prod(x.shape) >= LEAST_ELEMENTS and 0 < k <= share * x.shape[-1]


def _spec(name: str, shape: tuple[int, ...], k: int, levels: int = 0) -> ArgSpec:
    def make(rng: np.random.Generator, dtype: Any) -> tuple[np.ndarray, ...]:
        x = rng.standard_normal(shape) if not levels else rng.integers(0, levels, shape)
        return (x.astype(dtype),)

    return ArgSpec(name, make, {"k": k})


TOP_K = Op(
    "top_k",
    _reference,
    target="top_k",
    core_rank=1,
    refuses=_refuses,
    specs=(
        _spec("routing", (5, 8), 2),
        _spec("ties", (3, 1000), 70, levels=5),
        _spec("whole row", (2, 65), 65),
        _spec("nothing", (2, 9), 0),
        _spec("no rows", (0, 9), 3),
    ),
)
# Both results are the user's; float tangents of the values come from the reference.
TOP_K.outputs = (0, 1)
