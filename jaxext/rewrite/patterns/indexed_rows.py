"""Whole rows read by number, and rows added to by number."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from jax.lax import GatherScatterMode

from ... import _jax_compat as compat
from ...kernels._indexed_rows import GATHER, SCATTER, SCATTER_KINDS, filler, gather_gains, scatter_gains
from ...kernels._op import Op
from ..exchange import Exchange

_FILLS = GatherScatterMode.FILL_OR_DROP
# XLA takes the nearest row, or drops the update, where JAX was promised that there is one.
_MODES = (_FILLS, GatherScatterMode.CLIP, GatherScatterMode.PROMISE_IN_BOUNDS)


def _whole_rows(rank: int, indices: Any, indexed: Any, collapsed: Any, window: Any, batching: Any) -> bool:
    """Whether index vectors number leading dimensions in order, and rows come last in what is read or added."""
    depth, batch = indices.shape[-1], len(indices.shape) - 1
    leading = tuple(range(depth))
    return (
        tuple(indexed) == leading == tuple(collapsed)
        and tuple(window) == tuple(range(batch, batch + rank - depth))
        and not batching
    )


def gathers_whole_rows(params: Mapping[str, Any], table: Any, indices: Any) -> bool:
    """Whether a gather with `params` reads rows of `table`, each whole, by the numbers of its leading dimensions."""
    numbers, depth = params["dimension_numbers"], indices.shape[-1]
    whole = _whole_rows(
        len(table.shape),
        indices,
        numbers.start_index_map,
        numbers.collapsed_slice_dims,
        numbers.offset_dims,
        numbers.operand_batching_dims,
    )
    return whole and tuple(params["slice_sizes"]) == (*(1,) * depth, *table.shape[depth:])


def _gather(eqn: Any) -> tuple[Op, Mapping[str, Any]] | None:
    table, indices = (var.aval for var in eqn.invars)
    mode = eqn.params["mode"]
    if not gathers_whole_rows(eqn.params, table, indices):
        return None
    if GATHER.refusal(table, indices, fill=None) is not None or not gather_gains(table, indices):
        return None
    if mode not in _MODES or compat.explicit_sharding(table) or compat.explicit_sharding(indices):
        return None
    return GATHER, {"fill": filler(table.dtype.name, eqn.params["fill_value"]) if mode == _FILLS else None}


def _scatter(eqn: Any, *, kind: str) -> tuple[Op, Mapping[str, Any]] | None:
    table, indices, updates = avals = [var.aval for var in eqn.invars]
    numbers = eqn.params["dimension_numbers"]
    whole = _whole_rows(
        len(table.shape),
        indices,
        numbers.scatter_dims_to_operand_dims,
        numbers.inserted_window_dims,
        numbers.update_window_dims,
        numbers.operand_batching_dims,
    )
    if not whole or updates.shape != (*indices.shape[:-1], *table.shape[indices.shape[-1] :]):
        return None
    if SCATTER.refusal(*avals) is not None or not scatter_gains(table, updates, indices):
        return None
    if eqn.params["mode"] not in _MODES or any(compat.explicit_sharding(aval) for aval in avals):
        return None
    return SCATTER, {"kind": kind, "clips": eqn.params["mode"] == GatherScatterMode.CLIP}


EXCHANGES = (
    Exchange("gather", "gather", _gather),
    *(Exchange("scatter", f"scatter-{kind}", functools.partial(_scatter, kind=kind)) for kind in SCATTER_KINDS),
)
