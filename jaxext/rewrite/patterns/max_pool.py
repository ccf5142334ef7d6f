"""The largest elements of windows, and their gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ... import _jax_compat as compat
from ...kernels._max_pool import MAX_POOL, MAX_POOL_GRADIENT, max_pool_gains
from ...kernels._op import Op
from ..exchange import Exchange


def _windowed(params: Mapping[str, Any]) -> dict[str, Any] | None:
    """The op's parameters where a window spans one or two neighbouring dimensions and has no holes."""
    window, strides, padding = (tuple(params[of]) for of in ("window_dimensions", "window_strides", "padding"))
    wide = [d for d, of in enumerate(zip(window, strides, padding)) if of != (1, 1, (0, 0))]
    if not wide or wide[-1] - wide[0] > 1 or any(side < 0 for pads in padding for side in pads):
        return None
    if any(d != 1 for of in ("base_dilation", "window_dilation") for d in params.get(of, ())):
        return None
    part = slice(wide[0], wide[-1] + 1)
    trailing = len(window) - part.stop
    return {"window": window[part], "strides": strides[part], "padding": padding[part], "trailing": trailing}


def _choose(eqn: Any, op: Op) -> tuple[Op, Mapping[str, Any]] | None:
    avals = [var.aval for var in eqn.invars]
    params = _windowed(eqn.params)
    if params is None or any(compat.explicit_sharding(aval) for aval in avals):
        return None
    if op.refusal(*avals, **params) is not None:
        return None
    if not max_pool_gains(op, avals[-1], params["window"], params["strides"], params["trailing"]):
        return None
    return op, params


def _gradient(eqn: Any) -> tuple[Op, Mapping[str, Any]] | None:
    # `le` is a smallest element's.
    return _choose(eqn, MAX_POOL_GRADIENT) if eqn.params["select_prim"].name == "ge" else None


EXCHANGES = (
    Exchange("max_pool", "reduce_window_max", lambda eqn: _choose(eqn, MAX_POOL)),
    Exchange("max_pool", "select_and_scatter_add", _gradient),
)
