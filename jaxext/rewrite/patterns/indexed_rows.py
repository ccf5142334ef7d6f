"""Whole rows read by number, and rows added to by number."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from jax.lax import GatherScatterMode

from ... import _jax_compat as compat
from ...kernels._indexed_rows import GATHER, SCATTER, filler, gather_gains, scatter_gains
from ...kernels._op import Op
from ..exchange import Exchange
from ..row_numbers import MODES, gathers_whole_rows, scatters_whole_rows

_FILLS = GatherScatterMode.FILL_OR_DROP


def _gather(eqn: Any) -> tuple[Op, Mapping[str, Any]] | None:
    table, indices = (var.aval for var in eqn.invars)
    mode = eqn.params["mode"]
    if not gathers_whole_rows(eqn.params, table, indices):
        return None
    if GATHER.refusal(table, indices, fill=None) is not None or not gather_gains(table, indices):
        return None
    if mode not in MODES or compat.explicit_sharding(table) or compat.explicit_sharding(indices):
        return None
    return GATHER, {"fill": filler(table.dtype.name, eqn.params["fill_value"]) if mode == _FILLS else None}


def _scatter(eqn: Any, *, kind: str) -> tuple[Op, Mapping[str, Any]] | None:
    table, indices, updates = (var.aval for var in eqn.invars)
    if not scatters_whole_rows(eqn) or not scatter_gains(table, updates, indices):
        return None
    return SCATTER, {"kind": kind, "clips": eqn.params["mode"] == GatherScatterMode.CLIP}


EXCHANGES = (
    Exchange("gather", "gather", _gather),
    *(Exchange("scatter", f"scatter-{kind}", functools.partial(_scatter, kind=kind)) for kind in ("add", "max", "min")),
)
