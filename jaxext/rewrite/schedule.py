"""The order in which what is left of a graph runs.

Program order is kept, effects above all. Calls of jitted functions that nothing was replaced in run as the calls they
were: JAX caches their derivatives and their compiled code by call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .trace import Call, Graph, Node, Value

if TYPE_CHECKING:
    from .plan import Replacement

    Step = Node | Call | Replacement


def steps(graph: Graph, replacements: Sequence[Replacement], changed: set[Node], live: set[Value]) -> list[Step]:
    """Steps that compute the graph's outputs.

    `changed`: nodes whose inner functions are exchanged. `live`: the values that have to exist.
    """
    builder = _Builder(graph, replacements, changed, live)
    builder.add(0, len(graph.nodes), graph.calls)
    if any(len(replacement.match.roots) > 1 for replacement in replacements):
        return _by_dependency(builder.steps)
    return builder.steps


class _Builder:
    def __init__(self, graph: Graph, replacements: Sequence[Replacement], changed: set[Node], live: set[Value]) -> None:
        self.steps: list[Step] = []
        self._graph = graph
        self._live = live
        self._needed = {value.node for value in live} | {node for node in graph.nodes if node.eqn.effects}
        self._replaced = {root.node: r for r in replacements for root in r.match.roots}
        self._emitted: set[Replacement] = set()
        touched = {node for node in self._replaced if node is not None} | changed
        self._touched = sorted(node.position for node in touched)
        self._taken = [v for r in replacements for v in r.match.inputs if v.node is not None]

    def add(self, start: int, stop: int, calls: Sequence[Call]) -> None:
        position = start
        for call in calls:
            self._add_nodes(position, call.start)
            position = call.stop
            if self._stays_whole(call):
                if any(node in self._needed for node in self._graph.nodes[call.start : call.stop]):
                    self.steps.append(call)
            else:
                self.add(call.start, call.stop, call.calls)
        self._add_nodes(position, stop)

    def _stays_whole(self, call: Call) -> bool:
        if any(call.start <= position < call.stop for position in self._touched):
            return False
        outputs = set(call.outputs)
        for value in self._taken:
            assert value.node is not None
            if call.start <= value.node.position < call.stop and value not in outputs:
                return False
        return all(value.node is None or value in self._live for value in call.inputs)

    def _add_nodes(self, start: int, stop: int) -> None:
        for node in self._graph.nodes[start:stop]:
            replacement = self._replaced.get(node)
            if replacement is not None and replacement not in self._emitted and self._is_live(replacement):
                self._emitted.add(replacement)
                self.steps.append(replacement)
            if node in self._needed and not (replacement and self._live_only_as_root(node, replacement)):
                self.steps.append(node)

    def _is_live(self, replacement: Replacement) -> bool:
        return not self._live.isdisjoint(replacement.match.roots)

    def _live_only_as_root(self, node: Node, replacement: Replacement) -> bool:
        return not node.eqn.effects and not any(
            value in self._live and value not in replacement.match.roots for value in node.outputs
        )


def reads(step: Step) -> Sequence[Value]:
    return step.inputs if isinstance(step, (Node, Call)) else step.match.inputs


def writes(step: Step) -> Sequence[Value]:
    return step.outputs if isinstance(step, (Node, Call)) else step.match.roots


def _by_dependency(steps: list[Step]) -> list[Step]:
    """`steps`, each moved ahead only as far as a step that needs it; effects stay in their order."""
    producer: dict[Value, int] = {}
    for number, step in enumerate(steps):
        for value in writes(step):
            # Replacements come first, so that a root is taken from its kernel.
            producer.setdefault(value, number)
    ordered: list[Step] = []
    done: set[int] = set()
    previous_effect: int | None = None
    before: dict[int, int] = {}
    for number, step in enumerate(steps):
        if isinstance(step, (Node, Call)) and step.eqn.effects:
            if previous_effect is not None:
                before[number] = previous_effect
            previous_effect = number

    def needs(number: int) -> list[int]:
        found = [producer[value] for value in reads(steps[number]) if value in producer]
        return found + ([before[number]] if number in before else [])

    for number in range(len(steps)):
        stack: list[tuple[int, Any]] = [(number, None)]
        while stack:
            current, pending = stack.pop()
            if current in done:
                continue
            pending = iter(needs(current)) if pending is None else pending
            ahead = next((n for n in pending if n not in done and n != current), None)
            if ahead is None:
                done.add(current)
                ordered.append(steps[current])
            else:
                stack += [(current, pending), (ahead, None)]
    return ordered
