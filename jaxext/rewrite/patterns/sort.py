"""Sorting the last axis by one key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...kernels._op import Op
from ...kernels._sort import SORT, sort_gains
from ..exchange import Exchange


def _choose(eqn: Any) -> tuple[Op, Mapping[str, Any]] | None:
    avals = [var.aval for var in eqn.invars]
    # The kernel's result is stable, whatever was asked.
    if eqn.params["dimension"] != len(avals[0].shape) - 1 or eqn.params["num_keys"] != 1:
        return None
    if SORT.refusal(*avals) is not None or not sort_gains(avals[0]):
        return None
    return SORT, {}


EXCHANGE = Exchange("sort", "sort", _choose)
