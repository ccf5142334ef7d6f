"""Which gathers and scatters read or change whole rows, by the numbers of their array's leading dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax.lax import GatherScatterMode

from .. import _jax_compat as compat
from ..kernels._indexed_rows import SCATTER

# XLA takes the nearest row, or drops the update, where JAX was promised that there is one.
MODES = (GatherScatterMode.FILL_OR_DROP, GatherScatterMode.CLIP, GatherScatterMode.PROMISE_IN_BOUNDS)


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


def scatters_whole_rows(eqn: Any) -> bool:
    """Whether the kernel takes what a scatter does: whole rows, by the numbers of the table's leading dimensions."""
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
        return False
    known = eqn.params["mode"] in MODES and not any(map(compat.explicit_sharding, avals))
    kind = eqn.primitive.name.partition("-")[2] or "set"
    return known and SCATTER.refusal(*avals, kind=kind) is None
