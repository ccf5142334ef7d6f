"""Matrix products of bfloat16 operands, in whatever way they were written and differentiated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ...kernels._dot import DOT, dot_gains
from ...kernels._op import Op
from ..exchange import Exchange

_DEFAULT = (None, jax.lax.Precision.DEFAULT)


def _choose(eqn: Any) -> tuple[Op, Mapping[str, Any]] | None:
    a, b = (var.aval for var in eqn.invars)
    out = np.dtype(eqn.outvars[0].aval.dtype).name
    precision = eqn.params["precision"]
    asked = precision if isinstance(precision, tuple) else (precision,)
    if any(one not in _DEFAULT for one in asked) or eqn.params.get("out_sharding") is not None:
        return None
    dimension_numbers = eqn.params["dimension_numbers"]
    params = {"dimension_numbers": dimension_numbers, "preferred_element_type": out}
    if DOT.refusal(a, b, **params) is not None or not dot_gains(a, b, dimension_numbers):
        return None
    return DOT, params


EXCHANGE = Exchange("matmul", "dot_general", _choose)
