"""Arithmetic of a program, read from its jaxpr: floating-point operations of matrix products and convolutions.

XLA's own cost analysis counts the body of a loop once; here a scan counts as often as it runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(item, "jaxpr", item)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr


def _dot_flops(eqn: Any) -> float:
    (contracting, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracting)


def _convolution_flops(eqn: Any) -> float:
    kernel = eqn.invars[1].aval.shape
    features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / max(features, 1)


def count_flops(jaxpr: Any) -> float:
    """Operations (a multiply-add is two) of one call. A while loop counts once, a cond by its largest branch."""
    total = 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            total += _dot_flops(eqn)
        elif name == "conv_general_dilated":
            total += _convolution_flops(eqn)
        else:
            counts = [count_flops(inner) for inner in _inner(eqn.params)]
            if name == "cond":
                total += max(counts, default=0.0)
            else:
                total += sum(counts) * (eqn.params.get("length", 1) if name == "scan" else 1)
    return total


def product_dtypes(jaxpr: Any) -> set[str]:
    """Names of the dtypes in which the program multiplies matrices, inner programs included."""
    found = set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            found.add(eqn.invars[0].aval.dtype.name)
        for inner in _inner(eqn.params):
            found |= product_dtypes(inner)
    return found
