"""One test file on one side, in pytest processes of its own; what a process leaves unfinished goes on in the next."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from .environment import Prepared
from .errors import CompatError
from .results import FileResult, TestResult
from .suite import Suite

PLUGIN = Path(__file__).parents[1] / "pytest_plugin"
# The machine's settings would differ from one caller to the next.
_NOT_PASSED_ON = ("JAX", "JAXEXT_", "XLA_", "PYTEST_", "PYTHONPATH", "PYTHONSTARTUP")
_GAVE_UP = (3, 4)  # pytest: an internal error, or options or a conftest.py that it cannot work with
_PROBLEMS = ("collection", "exit")

sys.path.insert(0, str(PLUGIN))
import jaxext_compat as plugin  # noqa: E402  # pyright: ignore[reportMissingImports]


class Processes:
    """Those that run, so that an interrupt ends them all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[Any]] = set()
        self._stopped = False

    def run(self, command: list[str], log: Path, timeout: float, **options: Any) -> int | None:
        """Exit code, negative for a signal; None where the time was up. Output is appended to `log`."""
        with log.open("a") as output:
            with self._lock:
                if self._stopped:
                    raise KeyboardInterrupt
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, **options
                )
                self._running.add(process)
            try:
                return process.wait(timeout)
            except subprocess.TimeoutExpired:
                return None
            finally:
                end(process)
                with self._lock:
                    self._running.discard(process)

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._running:
                end(process)


def end(process: subprocess.Popen[Any]) -> None:
    """Ends the process and those it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


@dataclasses.dataclass(frozen=True)
class Job:
    """One test file on one side. `record`: where its events go; its output goes beside, to `.log`."""

    suite: Suite
    prepared: Prepared
    file: str
    side: str
    record: Path

    def command(self) -> list[str]:
        folder = self.prepared.source / self.suite.cwd
        own = ["-p", "jaxext_compat", f"--jaxext-side={self.side}", f"--jaxext-record={self.record}"]
        usual = ["-q", "--tb=short", "-p", "no:cacheprovider", f"--rootdir={folder}"]
        file = os.path.relpath(self.prepared.source / self.file, folder)
        return [self.prepared.python, "-m", "pytest", *own, *usual, *self.suite.options, file]

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_PASSED_ON)}
        fixed = {"JAX_PLATFORMS": "cpu", "PYTHONHASHSEED": "0", "PYTHONPATH": str(PLUGIN)}
        return kept | fixed | dict(self.suite.environment)


def run(job: Job, processes: Processes) -> FileResult:
    """
    Raises:
      CompatError: pytest did not start, with the end of its output.
    """
    job.record.parent.mkdir(parents=True, exist_ok=True)
    log = job.record.with_suffix(".log")
    log.unlink(missing_ok=True)
    job.record.unlink(missing_ok=True)
    start = time.monotonic()
    while not _round(job, processes, log):
        pass
    result = _result(plugin.read(job.record), time.monotonic() - start)
    job.record.unlink(missing_ok=True)
    return result


def _round(job: Job, processes: Processes, log: Path) -> bool:
    """One process over what is left; True where nothing is left to be run."""
    before = len(plugin.read(job.record))
    folder = job.prepared.source / job.suite.cwd
    code = processes.run(job.command(), log, job.suite.timeout, cwd=folder, env=job.environment())
    events = plugin.read(job.record)[before:]
    running = unfinished(events)
    if running is None and (code in _GAVE_UP or (code is not None and code >= 0 and not events)):
        tail = "\n  ".join(log.read_text(errors="replace").strip().splitlines()[-8:])
        raise CompatError(f"suite {job.suite.name}, {job.file}: pytest gave up (exit code {code}):\n  {tail}")
    finished = any("finished" in event for event in events)
    if finished and code is not None and code >= 0:
        return True
    outcome, error = _death(code, job.suite.timeout)
    if running is None and not any("outcome" in event for event in events):
        _append(job.record, {"exit" if finished else "collection": job.file, "error": error})
        return True
    if running is None:
        _append(job.record, {"exit": job.file, "error": error})
    elif outcome == "crashed" or _had_time(running, events, job.suite.timeout):
        _append(job.record, {"test": running["test"], "outcome": outcome, "error": error, "seconds": 0.0})
    return finished


def _had_time(running: dict[str, Any], events: list[dict[str, Any]], timeout: float) -> bool:
    """False for a test that came when the time was nearly up: it runs again, as the first of the next process."""
    first = next(event for event in events if "test" in event)
    return running is first or time.time() - running["start"] > timeout / 2


def unfinished(events: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The start of the test that was running when the process died."""
    tests = [event for event in events if "test" in event]
    return tests[-1] if tests and "outcome" not in tests[-1] else None


def _death(code: int | None, timeout: float) -> tuple[str, str]:
    if code is None:
        return "timed out", f"its process took more than {timeout:g} s"
    if code < 0:
        return "crashed", f"its process was ended by {signal.Signals(-code).name}"
    return "crashed", f"its process ended itself with exit code {code}"


def _append(record: Path, event: dict[str, Any]) -> None:
    with record.open("a") as file:
        file.write(json.dumps(event) + "\n")


def _result(events: list[dict[str, Any]], seconds: float) -> FileResult:
    tests = {
        event["test"]: TestResult(**{name: value for name, value in event.items() if name != "test"})
        for event in events
        if "outcome" in event
    }
    collection, at_exit = (next((event["error"] for event in events if kind in event), "") for kind in _PROBLEMS)
    return FileResult(tests, collection, at_exit, round(seconds, 1))
