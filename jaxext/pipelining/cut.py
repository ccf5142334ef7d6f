"""Cutting a loss into stages of equal cost at narrow places.

Dynamic programming over the operations in program order, as in Alpa (Zheng et al. 2022) and PipeDream (Narayanan et al.
2019): the largest share of the cost plus a price for the bytes that cross. What depends on parameters alone is not cut
but repeated wherever it is used. A scan over layers can be cut between any two layers.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

import numpy as np

from .. import _jax_compat as compat
from ..rewrite.trace import Node, Value
from . import cost, rows
from .microbatch import Kind, Typing
from .refusal import Refusal
from .stage import Join, Layers, Operation, Stage

# What a cut of the median width costs, as a share of the whole loss.
_CUT_PRICE = 0.02
_LAYER = re.compile(r"[\w./]+")


@dataclasses.dataclass(eq=False)
class _Item:
    """An operation in the order that is cut; `layer`: which layer of a scan it is, None for a plain operation."""

    node: Node
    cost: float
    layer: int | None = None


def wanted(typing: Typing) -> list[Value]:
    """Values of the loss that a microbatch has to give: its outputs, and what of it the whole batch is needed for."""
    found: dict[Value, None] = {}
    stack = list(typing.micro.outputs)
    seen: set[Value] = set(typing.micro.inputs)
    while stack:
        value = stack.pop()
        if value in seen or value.const is not None:
            continue
        seen.add(value)
        kind = typing.types[value].kind
        if kind is Kind.WHOLE and value.node is not None:
            stack += value.node.inputs
        elif kind is not Kind.DATA:
            found[value] = None
    return [value for value in found]


def cut(typing: Typing, num_stages: int) -> list[Stage]:
    """The stages of a loss.

    Raises:
      Refusal: it has fewer places to cut than stages.
    """
    collected = wanted(typing)
    order = _order(typing, collected)
    widths = _widths(typing, order)
    ends = _choose(order, widths, num_stages)
    return _stages(typing, order, ends, collected)


def _live(typing: Typing, collected: Iterable[Value]) -> set[Node]:
    live: set[Node] = set()
    stack = list(collected)
    while stack:
        node = stack.pop().node
        if node is not None and node not in live and typing.types[node.outputs[0]].kind is not Kind.DATA:
            live.add(node)
            stack += node.inputs
    return live


def _kind(typing: Typing, node: Node) -> Kind:
    return max(typing.types[value].kind for value in node.outputs)


def _order(typing: Typing, collected: list[Value]) -> list[_Item]:
    live = _live(typing, collected)
    items: list[_Item] = []
    for node in typing.micro.nodes:
        if node not in live or _kind(typing, node) is Kind.PARAMETER:
            continue
        length = node.params["length"] if node.primitive == "scan" else 1
        whole = cost.of_node(node)
        layers = range(length) if length > 1 else [None]
        items += [_Item(node, whole / length, layer) for layer in layers]
    return items


def _widths(typing: Typing, order: list[_Item]) -> list[int]:
    """Bytes that would cross a cut after each item."""
    crosses = {Kind.ROW, Kind.SUM}
    last: dict[Value, int] = {}
    for place, item in enumerate(order):
        for value in item.node.inputs:
            last[value] = place
    here, alive, widths = 0, dict[Value, int](), []
    for place, item in enumerate(order):
        within = 0
        if item.layer is not None:
            constants, carry = compat.scan_counts(item.node.params)
            within = sum(cost.nbytes(v.aval) for v in item.node.inputs[constants : constants + carry])
        if item.layer is None or item.layer == item.node.params["length"] - 1:
            within = 0
            alive.update((v, last[v]) for v in item.node.outputs if last.get(v, -1) > place)
        alive = {value: end for value, end in alive.items() if end > place}
        here = sum(cost.nbytes(value.aval) for value in alive if typing.types[value].kind in crosses)
        widths.append(here + within)
    return widths


def _choose(order: list[_Item], widths: list[int], num_stages: int) -> list[int]:
    """The ends of the stages, as places in the order."""
    count = len(order)
    total = np.cumsum([0.0, *(item.cost for item in order)])
    share = total / max(total[-1], 1.0)
    middle = [width for width, end in zip(widths, share[1:]) if 0.5 / num_stages <= end <= 1 - 0.5 / num_stages]
    median = float(np.median(middle or widths)) or 1.0
    places = [place + 1 for place in range(count - 1) if widths[place] <= median]
    if len(places) < num_stages - 1:
        raise Refusal(
            f"num_stages={num_stages}, but the loss can be cut in {len(places) + 1} at most",
            f"Use at most {len(places) + 1} stages.",
        )
    return _dynamic_program(share, [0, *places, count], [0, *(widths[p - 1] / median for p in places), 0], num_stages)


def _dynamic_program(share: np.ndarray, places: list[int], prices: list[float], num_stages: int) -> list[int]:
    """Stages that end at some of `places`, so that largest share + price of the cuts is least."""
    at = np.asarray([share[place] for place in places])
    price = _CUT_PRICE * np.asarray(prices)
    # For each place: the largest share and the price of the best way there, by number of stages.
    largest, paid = np.where(np.arange(len(places)) == 0, 0.0, np.inf), np.zeros(len(places))
    back: list[np.ndarray] = []
    for _ in range(num_stages):
        width = at[None, :] - at[:, None]
        worst = np.maximum(largest[:, None], np.where(width > 0, width, np.inf))
        score = worst + paid[:, None]
        chosen = np.argmin(score, axis=0)
        columns = np.arange(len(places))
        largest, paid = worst[chosen, columns], paid[chosen] + price
        back.append(chosen)
    ends, place = [], len(places) - 1
    for chosen in reversed(back):
        ends.append(places[place])
        place = int(chosen[place])
    return ends[::-1]


# ---------------------------------------------------------------- from cuts to stages


def _stages(typing: Typing, order: list[_Item], ends: list[int], collected: list[Value]) -> list[Stage]:
    groups = [order[start:end] for start, end in zip([0, *ends], ends)]
    operations = _operations(typing, groups)
    constant = _constant(typing)
    last = len(groups) - 1
    made: dict[Value, int] = {}
    stages = []
    for number, own in enumerate(operations):
        own_collected = [v for v in collected if v.node is not None and _made_here(v, own)]
        if number == last:
            own_collected += [v for v in collected if typing.types[v].kind is Kind.PARAMETER]
        needed = [*(v for op in own for v in op.inputs), *own_collected]
        everything = [*_repeated(typing, needed, constant), *own]
        made.update((value, number) for op in own for value in op.outputs)
        parameters, data = _reads(typing, everything, own_collected, constant)
        spent = sum(item.cost for item in groups[number])
        stage = Stage(everything, parameters, data, [], [], own_collected, spent, *_described(groups[number]))
        stages.append(stage)
    _connect(stages, operations, made)
    return stages


def _made_here(value: Value, operations: list[Operation]) -> bool:
    return any(value in op.outputs for op in operations)


def _operations(typing: Typing, groups: list[list[_Item]]) -> list[list[Operation]]:
    carried: dict[Node, list[Value]] = {}
    chunks: dict[Node, list[Value]] = {}
    found: list[list[Operation]] = []
    for group in groups:
        own: list[Operation] = []
        for place, item in enumerate(group):
            if item.layer is None:
                own.append(item.node)
            elif place == 0 or group[place - 1].node is not item.node:
                layers = [other.layer for other in group if other.node is item.node and other.layer is not None]
                own += _layers(typing, item.node, layers[0], layers[-1] + 1, carried, chunks)
        found.append(own)
    return found


def _layers(
    typing: Typing,
    node: Node,
    start: int,
    stop: int,
    carried: dict[Node, list[Value]],
    chunks: dict[Node, list[Value]],
) -> list[Operation]:
    length = node.params["length"]
    if (start, stop) == (0, length):
        return [node]
    constants, carry = compat.scan_counts(node.params)
    incoming = carried.get(node, node.inputs[constants : constants + carry])
    last = stop == length
    outgoing = node.outputs[:carry] if last else [_like(typing, v, v.aval) for v in node.outputs[:carry]]
    results = [_like(typing, v, v.aval.update(shape=(stop - start, *v.aval.shape[1:]))) for v in node.outputs[carry:]]
    carried[node] = outgoing
    chunks.setdefault(node, []).extend(results)
    inputs = [*node.inputs[:constants], *incoming, *node.inputs[constants + carry :]]
    piece = Layers(node, start, stop, inputs, [*outgoing, *results])
    if last and results:
        return [piece, Join(node, chunks[node], node.outputs[carry:])]
    return [piece]


def _like(typing: Typing, value: Value, aval: object) -> Value:
    new = Value(aval)
    typing.types[new] = typing.types[value]
    return new


def _constant(typing: Typing) -> set[Node]:
    """Operations that depend on no argument at all and are alike for all examples, as those that make a causal mask."""
    found: set[Node] = set()
    for node, full in zip(typing.micro.nodes, typing.full.nodes):
        known = all(value.const is not None or value.node in found for value in node.inputs)
        if known and not node.eqn.effects and _alike(typing, node, full):
            found.add(node)
    return found


def _alike(typing: Typing, node: Node, full: Node) -> bool:
    """True where all rows of a result are the same, those of the operands being so."""
    axes = [typing.types[value].axis for value in node.inputs]
    results = [typing.types[value].axis for value in node.outputs]
    if all(axis is None for axis in (*axes, *results)):
        return True
    if node.primitive == "iota":
        return node.params["dimension"] != results[0]
    return all(rows.rule(node, full, axes, axis) == rows.ROWS for axis in results)


def _repeated(typing: Typing, needed: Iterable[Value], constant: set[Node]) -> list[Node]:
    """What these values need of operations on parameters alone and on nothing, in program order."""
    found: set[Node] = set()
    stack = list(needed)
    while stack:
        value = stack.pop()
        node = value.node
        if node is None or node in found:
            continue
        if typing.types[value].kind is Kind.PARAMETER or node in constant:
            found.add(node)
            stack += node.inputs
    return sorted(found, key=lambda node: node.position)


def _reads(
    typing: Typing, operations: list[Operation], collected: list[Value], constant: set[Node]
) -> tuple[list[Value], list[Value]]:
    parameters: dict[Value, None] = {}
    data: dict[Value, None] = {}
    inputs = set(typing.micro.inputs)
    for value in (*(v for op in operations for v in op.inputs), *collected):
        if value in inputs:
            parameters[value] = None
        elif value.const is None and typing.types[value].kind is Kind.DATA and value.node not in constant:
            data[value] = None
    return list(parameters), list(data)


def _connect(stages: list[Stage], operations: list[list[Operation]], made: dict[Value, int]) -> None:
    """What crosses: a value goes through every stage from where it is made to where it is last used."""
    until: dict[Value, int] = {}
    for number, own in enumerate(operations):
        for op in own:
            for value in op.inputs:
                if made.get(value, number) < number:
                    until[value] = number
    for value, end in until.items():
        for number in range(made[value], end):
            stages[number].sends.append(value)
            stages[number + 1].receives.append(value)


def _described(group: list[_Item]) -> tuple[tuple[str, str], tuple[str, ...]]:
    """The lines and the name scopes of the costly operations."""
    heavy = set(sorted(group, key=lambda item: item.cost)[-max(1, len(group) // 4) :])
    chosen = [item.node.eqn for item in group if item in heavy]
    lines = [line for eqn in chosen if (line := compat.user_line(eqn))]
    # Transformations and the equations of einsum are scopes too, but no layers.
    scopes = [scope for eqn in chosen if _LAYER.fullmatch(scope := compat.name_scopes(eqn))]
    return (lines[0], lines[-1]) if lines else ("", ""), tuple(dict.fromkeys(scopes))
