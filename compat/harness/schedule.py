"""Suites on a pool of workers: each file on stock JAX, then on jaxext, but for what is recorded already."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from . import execute
from .environment import Base, Prepared, digest, prepare
from .errors import CompatError
from .results import JAXEXT, SIDES, FileResult, Store
from .suite import Suite, list_files


@dataclasses.dataclass(frozen=True)
class Run:
    """What one call of compat/run.py does.

    Attributes:
      base: the Python whose JAX and jaxext are compared.
      cache: folder of environments, sources and results.
      workers: test processes at a time.
      quick: only the quick subset.
      rerun: nothing that is recorded is used.
    """

    base: Base
    cache: Path
    workers: int = 2
    quick: bool = False
    rerun: bool = False

    @property
    def store(self) -> Store:
        return Store(self.cache / "results")


Progress = Callable[[Suite, str, str, FileResult, bool], None]
"""Called with suite, file, side, result, and whether it was recorded before."""


@dataclasses.dataclass
class SuiteRun:
    """A prepared suite, its files, and the results as they come in: `results[side][file]`."""

    suite: Suite
    prepared: Prepared
    files: list[str]
    results: dict[str, dict[str, FileResult]]


def prepared(run: Run, suites: list[Suite]) -> tuple[list[SuiteRun], list[str]]:
    """The suites that are ready, and what went wrong with the others."""

    def ready(suite: Suite) -> SuiteRun | str:
        try:
            place = prepare(suite, run.base, run.cache)
            return SuiteRun(suite, place, list_files(suite, place.source, run.quick), {side: {} for side in SIDES})
        except CompatError as error:
            return str(error)

    with ThreadPoolExecutor(run.workers) as pool:
        found = list(pool.map(ready, suites))
    return [item for item in found if isinstance(item, SuiteRun)], [item for item in found if isinstance(item, str)]


def work(run: Run, suites: list[SuiteRun], progress: Progress) -> list[str]:
    """Fills in the suites' results; what pytest could not run at all is returned.

    Raises:
      KeyboardInterrupt: passed on when every process has ended; what has finished is recorded.
    """
    processes = execute.Processes()
    code = digest(run.base.jaxext)
    errors: list[str] = []

    def both(item: SuiteRun, file: str) -> None:
        try:
            for side in SIDES:
                result, recorded = _one(run, item, file, side, code, processes)
                item.results[side][file] = result
                progress(item.suite, file, side, result, recorded)
        except CompatError as error:
            errors.append(str(error))

    pool = ThreadPoolExecutor(run.workers)
    futures: list[Future[None]] = [pool.submit(both, item, file) for item in suites for file in item.files]
    try:
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    finally:
        processes.stop()
        pool.shutdown(cancel_futures=True)
    return errors


def _one(
    run: Run, item: SuiteRun, file: str, side: str, code: str, processes: execute.Processes
) -> tuple[FileResult, bool]:
    key = result_key(item.suite, run.base, side, code)
    path = run.store.path(run.base.platform, item.suite.name, side, file)
    recorded = None if run.rerun else run.store.load(path, key)
    if recorded is not None:
        return recorded, True
    job = execute.Job(item.suite, item.prepared, file, side, path.with_suffix(".events"))
    result = execute.run(job, processes)
    run.store.save(path, key, result)
    return result, False


def result_key(suite: Suite, base: Base, side: str, code: str) -> Mapping[str, Any]:
    """All that a result depends on; `code`: the digest of jaxext's sources."""
    parts = {
        "suite": f"{suite.package}=={suite.version}",
        "requires": list(suite.requires),
        "cwd": suite.cwd,
        "options": list(suite.options),
        "environment": dict(suite.environment),
        "timeout": suite.timeout,
        **base.versions,
    }
    return parts | ({"jaxext": code} if side == JAXEXT else {})
