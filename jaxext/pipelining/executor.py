"""The actions of a schedule, dispatched in the order in which they are predicted to run.

JAX's dispatch is asynchronous, so that one thread keeps all its devices busy: an action starts when its inputs are
there. With several processes each runs the actions of its own stages, in that same order.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _jax_compat as compat
from ..rewrite.trace import Value
from . import cost, placement
from .action import Action
from .compiled import CompiledStep, Function, combine_gradients
from .links import REMOTE, Links
from .loss_run import LossRun, StageRun, floating_point_error
from .measuring import Stopwatch
from .places import Place
from .simulate import Costs


class _Arrays:
    """The arrays of the step around the loss, by value and stage; one is sent once to each stage that reads it."""

    def __init__(self, links: Links) -> None:
        self._links = links
        self._found: dict[Value, dict[int, Any]] = {}
        self._everywhere: dict[Value, Any] = {}

    def put(self, value: Value, stage: int, array: Any) -> None:
        self._found.setdefault(value, {})[stage] = array

    def put_everywhere(self, value: Value, array: Any) -> None:
        """An array that every process has a copy of."""
        self._everywhere[value] = array

    def is_everywhere(self, value: Value) -> bool:
        return value in self._everywhere

    def get(self, value: Value, stage: int | None) -> Any:
        """The array on that stage's device; None: the copy that every process has."""
        if value.const is not None:
            return value.const
        if stage is None:
            return self._everywhere[value]
        found = self._found.setdefault(value, {})
        if stage not in found:
            if value in self._everywhere:
                local = self._links.is_local(stage)
                found[stage] = self._links.places[stage].put([self._everywhere[value]])[0] if local else REMOTE
            else:
                source, array = next(iter(found.items()))
                (found[stage],) = self._links.move([array], source, stage, f"an array {value.aval} of stage {source}")
        return found[stage]

    def forget(self, value: Value, stage: int) -> None:
        self._found.get(value, {}).pop(stage, None)


@dataclasses.dataclass
class LastRun:
    """What was seen in the last step: for each rank, the largest number of microbatches whose residuals it held."""

    peak_live: list[int]


class Executor:
    """Runs a compiled step; `links`: the device of each stage of the loss, and the way from one to another."""

    def __init__(self, step: CompiledStep, order: Sequence[Action], links: Links) -> None:
        self._step, self._order, self._links, self._places = step, order, links, links.places
        self._local = [links.is_local(n) for n in range(step.num_stages)]
        self._numbers = [
            place.put([np.int32(m) for m in range(step.num_microbatches)]) if local else []
            for place, local in zip(self._places, self._local)
        ]
        self._zeros: dict[Any, Callable[[], list[Any]]] = {}
        self._given_to_all = step.given_to_all
        self.last_run = LastRun([0] * len(self._places))

    def _zero(self, stage: int, parameters: Sequence[Any]) -> list[Any]:
        """A stage's sums of gradients, sharded as its parameters are."""
        program = self._step.programs[stage]
        shardings = [parameters[place].sharding for place in program.gradients]
        key = (stage, *shardings)
        if key not in self._zeros:
            types = program.accumulators
            self._zeros[key] = jax.jit(lambda: [jnp.zeros(t.shape, t.dtype) for t in types], out_shardings=shardings)
        return self._zeros[key]()

    def joined(self, costs: Costs) -> Costs:
        """What was measured here, with what other processes measured and what the links between them cost."""
        sent = [sum(cost.nbytes(value.aval) for value in stage.sends) for stage in self._step.stages]
        return self._links.joined(costs, sent)

    def __call__(self, inputs: Sequence[Any], watch: Stopwatch | None = None) -> list[Any]:
        """The results of the step for its flat inputs; `watch` is told of each action here.

        Raises:
          FloatingPointError: under `jax_debug_nans` or `jax_debug_infs`, naming the action, microbatch and process.
          PeerError: another process is late, has failed or is gone.
        """
        try:
            return self._run(inputs, watch)
        except Exception as error:
            self._links.tell(error)
            raise

    def _run(self, inputs: Sequence[Any], watch: Stopwatch | None) -> list[Any]:
        step = self._step
        arrays = _Arrays(self._links)
        graph = step.captured.graph
        for value, array in zip(graph.inputs, inputs, strict=True):
            self._put_input(arrays, value, array)
        self._segments(arrays, before=True)
        self._loss(arrays, watch)
        self._segments(arrays, before=False)
        return [self._output(arrays, value) for value in graph.outputs]

    def _put_input(self, arrays: _Arrays, value: Value, array: Any) -> None:
        """Small arrays and what the loss takes of the batch are on every process, the rest where it lives."""
        stage = self._step.placement.home(value)
        if value in self._given_to_all or cost.nbytes(value.aval) <= placement.SMALL:
            if not array.is_fully_addressable:
                raise ValueError(
                    f"pipeline: an argument {value.aval} is on another process's device alone, but every process needs "
                    "it. Give each process its own copy of the batch and of frozen parameters."
                )
            arrays.put_everywhere(value, array)
        elif self._local[stage]:
            if not array.is_fully_addressable:
                raise ValueError(
                    f"pipeline: an argument {value.aval} is spread over several processes. Give each process a copy of "
                    "its own, over its own devices, or the results of a step."
                )
            arrays.put(value, stage, self._places[stage].put([array])[0])
        else:
            arrays.put(value, stage, REMOTE)

    def _output(self, arrays: _Arrays, value: Value) -> Any:
        if value.const is not None:
            return jnp.asarray(value.const)
        if arrays.is_everywhere(value):
            return arrays.get(value, None)
        stage = self._step.placement.home(value)
        array = arrays.get(value, stage)
        if cost.nbytes(value.aval) <= placement.SMALL:
            # The next step is compiled for these types: they have to be the same on all processes.
            return compat.with_weak_type(self._links.share(array, stage, value.aval), value.aval)
        return self._links.handle(value.aval, stage) if array is REMOTE else array

    def _segments(self, arrays: _Arrays, before: bool) -> None:
        for segment, function in self._step.segments:
            if segment.before == before:
                self._call(function, arrays, segment.stage)

    def _call(self, function: Function, arrays: _Arrays, stage: int) -> None:
        given = [arrays.get(value, stage) for value in function.inputs]
        with _named(f"what stage {stage} computes around the loss", self._places[stage]):
            results = function.run(*given) if self._local[stage] else [REMOTE] * len(function.outputs)
        for number in function.donated:
            arrays.forget(function.inputs[number], stage)
        for value, result in zip(function.outputs, results, strict=True):
            arrays.put(value, stage, result)

    # ------------------------------------------------------------ the loss

    def _loss(self, arrays: _Arrays, watch: Stopwatch | None) -> None:
        step = self._step
        node, loss = step.captured.node, step.captured.loss
        outside = dict(zip(loss.operands, node.inputs))
        inside = dict(zip(step.typing.micro.inputs, node.inputs))
        data = [self._prepared(arrays, outside, n) for n in range(step.num_stages)]
        parameters = [
            [arrays.get(inside[value], n) for value in stage.parameters] for n, stage in enumerate(step.stages)
        ]
        stages = [self._stage(n, data[n], own) if self._local[n] else None for n, own in enumerate(parameters)]
        run = LossRun(self._links, step.programs, stages)
        for action in self._order:
            run.act(action, watch)
        self.last_run = LastRun([stage.peak if stage is not None else 0 for stage in stages])
        count = len(loss.graph.outputs)
        self._results(arrays, run, data[-1])
        for value, gradient in zip(node.outputs[count:], self._gradients(run), strict=True):
            arrays.put(value, step.placement.home(value), gradient)

    def _stage(self, number: int, data: list[Any], parameters: list[Any]) -> StageRun:
        program = self._step.programs[number]
        parts = data[: len(program.stage.data)]
        return StageRun(program, parameters, parts, self._numbers[number], self._zero(number, parameters))

    def _prepared(self, arrays: _Arrays, outside: dict[Value, Value], stage: int) -> list[Any]:
        function = self._step.prepare[stage]
        given = [arrays.get(outside[value], stage) for value in function.inputs]
        with _named(f"what stage {stage} takes of the batch", self._places[stage]):
            return function.run(*given) if self._local[stage] else [REMOTE] * len(function.outputs)

    def _results(self, arrays: _Arrays, run: LossRun, data: list[Any]) -> None:
        """The loss's results; `data`: what the last stage took of the batch."""
        step, node = self._step, self._step.captured.node
        last = step.num_stages - 1
        found = _Arrays(self._links)
        for number, stage in enumerate(step.stages):
            if stage.collected:
                own = run.stages[number]
                whole = [REMOTE] * len(stage.collected) if own is None else step.finish[number](own.collected)
                for value, array in zip(stage.collected, whole, strict=True):
                    found.put(step.typing.pair[value], number, array)
        for value, array in zip(step.prepare[last].outputs, data):
            found.put(value, last, array)
        for value, outside, stage in zip(step.typing.full.inputs, node.inputs, step.homes):
            # A result may be a parameter as it was.
            found.put(value, stage, arrays.get(outside, stage))
        if step.epilogue is not None:
            self._call(step.epilogue, found, last)
        for value, whole in zip(node.outputs, step.typing.full.outputs):
            stage = step.placement.home(value)
            arrays.put(value, stage, found.get(whole, stage))

    def _gradients(self, run: LossRun) -> list[Any]:
        """The gradients of the parameters, each on the stage where the parameter lives."""
        step = self._step
        parts: dict[Value, list[tuple[int, Any]]] = {}
        for number, (program, own) in enumerate(zip(step.programs, run.stages)):
            totals = [REMOTE] * len(program.gradients) if own is None else own.totals
            for place, total in zip(program.gradients, totals, strict=True):
                parts.setdefault(program.stage.parameters[place], []).append((number, total))
        return [
            self._gradient(value, home, parts.get(value, []))
            for value, home in zip(step.typing.micro.inputs, step.homes)
            if jnp.issubdtype(value.dtype, jnp.inexact)
        ]

    def _gradient(self, value: Value, home: int, parts: Sequence[tuple[int, Any]]) -> Any:
        found = []
        for stage, part in parts:
            found += [part] if stage == home else self._links.move([part], stage, home, f"a gradient {value.aval}")
        if not self._local[home]:
            return REMOTE
        if not found:
            return self._places[home].put([jnp.zeros(value.shape, value.dtype)])[0]
        return found[0] if len(found) == 1 and found[0].dtype == value.dtype else combine_gradients(found, value.dtype)


@contextlib.contextmanager
def _named(what: str, place: Place) -> Iterator[None]:
    try:
        yield
    except FloatingPointError as error:
        raise floating_point_error(what, place, error) from error
