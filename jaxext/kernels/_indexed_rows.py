"""Rows of an array by the numbers of its leading dimensions: read (gather), and added to in place (scatter).

XLA copies the rows of a gather element by element up to a certain length, and widens the whole table of a bfloat16
scatter; here a row is one copy, or one vector sum. Results are stock's bit for bit, but for bfloat16 sums, which are
rounded once and not at every addition, and bfloat16 denormals, which JAX 0.12's XLA turns to zero where it fills rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxext.kernels import _platform
from jaxext.kernels._element import ORDERED
from jaxext.kernels._op import ArgSpec, Op

__all__ = ["GATHER", "SCATTER", "SCATTER_KINDS", "filler", "gather_gains", "scatter_gains", "updates_gain"]

SCATTER_KINDS = ("add", "max", "min", "set")
_SUMMED = ("float32", "bfloat16", "int32")
_MOST_INDEXED = 4

# XLA copies rows of up to this many elements one by one, longer ones by registers: float32 is as fast there. Below the
# others, starting a call or looking up a row costs what it gains. Measured in tests/bench/bench_primitives.py.
GATHERED_ROW = (40, 64)
LEAST_SCATTERED_ROW = 64
LEAST_ELEMENTS = 1 << 14
# What stock pays for is the table where that is so much larger than the updates, whatever the rows; and updates in
# ascending order are as fast in stock where there are so many more of them.
LARGE_TABLE, MANY_UPDATES = 4, 4
# A pass over whole tables has to cost more than finding the rows, and than copying the tables where these are still
# needed, which for a single one is all that a pass does. Measured in tests/bench/bench_touched_rows.py.
LEAST_UPDATED, UPDATED_SHARE, COPIED_SHARE, LEAST_COPIED = 1 << 16, 4, 8, 2


def filler(dtype: str, value: float | None) -> np.generic:
    """What stands in place of rows that are not there, a scalar of `dtype`; `value` None: JAX's own choice."""
    return _filler(dtype, None if value is None or value != value else value)


@functools.cache  # parameters are compared, and NaN is equal to itself only where it is the same object
def _filler(dtype: str, value: float | None) -> np.generic:
    kind = np.dtype(dtype)
    if value is None:
        integer = np.iinfo(kind) if kind.kind in "iu" else None
        value = math.nan if integer is None else integer.min if kind.kind == "i" else integer.max
    return kind.type(value)


def _gather(table: jax.Array, indices: jax.Array, *, fill: np.generic | None) -> Sequence[jax.Array]:
    depth, batch = indices.shape[-1], indices.ndim - 1
    row = table.shape[depth:]
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=tuple(range(batch, batch + len(row))),
        collapsed_slice_dims=tuple(range(depth)),
        start_index_map=tuple(range(depth)),
    )
    mode, value = ("clip", None) if fill is None else ("fill", fill)
    return (jax.lax.gather(table, indices, numbers, (*(1,) * depth, *row), mode=mode, fill_value=value),)


def _scatter(
    table: jax.Array, indices: jax.Array, updates: jax.Array, *, kind: str, clips: bool
) -> Sequence[jax.Array]:
    depth, batch = indices.shape[-1], indices.ndim - 1
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(batch, updates.ndim)),
        inserted_window_dims=tuple(range(depth)),
        scatter_dims_to_operand_dims=tuple(range(depth)),
    )
    scatter = jax.lax.scatter if kind == "set" else getattr(jax.lax, f"scatter_{kind}")
    return (scatter(table, indices, updates, numbers, mode="clip" if clips else "drop"),)


def _refuses_indices(table: Any, indices: Any) -> str | None:
    depth = indices.shape[-1]
    if indices.dtype != np.int32:
        return f"'indices' is {indices.dtype}; the kernel takes int32"
    if not 1 <= depth <= _MOST_INDEXED:
        return f"{depth} dimensions are indexed; the kernel takes 1 to {_MOST_INDEXED}"
    if max((*table.shape, math.prod(indices.shape))) >= 2**31:
        return "a dimension has 2**31 elements or more"
    return None


def _refuses_gather(table: Any, indices: Any, *, fill: np.generic | None) -> str | None:
    if table.dtype.name not in ORDERED:
        return f"'table' is {table.dtype}; the kernel takes {', '.join(ORDERED)}"
    return _refuses_indices(table, indices)


def _refuses_scatter(table: Any, indices: Any, updates: Any, **_: Any) -> str | None:
    if table.dtype.name not in _SUMMED or updates.dtype != table.dtype:
        return f"'table' is {table.dtype} and 'updates' {updates.dtype}; the kernel takes {', '.join(_SUMMED)}"
    return _refuses_indices(table, indices)


def gather_gains(table: Any, indices: Any) -> bool:
    """Whether the kernel is faster than XLA for rows of table: [*indexed, *row], indices: [*batch, depth]."""
    row = math.prod(table.shape[indices.shape[-1] :])
    least, most = GATHERED_ROW
    short = row <= most or table.dtype.itemsize < 4
    return row >= least and short and row * math.prod(indices.shape[:-1]) >= LEAST_ELEMENTS


def scatter_gains(table: Any, updates: Any, indices: Any) -> bool:
    """Whether the kernel is faster than XLA for table: [*indexed, *row], updates: [*batch, *row].

    On a CPU; another platform's kernel says itself what it refuses.
    """
    if _platform.foreseen() != "cpu":
        return True
    row = math.prod(updates.shape[len(indices.shape) - 1 :])
    elements, held = math.prod(updates.shape), math.prod(table.shape)
    if elements < LEAST_ELEMENTS or row < 16:
        return False
    if held >= LARGE_TABLE * elements:
        return True
    return row >= LEAST_SCATTERED_ROW and (table.dtype.itemsize < 4 or elements <= MANY_UPDATES * held)


def updates_gain(table: Any, updates: Any, *, tables: int, copied: bool) -> bool:
    """Whether updating the rows that have a gradient is faster than updating all.

    table: [n, *row], one of `tables` alike; updates: [*batch, *row]; copied: whether tables are kept as they were.
    """
    elements, held = math.prod(updates.shape), math.prod(table.shape)
    if elements == 0 or held < LEAST_UPDATED or (copied and tables < LEAST_COPIED):
        return False
    return held >= (COPIED_SHARE if copied else UPDATED_SHARE) * elements


def _gather_attributes(*, fill: np.generic | None) -> Mapping[str, Any]:
    bits = 0 if fill is None else int.from_bytes(fill.tobytes(), "little")
    return {"clips": fill is None, "fill": np.int64(bits)}


def _scatter_attributes(*, kind: str, clips: bool) -> Mapping[str, Any]:
    return {"clips": clips, "kind": np.int64(SCATTER_KINDS.index(kind))}


def _spec(
    name: str, table: tuple[int, ...], indices: tuple[int, ...], params: Mapping[str, Any], *, updates: bool = False
) -> ArgSpec:
    def make(rng: np.random.Generator, dtype: Any) -> tuple[np.ndarray, ...]:
        chosen = rng.integers(-2, 1 + table[0], indices).astype(np.int32)
        rows = (*indices[:-1], *table[indices[-1] :])
        more = (rng.standard_normal(rows).astype(dtype),) if updates else ()
        return rng.standard_normal(table).astype(dtype), chosen, *more

    return ArgSpec(name, make, params)


GATHER = Op(
    "gather_rows",
    _gather,
    target="gather_rows",
    core_rank=None,  # over several devices XLA's own, which it knows how to divide
    attributes=_gather_attributes,
    refuses=_refuses_gather,
    specs=(
        _spec("rows", (50, 33), (70, 1), {"fill": None}),
        _spec("filled", (50, 4, 8), (3, 9, 1), {"fill": filler("float32", 0)}),
        _spec("two indexed dimensions", (5, 6, 65), (40, 2), {"fill": None}),
        _spec("single elements", (50,), (40, 1), {"fill": filler("float32", 0)}),
        _spec("no indices", (5, 9), (0, 1), {"fill": None}),
    ),
)
SCATTER = Op(
    "scatter_rows",
    _scatter,
    target="scatter_rows",
    core_rank=None,  # over several devices XLA's own, which it knows how to divide
    attributes=_scatter_attributes,
    refuses=_refuses_scatter,
    aliases={0: 0},
    specs=(
        _spec("added", (20, 33), (300, 1), {"kind": "add", "clips": False}, updates=True),
        _spec("added, clipped", (20, 4, 16), (3, 90, 1), {"kind": "add", "clips": True}, updates=True),
        _spec("two indexed dimensions", (5, 6, 65), (40, 2), {"kind": "add", "clips": False}, updates=True),
        _spec("largest", (20, 40), (300, 1), {"kind": "max", "clips": False}, updates=True),
        _spec("smallest", (20, 7), (300, 1), {"kind": "min", "clips": False}, updates=True),
        _spec("set", (20, 40), (15, 1), {"kind": "set", "clips": False}, updates=True),
        _spec("no updates", (20, 7), (0, 1), {"kind": "add", "clips": False}, updates=True),
    ),
)
