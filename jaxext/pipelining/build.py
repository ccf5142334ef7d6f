"""From a call of a step to its compiled pipeline: capture twice, compile, schedule."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType

from .. import _jax_compat as compat
from .. import _settings
from ..rewrite.report import Report, collecting
from ..rewrite.trace import Value
from . import arguments, microbatch, places, schedules, simulate
from .arguments import Call, Options
from .capture import Captured, capture
from .compiled import CompiledStep, compile_step
from .executor import Executor
from .links import Links, ProcessLinks
from .microbatch import Typing
from .places import Place, Single, Slice
from .plan import PipelinePlan
from .refusal import Refusal
from .simulate import Costs
from .spread import Spread, of_batch
from .transport import connect
from .validate import validate

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
    mesh: Any = None
    axis: str = "stage"
    timeout: float = 300.0

    def validate(self) -> None:
        """
        Raises:
          ValueError: a number below 1, an unknown schedule, chunks for a schedule that has none, a mesh without `axis`.
          TypeError: `mesh` is no mesh of devices.
        """
        self._validate_mesh()
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

    def _validate_mesh(self) -> None:
        if self.mesh is None:
            if self.axis != "stage":
                raise ValueError(f"pipeline(axis={self.axis!r}): there is no mesh. Give it: mesh=jax.make_mesh(…).")
            return
        if not isinstance(self.mesh, jax.sharding.Mesh):
            raise TypeError(f"pipeline(mesh={self.mesh!r}): expected a jax.sharding.Mesh of devices.")
        if self.devices is not None:
            raise ValueError("pipeline(devices=…, mesh=…): each says where the stages run. Give one of them.")
        shape = dict(self.mesh.shape)
        if self.axis not in shape:
            raise ValueError(
                f"pipeline(axis={self.axis!r}): expected an axis of the mesh, which has {', '.join(map(repr, shape))}. "
                "Name the one that the stages lie along."
            )
        if self.num_stages not in (None, shape[self.axis]):
            raise ValueError(
                f"pipeline(num_stages={self.num_stages}): expected {shape[self.axis]}, as the mesh has along "
                f"{self.axis!r}. Leave it out, or make another mesh."
            )

    def chunks(self) -> int:
        if self.schedule == "interleaved_1f1b" and self.num_chunks is not None:
            return self.num_chunks
        return _CHUNKS.get(self.schedule, 1)

    def available(self) -> list[Any]:
        if self.mesh is not None:
            return list(self.mesh.devices.flat)
        return list(self.devices) if self.devices is not None else jax.devices()

    def ranks(self) -> list[Place]:
        """Where the ranks of the pipeline are, in order.

        Raises:
          Refusal: there are fewer devices than stages, or those of a stage belong to several processes.
        """
        if self.mesh is not None:
            return places.slices(self.mesh, self.axis)
        devices = self.available()
        wanted = len(devices) if self.num_stages is None else self.num_stages
        if wanted > len(devices):
            raise Refusal(
                f"num_stages={wanted}, but there are {len(devices)} devices",
                "Use fewer stages; on CPU, XLA_FLAGS=--xla_force_host_platform_device_count=N makes N devices.",
            )
        return [Single(device) for device in devices[:wanted]]

    def undivided(self) -> Place:
        """Where the step runs as one."""
        if self.mesh is None:
            return Single(self.available()[0])
        return Slice(self.mesh.update(axis_types=(AxisType.Auto,) * len(self.mesh.axis_names)), self.axis)

    def microbatches(self, batch: int, num_ranks: int, spread: Spread) -> int:
        """The number of microbatches for so many examples.

        Raises:
          Refusal: the batch cannot be divided so.
        """
        divisors = [m for m in range(1, batch // 2 + 1) if batch % (m * spread.size) == 0]
        wanted = self.num_microbatches
        if wanted is None:
            wanted = max((m for m in divisors if m <= _MICROBATCHES_PER_STAGE * num_ranks), default=1)
        if wanted == 1:
            raise Refusal(
                f"a batch of {batch} in one microbatch keeps one device busy at a time",
                "Give a batch that can be divided, or num_microbatches of at least 2.",
            )
        if batch % (wanted * spread.size):
            over = f" over {spread.size} devices along {', '.join(spread.axes)}" if spread.size > 1 else ""
            raise Refusal(
                f"num_microbatches={wanted} does not divide the batch of {batch}{over}",
                f"Use one of {', '.join(map(str, divisors))}." if divisors[1:] else "Give a larger batch.",
            )
        if wanted not in divisors:
            raise Refusal(
                f"num_microbatches={wanted} leaves one example in each microbatch, and an axis of size 1 broadcasts",
                f"Use {max(divisors, default=1)} at most, or a larger batch.",
            )
        return wanted


@dataclasses.dataclass(eq=False)
class Built:
    """A compiled step, its schedule and its plan; `output` is the structure of its results.

    `counted`, `measured`: the costs of its stages' passes; the schedule is made for the latter where there are any.
    """

    step: CompiledStep
    request: Request
    places: list[Place]
    output: dict[str, Any]
    name: str
    batch: int
    report: Report
    counted: Costs
    measured: Costs | None

    def __post_init__(self) -> None:
        self.replan(self.measured)

    def replan(self, measured: Costs | None) -> None:
        """Schedule and plan for these costs; the stages stay compiled."""
        self.measured = measured
        self.costs = measured or self.counted
        self.schedule = schedules.make(
            self.request.schedule, len(self.places), self.step.num_microbatches, num_chunks=self.request.chunks(),
            costs=self.costs,
        )  # fmt: skip
        validate(self.schedule)
        self.plan = PipelinePlan.of(
            self.name, self.step, self.schedule, self.costs, self.batch, self.report, self.places, measured is not None
        )
        self._executor: Executor | None = None

    def running(self) -> contextlib.AbstractContextManager[Any]:
        """In which the executor is called."""
        return self.places[0].running()

    def executor(self) -> Executor:
        if self._executor is None:
            order = simulate.global_order(self.schedule, self.costs)
            by_stage = [self.places[rank] for rank in self.schedule.placement]
            self._executor = Executor(self.step, order, self._links(by_stage))
        return self._executor

    def _links(self, places: list[Place]) -> Links:
        if len({place.process_index for place in places}) == 1:
            return Links(places)
        timeout = self.request.timeout
        links = ProcessLinks(places, connect(timeout), timeout)
        links.agree(self.plan.to_json())
        return links


def build(
    step: Callable[..., Any], call: Call, options: Options, request: Request, measured: Costs | None = None
) -> Built:
    """
    Raises:
      Refusal: the step cannot be pipelined.
    """
    ranks = request.ranks()
    here = next((place for place in ranks if place.process_index == jax.process_index()), ranks[0])
    for leaf, owner in zip(call.leaves, call.owners):
        here.check(leaf, f"argument {owner!r}" if owner else "an argument")
    with here.running():
        return _build(compat.user_name(step), call, options, request, measured, ranks, here)


def _build(
    name: str, call: Call, options: Options, request: Request, measured: Costs | None, ranks: list[Place], here: Place
) -> Built:
    captured = capture(call.run, call.types, name, here)
    output = call.output()
    typing, spread, size = _divide(call, captured, options, request, name, here)
    given_up = [captured.graph.inputs[n] for n in arguments.donated(call, options)]
    report = Report()
    settings = _settings.from_environment()
    with collecting(report), _settings.use(settings):
        compiled = compile_step(captured, typing, len(ranks) * request.chunks(), spread, given_up)
    return Built(compiled, request, ranks, output, name, size, report, _costs(compiled), measured)


def _divide(
    call: Call, captured: Captured, options: Options, request: Request, name: str, here: Place
) -> tuple[Typing, Spread, int]:
    """The loss on a part of the batch beside the loss on the batch, how examples are spread, the batch's size.

    Where several arguments may be the batch, it is the first whose examples the loss sums over.
    """
    refusals: list[Refusal] = []
    for batch in arguments.batches(call, _reaching(captured), options):
        try:
            spread = of_batch(here, [call.leaves[n] for n in batch.leaves])
            count = request.microbatches(batch.size, len(request.ranks()), spread)
            part = batch.size // count
            small = [t.update(shape=(part, *t.shape[1:])) if n in batch.leaves else t for n, t in enumerate(call.types)]
            typing = microbatch.infer(captured.loss.graph, _on_a_part(call, small, name, here).loss.graph, count)
            microbatch.refuse_unless_sum(typing, captured.loss.name)
        except Refusal as refusal:
            refusals.append(refusal)
        else:
            return typing, spread, batch.size
    raise refusals[0]


def _on_a_part(call: Call, types: list[Any], name: str, here: Place) -> Captured:
    try:
        return capture(call.run, types, name, here)
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
