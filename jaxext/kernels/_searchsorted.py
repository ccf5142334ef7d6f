"""`jnp.searchsorted`: in each turn of its loop, JAX reads one number for each query and writes where each has got to.

Here registers of queries are searched at once, queries that lie together in the part of the array that holds their
places. Places are stock's, also in an array that is not sorted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxext.kernels._op import ArgSpec, Op

__all__ = ["SEARCHSORTED", "searchsorted_gains"]

_NATIVE = ("float32", "int32")

# Below, starting the call costs what it gains. Measured in tests/bench/bench_primitives.py.
LEAST_QUERIES = 1 << 8


def _reference(array: jax.Array, query: jax.Array, *, side: str) -> Sequence[jax.Array]:
    return (jnp.searchsorted(array, query, side=side).astype(np.int32),)


def _refuses(array: Any, query: Any, **_: Any) -> str | None:
    if array.dtype.name not in _NATIVE or query.dtype != array.dtype:
        return f"'array' is {array.dtype}, 'query' {query.dtype}; the kernel takes two of {' or two of '.join(_NATIVE)}"
    if not 0 < array.shape[0] < 2**31 - 1:
        return f"'array' has {array.shape[0]} elements; the kernel takes 1 to 2**31 - 2"
    return None


def searchsorted_gains(array: Any, query: Any) -> bool:
    """Whether the kernel is faster than XLA: it reads the array once, so queries must not be few beside it."""
    queries = math.prod(query.shape)
    return queries >= LEAST_QUERIES and array.shape[0] <= 8 * queries


def _attributes(*, side: str) -> Mapping[str, Any]:
    return {"right": side == "right"}


def _spec(name: str, n: int, shape: tuple[int, ...], side: str, levels: int = 0, ascending: bool = False) -> ArgSpec:
    def make(rng: np.random.Generator, dtype: Any) -> tuple[np.ndarray, ...]:
        draw = lambda size: rng.integers(-levels, levels, size) if levels else 100 * rng.standard_normal(size)  # noqa: E731
        query = np.sort(draw(shape)) if ascending else draw(shape)
        return np.sort(draw(n)).astype(dtype), query.astype(dtype)

    return ArgSpec(name, make, {"side": side}, dtypes=("float32",))


SEARCHSORTED = Op(
    "searchsorted",
    _reference,
    target="searchsorted",
    core_rank=None,  # over several devices XLA's own, which it knows how to divide
    attributes=_attributes,
    refuses=_refuses,
    specs=(
        _spec("many", 1000, (5000,), "left"),
        _spec("ascending", 70000, (9001,), "right", ascending=True),
        _spec("bins", 9, (40, 77), "right", levels=5),
        _spec("one", 1, (33,), "left", levels=2),
        _spec("no queries", 9, (0,), "left"),
    ),
)
