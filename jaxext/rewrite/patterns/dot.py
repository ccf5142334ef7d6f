"""Matrix products that XLA computes slowly, in whatever way they were written and differentiated.

Those of bfloat16 operands, and of few float32 rows, become a kernel. The gradient of a matrix that [batch, steps,
features] were multiplied with sums over batch and steps and is transposed afterwards; XLA first turns the operands
round and then writes the result against its layout, at two fifths of the speed it has where these are one dimension.
A result that nobody transposes, as of `x @ w.T`, it writes as fast as anything.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ... import _jax_compat as compat
from ...kernels._dot import DOT, dot_gains
from ...kernels._op import Op
from ..exchange import Exchange, Expression
from ..neighbours import Neighbours

_FLATTENED = ("float32", "float64")
_DEFAULT = (None, jax.lax.Precision.DEFAULT)


def _choose(eqn: Any, neighbours: Neighbours) -> tuple[Op, Mapping[str, Any]] | Expression | None:
    a, b = (var.aval for var in eqn.invars)
    out = np.dtype(eqn.outvars[0].aval.dtype).name
    if eqn.params.get("out_sharding") is not None:
        return None
    dimension_numbers = eqn.params["dimension_numbers"]
    params = {"dimension_numbers": dimension_numbers, "preferred_element_type": out}
    kernel = _precision_is_default(eqn) and DOT.refusal(a, b, **params) is None
    if kernel and dot_gains(a, b, dimension_numbers):
        return DOT, params
    if _sums_over_leading_dimensions(eqn) and _is_transposed(eqn.outvars[0], neighbours):
        return Expression(functools.partial(_flattened, params=eqn.params), "summed dimensions as one")
    return None


def _precision_is_default(eqn: Any) -> bool:
    precision = eqn.params["precision"]
    asked = precision if isinstance(precision, tuple) else (precision,)
    return all(one in _DEFAULT for one in asked)


def _sums_over_leading_dimensions(eqn: Any) -> bool:
    a, b = (var.aval for var in eqn.invars)
    (left, right), (batch, _) = eqn.params["dimension_numbers"]
    if batch or len(left) < 2 or not (a.ndim == b.ndim == len(left) + 1) or a.dtype.name not in _FLATTENED:
        return False
    leading = tuple(range(len(left)))
    sharded = compat.explicit_sharding(a) or compat.explicit_sharding(b)
    return tuple(left) == tuple(right) == leading and a.dtype == b.dtype and not sharded


def _is_transposed(result: Any, neighbours: Neighbours) -> bool:
    """Whether those who read it turn it round; twice, as where the matrix itself was transposed, is not at all."""
    turned, reader = False, neighbours.only_reader(result)
    while reader is not None and reader.primitive.name == "transpose":
        turned = not turned
        reader = neighbours.only_reader(reader.outvars[0])
    return turned


def _flattened(a: jax.Array, b: jax.Array, *, params: Mapping[str, Any]) -> jax.Array:
    a, b = (x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) for x in (a, b))
    options = {name: params[name] for name in ("precision", "preferred_element_type")}
    return jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())), **options)


EXCHANGE = Exchange("matmul", "dot_general", _choose, looks_round=True)
