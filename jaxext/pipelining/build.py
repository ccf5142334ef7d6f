"""From a call of a step to its compiled pipeline: capture twice, compile, schedule."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from .. import _jax_compat as compat
from .. import _settings
from ..rewrite.report import Report, collecting
from ..rewrite.trace import Value
from . import arguments, microbatch, schedules, simulate
from .action import Schedule
from .arguments import Call, Options
from .capture import Captured, capture
from .compiled import CompiledStep, compile_step
from .executor import Executor
from .links import Links, ProcessLinks
from .microbatch import Typing
from .plan import PipelinePlan
from .refusal import Refusal
from .simulate import Costs
from .transport import connect

_CHUNKS = {"interleaved_1f1b": 2, "zb_v": 2, "dualpipe_v": 2}
# Microbatches per stage that are aimed at: the bubble of 1F1B is then (p - 1) / (5p - 1) of the step, below a fifth.
_MICROBATCHES_PER_STAGE = 4


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asked for; None: to be chosen."""

    num_stages: int | None
    num_microbatches: int | None
    schedule: str
    num_chunks: int | None
    devices: tuple[Any, ...] | None
    timeout: float = 300.0

    def validate(self) -> None:
        """
        Raises:
          ValueError: a number below 1, an unknown schedule, chunks for a schedule that has none.
        """
        for name in ("num_stages", "num_microbatches", "num_chunks"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"pipeline({name}={value!r}): expected a whole number of at least 1.")
        if self.schedule not in schedules.NAMES:
            raise ValueError(f"pipeline(schedule={self.schedule!r}): expected one of {', '.join(schedules.NAMES)}.")
        if self.num_chunks not in (None, self.chunks()) and self.schedule != "interleaved_1f1b":
            raise ValueError(
                f"pipeline(num_chunks={self.num_chunks}): {self.schedule} has {self.chunks()} a device. "
                "Leave it out, or use schedule='interleaved_1f1b'."
            )

    def chunks(self) -> int:
        if self.schedule == "interleaved_1f1b" and self.num_chunks is not None:
            return self.num_chunks
        return _CHUNKS.get(self.schedule, 1)

    def available(self) -> list[Any]:
        return list(self.devices) if self.devices is not None else jax.devices()

    def ranks(self) -> list[Any]:
        """The devices of the pipeline, in order.

        Raises:
          Refusal: there are fewer than stages.
        """
        devices = self.available()
        wanted = len(devices) if self.num_stages is None else self.num_stages
        if wanted > len(devices):
            raise Refusal(
                f"num_stages={wanted}, but there are {len(devices)} devices",
                "Use fewer stages; on CPU, XLA_FLAGS=--xla_force_host_platform_device_count=N makes N devices.",
            )
        return devices[:wanted]

    def microbatches(self, batch: int, num_ranks: int) -> int:
        """The number of microbatches for so many examples.

        Raises:
          Refusal: the batch cannot be divided so.
        """
        divisors = [m for m in range(1, batch // 2 + 1) if batch % m == 0]
        wanted = self.num_microbatches
        if wanted is None:
            wanted = max((m for m in divisors if m <= _MICROBATCHES_PER_STAGE * num_ranks), default=1)
        if wanted == 1:
            raise Refusal(
                f"a batch of {batch} in one microbatch keeps one device busy at a time",
                "Give a batch that can be divided, or num_microbatches of at least 2.",
            )
        if batch % wanted:
            raise Refusal(
                f"num_microbatches={wanted} does not divide the batch of {batch}",
                f"Use one of {', '.join(map(str, divisors))}.",
            )
        if wanted not in divisors:
            raise Refusal(
                f"num_microbatches={wanted} leaves one example in each microbatch, and an axis of size 1 broadcasts",
                f"Use {max(divisors, default=1)} at most, or a larger batch.",
            )
        return wanted


@dataclasses.dataclass(eq=False)
class Built:
    """A compiled step, its schedule and its plan; `output` is the structure of its results."""

    step: CompiledStep
    schedule: Schedule
    costs: Costs
    plan: PipelinePlan
    output: dict[str, Any]
    devices: list[Any]
    timeout: float
    _executor: Executor | None = None

    def executor(self) -> Executor:
        if self._executor is None:
            order = simulate.global_order(self.schedule, self.costs)
            by_stage = [self.devices[rank] for rank in self.schedule.placement]
            self._executor = Executor(self.step, order, self._links(by_stage))
        return self._executor

    def _links(self, devices: list[Any]) -> Links:
        if len({device.process_index for device in devices}) == 1:
            return Links(devices)
        links = ProcessLinks(devices, connect(self.timeout), self.timeout)
        links.agree(self.plan.to_json())
        return links


def build(step: Callable[..., Any], call: Call, options: Options, request: Request) -> Built:
    """
    Raises:
      Refusal: the step cannot be pipelined.
    """
    name = compat.user_name(step)
    types = call.types
    devices = request.ranks()
    captured = capture(call.run, types, name)
    output = call.output()
    typing, size, microbatches = _divide(call, captured, options, request, name)
    given_up = [captured.graph.inputs[n] for n in arguments.donated(call, options)]
    report = Report()
    settings = _settings.from_environment()
    with collecting(report), _settings.use(settings):
        compiled = compile_step(captured, typing, len(devices) * request.chunks(), microbatches, given_up)
    costs = _costs(compiled)
    schedule = schedules.make(request.schedule, len(devices), microbatches, num_chunks=request.chunks(), costs=costs)
    plan = PipelinePlan.of(name, compiled, schedule, costs, size, report, devices)
    return Built(compiled, schedule, costs, plan, output, devices, request.timeout)


def _divide(call: Call, captured: Captured, options: Options, request: Request, name: str) -> tuple[Typing, int, int]:
    """The loss on a part of the batch beside the loss on the batch, the batch's size, the number of microbatches.

    Where several arguments may be the batch, it is the first whose examples the loss sums over.
    """
    refusals: list[Refusal] = []
    for batch in arguments.batches(call, _reaching(captured), options):
        try:
            count = request.microbatches(batch.size, len(request.ranks()))
            part = batch.size // count
            small = [t.update(shape=(part, *t.shape[1:])) if n in batch.leaves else t for n, t in enumerate(call.types)]
            typing = microbatch.infer(captured.loss.graph, _on_a_part(call, small, name).loss.graph, count)
            microbatch.refuse_unless_sum(typing, captured.loss.name)
        except Refusal as refusal:
            refusals.append(refusal)
        else:
            return typing, batch.size, count
    raise refusals[0]


def _on_a_part(call: Call, types: list[Any], name: str) -> Captured:
    try:
        return capture(call.run, types, name)
    except (TypeError, ValueError) as error:
        if isinstance(error, Refusal):
            raise
        raise Refusal(
            f"the step does not take a smaller batch ({str(error).splitlines()[0]})",
            "Let it take the number of examples from its arguments, or name these: batch_argnames=('batch',).",
        ) from error


def _reaching(captured: Captured) -> list[int]:
    """Inputs of the step that the loss takes without being differentiated in them."""
    count = len(captured.loss.graph.inputs)
    found: set[Value] = set()
    stack = list(captured.node.inputs[count:])
    while stack:
        value = stack.pop()
        if value not in found:
            found.add(value)
            stack += value.node.inputs if value.node is not None else []
    return [number for number, value in enumerate(captured.graph.inputs) if value in found]


def _costs(step: CompiledStep) -> Costs:
    """Relative costs of the stages' passes, the dearest forward pass being 1."""
    largest = max(program.costs[0] for program in step.programs)
    forward, cotangents, weights = (tuple(p.costs[n] / largest for p in step.programs) for n in range(3))
    assert math.isfinite(largest)
    return Costs(forward=forward, backward_input=cotangents, backward_weight=weights)
