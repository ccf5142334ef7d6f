"""A step, cut and compiled: everything that an executor needs and that does not depend on where it runs."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._accelerate import accelerate
from ..rewrite.trace import Graph, Node, Value
from . import cut, microbatch, placement, program
from .capture import Captured
from .microbatch import Kind, Typing
from .placement import Placement, Segment
from .program import StageProgram
from .spread import Spread
from .stage import Stage, ancestors, function


@dataclasses.dataclass(eq=False)
class Function:
    """A jitted function between values of a graph: (*inputs) → (*outputs)."""

    inputs: list[Value]
    outputs: list[Value]
    run: Callable[..., list[Any]]
    donated: tuple[int, ...] = ()


@dataclasses.dataclass(eq=False)
class CompiledStep:
    """A step in parts.

    Attributes:
      captured: the step on the batch. typing: its loss, and what each value is to a microbatch.
      stages, programs: the stages of the loss. homes: the stage on which each parameter of the loss lives.
      prepare: per stage, from the loss's operands to what its forward pass takes of the batch, in microbatches, as in
        `Spread.parts`; on the last stage, what the epilogue takes of the batch follows.
      finish: per stage, from the collected values of all microbatches to those of the batch.
      epilogue: what of the loss's results needs the whole batch, on the last stage; None where nothing does.
      placement: the segments around the loss. segments: their functions.
    """

    captured: Captured
    typing: Typing
    stages: list[Stage]
    programs: list[StageProgram]
    homes: list[int]
    prepare: list[Function]
    finish: list[Callable[[list[list[Any]]], list[Any]]]
    epilogue: Function | None
    placement: Placement
    segments: list[tuple[Segment, Function]]

    @property
    def given_to_all(self) -> set[Value]:
        """Inputs of the step that the loss takes without being differentiated in them."""
        return set(self.captured.node.inputs[len(self.captured.loss.graph.inputs) :])

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def num_microbatches(self) -> int:
        return self.typing.count


def compile_step(
    captured: Captured, typing: Typing, num_stages: int, spread: Spread, donated: Sequence[Value]
) -> CompiledStep:
    """Cut a captured step.

    typing: of its loss. spread: of its examples. donated: inputs of the step that it may use up.

    Raises:
      Refusal: the loss has too few places to cut.
    """
    stages = cut.cut(typing, num_stages)
    programs = [program.build(s, typing, spread, f"stage{n}") for n, s in enumerate(stages)]
    homes = _homes(typing, stages)
    epilogue = _epilogue(typing)
    more = _data_read_by(epilogue, typing)
    prepare = [
        _prepare(typing, spread, stage, n, more if stage is stages[-1] else ()) for n, stage in enumerate(stages)
    ]
    placed = _place(captured, typing, stages, homes, prepare)
    segments = [(segment, _segment(captured.graph, segment, donated, placed)) for segment in placed.segments]
    finish = [_finish(typing, stage, n) for n, stage in enumerate(stages)]
    return CompiledStep(captured, typing, stages, programs, homes, prepare, finish, epilogue, placed, segments)


def _homes(typing: Typing, stages: Sequence[Stage]) -> list[int]:
    return [
        next((n for n, stage in enumerate(stages) if value in stage.parameters), 0) for value in typing.micro.inputs
    ]


def _jitted(
    nodes: Sequence[Node], inputs: list[Value], outputs: list[Value], name: str, donated: tuple[int, ...] = ()
) -> Function:
    return _named(function(nodes, inputs, outputs), inputs, outputs, name, donated)


def _named(
    run: Callable[..., list[Any]], inputs: list[Value], outputs: list[Value], name: str, donated: tuple[int, ...] = ()
) -> Function:
    run.__name__ = run.__qualname__ = name
    return Function(inputs, outputs, accelerate(run, donate_argnums=donated), donated)


def _prepare(typing: Typing, spread: Spread, stage: Stage, number: int, more: Sequence[Value]) -> Function:
    """What a stage takes of the batch, from the operands of the loss; `more`: values of the whole batch behind it."""
    axes = [typing.types[value].axis for value in stage.data]

    def in_parts(arrays: list[Any]) -> list[Any]:
        divided = [spread.parts(array, axis, typing.count) for array, axis in zip(arrays, axes)]
        return [*divided, *arrays[len(axes) :]]

    outputs = [*(typing.pair[value] for value in stage.data), *more]
    return _from_operands(typing.full, outputs, f"stage{number}_prepare", in_parts)


def _from_operands(graph: Graph, outputs: list[Value], name: str, then: Callable[[list[Any]], list[Any]]) -> Function:
    needed = ancestors(outputs)
    return _closed([node for node in graph.nodes if node in needed], outputs, name, then)


def _closed(
    nodes: Sequence[Node], outputs: list[Value], name: str, then: Callable[[list[Any]], list[Any]] = list
) -> Function:
    """`nodes` as a function of what they and `outputs` take from outside; `then`: what is done to its results."""
    made = {value for node in nodes for value in node.outputs}
    read = dict.fromkeys([*(value for node in nodes for value in node.inputs), *outputs])
    inputs = [value for value in read if value not in made and value.const is None]
    inner = function(nodes, inputs, outputs)
    return _named(lambda *arrays: then(inner(*arrays)), inputs, outputs, name)


def _types_of_batch(typing: Typing) -> dict[Value, microbatch.Type]:
    return {typing.pair[value]: found for value, found in typing.types.items() if value in typing.pair}


def _epilogue(typing: Typing) -> Function | None:
    types = _types_of_batch(typing)
    wanted = [v for v in typing.full.outputs if v.const is None and types[v].kind in (Kind.WHOLE, Kind.DATA)]
    if not wanted:
        return None
    nodes: set[Node] = set()
    stack = [value.node for value in wanted if types[value].kind is Kind.WHOLE]
    while stack:
        node = stack.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            stack += [v.node for v in node.inputs if v.const is None and types[v].kind is Kind.WHOLE]
    return _closed([node for node in typing.full.nodes if node in nodes], wanted, "whole_batch")


def _data_read_by(epilogue: Function | None, typing: Typing) -> list[Value]:
    types = _types_of_batch(typing)
    return [] if epilogue is None else [value for value in epilogue.inputs if types[value].kind is Kind.DATA]


def _place(
    captured: Captured, typing: Typing, stages: Sequence[Stage], homes: list[int], prepare: Sequence[Function]
) -> Placement:
    loss, node = captured.loss, captured.node
    count = len(loss.graph.outputs)
    anchors: dict[Value, int] = {}
    by_parameter = dict(zip(loss.graph.inputs, homes))
    for value, operand in zip(node.inputs, loss.operands):
        if operand in by_parameter and value.const is None:
            anchors[value] = by_parameter[operand]
    for value, parameter in zip(node.outputs[count:], loss.gradients, strict=True):
        anchors[value] = by_parameter[parameter]
    for value, output in zip(node.outputs[:count], typing.micro.outputs, strict=True):
        made = next((n for n, stage in enumerate(stages) if output in stage.collected), len(stages) - 1)
        anchors[value] = made
    needs = {operand: [n for n, own in enumerate(prepare) if operand in own.inputs] for operand in loss.closed_over}
    operands = {v: needs[op] for v, op in zip(node.inputs, loss.operands) if op in needs and v.const is None}
    return placement.place(captured.graph, node, anchors, operands)


def _segment(graph: Graph, segment: Segment, donated: Sequence[Value], placed: Placement) -> Function:
    """The function of a segment; it uses up what nobody reads after it, where a result of the same type can take it."""
    name = f"update{segment.phase}_stage{segment.stage}"
    if segment.before:
        return _jitted(segment.nodes, segment.inputs, segment.outputs, f"before_{name}")
    later = placed.segments[placed.segments.index(segment) + 1 :]
    kept = {value for other in later for value in other.inputs} | set(graph.outputs)
    room: list[tuple[Any, Any]] = [(value.shape, value.dtype) for value in segment.outputs]
    free = []
    for number, value in enumerate(segment.inputs):
        usable = value in donated or (value.node is not None and value.node.primitive == "jaxext_loss")
        kind = (getattr(value.aval, "shape", ()), getattr(value.aval, "dtype", None))
        if usable and value not in kept and kind in room:
            room.remove(kind)
            free.append(number)
    return _jitted(segment.nodes, segment.inputs, segment.outputs, name, tuple(free))


def combine(kind: Kind, axis: int | None, parts: Sequence[Any]) -> Any:
    """The value of the batch from those of the microbatches."""
    if kind is Kind.SUM:
        return functools.reduce(operator.add, parts)
    return parts[-1] if axis is None else jnp.concatenate(parts, axis)


def _finish(typing: Typing, stage: Stage, number: int) -> Callable[[list[list[Any]]], list[Any]]:
    """The function from the collected values of all microbatches to those of the batch."""
    types: list[tuple[Kind, int | None]] = [(typing.types[v].kind, typing.types[v].axis) for v in stage.collected]

    def run(microbatches: list[list[Any]]) -> list[Any]:
        return [combine(kind, axis, parts) for (kind, axis), parts in zip(types, zip(*microbatches))]

    run.__name__ = run.__qualname__ = f"stage{number}_finish"
    return jax.jit(run)


@functools.partial(jax.jit, static_argnums=1)
def combine_gradients(parts: Sequence[Any], dtype: Any) -> Any:
    """The gradient of a parameter from those of the stages that use it."""
    return functools.reduce(operator.add, parts).astype(dtype)
