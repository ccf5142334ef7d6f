"""The pytest plugin of compat/run.py: one line of JSON for each thing that happens, and on one side jaxext.

Given as `-p jaxext_compat --jaxext-side=stock|jaxext --jaxext-record=FILE`. Tests that FILE has an outcome of already
do not run again, so that the file of a process that died can be gone on with.
"""

from __future__ import annotations

import collections
import contextlib
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Of several things that went wrong in one test, the worst is its outcome.
_RANK = ("skipped", "passed", "xfailed", "xpassed", "failed", "error")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("jaxext")
    group.addoption("--jaxext-side", choices=("stock", "jaxext"), required=True)
    group.addoption("--jaxext-record", type=Path, required=True)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    # Ahead of the project's own conftest.py, which may compute already.
    if early_config.known_args_namespace.jaxext_side == "jaxext":
        import jaxext

        jaxext.install()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Recorder(config), "jaxext-recorder")


class _Recorder:
    def __init__(self, config: pytest.Config) -> None:
        self._path = Path(str(config.getoption("--jaxext-record")))
        self._with_jaxext = config.getoption("--jaxext-side") == "jaxext"
        self._done = {event["test"] for event in read(self._path) if "outcome" in event}
        self._reports: list[pytest.TestReport] = []

    def _write(self, **event: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(event) + "\n")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(collection=report.nodeid, error=first_line(report))

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = [item for item in items if item.nodeid in self._done]
        items[:] = [item for item in items if item.nodeid not in self._done]
        if done:
            config.hook.pytest_deselected(items=done)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._write(test=item.nodeid, start=time.time())
        self._reports.clear()
        start = time.perf_counter()
        with self._collecting() as report:
            result = yield
        outcome, error = worst(self._reports)
        seconds = round(time.perf_counter() - start, 3)
        self._write(test=item.nodeid, outcome=outcome, seconds=seconds, error=error, **counts(report))
        return result

    def _collecting(self) -> contextlib.AbstractContextManager[Any]:
        if not self._with_jaxext:
            return contextlib.nullcontext()
        import jaxext

        return jaxext.collect()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(report)

    def pytest_sessionfinish(self) -> None:
        self._write(finished=True)


def read(path: Path) -> list[dict[str, Any]]:
    """The events of a record; a last line that a dying process cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def counts(report: Any) -> dict[str, dict[str, int]]:
    """A `jaxext.Report` (or None) as numbers."""
    if report is None:
        return {}
    return {
        "replaced": collections.Counter(entry.kernel for entry in report.replaced),
        "fallbacks": _reasons(report.fallbacks),
        "missed": _reasons(report.missed),
    }


def _reasons(entries: Iterable[Any]) -> dict[str, int]:
    return collections.Counter(f"{entry.kernel or 'whole function'}: {entry.reason}" for entry in entries)


def worst(reports: list[pytest.TestReport]) -> tuple[str, str]:
    """Outcome of a test and the first line of its error."""
    outcome, error = "skipped", "it did not run"
    # Setup and teardown that went well say nothing of the test.
    telling = [report for report in reports if report.when == "call" or not report.passed]
    for number, report in enumerate(telling):
        new = _outcome(report)
        if number == 0 or _RANK.index(new) > _RANK.index(outcome):
            outcome, error = new, "" if new == "passed" else first_line(report)
    return outcome, error


def _outcome(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return "xfailed" if report.skipped else "xpassed"
    if report.failed:
        return "failed" if report.when == "call" else "error"
    return report.outcome


def first_line(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The error in one line, such as `AssertionError: assert 1 == 2`."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        text = crash.message
    elif isinstance(report.longrepr, tuple):
        text = report.longrepr[-1]
    else:
        # What collection raised: the last line that pytest marks with E names the error.
        lines = [line for line in report.longreprtext.splitlines() if line.strip()]
        marked = [line.removeprefix("E").strip() for line in lines if line.startswith("E ")]
        text = (marked or lines or [""])[-1]
    return text.strip().partition("\n")[0][:300]
