"""What docs/compat.md is made from: one small JSON file a suite and platform, kept in the repository.

The whole takes hours on a small machine, so a page is rarely made of one run's results. A record says how many of the
suite's files it covers and which builds of jaxext they ran on.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import known_failures, suite
from .compare import Comparison, Problem, compare
from .environment import source_folder
from .results import JAXEXT, STOCK, FileResult, Store


@dataclasses.dataclass(frozen=True)
class Record:
    """A suite's results on one Python and JAX.

    Attributes:
      platform: such as py3.11-jax0.10.2.
      package, version: the release whose tests they are.
      there, files: files with results on both sides, and those there are.
      builds: digests of the jaxext that ran them (environment.digest); more than one where it changed in between.
      comparison: what they gave.
    """

    platform: str
    package: str
    version: str
    there: int
    files: int
    builds: tuple[str, ...]
    comparison: Comparison

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        values["comparison"]["suite"] = self.comparison.suite.name
        return values


def collect(cache: Path, compat: Path) -> Iterator[Record]:
    """Records of all results in the cache's `results`, of every Python and JAX."""
    for folder in sorted(path for path in (cache / "results").glob("*") if path.is_dir()):
        for item in suite.find(compat / "suites", [], versions_of(folder.name)):
            record = _collected(item, folder.name, cache, compat)
            if record is not None:
                yield record


def versions_of(platform: str) -> dict[str, str]:
    """`python` and `jax` of a platform such as py3.11-jax0.10.2."""
    python, jax = platform.removeprefix("py").split("-jax")
    return {"python": python, "jax": jax}


def _collected(item: suite.Suite, platform: str, cache: Path, compat: Path) -> Record | None:
    source = source_folder(item, cache)
    if item.skip or not source.exists():
        return None
    store = Store(cache / "results")
    files = suite.list_files(item, source, quick=False)
    sides: dict[str, dict[str, FileResult]] = {STOCK: {}, JAXEXT: {}}
    builds = set()
    for side, file in ((side, file) for side in sides for file in files):
        path = store.path(platform, item.name, side, file)
        found = store.load_with_key(path, {"suite": f"{item.package}=={item.version}"})
        if found is not None:
            sides[side][file], key = found
            builds.add(key.get("jaxext"))
    both = [file for file in files if file in sides[STOCK] and file in sides[JAXEXT]]
    if not both:
        return None
    known = known_failures.read(compat / "known_failures" / f"{item.name}.toml", versions_of(platform))
    stock, jaxext = ({file: sides[side][file] for file in both} for side in sides)
    comparison = compare(item, stock, jaxext, known, whole=len(both) == len(files))
    names = tuple(sorted(build for build in builds if build))
    return Record(platform, item.package, item.version, len(both), len(files), names, comparison)


def keep(record: Record, folder: Path) -> bool:
    """Write `folder/PLATFORM/SUITE.json`; not (False) over a record of more files of the same release."""
    path = folder / record.platform / f"{record.comparison.suite.name}.json"
    if path.exists():
        old = json.loads(path.read_text())
        if old["version"] == record.version and old["there"] > record.there:
            return False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record.to_dict(), indent=1) + "\n")
    return True


def read(folder: Path, platform: str, item: suite.Suite) -> Record | None:
    """The record of a suite on a platform, where there is one."""
    path = folder / platform / f"{item.name}.json"
    if not path.exists():
        return None
    values = json.loads(path.read_text())
    compared = values["comparison"]
    problems = tuple(Problem(**problem) for problem in compared["problems"])
    comparison = Comparison(**{**compared, "suite": item, "problems": problems})
    return Record(**{**values, "builds": tuple(values["builds"]), "comparison": comparison})
