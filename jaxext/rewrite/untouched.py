"""What arithmetic on each element does where one operand, a gradient, is zero: whether it leaves other operands alone.

An interval analysis (Moore, "Interval Analysis", 1966) of a few equations, with one more kind of value: an operand,
unchanged. Equal means equal as numbers: zeros of both signs are one, and so are the denormals that XLA takes for zeros.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .written import is_literal

_SLACK = 1e-6  # of a result, more than one rounding in float32
_LARGEST, _TINY = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)
_KEEP = frozenset(("copy", "broadcast_in_dim"))
_MOST_ASSUMED = 2


@dataclasses.dataclass(frozen=True)
class Within:
    """A number from `low` to `high`, either of which may be infinite; no NaN."""

    low: float
    high: float

    @property
    def is_zero(self) -> bool:
        return self.low == self.high == 0


@dataclasses.dataclass(frozen=True)
class Same:
    """The operand `var`, unchanged."""

    var: Any


@dataclasses.dataclass(frozen=True)
class Above:
    """Whether `var` is greater than `bound`."""

    var: Any
    bound: float


Known = Within | Same | Above | None
"""What is known of a value; None: nothing."""

ZERO = Within(0.0, 0.0)


def results(equations: Sequence[Any], given: Mapping[Any, Known], assumed: int = 0) -> dict[Any, Known]:
    """What is known of each equation's result, `given` what is known of operands.

    assumed: how many of the given are results for which a condition holds, within which this is asked.
    """
    known = dict(given)
    for number, eqn in enumerate(equations):
        (var,) = eqn.outvars
        if var in given:
            continue
        if eqn.primitive.name != "select_n":
            known[var] = _result(eqn, [_of(x, known) for x in eqn.invars])
        elif len(eqn.invars) == 3:
            asked, first, second = (_of(x, known) for x in eqn.invars)
            if isinstance(asked, Above) and second is None and assumed < _MOST_ASSUMED:
                least = float(np.nextafter(np.float32(asked.bound), np.float32(np.inf)))
                holds = {**given, asked.var: Within(least, math.inf)}
                second = _of(eqn.invars[2], results(equations[:number], holds, assumed + 1))
            known[var] = _either(first, second)
    return known


def _of(var: Any, known: Mapping[Any, Known]) -> Known:
    if not is_literal(var):
        return known.get(var)
    value = float(var.val)
    return None if math.isnan(value) else Within(value, value)


def _either(first: Known, second: Known) -> Known:
    if isinstance(first, Within) and isinstance(second, Within):
        return Within(min(first.low, second.low), max(first.high, second.high))
    return first if first == second else None


def _result(eqn: Any, xs: Sequence[Known]) -> Known:
    name = eqn.primitive.name
    if name in _KEEP or (name == "convert_element_type" and eqn.invars[0].aval.dtype == eqn.outvars[0].aval.dtype):
        return xs[0]
    if name == "gt" and isinstance(xs[1], Within) and xs[1].low == xs[1].high and not is_literal(eqn.invars[0]):
        return Above(eqn.invars[0], xs[1].low)
    if name == "integer_pow":
        return _power(xs[0], eqn.params["y"])
    if (kept := _kept(name, xs)) is not None:
        return kept
    if name not in _ARITHMETIC or not all(isinstance(x, Within) for x in xs):
        return None
    return _ARITHMETIC[name](*xs)


def _kept(name: str, xs: Sequence[Known]) -> Known:
    """The operand that a sum with zero, or a product with one, leaves as it was."""
    if name in ("add", "add_any", "sub", "mul") and len(xs) == 2:
        nothing = Within(1.0, 1.0) if name == "mul" else ZERO
        if isinstance(xs[0], Same) and xs[1] == nothing:
            return xs[0]
        if isinstance(xs[1], Same) and xs[0] == nothing and name != "sub":
            return xs[1]
    return None


def _bounds(*ends: float) -> Known:
    """From the least to the largest of the exact `ends`, rounded outwards."""
    if any(map(math.isnan, ends)):
        return None
    low, high = min(ends), max(ends)
    low, high = low - _SLACK * abs(low), high + _SLACK * abs(high)
    low, high = (0.0 if 0 < low < _TINY else low), (0.0 if -_TINY < high < 0 else high)  # denormals may become zeros
    return Within(-math.inf if low < -_LARGEST else low, math.inf if high > _LARGEST else high)


def _rounds(function: Callable[[float], float], least: float) -> Callable[[Within], Known]:
    """A monotonic function, known for what is not below `least`."""
    return lambda x: None if x.low < least else _bounds(function(x.low), function(x.high))


def _add(x: Within, y: Within) -> Known:
    return _bounds(x.low + y.low, x.high + y.high, x.low + y.high, x.high + y.low)


def _negative(x: Within) -> Within:
    return Within(-x.high, -x.low)


def _mul(x: Within, y: Within) -> Known:
    return _bounds(*(a * b for a in (x.low, x.high) for b in (y.low, y.high)))


def _div(x: Within, y: Within) -> Known:
    # A quotient by a denormal is one by zero to XLA.
    if not (y.low >= _TINY or y.high <= -_TINY):
        return None
    return _bounds(*(math.nan if math.isinf(a) and math.isinf(b) else a / b
                     for a in (x.low, x.high) for b in (y.low, y.high)))  # fmt: skip


def _power(x: Known, exponent: int) -> Known:
    return ZERO if isinstance(x, Within) and x.is_zero and exponent > 0 else None


def _square(x: Within) -> Known:
    ends = [x.low * x.low, x.high * x.high]
    return _bounds(*ends, *([0.0] if x.low <= 0 <= x.high else []))


_ARITHMETIC: dict[str, Callable[..., Known]] = {
    "add": _add,
    "add_any": _add,
    "sub": lambda x, y: _add(x, _negative(y)),
    "mul": _mul,
    "div": _div,
    "neg": _negative,
    "square": _square,
    "sqrt": _rounds(math.sqrt, 0.0),
    "rsqrt": _rounds(lambda x: 0.0 if math.isinf(x) else 1 / math.sqrt(x), _TINY),
    "max": lambda x, y: Within(max(x.low, y.low), max(x.high, y.high)),
    "min": lambda x, y: Within(min(x.low, y.low), min(x.high, y.high)),
    "abs": lambda x: Within(max(x.low, -x.high, 0.0), max(x.high, -x.low)),
}

UNDERSTOOD = frozenset((*_ARITHMETIC, *_KEEP, "convert_element_type", "gt", "integer_pow", "select_n"))
