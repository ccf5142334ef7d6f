"""One process, many devices: the actions of a schedule are dispatched in the order in which they are predicted to run.

JAX's dispatch is asynchronous, so that one thread keeps all devices busy: an action starts when its inputs are there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..rewrite.trace import Value
from . import compiled as compiling
from .action import Action, Kind
from .compiled import CompiledStep, Function

Watch = Callable[[Action, list[Any]], None]


class _Arrays:
    """The arrays of the step around the loss, by value and stage; one is sent once to each stage that reads it."""

    def __init__(self, devices: Sequence[Any]) -> None:
        self._devices = devices
        self._found: dict[Value, dict[int, Any]] = {}

    def put(self, value: Value, stage: int, array: Any) -> None:
        self._found.setdefault(value, {})[stage] = array

    def get(self, value: Value, stage: int) -> Any:
        if value.const is not None:
            return value.const
        found = self._found[value]
        if stage not in found:
            found[stage] = jax.device_put(next(iter(found.values())), self._devices[stage])
        return found[stage]

    def forget(self, value: Value, stage: int) -> None:
        self._found.get(value, {}).pop(stage, None)


@dataclasses.dataclass
class LastRun:
    """What was seen in the last step: for each rank, the largest number of microbatches whose residuals it held."""

    peak_live: list[int]


class LocalExecutor:
    """Runs a compiled step on devices of this process; `devices`: one for each stage of the loss."""

    def __init__(self, step: CompiledStep, order: Sequence[Action], devices: Sequence[Any]) -> None:
        self._step, self._order, self._devices = step, order, list(devices)
        self._numbers = [
            [jax.device_put(np.int32(m), device) for m in range(step.num_microbatches)] for device in self._devices
        ]
        self._zeros = [self._zero(program.accumulators, n) for n, program in enumerate(step.programs)]
        self._finish = [compiling.finish(step.typing, stage, n) for n, stage in enumerate(step.stages)]
        self._sum = jax.jit(lambda parts, dtype: compiling.combine_gradients(parts, dtype), static_argnums=1)
        self.last_run = LastRun([0] * len(self._devices))

    def _zero(self, types: Sequence[Any], stage: int) -> Any:
        place = jax.sharding.SingleDeviceSharding(self._devices[stage])
        return jax.jit(lambda: [jnp.zeros(t.shape, t.dtype) for t in types], out_shardings=place)

    def __call__(self, inputs: Sequence[Any], watch: Watch | None = None) -> list[Any]:
        """The results of the step for its flat inputs; `watch` is told of each action, and of what it gave."""
        step = self._step
        arrays = _Arrays(self._devices)
        graph = step.captured.graph
        for value, array in zip(graph.inputs, inputs, strict=True):
            stage = step.placement.home(value)
            arrays.put(value, stage, jax.device_put(array, self._devices[stage]))
        self._segments(arrays, before=True)
        self._loss(arrays, watch)
        self._segments(arrays, before=False)
        return [arrays.get(value, step.placement.home(value)) for value in graph.outputs]

    def _segments(self, arrays: _Arrays, before: bool) -> None:
        for segment, function in self._step.segments:
            if segment.before == before:
                self._call(function, arrays, segment.stage)

    def _call(self, function: Function, arrays: _Arrays, stage: int) -> None:
        results = function.run(*(arrays.get(value, stage) for value in function.inputs))
        for number in function.donated:
            arrays.forget(function.inputs[number], stage)
        for value, result in zip(function.outputs, results, strict=True):
            arrays.put(value, stage, result)

    # ------------------------------------------------------------ the loss

    def _loss(self, arrays: _Arrays, watch: Watch | None) -> None:
        step = self._step
        node, loss = step.captured.node, step.captured.loss
        outside = dict(zip(loss.operands, node.inputs))
        inside = dict(zip(step.typing.micro.inputs, node.inputs))
        run = _LossRun(self, [self._prepared(arrays, outside, n) for n in range(step.num_stages)])
        run.parameters = [
            [arrays.get(inside[value], n) for value in stage.parameters] for n, stage in enumerate(step.stages)
        ]
        for action in self._order:
            results = run.act(action)
            if watch is not None:
                watch(action, results)
        self.last_run = LastRun(run.peak)
        count = len(loss.graph.outputs)
        self._results(arrays, run)
        for value, gradient in zip(node.outputs[count:], self._gradients(run), strict=True):
            arrays.put(value, step.placement.home(value), gradient)

    def _prepared(self, arrays: _Arrays, outside: dict[Value, Value], stage: int) -> dict[Value, Any]:
        function = self._step.prepare[stage]
        given = [arrays.get(outside[value], stage) for value in function.inputs]
        return dict(zip(function.outputs, function.run(*given), strict=True))

    def _results(self, arrays: _Arrays, run: _LossRun) -> None:
        step, node = self._step, self._step.captured.node
        last = step.num_stages - 1
        found = _Arrays(self._devices)
        for number, stage in enumerate(step.stages):
            if stage.collected:
                whole = self._finish[number](run.collected[number])
                for value, array in zip(stage.collected, whole, strict=True):
                    found.put(step.typing.pair[value], number, array)
        for value, array in run.data[last].items():
            found.put(value, last, array)
        for value, outside, stage in zip(step.typing.full.inputs, node.inputs, step.homes):
            # A result may be a parameter as it was.
            found.put(value, stage, arrays.get(outside, stage))
        if step.epilogue is not None:
            self._call(step.epilogue, found, last)
        for value, whole in zip(node.outputs, step.typing.full.outputs):
            stage = step.placement.home(value)
            arrays.put(value, stage, found.get(whole, stage))

    def _gradients(self, run: _LossRun) -> list[Any]:
        """The gradients of the parameters, each on the stage where the parameter lives."""
        step = self._step
        parts: dict[Value, list[Any]] = {}
        for number, program in enumerate(step.programs):
            for place, total in zip(program.gradients, run.totals[number], strict=True):
                parts.setdefault(program.stage.parameters[place], []).append(total)
        gradients = []
        for value, home in zip(step.typing.micro.inputs, step.homes):
            if not jnp.issubdtype(value.dtype, jnp.inexact):
                continue
            found = [jax.device_put(part, self._devices[home]) for part in parts.get(value, [])]
            if not found:
                gradients.append(jax.device_put(jnp.zeros(value.shape, value.dtype), self._devices[home]))
            elif len(found) == 1 and found[0].dtype == value.dtype:
                gradients.append(found[0])
            else:
                gradients.append(self._sum(found, value.dtype))
        return gradients


class _LossRun:
    """One pass of all microbatches through the stages."""

    def __init__(self, executor: LocalExecutor, data: list[dict[Value, Any]]) -> None:
        step = executor._step
        self._step, self._devices, self._numbers = step, executor._devices, executor._numbers
        self.data = data
        self._sliced = [[own[step.typing.pair[v]] for v in stage.data] for own, stage in zip(data, step.stages)]
        self.parameters: list[list[Any]] = []
        self.totals = [zero() for zero in executor._zeros]
        self.collected: list[list[list[Any]]] = [[[] for _ in range(step.num_microbatches)] for _ in step.stages]
        self._sent: dict[tuple[int, int], list[Any]] = {}
        self._cotangents: dict[tuple[int, int], list[Any]] = {}
        self._residuals: dict[tuple[int, int], list[Any]] = {}
        self._handed: dict[tuple[int, int], list[Any]] = {}
        self._live = [0] * step.num_stages
        self.peak = [0] * step.num_stages

    def act(self, action: Action) -> list[Any]:
        """Dispatch an action; all arrays that it gives."""
        stage, microbatch = action.stage, action.microbatch
        match action.kind:
            case Kind.F:
                return self._forward(stage, microbatch)
            case Kind.B:
                return self._backward(stage, microbatch)
            case Kind.I:
                return self._input(stage, microbatch)
            case Kind.W:
                return self._weights(stage, microbatch)
        raise ValueError(f"{action.kind} is not for an executor of one process")

    def _forward(self, stage: int, microbatch: int) -> list[Any]:
        program = self._step.programs[stage]
        received = jax.device_put(self._sent.pop((stage - 1, microbatch), []), self._devices[stage])
        number = self._numbers[stage][microbatch]
        arguments = [*self.parameters[stage], *received, *self._sliced[stage], number]
        returned = program.forward(*arguments)
        own = program.stage
        self._sent[stage, microbatch] = returned[: len(own.sends)]
        self.collected[stage][microbatch] = returned[len(own.sends) : len(own.sends) + len(own.collected)]
        self._residuals[stage, microbatch] = program.kept.gather(arguments, returned)
        self._live[stage] += 1
        self.peak[stage] = max(self.peak[stage], self._live[stage])
        return returned

    def _incoming(self, stage: int, microbatch: int) -> list[Any]:
        """Residuals, then the cotangents of what the stage sent."""
        cotangents = jax.device_put(self._cotangents.pop((stage + 1, microbatch), []), self._devices[stage])
        return [*self._residuals[stage, microbatch], *cotangents]

    def _backward(self, stage: int, microbatch: int) -> list[Any]:
        program = self._step.programs[stage]
        incoming = self._incoming(stage, microbatch)
        results = program.backward(*incoming, *self.totals[stage])
        self._cotangents[stage, microbatch] = results[: len(program.float_received)]
        self.totals[stage] = results[len(program.float_received) :]
        self._free(stage, microbatch)
        return results

    def _input(self, stage: int, microbatch: int) -> list[Any]:
        program = self._step.programs[stage]
        incoming = self._incoming(stage, microbatch)
        results = program.cotangents(*incoming)
        self._cotangents[stage, microbatch] = results[: len(program.float_received)]
        self._handed[stage, microbatch] = [*incoming, *results[len(program.float_received) :]]
        return results

    def _weights(self, stage: int, microbatch: int) -> list[Any]:
        program = self._step.programs[stage]
        self.totals[stage] = program.weights(*self._handed.pop((stage, microbatch)), *self.totals[stage])
        self._free(stage, microbatch)
        return self.totals[stage]

    def _free(self, stage: int, microbatch: int) -> None:
        del self._residuals[stage, microbatch]
        self._live[stage] -= 1
