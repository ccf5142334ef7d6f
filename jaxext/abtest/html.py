"""A result as one self-contained page: figures, charts, replacements, settings, raw data. Nothing is fetched."""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

from jaxext.abtest import charts, report
from jaxext.abtest.result import ProgramResult, Result, Row

if TYPE_CHECKING:
    from jaxext.abtest.suite import SuiteResult

_CSS = """
:root{--ink:#1f2933;--soft:#52606d;--line:#e4e7ec;--good:#0a7e8c;--bad:#c8372d;--warn:#9a6700;--back:#f5f7fa}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink)}
body{font:15px/1.5 system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1120px;margin:0 auto;padding:32px 20px 60px}
section,header{background:#fff;border:1px solid var(--line);border-radius:10px;padding:20px 24px;margin-bottom:18px}
header{border-left:8px solid var(--good)}header.bad{border-left-color:var(--bad)}
header.warn{border-left-color:var(--warn)}
h1{font-size:26px;line-height:1.25;margin:2px 0 8px}h2{font-size:17px;margin:0 0 4px}
p{margin:2px 0;color:var(--soft)}.name{font-family:ui-monospace,Menlo,"DejaVu Sans Mono",monospace;font-size:13px}
.big{font-size:58px;font-weight:700;line-height:1;color:var(--good);float:right;margin-left:24px}
.bad .big{color:var(--bad)}.warn .big{color:var(--warn)}
.failure{color:var(--bad);font-weight:600;overflow-wrap:anywhere}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(440px,1fr));gap:18px;margin-bottom:18px}
.grid section{margin:0}.grid svg{width:100%;height:auto;display:block;margin-top:8px}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;margin-top:8px}
th,td{padding:6px 12px 6px 0;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}
th{font-weight:600;color:var(--soft);font-size:13px}th:first-child,td:first-child,td.text{text-align:left}
td{font-variant-numeric:tabular-nums}td.text{color:var(--soft);overflow-wrap:anywhere}
details{margin-top:10px}summary{cursor:pointer;color:var(--good);font-weight:600}
@media(max-width:600px){.big{float:none;margin:0 0 8px}.grid{grid-template-columns:1fr}}
@media print{body{background:#fff}section,header{break-inside:avoid}}
"""


def page(result: Result | ProgramResult) -> str:
    """The whole page.

    Raises:
      ChartsUnavailable: matplotlib is not installed.
    """
    body = [_header(result), section("Side by side", "", _side_table(result)), _charts(result)]
    if isinstance(result, Result):
        if result.contributions:
            caption = "Each kernel left out in turn, against jaxext with all. Kernels overlap: ratios do not multiply."
            rows = _row_table(("left out", "step without", "step with"), result.contributions)
            body.append(section("What each kernel brings", caption, rows))
        if result.memory:
            caption = "Stock JAX with the system's memory behaviour runs in a process of its own."
            rows = _row_table(("", "before", "after"), result.memory)
            body.append(section("What memory reuse brings", caption, rows))
        body.append(section("Replacements", "", _replacements(result)))
    if result.parity.leaves:
        body.append(section("Every compared leaf", "Norms of differences, worst first.", _leaf_table(result)))
    body.append(section("Settings", "", paragraphs(report.setting_lines(result)) + raw(result)))
    return frame(f"jaxext ab {result.name}", body)


def frame(title: str, body: Iterable[str]) -> str:
    """The page around `body`."""
    title = escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{_CSS}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )


def _header(result: Result | ProgramResult) -> str:
    state = "bad" if not result.agrees else "warn" if result.ratio < 1 else ""
    failures = "".join(f'<p class="failure">{escape(failure)}</p>' for failure in result.parity.failures)
    ratio = result.ratio if result.agrees else None
    return header(state, ratio, result.name, report.headline(result), paragraphs(report.evidence(result)) + failures)


def header(state: str, ratio: float | None, name: str, headline: str, content: str) -> str:
    """The box on top; `state`: "", "warn" or "bad". `ratio` None: the results differ. The content is not escaped."""
    big = "&ne;" if ratio is None else f"{ratio:.2f}&times;"
    return (
        f'<header class="{state}"><div class="big">{big}</div><p class="name">{escape(name)}</p>'
        f"<h1>{escape(headline)}</h1>{content}</header>"
    )


def paragraphs(lines: Iterable[str]) -> str:
    """A paragraph a line, escaped."""
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def section(title: str, caption: str, content: str) -> str:
    """One box of the page; title and caption are escaped, the content is not."""
    text = f"<p>{escape(caption)}</p>" if caption else ""
    return f"<section><h2>{escape(title)}</h2>{text}{content}</section>"


def _charts(result: Result | ProgramResult) -> str:
    drawn = (section(panel.title, panel.caption, charts.svg(panel)) for panel in charts.panels(result))
    return f'<div class="grid">{"".join(drawn)}</div>'


def table(headers: Iterable[str], rows: Iterable[Iterable[str]], text_columns: frozenset[int] = frozenset()) -> str:
    """Cells and headers are escaped."""
    head = "".join(f"<th>{escape(header)}</th>" for header in headers)
    lines = []
    for row in rows:
        cells = (
            f'<td class="text">{escape(cell)}</td>' if index in text_columns else f"<td>{escape(cell)}</td>"
            for index, cell in enumerate(row)
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _side_table(result: Result | ProgramResult) -> str:
    return table(("", result.reference.label, result.candidate.label, "times less"), report.side_rows(result))


def _row_table(headers: tuple[str, str, str], rows: list[Row]) -> str:
    cells = []
    for row in rows:
        if row.ratio is None:
            cells.append((row.name, "", "", "", row.note))
            continue
        interval = f"{row.ratio.interval[0]:.2f} to {row.ratio.interval[1]:.2f}" if row.ratio.interval else ""
        seconds = (report.duration(row.reference_seconds), report.duration(row.candidate_seconds))
        cells.append((row.name, *seconds, f"{row.ratio.value:.2f}x", interval))
    return table((*headers, "ratio", "95% interval"), cells)


def _replacements(result: Result) -> str:
    summary = "".join(f"<p>{escape(line)}</p>" for line in report.replacement_lines(result.replacements))
    rows = [
        (entry["kernel"], word, entry["source"], entry["location"], ", ".join(entry["shapes"]), entry["reason"])
        for key, word in (("replaced", "replaced"), ("missed", "missed"), ("fallbacks", "left to stock"))
        for entry in result.replacements.get(key, [])
    ]
    if not rows:
        return summary
    headers = ("kernel", "", "line of the program", "inside", "shapes", "reason")
    places = table(headers, rows, frozenset(range(1, 6)))
    return f"{summary}<details><summary>All {len(rows)} places</summary>{places}</details>"


def _leaf_table(result: Result | ProgramResult) -> str:
    rows = [
        (leaf.name, str(leaf.step), f"{leaf.error:.2e}", f"{leaf.bound:.2e}", f"{100 * min(leaf.fraction, 1e6):.1f}%")
        for leaf in result.parity.leaves
    ]
    headers = ("leaf", "step", "error", "bound", "share of the bound")
    first, rest = rows[:5], rows[5:]
    if not rest:
        return table(headers, first)
    more = f"<details><summary>{len(rest)} more</summary>{table(headers, rest)}</details>"
    return table(headers, first) + more


def raw(result: Result | ProgramResult | SuiteResult) -> str:
    """The result as JSON in the page."""
    data = json.dumps(result.to_dict()).replace("</", "<\\/")
    return f'<script type="application/json" id="result">{data}</script>'
