"""Primitives exchanged one for one, in a function that nobody will differentiate any more.

An equation keeps its operands, results and source line and gets an op's primitive, or an expression of JAX's own
primitives that XLA runs faster on a CPU; also inside scan, while, cond, checkpoint, shard_map and jit.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .. import _jax_compat as compat
from .._settings import Settings
from ..kernels import _platform
from ..kernels._op import Op
from . import touched_rows, unrounded, written
from .eight_bits import EightBits
from .neighbours import Neighbours
from .plan import HIGHER_ORDER, LOCATION, excluded, left_out
from .report import Entry, Report


@dataclasses.dataclass(frozen=True)
class Instead:
    """`equation` made an operand of the exchanged one; `operands` are what both together read."""

    equation: Any
    operands: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Expression:
    """`run(*operands)` computes the equation's result, or a list of its results, in plain JAX.

    For the report: `detail` says how, `shapes` stands for the operands' types where these would say little.
    `instead`: what `run` is given in the place of the operands, where it also does what made one of them.
    """

    run: Callable[..., Any]
    detail: str
    shapes: tuple[str, ...] | None = None
    instead: Instead | None = None


@dataclasses.dataclass(frozen=True)
class Exchange:
    """`kernel`: the name in reports and settings. `primitive`: JAX's name of what may be exchanged.

    `choose(equation)` returns the op and its parameters, or an expression; None where stock JAX is to run it.
    `before(equation)` makes an equation to run first, whose results the op takes in the operands' place.
    `looks_round`: the choice depends on what makes its operands or reads its results: `choose(equation, neighbours)`.
    """

    kernel: str
    primitive: str
    choose: Callable[..., tuple[Op, Mapping[str, Any]] | Expression | None]
    before: Callable[[Any], Any] | None = None
    looks_round: bool = False


def exchange(
    jaxpr: Any, settings: Settings, exchanges: Sequence[Exchange], location: str, donated: Sequence[bool] = ()
) -> tuple[Any, Report]:
    """`jaxpr` with its primitives exchanged, None where it stays as it is, and what was exchanged.

    donated: which operands the program may write over.
    """
    wanted = {e.primitive: e for e in exchanges if e.kernel not in settings.exclude}
    walk = _Walk(wanted, settings, _platform.foreseen() == "cpu")
    new = walk.inside(jaxpr, location, donated)
    return (None if new is jaxpr else new), walk.report


class _Walk:
    def __init__(self, wanted: Mapping[str, Exchange], settings: Settings, for_cpu: bool) -> None:
        self._wanted, self._for_cpu = wanted, for_cpu
        self._finds_chains = for_cpu and unrounded.KERNEL not in settings.exclude
        self._updates_rows = for_cpu and touched_rows.KERNEL not in settings.exclude
        self._eight_bits = EightBits(settings)
        self._known: dict[Any, tuple[Any, Any]] = {}
        self._around = ""  # the name scopes of the operations that the walk is inside of
        self._without: frozenset[str] = frozenset()  # the kernels that they exclude
        self.report = Report()

    def inside(self, jaxpr: Any, location: str, donated: Sequence[bool] = ()) -> Any:
        """The function, exchanged; itself where nothing changed. One that is called several times is walked once."""
        key = id(jaxpr), self._eight_bits.context(self._around), self._without
        if key not in self._known:
            opened, _ = compat.open_jaxpr(jaxpr)
            given = self._touched_rows(opened, location, donated)
            finds_chains = self._finds_chains and unrounded.KERNEL not in self._without
            flat, chains = unrounded.find(given) if finds_chains else (given.eqns, {})
            equations = []
            neighbours = Neighbours(flat, opened.outvars)
            products = self._eight_bits.choose(flat, self._around, location, self.report)
            for eqn in flat:
                chain = chains.get(id(eqn))
                if id(eqn) in products:
                    equations.append(products[id(eqn)])
                elif chain is None:
                    equations += self._equations(eqn, location, neighbours)
                elif chain.end is eqn:
                    equations.append(self._unrounded(chain, location))
            same = len(equations) == len(opened.eqns) and all(new is old for new, old in zip(equations, opened.eqns))
            # The original is kept with the new one, so that its id is not given to another.
            self._known[key] = (jaxpr, jaxpr if same else compat.with_equations(jaxpr, equations))
        return self._known[key][1]

    def _equations(self, eqn: Any, location: str, neighbours: Neighbours) -> list[Any]:
        name = eqn.primitive.name
        wanted = self._wanted.get(name)
        chosen = None
        if wanted is not None and wanted.kernel not in self._without and not left_out(wanted.kernel, eqn):
            chosen = wanted.choose(eqn, neighbours) if wanted.looks_round else wanted.choose(eqn)
        if isinstance(chosen, Expression) and not self._for_cpu:
            chosen = None  # what XLA runs slowly on a CPU
        if wanted is None or chosen is None:
            if name not in HIGHER_ORDER:
                return [eqn]
            return [self._higher_order(eqn, f"{location}/{LOCATION.get(name, eqn.params.get('name', name))}")]
        shapes = tuple(compat.short_type(var.aval) for var in eqn.invars)
        dtype = str(eqn.outvars[0].aval.dtype)
        detail = ""
        if isinstance(chosen, Expression):
            detail, shapes = chosen.detail, shapes if chosen.shapes is None else chosen.shapes
        entry = Entry(wanted.kernel, shapes, dtype, compat.user_line(eqn), location, detail=detail)
        self.report.replaced.append(entry)
        if isinstance(chosen, Expression):
            both = chosen.instead
            equations, operands = ([eqn], eqn.invars) if both is None else ([both.equation, eqn], both.operands)
            new = written.equation(equations, operands, chosen.run, f"jaxext_{wanted.kernel}")
            return [self._higher_order(new, location) if name in HIGHER_ORDER else new]
        op, params = chosen
        first = [] if wanted.before is None else [wanted.before(eqn)]
        operands = first[0].outvars if first else eqn.invars
        return [*first, eqn.replace(primitive=op.primitive, params=dict(params), invars=list(operands))]

    def _touched_rows(self, opened: Any, location: str, donated: Sequence[bool]) -> Any:
        """The open jaxpr with the tables' updates that need only some rows."""
        if not self._updates_rows or touched_rows.KERNEL in self._without:
            return opened

        def found(update: touched_rows.Update) -> None:
            end, shapes = update.computed[-1], tuple(compat.short_type(var.aval) for var in update.scatter.invars)
            entry = Entry(touched_rows.KERNEL, shapes, "float32", compat.user_line(end), location)
            self.report.replaced.append(dataclasses.replace(entry, detail="updates only rows that have a gradient"))

        kept = [var for var, gone in itertools.zip_longest(opened.invars, donated, fillvalue=False) if not gone]
        equations = touched_rows.replaced(opened, {*opened.constvars, *kept}, found)
        return opened if equations is opened.eqns else compat.with_equations(opened, equations)

    def _unrounded(self, chain: unrounded.Chain, location: str) -> Any:
        end, shapes = chain.end, tuple(compat.short_type(var.aval) for var in chain.operands)
        detail = f"{len(chain.equations)} operations, rounded once"
        dtype = str(end.outvars[0].aval.dtype)
        self.report.replaced.append(
            Entry(unrounded.KERNEL, shapes, dtype, compat.user_line(end), location, detail=detail)
        )
        return written.equation(chain.equations, chain.operands, chain.run, f"jaxext_{unrounded.KERNEL}")

    def _higher_order(self, eqn: Any, location: str) -> Any:
        if left_out("", eqn):
            return eqn
        changed, around, without = {}, self._around, self._without
        self._around = f"{around}/{compat.name_scopes(eqn)}"
        self._without = excluded(self._around)
        for parameter in HIGHER_ORDER.get(eqn.primitive.name, (written.PARAMETER,)):
            value = eqn.params[parameter]
            free = _overwritten(eqn)
            new = tuple(self.inside(x, location, free) for x in (value if isinstance(value, tuple) else (value,)))
            old = value if isinstance(value, tuple) else (value,)
            if any(a is not b for a, b in zip(new, old)):
                changed[parameter] = new if isinstance(value, tuple) else new[0]
        self._around, self._without = around, without
        return eqn.replace(params={**eqn.params, **changed}) if changed else eqn


def _overwritten(eqn: Any) -> Sequence[bool]:
    """Which operands of a loop's body nobody needs after it: those that are carried from step to step."""
    if eqn.primitive.name != "scan":
        return ()
    constants, carried = compat.scan_counts(eqn.params)
    return [False] * constants + [True] * carried
