"""Charts of a result, drawn with matplotlib: one picture, or one SVG each for the page."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jaxext.abtest.parity import FIRST_STEPS, Parity, relative_differences
from jaxext.abtest.report import duration, size
from jaxext.abtest.result import ProgramResult, Result, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REFERENCE, CANDIDATE, EXTRA, INK, FAINT, ALARM = "#8d99ae", "#0a7e8c", "#c9ced8", "#1f2933", "#e4e7ec", "#c8372d"
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "xtick.color": "#52606d",
    "ytick.color": "#52606d",
    "text.color": INK,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "jaxext",
}


class ChartsUnavailable(RuntimeError):
    """matplotlib is not installed."""


def require_matplotlib() -> None:
    """Raise ChartsUnavailable, with the remedy, where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ChartsUnavailable('--html and --png draw charts with matplotlib. Install it: pip install "jaxext[ab]"')


@dataclasses.dataclass(frozen=True)
class Panel:
    """One chart: its title, what to read from it, how to draw it, and its height in inches at 6.2 wide."""

    title: str
    caption: str
    draw: Callable[[Axes], None]
    height: float = 2.7


def _bars(axes: Axes, names: list[str], values: list[float], colours: list[str], text: Callable[[float], str]) -> None:
    places = range(len(names))
    axes.barh(places, values, color=colours, height=0.62)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, max(values) * 1.22 or 1)
    for place, value in zip(places, values, strict=True):
        axes.text(value + max(values) * 0.012, place, text(value), va="center", fontsize=9.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _scale(seconds: list[float]) -> tuple[float, str]:
    middle = statistics.median(seconds)
    return (1.0, "s") if middle >= 1 else (1e3, "ms") if middle >= 1e-3 else (1e6, "µs")


def _speed(result: Result | ProgramResult) -> Panel:
    sides = [(result.reference.label, result.reference.seconds), (result.candidate.label, result.candidate.seconds)]
    names, values, colours = [s[0] for s in sides], [statistics.median(s[1]) for s in sides], [REFERENCE, CANDIDATE]
    caption = "Medians of interleaved measurements."
    if isinstance(result, Result) and result.memory and result.memory[0].ratio:
        names, colours = ["stock,\nsystem memory", *names], [EXTRA, *colours]
        # It was timed in fewer rounds, so its paired ratio places it beside the others.
        values = [values[0] * result.memory[0].ratio.value, *values]
        caption += " System memory: placed by its own paired ratio, from processes of its own."
    factor, unit = _scale(values)

    def draw(axes: Axes) -> None:
        _bars(axes, names, [value * factor for value in values], colours, lambda value: duration(value / factor))
        axes.set_xlabel(f"median step time ({unit}), less is better")

    return Panel("Step time", caption, draw, 0.9 + 0.5 * len(names))


def _rounds(result: Result | ProgramResult) -> Panel:
    factor, unit = _scale(result.reference.seconds)

    def draw(axes: Axes) -> None:
        for side, colour, marker in ((result.reference, REFERENCE, "o"), (result.candidate, CANDIDATE, "D")):
            rounds = range(1, len(side.seconds) + 1)
            times = [seconds * factor for seconds in side.seconds]
            axes.plot(rounds, times, marker, color=colour, markersize=4.5, label=side.label)
            axes.axhline(side.median * factor, color=colour, linewidth=1, alpha=0.7)
        axes.set_ylim(bottom=0)
        _whole_numbers(axes)
        axes.set_xlabel("round")
        axes.set_ylabel(f"step time ({unit})")
        axes.legend(loc="lower left", ncols=2)

    return Panel("Every measurement", "One point a sample, lines at the medians: drift and outliers show here.", draw)


def _losses(parity: Parity, names: tuple[str, str]) -> Panel:
    def draw(axes: Axes) -> None:
        steps = range(1, len(parity.reference_losses) + 1)
        axes.plot(steps, parity.reference_losses, color=REFERENCE, linewidth=4, label=names[0], alpha=0.75)
        axes.plot(steps, parity.candidate_losses, color=CANDIDATE, linewidth=1.5, label=names[1])
        _whole_numbers(axes)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.legend(loc="upper right")

    return Panel("Loss", "Both sides start from equal states and see equal inputs.", draw)


def _differences(parity: Parity) -> Panel:
    def draw(axes: Axes) -> None:
        found = relative_differences(parity.reference_losses, parity.candidate_losses)
        steps = list(range(1, len(found) + 1))
        floor = parity.tolerance.loss * 1e-5
        heights = [max(value, floor) for value in found]
        axes.semilogy(steps, heights, color=CANDIDATE, linewidth=0.8, alpha=0.5)
        for equal, fill in ((False, CANDIDATE), (True, "white")):
            shown = [index for index, value in enumerate(found) if (value == 0) == equal]
            places = [steps[index] for index in shown]
            axes.plot(places, [heights[i] for i in shown], "o", color=CANDIDATE, markerfacecolor=fill, markersize=4)
        axes.hlines(parity.tolerance.loss, 1, max(min(FIRST_STEPS, len(found)), 2), color=ALARM, linewidth=1.2)
        axes.text(1, parity.tolerance.loss * 1.4, "tolerance", color=ALARM, va="bottom", fontsize=8.5)
        axes.set_ylim(floor * 0.6, parity.tolerance.loss * 12)
        _whole_numbers(axes)
        axes.set_xlabel("step")
        axes.set_ylabel("relative difference")

    caption = (
        f"Relative difference of the losses; the tolerance holds for the first {FIRST_STEPS} steps. Hollow: equal."
    )
    return Panel("Agreement of the losses", caption, draw)


def _leaves(parity: Parity) -> Panel:
    def draw(axes: Axes) -> None:
        fractions = sorted((min(max(leaf.fraction, 1e-6), 1e3) for leaf in parity.leaves), reverse=True)
        places = range(1, len(fractions) + 1)
        colours = [ALARM if value > 1 else CANDIDATE for value in fractions]
        # Many bars side by side would shimmer; without gaps they read as one area.
        axes.bar(places, fractions, bottom=0, color=colours, width=0.7 if len(fractions) <= 40 else 1.0, linewidth=0)
        axes.axhline(1.0, color=ALARM, linewidth=1.2)
        axes.text(len(fractions) + 0.5, 1.3, "bound", color=ALARM, ha="right", va="bottom", fontsize=8.5)
        axes.set_yscale("log")
        axes.set_ylim(max(min(fractions) / 3, 1e-6), max(4.0, max(fractions) * 2))
        axes.set_xlim(0.2, len(fractions) + 0.8)
        _whole_numbers(axes)
        axes.set_xlabel("leaf, worst first")
        axes.set_ylabel("error / bound")

    caption = "Each parameter, optimizer and output leaf: its error as a share of what stock JAX's own rounding allows."
    return Panel("Agreement of every leaf", caption, draw)


def _contributions(rows: list[Row]) -> Panel:
    known = [row for row in rows if row.ratio is not None]

    def draw(axes: Axes) -> None:
        for place, row in enumerate(known):
            assert row.ratio is not None
            low, high = row.ratio.interval or (row.ratio.value, row.ratio.value)
            axes.barh(place, row.ratio.value - 1, left=1, color=CANDIDATE, height=0.5, alpha=0.85)
            axes.plot([low, high], [place, place], color=INK, linewidth=1.2)
            axes.plot([low, high], [place, place], "|", color=INK, markersize=7)
            axes.text(max(high, 1.0), place, f"  {row.ratio.value:.2f}x", va="center")
        axes.axvline(1, color="#52606d", linewidth=1)
        axes.set_yticks(range(len(known)), [row.name.replace("_", " ") for row in known])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_ylim(len(known) - 0.4, -0.6)
        edges = [(row.ratio.interval or (1.0, 1.0)) for row in known if row.ratio]
        top, bottom = max(1.05, *(edge[1] for edge in edges)), min(1.0, *(edge[0] for edge in edges))
        axes.set_xlim(bottom - 0.05 * (top - bottom), top + 0.18 * (top - bottom))
        axes.set_xlabel("step time without the kernel / with it (line: 95% interval)")

    caption = "Each kernel left out in turn. Above 1: it helps. Kernels overlap, so the ratios do not multiply."
    return Panel("What each kernel brings", caption, draw, 1.1 + 0.45 * max(len(known), 1))


def _memory(names: tuple[str, str], counts: tuple[float, float], title: str, caption: str) -> Panel:
    def draw(axes: Axes) -> None:
        mebi = [count / 2**20 for count in counts]
        _bars(axes, list(names), mebi, [REFERENCE, CANDIDATE], lambda value: size(value * 2**20))
        axes.set_xlabel("MiB, less is better")

    return Panel(title, caption, draw, 1.9)


def panels(result: Result | ProgramResult) -> list[Panel]:
    """The charts that this result has figures for."""
    names = (result.reference.label, result.candidate.label)
    found = [_speed(result), _rounds(result)]
    if len(result.parity.reference_losses) > 1:
        found += [_losses(result.parity, names), _differences(result.parity)]
    if result.parity.leaves:
        found.append(_leaves(result.parity))
    if isinstance(result, ProgramResult):
        counts = (float(result.reference.peak_rss), float(result.candidate.peak_rss))
        return [*found, _memory(names, counts, "Resident memory", "Largest resident memory of the process.")]
    if any(row.ratio for row in result.contributions):
        found.append(_contributions(result.contributions))
    temporary = [side.compilation.temporary_bytes for side in (result.reference, result.candidate)]
    if temporary[0] and temporary[1] is not None:
        caption = "XLA's temporary buffers for one step; kernels' own scratch, reused by all steps, is not in it."
        counts = (float(temporary[0]), float(temporary[1]))
        found.append(_memory(names, counts, "Temporary memory", caption))
    return found


def svg(panel: Panel) -> str:
    """One chart as an <svg> element."""
    figure = _figure(6.2, panel.height)
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        panel.draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def picture(result: Result | ProgramResult) -> bytes:
    """All charts in one PNG.

    Raises:
      ChartsUnavailable: matplotlib is not installed.
    """
    from jaxext.abtest.report import evidence, headline

    drawn = panels(result)
    rows = [drawn[index : index + 2] for index in range(0, len(drawn), 2)]
    heights = [max(panel.height for panel in row) for row in rows]
    figure = _figure(13.0, sum(heights) + 0.45 * len(rows) + 1.2)
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        grid = figure.add_gridspec(len(rows), 2, height_ratios=heights)
        for index, panel in enumerate(drawn):
            axes = figure.add_subplot(grid[index // 2, index % 2])
            panel.draw(axes)
            axes.set_title(panel.title)
        colour = INK if result.agrees else ALARM
        figure.suptitle(f"{headline(result)}\n", x=0.012, ha="left", fontsize=17, fontweight="bold", color=colour)
        top = 1 - 0.62 / figure.get_figheight()
        figure.text(0.012, top, f"{result.name}   {evidence(result)[0]}", fontsize=10, color="#52606d")
        return _png(figure)


def png(panel: Panel, title: str) -> bytes:
    """One chart as a PNG."""
    figure = _figure(9.0, 1.3 * panel.height + 0.5)
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        axes = figure.add_subplot()
        panel.draw(axes)
        axes.set_title(title)
        return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _figure(width: float, height: float) -> Figure:
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        return Figure(figsize=(width, height), layout="constrained", facecolor="white")
