"""What an operation costs: its arithmetic, and the bytes that it moves as arithmetic that could have been done."""

from __future__ import annotations

import math
from typing import Any

from .. import _jax_compat as compat
from ..rewrite.trace import Node

# Operations per byte moved at which a machine is as busy with one as with the other; of the order of any machine's.
_BALANCE = 8.0


def of_node(node: Node) -> float:
    """Floating-point operations of a node, bytes included."""
    return _cost(node.primitive, node.params, [v.aval for v in node.inputs], [v.aval for v in node.outputs])


def nbytes(aval: Any) -> int:
    """Bytes of an array of this type; typed random keys count as their words."""
    return math.prod(getattr(aval, "shape", ())) * int(getattr(aval.dtype, "itemsize", 8))


def _cost(primitive: str, params: dict[str, Any], operands: list[Any], results: list[Any]) -> float:
    inner = sum(_of_jaxpr(jaxpr) for value in params.values() for jaxpr in _jaxprs(value))
    if inner:
        return inner * params.get("length", 1)
    moved = _BALANCE * sum(map(nbytes, results))
    if primitive == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return moved + 2.0 * math.prod(results[0].shape) * math.prod(operands[0].shape[d] for d in contracted)
    if primitive == "conv_general_dilated":
        kernel, numbers = operands[1].shape, params["dimension_numbers"]
        taps = math.prod(kernel) / kernel[numbers.rhs_spec[0]]
        return moved + 2.0 * math.prod(results[0].shape) * taps
    return moved


def _of_jaxpr(jaxpr: Any) -> float:
    opened, _ = compat.open_jaxpr(jaxpr)
    return sum(
        _cost(eqn.primitive.name, eqn.params, [v.aval for v in eqn.invars], [v.aval for v in eqn.outvars])
        for eqn in opened.eqns
    )


def _jaxprs(value: Any) -> list[Any]:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return [item for item in values if compat.is_jaxpr(item)]
