"""What a pipeline will do, to be looked at before it runs."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from ..rewrite.report import Report
from . import cost, simulate, timeline
from .action import Schedule
from .compiled import CompiledStep
from .places import Place
from .simulate import Costs, Timeline


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """One stage of the loss.

    Attributes:
      device: where it runs. lines: the user's lines of its first and last costly operation. layers: name scopes in it.
      share: of the loss's forward cost. sends_bytes: what one microbatch hands to the next stage.
      parameter_bytes: of the parameters that it uses; shared_bytes: of those that live on another stage.
      residual_bytes: kept for one microbatch between its forward and its backward pass.
      peak_live: microbatches whose residuals are kept at once, as the schedule has it.
    """

    device: str
    lines: tuple[str, str]
    layers: tuple[str, ...]
    share: float
    sends_bytes: int
    parameter_bytes: int
    shared_bytes: int
    residual_bytes: int
    peak_live: int

    @property
    def memory_bytes(self) -> int:
        """Parameters, one gradient of each, and the residuals at their peak; all devices of a slice together."""
        return 2 * self.parameter_bytes + self.peak_live * self.residual_bytes


@dataclasses.dataclass(frozen=True)
class PipelinePlan:
    """What a pipelined step does; print it, or see `to_json`, `plot` and `trace`.

    Attributes:
      name: of the step. batch: its examples; num_microbatches: the parts that they are cut into.
      schedule: the actions of each device in order. stages: of the loss, in order.
      timeline: of one step as simulated from counted costs, where the unit of time is the dearest stage's forward pass,
        or from measured ones, in theirs.
      bubble: share of the step's time in which the busiest device idles.
      speedup: of the loss's passes over one device, as simulated.
      report: what jaxext's kernels replaced inside the stages. notes: what does not pay, and why.
      measured: whether the costs are.
    """

    name: str
    batch: int
    num_microbatches: int
    schedule: Schedule
    stages: tuple[StagePlan, ...]
    timeline: Timeline
    bubble: float
    speedup: float
    report: Report
    notes: tuple[str, ...]
    measured: bool = False

    @classmethod
    def of(
        cls, name: str, step: CompiledStep, schedule: Schedule, costs: Costs, batch: int, report: Report,
        places: Sequence[Place], measured: bool = False,
    ) -> PipelinePlan:  # fmt: skip
        simulated = simulate.simulate(schedule, costs)
        work = sum(
            costs.forward[s] + costs.backward_input[s] + costs.backward_weight[s] for s in range(step.num_stages)
        )
        one_device = work * step.num_microbatches
        speedup = one_device / simulated.makespan
        stages = tuple(_stage(step, schedule, simulated, n, places) for n in range(step.num_stages))
        notes = tuple(_notes(step, stages, speedup, len(places)))
        return cls(
            name, batch, step.num_microbatches, schedule, stages, simulated,
            simulated.bubble_fraction, speedup, report, notes, measured,
        )  # fmt: skip

    def to_json(self) -> str:
        """All of it but the events, as JSON; the schedule in its text form."""
        return json.dumps(
            {
                "name": self.name,
                "batch": self.batch,
                "num_microbatches": self.num_microbatches,
                "schedule": self.schedule.name,
                "actions": self.schedule.to_text(),
                "costs": "measured" if self.measured else "counted",
                "bubble": self.bubble,
                "speedup": self.speedup,
                "stages": [dataclasses.asdict(stage) | {"memory_bytes": stage.memory_bytes} for stage in self.stages],
                "kernels": self.report.to_dict(),
                "notes": list(self.notes),
            },
            indent=2,
        )

    def plot(self, path: str | Path) -> None:
        """A picture of the timeline, in the format of the file's suffix (matplotlib)."""
        timeline.to_plot(self.timeline, path)

    def trace(self, path: str | Path) -> None:
        """The timeline for https://ui.perfetto.dev, as JSON."""
        timeline.to_perfetto(self.timeline, path)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        chunks = len(self.stages) // self.schedule.num_ranks
        yield (
            f"[bold]{self.name}[/bold]: batch {self.batch} in {self.num_microbatches} microbatches, "
            f"{len(self.stages)} stages on {self.schedule.num_ranks} devices"
            + (f" ({chunks} each)" if chunks > 1 else "")
            + f", schedule {self.schedule.name}"
        )
        yield _table(self.stages)
        yield (
            f"predicted from {'measured' if self.measured else 'counted'} costs: {self.speedup:.2f}x one device, "
            f"bubble {self.bubble:.0%} of the step; "
            f"kernels in the stages: {', '.join(sorted(self.report.kernels())) or 'none'}"
        )
        yield Text(timeline.to_ascii(self.timeline, min(options.max_width, 100)), no_wrap=True)
        for note in self.notes:
            yield f"note: {note}"

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=118).print(self)
        return text.getvalue().rstrip()


def _table(stages: Sequence[StagePlan]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("stage", "device", "lines", "layers"):
        table.add_column(heading, overflow="fold")
    for heading in ("cost", "sends", "parameters", "residuals x live", "memory"):
        table.add_column(heading, justify="right")
    for number, stage in enumerate(stages):
        shared = f" ({_size(stage.shared_bytes)} shared)" if stage.shared_bytes else ""
        table.add_row(
            str(number), stage.device, _lines(*stage.lines), _span(stage.layers), f"{stage.share:.0%}",
            _size(stage.sends_bytes),
            _size(stage.parameter_bytes) + shared, f"{_size(stage.residual_bytes)} x {stage.peak_live}",
            _size(stage.memory_bytes),
        )  # fmt: skip
    return table


def _lines(first: str, last: str) -> str:
    """`model.py:12-40` of two lines such as `src/model.py:12 (block)`."""
    places = [line.partition(" ")[0].rpartition(":") for line in (first, last)]
    (one, start), (other, stop) = ((Path(path).name, line) for path, _, line in places)
    if one != other:
        return f"{one}:{start} to {other}:{stop}"
    return f"{one}:{start}" if start == stop or not start else f"{one}:{start}-{stop}"


def _span(layers: Sequence[str]) -> str:
    if not layers:
        return ""
    return layers[0] if len(layers) == 1 else f"{layers[0]} … {layers[-1]}"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _stage(
    step: CompiledStep, schedule: Schedule, simulated: Timeline, number: int, places: Sequence[Place]
) -> StagePlan:
    stage, program = step.stages[number], step.programs[number]
    homes = dict(zip(step.typing.micro.inputs, step.homes))
    shared = [value for value in stage.parameters if homes[value] != number]
    total = sum(other.cost for other in step.stages) or 1.0
    return StagePlan(
        device=str(places[schedule.placement[number]]),
        lines=stage.lines,
        layers=stage.layers,
        share=stage.cost / total,
        sends_bytes=sum(cost.nbytes(value.aval) for value in stage.sends),
        parameter_bytes=sum(cost.nbytes(value.aval) for value in stage.parameters),
        shared_bytes=sum(cost.nbytes(value.aval) for value in shared),
        residual_bytes=program.residual_bytes,
        peak_live=simulate.peak_live(a for a in schedule.actions[schedule.placement[number]] if a.stage == number),
    )


def _notes(step: CompiledStep, stages: Sequence[StagePlan], speedup: float, num_devices: int) -> list[str]:
    notes = []
    largest = max(stage.share for stage in stages)
    if largest * len(stages) > 1.25:
        notes.append(
            f"the costs are uneven: the dearest stage has {largest:.0%} of the loss, {1 / len(stages):.0%} would be "
            "even; fewer stages may be as fast"
        )
    shared = sum(stage.shared_bytes for stage in stages)
    if shared:
        notes.append(
            f"{_size(shared)} of parameters are used by several stages: they are sent, and their gradients sent back, "
            "once a step"
        )
    if speedup < 1.2 and num_devices > 1:
        notes.append(f"this does not pay: {num_devices} devices are predicted to be {speedup:.2f}x as fast as one")
    return notes
