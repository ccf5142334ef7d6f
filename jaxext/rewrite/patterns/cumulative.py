"""Running sums, products, maxima, minima and logarithms of sums of exponentials along an axis."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from ... import _jax_compat as compat
from ...kernels._cumulative import CUMULATIVE, KINDS, cumulative_gains
from ...kernels._op import Op
from ..exchange import Exchange


def _choose(eqn: Any, *, kind: str) -> tuple[Op, Mapping[str, Any]] | None:
    x = eqn.invars[0].aval
    axis = eqn.params["axis"] - len(x.shape)
    if compat.explicit_sharding(x) or CUMULATIVE.refusal(x, kind=kind) or not cumulative_gains(x, axis, kind):
        return None
    return CUMULATIVE, {"axis": axis, "kind": kind, "reverse": eqn.params["reverse"]}


EXCHANGES = tuple(Exchange("cumsum", kind, functools.partial(_choose, kind=kind)) for kind in KINDS)
