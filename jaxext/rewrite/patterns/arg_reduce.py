"""The place of the largest or smallest element along an axis."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from ... import _jax_compat as compat
from ...kernels._arg_reduce import ARG_REDUCE, arg_reduce_gains
from ...kernels._op import Op
from ..exchange import Exchange


def _choose(eqn: Any, *, largest: bool) -> tuple[Op, Mapping[str, Any]] | None:
    x, axes = eqn.invars[0].aval, eqn.params["axes"]
    if len(axes) != 1 or np.dtype(eqn.params["index_dtype"]) != np.int32 or compat.explicit_sharding(x):
        return None
    axis = axes[0] - len(x.shape)
    if ARG_REDUCE.refusal(x, axis=axis) is not None or not arg_reduce_gains(x, axis):
        return None
    return ARG_REDUCE, {"axis": axis, "largest": largest}


EXCHANGES = tuple(
    Exchange("argmax", name, functools.partial(_choose, largest=name == "argmax")) for name in ("argmax", "argmin")
)
