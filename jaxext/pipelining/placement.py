"""Where the rest of a step runs: what prepares the loss's arguments, and the update of the optimizer.

A parameter lives on the first stage that uses it. Arrays of its shape that elementwise operations tie to it (moments,
averages, its gradient) live there too, and so does the update of that leaf. Numbers that several stages contribute to,
such as a global norm, are put together on stage 0. Small values that hang on no stage (step counts, learning rates) are
computed wherever they are needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ..rewrite.trace import Graph, Node, Value
from . import cost
from .stage import ancestors

ANYWHERE = -1
# Up to so many bytes, computing again is cheaper than sending.
SMALL = 1 << 16


@dataclasses.dataclass(eq=False)
class Segment:
    """Operations that one stage's device runs at a time, between transfers.

    `before`: ahead of the loss. `phase`: segments of a later phase may take what another stage made in an earlier one.
    """

    before: bool
    phase: int
    stage: int
    nodes: list[Node]
    inputs: list[Value] = dataclasses.field(default_factory=list)
    outputs: list[Value] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False)
class Placement:
    """The segments of a step, in an order in which they can run. `homes`: the stage on which a value lives."""

    segments: list[Segment]
    homes: dict[Value, int]

    def home(self, value: Value) -> int:
        """The stage where an input or result of the step is kept."""
        return max(0, self.homes.get(value, 0))


def place(graph: Graph, loss: Node, anchors: Mapping[Value, int], operands: Mapping[Value, Sequence[int]]) -> Placement:
    """Place the operations of a step around its loss.

    anchors: values that live on a certain stage (parameters, gradients, results of the loss).
    operands: for other operands of the loss, the stages that need them.
    """
    homes = _homes(graph, loss, anchors, operands)
    before = ancestors(loss.inputs)
    where = _nodes(graph, loss, homes)
    needed = ancestors(graph.outputs) | before
    segments: dict[tuple[bool, int, int], Segment] = {}
    phases: dict[Node, int] = {}
    for node in graph.nodes:
        if node is loss or (node not in needed and not node.eqn.effects) or where[node] == ANYWHERE:
            continue
        phases[node] = max((_phase_after(value, node, loss, where, phases) for value in node.inputs), default=0)
        key = (node in before, phases[node], where[node])
        segments.setdefault(key, Segment(*key, nodes=[])).nodes.append(node)
    _place_the_rest(graph, loss, where, segments)
    ordered = sorted(segments.values(), key=lambda s: (not s.before, s.phase, s.stage))
    for segment in ordered:
        segment.nodes = _with_what_is_anywhere(segment.nodes, where)
    _connect(graph, loss, ordered, homes)
    return Placement(ordered, homes)


# ---------------------------------------------------------------- homes of values


class _Classes:
    """Sets of values that live together (union-find); a set has one home at most."""

    def __init__(self, anchors: Mapping[Value, int]) -> None:
        self._parent: dict[Value, Value] = {}
        self._home = dict(anchors)

    def find(self, value: Value) -> Value:
        path = []
        while value in self._parent:
            path.append(value)
            value = self._parent[value]
        for passed in path:
            self._parent[passed] = value
        return value

    def home(self, value: Value) -> int | None:
        return self._home.get(self.find(value))

    def unite(self, a: Value, b: Value) -> None:
        a, b = self.find(a), self.find(b)
        if a is b:
            return
        homes = {self._home[x] for x in (a, b) if x in self._home}
        if len(homes) < 2:
            self._parent[b] = a
            if homes:
                self._home[a] = homes.pop()


def _is_large(value: Value) -> bool:
    return value.const is None and len(getattr(value.aval, "shape", ())) > 0


def _homes(
    graph: Graph, loss: Node, anchors: Mapping[Value, int], operands: Mapping[Value, Sequence[int]]
) -> dict[Value, int]:
    fixed = dict(anchors)
    for value, stages in operands.items():
        fixed.setdefault(value, min(stages, default=0))
    classes = _Classes(fixed)
    for node in graph.nodes:
        if node is loss:
            continue
        large = [value for value in (*node.inputs, *node.outputs) if _is_large(value)]
        for value in large[1:]:
            if value.shape == large[0].shape:
                classes.unite(large[0], value)
    values = [*graph.inputs, *graph.captures, *(value for node in graph.nodes for value in node.outputs)]
    return {value: home for value in values if (home := classes.home(value)) is not None}


def _nodes(graph: Graph, loss: Node, homes: dict[Value, int]) -> dict[Node, int]:
    """The stage of each node, ANYWHERE for small ones that hang on none; completes `homes`."""
    where: dict[Node, int] = {}
    for node in graph.nodes:
        if node is loss:
            continue
        own = [homes[value] for value in node.outputs if _is_large(value) and value in homes]
        stage = own[0] if own else _by_inputs(node, homes)
        where[node] = stage
        if stage != ANYWHERE:
            for value in node.outputs:
                homes.setdefault(value, stage)
    return where


def _by_inputs(node: Node, homes: Mapping[Value, int]) -> int:
    placed = [value for value in node.inputs if value in homes]
    large = [value for value in placed if _is_large(value)]
    if large:
        return homes[max(large, key=lambda value: cost.nbytes(value.aval))]
    if placed:
        stages = {homes[value] for value in placed}
        return stages.pop() if len(stages) == 1 else 0
    small = all(cost.nbytes(value.aval) <= SMALL for value in node.outputs)
    return ANYWHERE if small and not node.eqn.effects else 0


# ---------------------------------------------------------------- segments


def _phase_after(value: Value, node: Node, loss: Node, where: Mapping[Node, int], phases: Mapping[Node, int]) -> int:
    """The earliest phase in which `node` can have `value`."""
    made = value.node
    if made is None or made is loss or where[made] == ANYWHERE:
        return 0
    return phases[made] + (where[made] != where[node])


def _place_the_rest(
    graph: Graph, loss: Node, where: Mapping[Node, int], segments: dict[tuple[bool, int, int], Segment]
) -> None:
    """What is anywhere and wanted from outside of the segments, by the loss or as a result, runs on stage 0."""
    for before, values in ((True, loss.inputs), (False, graph.outputs)):
        nodes = {v.node for v in values if v.node is not None and v.node is not loss and where[v.node] == ANYWHERE}
        if nodes:
            key = (before, 0, 0)
            segment = segments.setdefault(key, Segment(*key, nodes=[]))
            segment.nodes += [node for node in nodes if node not in segment.nodes]


def _with_what_is_anywhere(nodes: Sequence[Node], where: Mapping[Node, int]) -> list[Node]:
    found = set(nodes)
    stack = [value for node in nodes for value in node.inputs]
    while stack:
        node = stack.pop().node
        if node is not None and node not in found and where.get(node) == ANYWHERE:
            found.add(node)
            stack += node.inputs
    return sorted(found, key=lambda node: node.position)


def _connect(graph: Graph, loss: Node, segments: Sequence[Segment], homes: dict[Value, int]) -> None:
    wanted = {value for value in (*graph.outputs, *loss.inputs) if value.const is None}
    made_in: dict[Value, list[Segment]] = {}
    for segment in segments:
        made = {value for node in segment.nodes for value in node.outputs}
        read = dict.fromkeys(value for node in segment.nodes for value in node.inputs)
        segment.inputs = [value for value in read if value not in made and value.const is None]
        wanted.update(segment.inputs)
        for value in made:
            made_in.setdefault(value, []).append(segment)
    for value, makers in made_in.items():
        # What is anywhere is made in many segments; outside of them one of them gives it.
        if value in wanted:
            makers[0].outputs.append(value)
            homes.setdefault(value, makers[0].stage)
