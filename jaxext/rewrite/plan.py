"""What of a graph is replaced, what is left to run, and in which order.

A replacement is demand-driven: a match's roots take their values from the kernel, and whatever nobody needs any more is
not run. A value inside a match that is used elsewhere is still computed, so a replacement is never wrong.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from .. import _jax_compat as compat
from .._settings import SCOPE_OFF, Settings
from ..kernels import _platform
from . import schedule, trace
from .match import Match, NoMatch, Pattern
from .report import Entry, Report
from .trace import Call, Graph, Node, Value

# Parameters of an equation that hold the functions it runs.
HIGHER_ORDER = {
    "scan": ("jaxpr",),
    "while": ("cond_jaxpr", "body_jaxpr"),
    "cond": ("branches",),
    "remat2": ("jaxpr",),
    "checkpoint": ("jaxpr",),
    "shard_map": ("jaxpr",),
    "jit": ("jaxpr",),
    "pjit": ("jaxpr",),
}
LOCATION = {"remat2": "remat", "checkpoint": "remat"}
# Operations that cost next to nothing: a match may be broken open at one of them.
_LAYOUT = frozenset(
    ("reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim", "convert_element_type", "copy", "pvary")
)
_REDUCTIONS = frozenset(("reduce_sum", "reduce_max", "dot_general", "argmax", "reduce_window_sum", "cumsum"))
_WITHOUT = re.compile(r"jaxext\.without((?:\.\w+)+)")


@dataclasses.dataclass(frozen=True)
class Mode:
    """How a function is planned.

    `whole_step`: the function will not be differentiated any more, so a match pays off only where it makes all it
    covers dead. `skip_differentiated`: what JAX has differentiated was rewritten before that, and is left alone.
    """

    whole_step: bool
    skip_differentiated: bool


@dataclasses.dataclass(eq=False)
class Replacement:
    """A match that is used; `covers`: the nodes from its inputs to its roots, these included."""

    match: Match
    covers: frozenset[Node]

    @property
    def node(self) -> Node:
        node = self.match.roots[0].node
        assert node is not None
        return node


@dataclasses.dataclass(eq=False)
class Plan:
    """How to run a function: `steps` in order, and the plans of the functions inside its nodes."""

    jaxpr: Any
    graph: Graph
    report: Report
    replacements: list[Replacement] = dataclasses.field(default_factory=list)
    steps: list[Node | Call | Replacement] = dataclasses.field(default_factory=list)
    nested: dict[Node, dict[str, tuple[Plan, ...]]] = dataclasses.field(default_factory=dict)
    # Why a function could not be exchanged after all, by the node that it is inside of; None: the function itself.
    refused: dict[Node | None, str] = dataclasses.field(default_factory=dict)

    def changes(self, node: Node | None = None) -> bool:
        """True where the plan, or what it has for `node`, replaces anything."""
        if node is None:
            return bool(self.replacements) or any(self.changes(inner) for inner in self.nested)
        inner = self.nested.get(node, {})
        return any(plan.changes() for plans in inner.values() for plan in plans)

    def full_report(self, location: str) -> Report:
        """All entries of this plan and the nested ones, each with its location."""
        result = Report()
        result.extend(self.report)
        for name in ("replaced", "missed", "fallbacks"):
            setattr(result, name, [dataclasses.replace(e, location=location) for e in getattr(result, name)])
        for node, plans in self.nested.items():
            place = f"{location}/{_place(node)}" if location else _place(node)
            for plan in (plan for group in plans.values() for plan in group):
                inner = plan.full_report(place)
                _refuse(inner, self.refused.get(node, ""))
                result.extend(inner)
        _refuse(result, self.refused.get(None, ""))
        return result

    def refuse(self, reason: str, node: Node | None = None) -> None:
        """The function inside `node`, or this whole one, stays as it is after all."""
        self.refused[node] = reason


def _refuse(report: Report, reason: str) -> None:
    if reason:
        report.fallbacks += [dataclasses.replace(entry, reason=reason) for entry in report.replaced]
        report.replaced = []


def _place(node: Node) -> str:
    if node.primitive in ("jit", "pjit"):
        return str(node.params.get("name", "jit"))
    return LOCATION.get(node.primitive, node.primitive)


def make(closed_jaxpr: Any, settings: Settings, patterns: Sequence[Pattern], mode: Mode) -> Plan:
    """Plan a traced function and all functions inside it."""
    return _Planner(settings, patterns, mode).plan(closed_jaxpr, ())


class _Planner:
    def __init__(self, settings: Settings, patterns: Sequence[Pattern], mode: Mode) -> None:
        self._settings = settings
        self._patterns = patterns
        self._mode = mode
        self._known: dict[tuple[Any, ...], Plan] = {}

    def plan(self, jaxpr: Any, origins: tuple[Value | None, ...], without: frozenset[str] = frozenset()) -> Plan:
        # A function that is called several times alike is planned once.
        key = (id(jaxpr), origins, without)
        if key not in self._known:
            self._known[key] = self._make(jaxpr, origins, without)
        return self._known[key]

    def _make(self, jaxpr: Any, origins: tuple[Value | None, ...], without: frozenset[str]) -> Plan:
        graph = trace.build(jaxpr, origins)
        plan = Plan(jaxpr, graph, Report())
        settings = dataclasses.replace(self._settings, exclude=self._settings.exclude | without)
        _choose(plan, settings, self._patterns, self._mode)
        live = _drop_what_does_not_pay(plan, self._mode)
        needed = {value.node for value in live}
        for node in graph.nodes:
            runs = node in needed or node.eqn.effects
            if runs and node.primitive in HIGHER_ORDER and not _skipped(node, self._mode):
                plan.nested[node] = self._inside(node, without | excluded(compat.name_scopes(node.eqn)))
        changed = {node for node in plan.nested if plan.changes(node)}
        plan.steps = schedule.steps(graph, plan.replacements, changed, live)
        return plan

    def _inside(self, node: Node, without: frozenset[str]) -> dict[str, tuple[Plan, ...]]:
        plans = {}
        for name in HIGHER_ORDER[node.primitive]:
            numbers = _operands(node.eqn, name)
            origins = tuple(None if number is None else node.inputs[number] for number in numbers)
            plans[name] = tuple(self.plan(inner, origins, without) for inner in functions_of(node, name))
        return plans


def _operands(eqn: Any, parameter: str) -> list[int | None]:
    """For each argument of a function inside `eqn`: the operand that it always is, None where that varies."""
    params, count = eqn.params, len(eqn.invars)
    match eqn.primitive.name:
        case "scan":
            constants, _ = compat.scan_counts(params)
            return [*range(constants), *[None] * (count - constants)]
        case "while":
            conditions, bodies = params["cond_nconsts"], params["body_nconsts"]
            start, length = (0, conditions) if parameter == "cond_jaxpr" else (conditions, bodies)
            return [*range(start, start + length), *[None] * (count - conditions - bodies)]
        case "cond":
            return [*range(1, count)]
        case "shard_map":
            # An operand that every device has whole is the same inside.
            return [None if any(tuple(spec)) else number for number, spec in enumerate(params["in_specs"])]
    return [*range(count)]


def functions_of(node: Node, name: str) -> tuple[Any, ...]:
    """The jaxprs in parameter `name` of a higher-order node."""
    value = node.params[name]
    return value if isinstance(value, tuple) else (value,)


def _skipped(node: Node, mode: Mode) -> bool:
    if mode.skip_differentiated and compat.is_differentiated(node.eqn):
        return True
    return SCOPE_OFF in compat.name_scopes(node.eqn)


# ---------------------------------------------------------------- choosing matches


def _choose(plan: Plan, settings: Settings, patterns: Sequence[Pattern], mode: Mode) -> None:
    by_primitive: dict[str, list[Node]] = {}
    for node in _candidates(plan.graph, mode):
        by_primitive.setdefault(node.primitive, []).append(node)
    covered: set[Node] = set()
    refused: dict[str, set[Node]] = {}
    near: list[tuple[Node, Entry]] = []
    for pattern in patterns:
        if pattern.kernel in settings.exclude or (pattern.for_cpu and _platform.foreseen() != "cpu"):
            continue
        candidates = [node for primitive in pattern.roots for node in by_primitive.get(primitive, ())]
        for node in sorted(candidates, key=lambda node: -node.position):
            if node in covered or node in refused.get(pattern.kernel, ()):
                continue
            match = _try(pattern, node, plan, near)
            if match is None or match.kernel in settings.exclude or left_out(match.kernel, node.eqn):
                continue
            covers = frozenset(trace.between(match.roots, set(match.inputs)))
            refusal = match.refusal or _explicit_sharding(match)
            if refusal is not None:
                plan.report.fallbacks.append(_entry(match.kernel, node, match, refusal))
                refused.setdefault(pattern.kernel, set()).update(covers)
                continue
            covered |= covers
            plan.replacements.append(Replacement(match, covers))
    for node, entry in near:
        if node not in covered and node not in refused.get(entry.kernel, ()) and not left_out(entry.kernel, node.eqn):
            plan.report.missed.append(entry)


def _candidates(graph: Graph, mode: Mode) -> list[Node]:
    """The nodes that may be the root of a match, last first.

    In a whole step these are the ones that depend on a reduction which no differentiation made, for that is what all
    patterns have in common; so the thousands of operations of an optimizer cost no attempts.
    """
    nodes = graph.nodes
    if mode.skip_differentiated:
        nodes = [node for node in nodes if not compat.is_differentiated(node.eqn)]
    if mode.whole_step:
        reduced: set[Value] = set()
        chosen = []
        for node in nodes:
            if not reduced.isdisjoint(node.inputs) or _reduces(node):
                reduced.update(node.outputs)
                chosen.append(node)
        nodes = chosen
    return nodes[::-1]


def _reduces(node: Node) -> bool:
    if node.primitive in _REDUCTIONS:
        return node.outputs[0].shape != ()
    return node.primitive == "custom_jvp_call" or node.primitive in HIGHER_ORDER


def _try(pattern: Pattern, node: Node, plan: Plan, near: list[tuple[Node, Entry]]) -> Match | None:
    try:
        match = pattern.match(node.outputs[0], plan.graph)
        _check_reachable(match)
    except NoMatch as error:
        if error.near:
            near.append((node, _entry(pattern.kernel, node, None, error.reason)))
        return None
    except Exception as error:  # a matcher that fails must not take the user's program down: it is reported
        reason = f"the matcher failed: {type(error).__name__}: {error}"
        plan.report.fallbacks.append(_entry(pattern.kernel, node, None, reason))
        return None
    return match


def _check_reachable(match: Match) -> None:
    for value in (*match.roots, *match.inputs):
        if value.node is not None and value.node.position < 0:
            raise NoMatch("an input exists only inside a function with a custom derivative", near=True)


def _explicit_sharding(match: Match) -> str | None:
    """Why a kernel cannot stand where the arrays' types say how they are sharded, None where it can."""
    if not any(compat.explicit_sharding(value.aval) for value in (*match.inputs, *match.roots)):
        return None
    try:
        types = compat.out_types(compat.trace(match.call, [value.aval for value in match.inputs]))
    except Exception as error:  # JAX has several types of its own for types that do not go together; it is reported
        return f"the explicit shardings do not fit the kernel ({str(error).splitlines()[0]})"
    for root, now in zip(match.roots, types):
        if compat.explicit_sharding(root.aval) != compat.explicit_sharding(now):
            return f"its result is {compat.short_type(root.aval)}, the kernel would give {compat.short_type(now)}"
    return None


def excluded(scopes: str) -> frozenset[str]:
    """The kernels that the functions in these name scopes exclude."""
    return frozenset(name for group in _WITHOUT.findall(scopes) for name in group.strip(".").split("."))


def left_out(kernel: str, eqn: Any) -> bool:
    """True for an equation inside `disabled`, or inside a function of its jaxpr that excludes the kernel."""
    scopes = compat.name_scopes(eqn)
    return "jaxext." in scopes and (SCOPE_OFF in scopes or kernel in excluded(scopes))


def _entry(kernel: str, node: Node, match: Match | None, reason: str = "") -> Entry:
    inputs = match.inputs if match is not None else node.inputs
    return Entry(
        kernel=kernel,
        shapes=tuple(compat.short_type(value.aval) for value in inputs),
        dtype=str(node.outputs[0].dtype),
        source=compat.user_line(node.eqn),
        reason=reason,
        detail=match.detail if match is not None else "",
    )


# ---------------------------------------------------------------- what is left to run


def _by_root(replacements: Sequence[Replacement]) -> dict[Value, Replacement]:
    return {root: replacement for replacement in replacements for root in replacement.match.roots}


def _live(plan: Plan) -> set[Value]:
    """The values that still have to exist."""
    by_root = _by_root(plan.replacements)
    effectful = [node for node in plan.graph.nodes if node.eqn.effects]
    stack = [*plan.graph.outputs, *(value for node in effectful for value in node.inputs)]
    live: set[Value] = set()
    while stack:
        value = stack.pop()
        if value in live:
            continue
        live.add(value)
        if value in by_root:
            stack += by_root[value].match.inputs
        elif value.node is not None:
            stack += value.node.inputs
    return live


def _drop_what_does_not_pay(plan: Plan, mode: Mode) -> set[Value]:
    while True:
        live = _live(plan)
        dropped = _in_cycle(plan) or [r for r in plan.replacements if mode.whole_step and _broken_open(r, live)]
        for replacement in dropped:
            plan.replacements.remove(replacement)
            reason = "values inside it are used elsewhere, so that stock JAX would have to compute them too"
            match = replacement.match
            plan.report.missed.append(_entry(match.kernel, replacement.node, match, reason))
        if not dropped:
            break
    plan.replacements = [r for r in plan.replacements if not live.isdisjoint(r.match.roots)]
    plan.report.replaced += [_entry(r.match.kernel, r.node, r.match) for r in plan.replacements]
    return live


def _broken_open(replacement: Replacement, live: set[Value]) -> bool:
    """True where a node that works on the match's inputs has to run all the same."""
    roots = set(replacement.match.roots)
    derived: set[Value] = set(replacement.match.inputs)
    for node in sorted(replacement.covers, key=lambda node: node.position):
        if not derived.isdisjoint(node.inputs):
            derived.update(node.outputs)
            used = not live.isdisjoint(node.outputs)
            if used and node.primitive not in _LAYOUT and roots.isdisjoint(node.outputs):
                return True
    return False


def _in_cycle(plan: Plan) -> list[Replacement]:
    """A replacement with an input that depends on one of its roots, through the other replacements too."""
    if all(len(replacement.match.roots) == 1 for replacement in plan.replacements):
        return []  # in program order there is no cycle
    by_root = _by_root(plan.replacements)
    for replacement in plan.replacements:
        if len(replacement.match.roots) > 1 and _depends_on_itself(replacement, by_root):
            return [replacement]
    return []


def _depends_on_itself(replacement: Replacement, by_root: dict[Value, Replacement]) -> bool:
    stack, seen = list(replacement.match.inputs), set()
    while stack:
        value = stack.pop()
        if by_root.get(value) is replacement:
            return True
        if value in seen:
            continue
        seen.add(value)
        if value in by_root:
            stack += by_root[value].match.inputs
        elif value.node is not None:
            stack += value.node.inputs
    return False
