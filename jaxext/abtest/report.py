"""A result as a terminal shows it."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from jaxext.abtest.parity import FIRST_STEPS
from jaxext.abtest.result import Outcome, ProgramResult, ProgramSide, Result, Row, SideResult

AnyResult = Result | ProgramResult
SHOWN_FAILURES = 6


def duration(seconds: float | None) -> str:
    """Seconds in the unit that suits them."""
    if seconds is None:
        return "-"
    for limit, scale, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms")):
        if seconds < limit:
            return f"{seconds * scale:.3g} {unit}" if seconds * scale < 100 else f"{seconds * scale:.0f} {unit}"
    return f"{seconds:.2f} s"


def size(count: float | None) -> str:
    """Bytes in the unit that suits them."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}%"


def times(reference: float | None, candidate: float | None) -> str:
    """How many times less the candidate needs."""
    if reference is None or not candidate:
        return "-"
    return f"{reference / candidate:.2f}x"


def headline(result: AnyResult) -> str:
    """The outcome in one sentence."""
    names = f"{result.candidate.label} against {result.reference.label}"
    if not result.agrees:
        return f"{names}: the results DIFFER, so the speed means nothing"
    low, high = result.interval or (result.ratio, result.ratio)
    if low <= 1 <= high:
        return f"{names}: no difference in speed can be told ({result.ratio:.2f}x)"
    if result.ratio >= 1:
        return f"{names}: {result.ratio:.2f}x as fast"
    return f"{names}: SLOWER, {result.ratio:.2f}x as fast"


def evidence(result: AnyResult) -> list[str]:
    """How sure the figures are and what was compared, a line each."""
    interval = f"95% interval {result.interval[0]:.2f}x to {result.interval[1]:.2f}x, " if result.interval else ""
    lines = [f"{interval}{result.speed.pairs} interleaved pairs in random order, medians"]
    parity = result.parity
    if parity.worst_loss is not None:
        count = min(len(parity.candidate_losses), FIRST_STEPS)
        lines.append(
            f"losses of {count} steps: largest relative difference {parity.worst_loss:.1e} "
            f"(tolerance {parity.tolerance.loss:.0e}, {parity.tolerance.dtype})"
        )
    if parity.leaves:
        steps = parity.leaf_steps
        span = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
        worst = parity.leaves[0]
        noun = "leaf" if len(parity.leaves) == 1 else "leaves"
        lines.append(
            f"{len(parity.leaves)} {noun} after {span}: the worst, {worst.name}, uses "
            f"{100 * min(worst.fraction, 1e6):.0f}% of its bound"
        )
    return lines


def _panel(result: AnyResult) -> Panel:
    good = result.agrees and result.ratio >= 1
    style = "green" if good else "red" if not result.agrees else "yellow"
    text = Text(headline(result) + "\n", style=f"bold {style}")
    text.append("\n".join(evidence(result)), style="default")
    failures = result.parity.failures
    for failure in failures[:SHOWN_FAILURES]:
        text.append(f"\ndisagreement: {failure}", style="red")
    if len(failures) > SHOWN_FAILURES:
        text.append(f"\nand {len(failures) - SHOWN_FAILURES} more", style="red")
    return Panel(text, title=f"jaxext ab  {result.name}", border_style=style, padding=(0, 1))


def new_table(columns: Iterable[str]) -> Table:
    """An empty table, its first column left-aligned, the others right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _quartiles(side: SideResult | ProgramSide) -> str:
    ordered = sorted(side.seconds)
    return f"{duration(ordered[len(ordered) // 4])} to {duration(ordered[(3 * len(ordered)) // 4])}"


def side_rows(result: AnyResult) -> list[tuple[str, str, str, str]]:
    """(what, reference, candidate, times) for each figure of the two sides."""
    if isinstance(result, ProgramResult):
        return _program_rows(result)
    left, right = result.reference, result.candidate
    a, b = left.compilation, right.compilation
    rows = [
        ("step time, median", duration(left.median), duration(right.median), f"{result.ratio:.2f}x"),
        ("step time, middle half", _quartiles(left), _quartiles(right), ""),
        (
            "temporary memory of the program",
            size(a.temporary_bytes),
            size(b.temporary_bytes),
            times(a.temporary_bytes, b.temporary_bytes),
        ),
    ]
    if left.share_of_peak is not None:
        rows.append(("share of the machine's peak", percent(left.share_of_peak), percent(right.share_of_peak), ""))
    if a.trace_seconds is not None:
        rows.append(
            (
                "trace time",
                duration(a.trace_seconds),
                duration(b.trace_seconds),
                times(a.trace_seconds, b.trace_seconds),
            )
        )
        full = [c.lower_seconds + c.compile_seconds for c in (a, b)]
        rows.append(("compile time", duration(full[0]), duration(full[1]), times(full[0], full[1])))
    return rows


def _program_rows(result: ProgramResult) -> list[tuple[str, str, str, str]]:
    left, right = result.reference, result.candidate
    rows = []
    if left.prints_steps:
        rows = [
            ("step time, median", duration(left.median), duration(right.median), f"{result.ratio:.2f}x"),
            ("step time, middle half", _quartiles(left), _quartiles(right), ""),
        ]
    rows.append(("whole run, median", duration(left.wall), duration(right.wall), f"{result.wall.value:.2f}x"))
    rows.append(
        ("peak resident memory", size(left.peak_rss), size(right.peak_rss), times(left.peak_rss, right.peak_rss))
    )
    return rows


def _sides(result: AnyResult) -> Table:
    table = new_table(("", result.reference.label, result.candidate.label, "times less"))
    for row in side_rows(result):
        table.add_row(*row)
    return table


def _rows(headers: tuple[str, str, str], rows: list[Row]) -> Table:
    table = new_table((*headers, "ratio", "95% interval"))
    for row in rows:
        if row.ratio is None:
            table.add_row(row.name, "", "", "", Text(row.note, style="dim"))
            continue
        interval = row.ratio.interval
        table.add_row(
            row.name,
            duration(row.reference_seconds),
            duration(row.candidate_seconds),
            f"{row.ratio.value:.2f}x",
            f"{interval[0]:.2f} to {interval[1]:.2f}" if interval else "",
        )
    return table


def replacement_lines(replacements: dict[str, Any]) -> list[str]:
    """What was replaced by kernel, and each miss and fall-back with its reason, equal ones counted."""
    used = Counter(entry["kernel"] for entry in replacements.get("replaced", []))
    lines = ["replaced: " + (", ".join(f"{count} {kernel}" for kernel, count in used.most_common()) or "nothing")]
    for key, word in (("missed", "missed"), ("fallbacks", "left to stock JAX")):
        reasons = Counter(
            (entry["kernel"] or "whole function", entry["source"], entry["reason"])
            for entry in replacements.get(key, [])
        )
        for (kernel, source, reason), count in reasons.most_common():
            where = f" at {source}" if source else ""
            lines.append(f"{word}: {count} {kernel}{where}: {reason}")
    return lines + [f"note: {note}" for note in replacements.get("notes", [])]


def setting_lines(result: AnyResult) -> list[str]:
    """What was equal on both sides, and the notes that qualify the figures."""
    facts = ", ".join(f"{key} {value}" for key, value in result.facts.items())
    lines = [f"equal on both sides: {facts}", f"seed {result.seed}; took {duration(result.elapsed)}"]
    if isinstance(result, Result):
        lines[1] = f"{result.wiring}; {lines[1]}"
    if isinstance(result, Result) and result.peaks:
        lines.append(peak_line(result.peaks))
    return lines + [f"note: {note}" for note in result.notes]


def peak_line(peaks: dict[str, float]) -> str:
    """What machine.peaks measured."""
    return (
        f"measured peak of this machine: f32 {peaks['f32'] / 1e9:.0f} GFLOP/s, "
        f"bf16 {peaks['bf16'] / 1e9:.0f} GFLOP/s, copy {peaks['copy'] / 1e9:.0f} GB/s"
    )


def render(result: Outcome) -> RenderableType:
    """Everything a terminal shows."""
    assert isinstance(result, AnyResult)
    parts: list[RenderableType] = [_panel(result), Text("Side by side", style="bold"), _sides(result)]
    if isinstance(result, Result):
        parts += _step_parts(result)
    parts.append(Text("Settings", style="bold"))
    parts += [Text(f"  {line}", style="dim", overflow="fold") for line in setting_lines(result)]
    return Group(*parts)


def _step_parts(result: Result) -> list[RenderableType]:
    parts: list[RenderableType] = []
    if result.contributions:
        parts.append(Text("What each kernel brings (they overlap: ratios do not multiply)", style="bold"))
        parts.append(_rows(("left out", "step without", "step with"), result.contributions))
    if result.memory:
        parts.append(Text("What memory reuse brings (processes of their own)", style="bold"))
        parts.append(_rows(("", "before", "after"), result.memory))
    parts.append(Text("Replacements", style="bold"))
    parts += [Text(f"  {line}", overflow="fold") for line in replacement_lines(result.replacements)]
    return [*parts, Text("")]


def plain_text(result: Outcome) -> str:
    """The same without colour, 120 columns wide."""
    return printed(render(result), width=120)


def printed(rendered: RenderableType, width: int) -> str:
    """What a terminal of this width and without colour shows."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(rendered)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
