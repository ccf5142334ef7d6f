"""Which matrix products of a program multiply in eight bits, where the user asked for it (kernels/_fp8.py).

They are chosen once nobody differentiates the program any more, so the derivative's products are among them. Which
operand is a cotangent is read off the equation: JAX's transposition of a product puts it first, and the name stack says
that it is transposed, or computed again for `checkpoint`. Where a hand-written derivative misleads this, an operand is
rounded to the other format, no more.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax

from .. import _jax_compat as compat
from .._settings import SCOPE_FP8, Settings
from ..kernels import _fp8, _platform
from . import written
from .plan import excluded, left_out
from .report import Entry, Report

KERNEL, PRIMITIVE = "matmul", "dot_general"
# What a network's logits go through on their way to the maximum that a softmax begins with.
_LAYOUT = ("convert_element_type", "reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim", "copy")
_PASSES = frozenset((*_LAYOUT, "add", "sub", "mul", "div", "tanh", "select_n", "reduce_precision"))
_LOSSES = ("jaxext_softmax_cross_entropy", "jaxext_target_cross_entropy")
_DEFAULT = (None, jax.lax.Precision.DEFAULT)
_AGAIN = "rematted_computation"


class EightBits:
    """The choice for one program, under its settings and for the platform it is traced for."""

    def __init__(self, settings: Settings) -> None:
        self._everywhere, self._off = settings.precision == "fp8", KERNEL in settings.exclude
        self._unavailable: str | None = None

    def _asked(self, scopes: str) -> bool:
        return not self._off and (self._everywhere or SCOPE_FP8 in scopes) and KERNEL not in excluded(scopes)

    def context(self, around: str) -> tuple[bool, ...]:
        """What the choice inside a function depends on, `around` being the name scopes it is called in."""
        return (True, "transpose(" in around, _AGAIN in around) if self._asked(around) else ()

    def choose(self, equations: Sequence[Any], around: str, location: str, report: Report) -> dict[int, Any]:
        """The equations that stand for products of one jaxpr, by those products' ids; the report has the reasons."""
        asked = [eqn for eqn in equations if eqn.primitive.name == PRIMITIVE and self._asks_for(eqn, around)]
        if not asked or self._is_unavailable(location, report):
            return {}
        chosen, softmax = {}, _before_softmax(equations)
        for eqn in asked:
            reason = _refusal(eqn, softmax)
            cotangent = _has_cotangent(f"{around}/{compat.name_scopes(eqn)}")
            entry = _entry(eqn, location, cotangent)
            if reason is not None:
                report.missed.append(dataclasses.replace(entry, reason=reason, detail="in eight bits"))
                continue
            report.replaced.append(entry)
            numbers = eqn.params["dimension_numbers"]
            run = functools.partial(_fp8.fp8_product, dimension_numbers=numbers, cotangent=cotangent)
            chosen[id(eqn)] = written.equation([eqn], eqn.invars, run, f"jaxext_{KERNEL}", platform="cuda")
        return chosen

    def _asks_for(self, eqn: Any, around: str) -> bool:
        return self._asked(f"{around}/{compat.name_scopes(eqn)}") and not left_out(KERNEL, eqn)

    def _is_unavailable(self, location: str, report: Report) -> bool:
        if self._unavailable is None:
            platform, capability = _platform.foreseen(), _platform.compute_capability()
            self._unavailable = _fp8.fp8_device_refusal(platform, capability) or ""
            if self._unavailable:
                report.fallbacks.append(Entry(KERNEL, location=location, reason=self._unavailable))
        return bool(self._unavailable)


def _entry(eqn: Any, location: str, cotangent: bool) -> Entry:
    shapes = tuple(compat.short_type(var.aval) for var in eqn.invars)
    detail = f"{_fp8.E5M2 if cotangent else _fp8.E4M3} x {_fp8.E4M3}"
    dtype = str(eqn.outvars[0].aval.dtype)
    return Entry(KERNEL, shapes, dtype, compat.user_line(eqn), location, detail=detail)


def _has_cotangent(scopes: str) -> bool:
    return "transpose(" in scopes and _AGAIN not in scopes


def _refusal(eqn: Any, softmax: Sequence[Any]) -> str | None:
    """Why a product stays as it is; `softmax`: the products of its jaxpr that go into one."""
    a, b = (var.aval for var in eqn.invars)
    asked = eqn.params["precision"]
    if any(each not in _DEFAULT for each in (asked if isinstance(asked, tuple) else (asked,))):
        return "it asks for a precision of its own"
    if eqn.params.get("out_sharding") is not None or any(map(compat.explicit_sharding, (a, b))):
        return "its sharding is part of its type"
    types = _fp8.fp8_refusal(a, b, eqn.params["dimension_numbers"], eqn.outvars[0].aval.dtype)
    return types or ("its result goes into a softmax" if any(_same_layer(eqn, each) for each in softmax) else None)


# ---------------------------------------------------------------- what goes into a softmax


def _before_softmax(equations: Sequence[Any]) -> list[Any]:
    """The products whose results go into a softmax: the logits of a loss or of a router, scores."""
    readers = _readers(equations)
    return [eqn for eqn in equations if eqn.primitive.name == PRIMITIVE and _has_softmax(eqn.outvars[0], readers)]


def _readers(equations: Sequence[Any]) -> dict[Any, list[Any]]:
    found: dict[Any, list[Any]] = {}
    for eqn in equations:
        for var in eqn.invars:
            if not written.is_literal(var):
                found.setdefault(var, []).append(eqn)
    return found


def _has_softmax(start: Any, readers: dict[Any, list[Any]]) -> bool:
    stack, seen = [start], set()
    while stack:
        var = stack.pop()
        if var in seen:
            continue
        seen.add(var)
        for eqn in readers.get(var, ()):
            name = eqn.primitive.name
            if name.startswith(_LOSSES) or (name in written.CALLS and _inside(eqn, var)):
                return True
            if name == "reduce_max" and eqn.params["axes"] == (var.aval.ndim - 1,):
                return True
            if name in _PASSES and eqn.outvars[0].aval.size == start.aval.size:
                stack.append(eqn.outvars[0])
    return False


def _inside(call: Any, var: Any) -> bool:
    inner, _ = compat.open_jaxpr(call.params["jaxpr"])
    readers = _readers(inner.eqns)
    return any(_has_softmax(own, readers) for own, given in zip(inner.invars, call.invars) if given is var)


def _same_layer(eqn: Any, logits: Any) -> bool:
    """Whether this is that product or one of its gradients: one operand in common, and one of the result's shape."""
    if eqn is logits:
        return True
    shape = logits.outvars[0].aval.shape
    return any(
        one in logits.invars and other.aval.shape == shape
        for one, other in (eqn.invars, eqn.invars[::-1])
        if not written.is_literal(one)
    )
