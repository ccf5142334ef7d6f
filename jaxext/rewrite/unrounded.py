"""Chains of bfloat16 arithmetic computed in float32 and rounded once, where they end.

On a CPU, XLA computes each bfloat16 operation in float32 and rounds its result, which costs more than most operations
do. Here a value stays unrounded where nothing but one chain of elementwise operations reads it: such a value is in no
array. What is a result, or is read by a comparison, a cast or anything else, is rounded as ever, and so is what the
program itself rounds (`astype`, `lax.reduce_precision`). XLA does the same on other platforms, where
`xla_allow_excess_precision`, which is on unless somebody switches it off, permits it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from .. import _jax_compat as compat
from .plan import left_out
from .written import CALLS, body, evaluate, inlined, is_literal

KERNEL = "elementwise"

# Continuous functions of each element: what is not rounded before them changes them no more than rounding does.
_ELEMENTWISE = frozenset(
    (
        *("add", "add_any", "sub", "mul", "div", "neg", "abs", "max", "min", "square", "integer_pow", "pow", "sqrt"),
        *("rsqrt", "exp", "exp2", "expm1", "log", "log1p", "logistic", "tanh", "erf", "erfc", "sin", "cos", "select_n"),
    )
)

# How often XLA rounds within one operation, where that is more than once.
_ROUNDINGS = {"logistic": 4}

# Below, nothing is measurable. tests/bench/bench_elementwise.py.
LEAST_ELEMENTS, LEAST_ROUNDINGS = 1 << 14, 2


@dataclasses.dataclass(frozen=True)
class Chain:
    """Equations, in order, of which only the last one's result is read by others; `operands` are what they read."""

    equations: Sequence[Any]
    operands: Sequence[Any]

    @property
    def end(self) -> Any:
        return self.equations[-1]

    def run(self, *arrays: Any) -> Any:
        """The chain's result, rounded once."""
        wide = [_widened(x) for x in arrays]
        (result,) = evaluate(self.equations, self.operands, wide, self.end.outvars, _bind)
        return jax.lax.convert_element_type(result, self.end.outvars[0].aval.dtype)


def find(jaxpr: Any) -> tuple[Sequence[Any], Mapping[int, Chain]]:
    """An open jaxpr's equations, and the chains worth their while by the id of each of their equations.

    Calls of functions that are nothing but such arithmetic (`jax.nn.silu`) are inlined where there is a chain.
    """
    if not is_permitted():
        return jaxpr.eqns, {}
    flat = [inner for eqn in jaxpr.eqns for inner in inlined(eqn, _is_arithmetic)]
    members: dict[int, list[Any]] = {}
    for number, home in sorted(_homes(flat, jaxpr.outvars).items()):
        members.setdefault(home, []).append(flat[number])
    chains = [Chain(equations, _read(equations)) for equations in members.values() if _gains(equations)]
    if not chains:
        return jaxpr.eqns, {}
    return flat, {id(eqn): chain for chain in chains for eqn in chain.equations}


def is_permitted() -> bool:
    """False where XLA_FLAGS ask for every rounding that the dtypes prescribe."""
    return "xla_allow_excess_precision=false" not in os.environ.get("XLA_FLAGS", "").lower()


def _homes(equations: Sequence[Any], results: Collection[Any]) -> dict[int, int]:
    """The number of each elementwise equation, and of the one that ends its chain."""
    readers: dict[Any, list[int]] = {}
    for number, eqn in enumerate(equations):
        for var in eqn.invars:
            if not is_literal(var):
                readers.setdefault(var, []).append(number)
    escape = {var for var in results if not is_literal(var)}
    homes: dict[int, int] = {}
    for number in reversed(range(len(equations))):
        eqn = equations[number]
        if eqn.primitive.name in CALLS or not _is_arithmetic(eqn):
            continue
        (result,) = eqn.outvars
        reading = {homes.get(reader) for reader in readers.get(result, ())}
        (home,) = reading if len(reading) == 1 and result not in escape else (None,)
        same = home is not None and equations[home].outvars[0].aval.shape == result.aval.shape
        homes[number] = home if home is not None and same else number
    return homes


def _is_arithmetic(eqn: Any) -> bool:
    """Whether `eqn` is bfloat16 arithmetic on each element, or a call of a function that is nothing else."""
    name, inside = eqn.primitive.name, ()
    if name in CALLS:
        inside = body(eqn)
        if inside is None:
            return False
    elif name not in _ELEMENTWISE or not all(map(_is_bfloat16, (*eqn.outvars, *_numbers(eqn)))):
        return False
    sharded = any(compat.explicit_sharding(var.aval) for var in eqn.outvars)
    return not (eqn.effects or sharded or left_out(KERNEL, eqn)) and all(map(_is_arithmetic, inside))


def _numbers(eqn: Any) -> Sequence[Any]:
    """The operands that are computed with: not a select's predicate, nor a power's exponent."""
    name = eqn.primitive.name
    return eqn.invars[1:] if name == "select_n" else eqn.invars[:1] if name == "pow" else eqn.invars


def _is_bfloat16(var: Any) -> bool:
    return getattr(var.aval, "dtype", None) == jax.numpy.bfloat16


def _read(equations: Sequence[Any]) -> list[Any]:
    made = {var for eqn in equations for var in eqn.outvars}
    read = (var for eqn in equations for var in eqn.invars if not is_literal(var) and var not in made)
    return list(dict.fromkeys(read))


def _gains(equations: Sequence[Any]) -> bool:
    elements = equations[-1].outvars[0].aval.size
    return elements >= LEAST_ELEMENTS and sum(map(_roundings, equations)) > LEAST_ROUNDINGS


def _roundings(eqn: Any) -> int:
    """How often XLA would round each element."""
    if eqn.primitive.name == "integer_pow":
        return max(1, abs(eqn.params["y"]).bit_length() + abs(eqn.params["y"]).bit_count() - 2)
    return _ROUNDINGS.get(eqn.primitive.name, 1)


def _bind(eqn: Any, inputs: list[Any]) -> list[Any]:
    return compat.bind(eqn, [_widened(x) for x in inputs], eqn.params)


def _widened(x: Any) -> Any:
    if x.dtype != jax.numpy.bfloat16:
        return x
    if isinstance(x, jax.Array):
        return jax.lax.convert_element_type(x, np.float32)
    return np.asarray(x).astype(np.float32)
