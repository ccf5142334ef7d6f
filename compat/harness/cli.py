"""The command line of compat/run.py: options, progress, the table of what went wrong, the exit code."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from . import document, known_failures, records, schedule, suite
from .compare import Comparison, compare
from .environment import probe
from .errors import CompatError
from .results import JAXEXT, SIDES, STOCK, FileResult

ROOT = Path(__file__).parents[2]


def main(arguments: list[str] | None = None, *, compat: Path = ROOT / "compat") -> int:
    """0: everything that passes on stock JAX passes on jaxext. 1: something does not. 2: bad input. 130: interrupted.

    compat: folder with `suites`, `known_failures` and `records`.
    """
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        return _run(options, compat, console)
    except CompatError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted; what had finished is recorded, the same command goes on from there")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compat/run.py",
        description="Run other projects' test suites on stock JAX and on jaxext, and compare them test by test.",
    )
    parser.add_argument("--suite", action="append", default=[], metavar="NAME", help="only this suite (repeatable)")
    parser.add_argument("--quick", action="store_true", help="only each suite's quick subset")
    parser.add_argument("--python", default=sys.executable, help="a Python with jaxext installed (default: this one)")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "compat", help="environments, sources, results")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="test processes at a time")
    parser.add_argument("--rerun", action="store_true", help="run again what is recorded already")
    parser.add_argument("--write-docs", action="store_true", help="record what is cached, and write the page")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "compat.md", help="the page (docs/compat.md)")
    return parser


def _run(options: argparse.Namespace, compat: Path, console: Console) -> int:
    base = probe(options.python)
    suites = suite.find(compat / "suites", options.suite, base.versions)
    for item in suites:
        if item.skip:
            console.print(f"{item.name} is not run: {item.skip}", markup=False, highlight=False)
    suites = [item for item in suites if not item.skip and (item.quick or not options.quick)]
    if not suites:
        raise CompatError("none of these suites has anything to run here: see --suite and --quick.")
    if options.workers < 1:
        raise CompatError(f"--workers {options.workers}: expected at least 1.")
    run = schedule.Run(base, options.cache.absolute(), options.workers, options.quick, options.rerun)
    known = {item.name: known_failures.read(_known(compat, item), base.versions) for item in suites}
    console.print(f"Python {base.python}, JAX {base.jax}: {', '.join(item.name for item in suites)}", highlight=False)
    with console.status("environments and source distributions"):
        ready, errors = schedule.prepared(run, suites)
    errors += _work(run, ready, console)
    comparisons = [
        compare(item.suite, item.results[STOCK], item.results[JAXEXT], known[item.suite.name], whole=not options.quick)
        for item in ready
        if item.results[JAXEXT].keys() == set(item.files)
    ]
    _show(comparisons, errors, console)
    if options.write_docs:
        for record in records.collect(run.cache, compat):
            if not records.keep(record, compat / "records"):
                kept = f"{record.comparison.suite.name} on {record.platform}: a record of more files is kept"
                console.print(kept, highlight=False)
        options.docs.write_text(document.text(compat / "records", compat / "suites"))
        console.print(f"wrote {options.docs}")
    return 1 if errors or any(comparison.problems for comparison in comparisons) else 0


def _known(compat: Path, item: suite.Suite) -> Path:
    return compat / "known_failures" / f"{item.name}.toml"


def _work(run: schedule.Run, ready: list[schedule.SuiteRun], console: Console) -> list[str]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        tasks = {item.suite.name: bar.add_task(item.suite.name, total=len(SIDES) * len(item.files)) for item in ready}

        def progress(item: suite.Suite, file: str, side: str, result: FileResult, recorded: bool) -> None:
            bar.advance(tasks[item.name])
            if not console.is_terminal and not recorded:
                passed = sum(test.outcome == "passed" for test in result.tests.values())
                line = f"{item.name} {file} {side}: {passed} of {len(result.tests)} passed, {result.seconds:g} s"
                console.print(f"{line} {result.collection}", markup=False, highlight=False, soft_wrap=True)

        return schedule.work(run, ready, progress)


def _show(comparisons: list[Comparison], errors: list[str], console: Console) -> None:
    table = Table("suite", "tests", "pass on stock", "on jaxext", "known failures", "kernel calls", "fell back")
    for item in comparisons:
        numbers = (item.tests, item.stock, item.jaxext, len(item.known), _sum(item.replaced), _sum(item.fallbacks))
        table.add_row(item.suite.name, *map(str, numbers))
    console.print(table)
    for item in comparisons:
        for file, error in item.uncollected.items():
            text = f"{item.suite.name}: {file} cannot be collected on stock JAX: {error}"
            console.print(text, style="yellow", markup=False, highlight=False)
    problems = [problem for item in comparisons for problem in item.problems]
    if problems:
        wrong = Table(title=f"{len(problems)} problems", title_justify="left")
        for column in ("suite", "test", "on jaxext"):
            wrong.add_column(column, overflow="fold")
        for problem in problems:
            wrong.add_row(*map(Text, (problem.suite, problem.test, problem.what)))
        console.print(wrong)
    for error in errors:
        console.print(error, style="red", markup=False, highlight=False)


def _sum(counts: object) -> int:
    return sum(counts.values()) if isinstance(counts, dict) else 0
