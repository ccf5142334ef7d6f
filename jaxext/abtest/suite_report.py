"""A suite's result as a terminal shows it, and as one self-contained page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from jaxext.abtest.report import duration, new_table, peak_line, percent, printed, times

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from jaxext.abtest.suite import Entry, SuiteResult

HEADERS = (
    "program",
    "stock step",
    "jaxext step",
    "as run",
    "95% interval",
    "kernels alone",
    "share of peak",
    "memory",
    "losses",
)
EXPLAINED = (
    "as run: stock JAX as it comes against jaxext run. Kernels alone: stock JAX with memory reuse against the same. "
    "Share of peak: stock's arithmetic by step time, stock then jaxext. Memory: peak resident, times less. Losses: "
    "largest relative difference."
)


def headline(result: SuiteResult) -> str:
    """The outcome in one sentence."""
    mean = result.mean("as_run")
    if mean is None:
        return "no program could be measured"
    programs = f"{mean.pairs} program" + ("s" if mean.pairs != 1 else "")
    differ = sum(entry.as_run is not None and not entry.agrees for entry in result.entries)
    if differ:
        return f"{differ} of {programs} compute something else on jaxext: fix that before reading any speed"
    return f"{mean.value:.2f}x as fast as stock JAX, geometric mean of {programs}"


def evidence(result: SuiteResult) -> list[str]:
    """What qualifies the headline, a line each."""
    lines = []
    for kind, text in (("as_run", "as a user runs it"), ("kernels", "kernels alone, memory reuse on both sides")):
        mean = result.mean(kind)
        if mean is not None:
            interval = f", 95% interval {mean.interval[0]:.2f}x to {mean.interval[1]:.2f}x" if mean.interval else ""
            lines.append(f"{text}: {mean.value:.2f}x{interval}")
    measured = [entry for entry in result.entries if entry.as_run is not None]
    if measured:
        speeds = sorted(((e.program.name, e.as_run.speed) for e in measured if e.as_run), key=lambda one: one[1].value)
        (least, slow), (most, fast) = speeds[0], speeds[-1]
        lines.append(f"least: {least} {slow}; most: {most} {fast}")
    return lines + [f"{entry.program.name} failed: {entry.error}" for entry in result.entries if entry.error]


def rows(result: SuiteResult) -> list[tuple[str, ...]]:
    """A row of HEADERS' cells for each program, the geometric mean last."""
    found = [_row(entry, result.peaks) for entry in result.entries]
    means = [result.mean(kind) for kind in ("as_run", "kernels")]
    if means[0] is not None and means[1] is not None:
        interval = f"{means[0].interval[0]:.2f} to {means[0].interval[1]:.2f}" if means[0].interval else ""
        found.append(
            ("geometric mean", "", "", f"{means[0].value:.2f}x", interval, f"{means[1].value:.2f}x", "", "", "")
        )
    return found


def _row(entry: Entry, peaks: dict[str, float]) -> tuple[str, ...]:
    if entry.as_run is None or entry.kernels is None:
        return (entry.program.name, "failed", *[""] * (len(HEADERS) - 2))
    run = entry.as_run
    interval = f"{run.interval[0]:.2f} to {run.interval[1]:.2f}" if run.interval else ""
    shares = entry.share_of_peak(peaks)
    worst = max((r.parity.worst_loss for r in (run, entry.kernels) if r.parity.worst_loss is not None), default=None)
    return (
        entry.program.name,
        duration(run.reference.median),
        duration(run.candidate.median),
        f"{run.ratio:.2f}x",
        interval,
        f"{entry.kernels.ratio:.2f}x",
        "-" if shares[0] is None else f"{percent(shares[0])} to {percent(shares[1])}",
        times(run.reference.peak_rss, run.candidate.peak_rss),
        ("DIFFER" if not entry.agrees else "agree") + ("" if worst is None else f" {worst:.0e}"),
    )


def setting_lines(result: SuiteResult) -> list[str]:
    """The machine, what was equal on all sides, and the notes."""
    facts = ", ".join(f"{key} {value}" for key, value in result.facts.items() if not key.startswith("memory"))
    lines = [f"equal on all sides: {facts}", f"seed {result.seed}; took {duration(result.elapsed)}"]
    if result.peaks:
        lines.append(peak_line(result.peaks))
    return lines + [f"note: {note}" for note in result.notes]


def render(result: SuiteResult) -> RenderableType:
    """Everything a terminal shows."""
    good = result.agrees and result.complete
    style = "green" if good else "yellow" if result.agrees else "red"
    text = Text(headline(result) + "\n", style=f"bold {style}")
    text.append("\n".join(evidence(result)), style="default")
    table: Table = new_table(HEADERS)
    for row in rows(result):
        table.add_row(*row, style="bold" if row[0] == "geometric mean" else None)
    settings = [Text(f"  {line}", style="dim", overflow="fold") for line in (EXPLAINED, *setting_lines(result))]
    panel = Panel(text, title=f"jaxext ab --suite {result.name}", border_style=style, padding=(0, 1))
    return Group(panel, table, Text("Settings", style="bold"), *settings)


def plain_text(result: SuiteResult) -> str:
    """The same without colour, 140 columns wide."""
    return printed(render(result), width=140)


def page(result: SuiteResult) -> str:
    """The result as one self-contained page.

    Raises:
      ChartsUnavailable: matplotlib is not installed.
    """
    from jaxext.abtest import charts, html

    state = "" if result.agrees and result.complete else "warn" if result.agrees else "bad"
    mean = result.mean("as_run")
    ratio = mean.value if mean and result.agrees else None
    body = [html.header(state, ratio, result.name, headline(result), html.paragraphs(evidence(result)))]
    if mean:
        body.append(html.section("How much faster", _CAPTION, charts.svg(speed_panel(result))))
    body.append(html.section("Programs", EXPLAINED, html.table(HEADERS, rows(result))))
    body.append(html.section("Settings", "", html.paragraphs(setting_lines(result)) + html.raw(result)))
    return html.frame(f"jaxext ab --suite {result.name}", body)


def picture(result: SuiteResult) -> bytes:
    """The chart of all programs as a PNG.

    Raises:
      ChartsUnavailable: matplotlib is not installed.
    """
    from jaxext.abtest import charts

    return charts.png(speed_panel(result), headline(result))


_CAPTION = "Step time of stock JAX / of jaxext, on a logarithmic scale; lines are 95% intervals."


def speed_panel(result: SuiteResult):
    """The chart of all programs' ratios, the largest first."""
    from jaxext.abtest import charts

    measured = [entry for entry in result.entries if entry.as_run and entry.kernels]
    measured.sort(key=lambda entry: -entry.as_run.ratio if entry.as_run else 0.0)

    def draw(axes: Axes) -> None:
        for place, entry in enumerate(measured):
            assert entry.as_run is not None and entry.kernels is not None
            value = entry.as_run.ratio
            low, high = entry.as_run.interval or (value, value)
            axes.plot(
                [1, value], [place, place], color=charts.CANDIDATE, linewidth=7, alpha=0.85, solid_capstyle="butt"
            )
            axes.plot([low, high], [place, place], color=charts.INK, linewidth=1.2)
            axes.plot(entry.kernels.ratio, place, "D", color=charts.EXTRA, markersize=5, markeredgecolor=charts.INK)
            axes.text(
                max(high, value, entry.kernels.ratio, 1.0) * 1.06, place, f"{value:.2f}x", va="center", fontsize=9
            )
        axes.axvline(1, color="#52606d", linewidth=1)
        mean = result.mean("as_run")
        assert mean is not None
        axes.axvline(mean.value, color=charts.ALARM, linewidth=1, linestyle="--")
        axes.set_xscale("log")
        edges = [entry.as_run.ratio for entry in measured if entry.as_run]
        edges += [entry.kernels.ratio for entry in measured if entry.kernels]
        low, high = min(0.9, *edges), max(2.0, *edges)
        axes.set_xlim(low * 0.95, high * 1.5)
        ticks = [tick for tick in (0.5, 1, 1.5, 2, 3, 4, 6, 10, 20, 40) if low * 0.95 <= tick <= high * 1.5]
        axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
        axes.minorticks_off()
        axes.set_yticks(range(len(measured)), [entry.program.name for entry in measured])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("bar: as run; diamond: kernels alone\ndashed: geometric mean as run")

    return charts.Panel("How much faster", _CAPTION, draw, 1.0 + 0.3 * len(measured))
