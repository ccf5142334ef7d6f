"""Pictures of a simulated schedule: text, a plot, a trace for Perfetto."""

from __future__ import annotations

import json
from pathlib import Path

from .action import Kind
from .simulate import Timeline

_COLOURS = {Kind.F: "#4c78a8", Kind.B: "#54a24b", Kind.I: "#54a24b", Kind.W: "#eeca3b"}
_NAMES = {Kind.F: "forward", Kind.B: "backward", Kind.I: "cotangents", Kind.W: "weight gradients"}
# Microbatch numbers are written into cells that are at least so many points wide.
_LEGIBLE = 9.0


def to_ascii(timeline: Timeline, width: int) -> str:
    """One line a rank, `width` characters wide: the kind of action at each moment, `·` where the rank idles."""
    columns = max(10, width - 8)
    lines = []
    for rank in range(timeline.schedule.num_ranks):
        cells = ["·"] * columns
        for event in (e for e in timeline.events if e.rank == rank and e.end > e.start):
            first, last = (round(t / timeline.makespan * columns) for t in (event.start, event.end))
            later = timeline.schedule.stages_of(rank).index(event.action.stage) > 0
            letter = event.action.kind.value
            cells[first : max(last, first + 1)] = (letter.lower() if later else letter) * max(last - first, 1)
        lines.append(f"rank {rank:<2} " + "".join(cells[:columns]))
    return "\n".join(lines)


def to_perfetto(timeline: Timeline, path: str | Path, microseconds: float = 1.0) -> None:
    """A file for https://ui.perfetto.dev, a track a rank; one unit of time is shown as so many microseconds."""
    events = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}}
        for rank in range(timeline.schedule.num_ranks)
    ]
    events += [
        {
            "name": f"{event.action.kind.value}{event.action.microbatch}",
            "cat": _NAMES[event.action.kind],
            "ph": "X",
            "pid": 0,
            "tid": event.rank,
            "ts": event.start * microseconds,
            "dur": (event.end - event.start) * microseconds,
            "args": {"stage": event.action.stage, "microbatch": event.action.microbatch},
        }
        for event in timeline.events
    ]
    Path(path).write_text(json.dumps({"traceEvents": events}))


def to_plot(timeline: Timeline, path: str | Path) -> None:
    """A picture in the format of the file's suffix.

    Raises:
      ImportError: matplotlib is not installed; says how to get it.
    """
    try:
        import matplotlib.figure as figures
        import matplotlib.patches as patches
    except ImportError as error:
        raise ImportError("the picture of a plan needs matplotlib: pip install 'jaxext[ab]'.") from error
    ranks = timeline.schedule.num_ranks
    figure = figures.Figure(figsize=(12, 1.0 + 0.4 * ranks), layout="constrained")
    axes = figure.subplots()
    points = 12 * 72 / timeline.makespan
    for event in timeline.events:
        length = event.end - event.start
        second = timeline.schedule.stages_of(event.rank).index(event.action.stage) > 0
        axes.broken_barh(
            [(event.start, length)], (event.rank - 0.42, 0.84), facecolor=_COLOURS[event.action.kind],
            edgecolor="white", linewidth=0.6, alpha=0.6 if second else 1.0,
        )  # fmt: skip
        if length * points >= _LEGIBLE:
            middle = event.start + length / 2
            axes.text(middle, event.rank, str(event.action.microbatch), ha="center", va="center", fontsize=7)
    axes.set(xlim=(0, timeline.makespan), ylim=(ranks - 0.5, -0.5), xlabel="time, forward passes of the dearest stage")
    axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    axes.spines[["top", "right", "left"]].set_visible(False)
    kinds = [kind for kind in _COLOURS if any(event.action.kind is kind for event in timeline.events)]
    handles = [patches.Patch(color=_COLOURS[kind], label=_NAMES[kind]) for kind in kinds]
    axes.set_title(
        f"{timeline.schedule.name}: {timeline.bubble / timeline.makespan:.0%} bubble", loc="left", fontsize=10
    )
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False, fontsize=8)
    figure.savefig(path)
