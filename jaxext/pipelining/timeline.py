"""Pictures of a simulated schedule: text, a plot, a trace for Perfetto."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from .action import Kind
from .simulate import Event, Timeline

_COLOURS = {Kind.F: "#4c78a8", Kind.B: "#54a24b", Kind.I: "#72b7b2", Kind.W: "#eeca3b"}
_NAMES = {Kind.F: "forward", Kind.B: "backward", Kind.I: "cotangents", Kind.W: "weight gradients"}
_INCHES = 12.0
# Room of one character, in points, at the size in which microbatch numbers are written.
_CHARACTER = 4.5


def to_ascii(timeline: Timeline, width: int = 100) -> str:
    """One line a rank, at most `width` characters wide: what it does at each moment, `·` where it idles.

    An action begins with its kind, and with its microbatch if the shortest has room for it; a rank's later stages are
    in lower case.
    """
    label = len(f"rank {timeline.schedule.num_ranks - 1} ")
    columns = max(10, width - label)
    scale = columns / (timeline.makespan or 1.0)
    shown = [
        (event.rank, _letters(timeline, event), round(event.start * scale), round(event.end * scale))
        for event in timeline.events
        if event.end > event.start
    ]
    numbered = all(last - first > len(text) for _, text, first, last in shown)
    lines = [["·"] * columns for _ in timeline.busy]
    for rank, text, first, last in shown:
        # What is too short for a column gets one all the same.
        first = min(first, columns - 1)
        length = max(last - first, 1)
        lines[rank][first : first + length] = text.ljust(length, "─") if numbered else text[0] * length
    return "\n".join(f"rank {rank}".ljust(label) + "".join(cells) for rank, cells in enumerate(lines))


def _letters(timeline: Timeline, event: Event) -> str:
    text = f"{event.action.kind.value}{event.action.microbatch}"
    return text.lower() if timeline.schedule.chunk[event.action.stage] else text


def to_perfetto(timeline: Timeline, path: str | Path, microseconds: float = 1.0) -> None:
    """A file for https://ui.perfetto.dev, a track a rank; one unit of time is shown as so many microseconds."""
    events = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}}
        for rank in range(timeline.schedule.num_ranks)
    ]
    events += [
        {
            "name": timeline.schedule.cell(event.action),
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


def to_plot(timeline: Timeline, path: str | Path, unit: str = "unit: the dearest stage's forward pass") -> None:
    """A picture in the format of the file's suffix, such as .svg or .png; a rank's later stages are paler.

    Raises:
      ImportError: matplotlib is not installed; says how to get it.
    """
    try:
        import matplotlib
        from matplotlib import figure as figures
        from matplotlib import patches
    except ImportError as error:
        raise ImportError("the picture of a timeline needs matplotlib: pip install 'jaxext[ab]'.") from error
    ranks = timeline.schedule.num_ranks
    figure = figures.Figure(figsize=(_INCHES, 1.0 + 0.4 * ranks), layout="constrained")
    axes = figure.subplots()
    rows: defaultdict[tuple[int, Kind, bool], list[tuple[float, float]]] = defaultdict(list)
    for event in timeline.events:
        later = timeline.schedule.chunk[event.action.stage] > 0
        rows[event.rank, event.action.kind, later].append((event.start, event.end - event.start))
    for (rank, kind, later), spans in rows.items():
        axes.broken_barh(
            spans, (rank - 0.42, 0.84), facecolor=_COLOURS[kind], edgecolor="white", linewidth=0.6,
            alpha=0.6 if later else 1.0,
        )  # fmt: skip
    points = _INCHES * 72 / (timeline.makespan or 1.0)
    for event in timeline.events:
        text = str(event.action.microbatch)
        if (event.end - event.start) * points >= _CHARACTER * (len(text) + 1):
            axes.text((event.start + event.end) / 2, event.rank, text, ha="center", va="center", fontsize=7)
    axes.set(xlim=(0, timeline.makespan or 1.0), ylim=(ranks - 0.5, -0.5), xlabel=f"time ({unit})")
    axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(f"{timeline.schedule.name}: {timeline.bubble_fraction:.0%} bubble", loc="left", fontsize=10)
    kinds = [kind for kind in _COLOURS if any(found == kind for _, found, _ in rows)]
    handles = [patches.Patch(color=_COLOURS[kind], label=_NAMES[kind]) for kind in kinds]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles) or 1, frameon=False, fontsize=8)
    # Text stays text, and the same timeline gives the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "jaxext"}):
        figure.savefig(path, metadata={"Date": None} if Path(path).suffix == ".svg" else None)
