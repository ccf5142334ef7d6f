"""What a stage keeps of its forward pass for its backward pass: nothing that it has anyway or makes again for little.

`jax.vjp` keeps whatever the derivatives multiply with, such as 1 - tanh(x)² beside tanh(x) that the next product wants.
XLA makes such a value again inside the operation that reads it, where both passes are one program; passes apart would
write and read it, and hold it for every microbatch that is under way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from ..rewrite import trace
from ..rewrite.trace import Graph, Value
from . import cost
from .stage import function

# Arithmetic that costs less than reading its result, and moves of elements that XLA makes part of what reads them.
_CHEAP = frozenset(
    ("abs", "add", "add_any", "and", "broadcast_in_dim", "convert_element_type", "eq", "ge", "gt", "integer_pow", "le",
     "lt", "max", "min", "mul", "ne", "neg", "not", "one_minus_square", "or", "reshape", "select_n", "sign", "square",
     "squeeze", "sub")
)  # fmt: skip
# Operations that one residual may be made by, so that making it stays cheaper than reading it.
_MOST = 8


@dataclasses.dataclass(eq=False)
class Kept:
    """The arrays that a forward pass leaves for the backward pass.

    sources: where they come from, its arguments, by number, or what it returned, by number.
    all: (*kept) → the residuals of `jax.vjp`, in its order.
    """

    sources: list[tuple[bool, int]]
    all: Callable[..., list[Any]]

    def gather(self, arguments: Sequence[Any], returned: Sequence[Any]) -> list[Any]:
        return [arguments[number] if given else returned[number] for given, number in self.sources]


def reduced(closed: Any, parameters: int, plain: int) -> tuple[Callable[..., list[Any]], Kept, list[Any]]:
    """A forward function, (*parameters, …) → (*plain results, *residuals), that returns only the residuals it has to.

    `parameters`, `plain`: their numbers. Also what is kept for its backward pass, and its types.
    """
    graph = trace.build(closed)
    residuals = list(dict.fromkeys(graph.outputs[plain:]))
    permanent = graph.inputs[:parameters]
    kept = _wanted(graph, residuals, permanent, graph.outputs[:plain])
    nodes = trace.between(residuals, kept)
    read = dict.fromkeys([*residuals, *(value for node in nodes for value in node.inputs)])
    stored = [value for value in read if value in kept]
    given = {value: number for number, value in enumerate(graph.inputs)}
    returned: dict[Value, int] = {}
    outputs = list(graph.outputs[:plain])
    for number, value in enumerate(outputs):
        returned.setdefault(value, number)
    sources = []
    for value in stored:
        if value in given:
            sources.append((True, given[value]))
            continue
        if value not in returned:
            returned[value] = len(outputs)
            outputs.append(value)
        sources.append((False, returned[value]))
    again = [node for node in graph.nodes if node in nodes]
    remade = function(again, stored, graph.outputs[plain:], graph.captures)
    forward = function(graph.nodes, graph.inputs, outputs, graph.captures)
    return forward, Kept(sources, remade), [value.aval for value in stored]


def _wanted(
    graph: Graph, residuals: Sequence[Value], permanent: Sequence[Value], results: Sequence[Value]
) -> set[Value]:
    """Residuals that cannot be made cheaply from others, from `permanent`, which are there at any time, or `results`.

    And all that they may be made from.
    """
    free = {*residuals, *permanent}
    kept = {*free, *results}
    # From the last to the first: what one is made from is made before it.
    for value in sorted((v for v in residuals if v.node is not None), key=_position, reverse=True):
        if value in results:
            continue
        kept.discard(value)
        if not _is_cheap(graph, value, kept, free):
            kept.add(value)
    return kept


def _position(value: Value) -> int:
    assert value.node is not None
    return value.node.position


def _is_cheap(graph: Graph, value: Value, kept: set[Value], free: set[Value]) -> bool:
    """True where `value` is made from `kept` by a few cheap operations that read no more than it takes to keep it.

    What they read besides `free` is kept instead of it, and has to be no larger.
    """
    nodes = trace.between([value], kept)
    if len(nodes) > _MOST or any(node.primitive not in _CHEAP for node in nodes):
        return False
    read = {operand for node in nodes for operand in node.inputs}
    starts = {operand for operand in read if operand in kept or operand.node is None}
    if any(start not in kept and start.const is None and start not in graph.captures for start in starts):
        return False
    size = cost.nbytes(value.aval)
    instead = sum(cost.nbytes(start.aval) for start in starts if start in kept and start not in free)
    return instead <= size and sum(cost.nbytes(start.aval) for start in starts) <= 2 * size
