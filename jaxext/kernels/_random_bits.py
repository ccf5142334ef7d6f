"""The bits of JAX's default generator, Threefry 2x32 in its partitionable form, behind uniform, normal and dropout.

Bit for bit stock's. XLA hashes two arrays of counters that it first writes to memory; here counters live in registers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxext import _jax_compat as compat
from jaxext.kernels._op import ArgSpec, Op

__all__ = ["RANDOM_BITS", "random_bits_gains"]

_WIDTHS = (8, 16, 32)

# Below, starting the call costs what it gains. Measured in tests/bench/bench_primitives.py.
LEAST_ELEMENTS = 1 << 8


def _reference(keys: jax.Array, *, bit_width: int, shape: tuple[int, ...]) -> Sequence[jax.Array]:
    return (compat.threefry_bits(keys, bit_width, shape),)


def _refuses(keys: Any, *, bit_width: int, **_: Any) -> str | None:
    if bit_width not in _WIDTHS:
        return f"{bit_width} bits an element; the kernel makes {', '.join(map(str, _WIDTHS))}"
    return None


def random_bits_gains(keys_shape: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether the kernel is faster than XLA for keys of this shape (without the words of a key)."""
    return math.prod(keys_shape) * math.prod(shape) >= LEAST_ELEMENTS


def _spec(name: str, keys: tuple[int, ...], shape: tuple[int, ...], bit_width: int) -> ArgSpec:
    def make(rng: np.random.Generator, dtype: Any) -> tuple[np.ndarray, ...]:
        return (rng.integers(0, 2**32, (*keys, 2), dtype=np.uint32),)

    return ArgSpec(name, make, {"bit_width": bit_width, "shape": shape}, dtypes=("float32",))


RANDOM_BITS = Op(
    "random_bits",
    _reference,
    target="random_bits",
    core_rank=1,
    refuses=_refuses,
    needs_batch=True,
    specs=(
        _spec("a key for each row", (3,), (5, 77), 32),
        _spec("one key", (), (20000,), 32),
        _spec("bytes", (2,), (333,), 8),
        _spec("halves", (2,), (65,), 16),
        _spec("scalars", (4, 5), (), 32),
        _spec("nothing", (3,), (0, 4), 32),
    ),
)
