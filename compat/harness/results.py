"""What a test file's run gave, kept as JSON so that a stopped run goes on where it was."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STOCK, JAXEXT = SIDES = ("stock", "jaxext")
# Part of every key: results in an older form are made again.
_FORM = {"form": 2}


@dataclasses.dataclass(frozen=True)
class TestResult:
    """
    Attributes:
      outcome: passed, failed, error, skipped, xfailed, xpassed, crashed or timed out.
      seconds: wall time.
      error: first line of the error; "" where there is none.
      replaced: kernel calls that were put into programs traced during the test, by kernel.
      fallbacks: patterns found but left to stock JAX, by "kernel: reason".
      missed: near misses, by "kernel: reason".
    """

    __test__ = False

    outcome: str
    seconds: float = 0.0
    error: str = ""
    replaced: Mapping[str, int] = dataclasses.field(default_factory=dict)
    fallbacks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    missed: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class FileResult:
    """
    Attributes:
      tests: result by pytest id.
      collection: why pytest could not collect the file; "" where it could.
      at_exit: how a process died after a test had ended, or all; "" where none did.
      seconds: wall time of its processes.
    """

    tests: Mapping[str, TestResult]
    collection: str = ""
    at_exit: str = ""
    seconds: float = 0.0


class Store:
    """Results under one folder: `PLATFORM/SUITE/SIDE/FILE.json`, each with the key under which it is valid."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, platform: str, suite: str, side: str, file: str) -> Path:
        name = file.replace("/", "__")
        return self.folder / platform / suite / side / f"{name}.json"

    def load(self, path: Path, key: Mapping[str, Any]) -> FileResult | None:
        """What was recorded, where it was under a key that has all of `key`."""
        found = self.load_with_key(path, key)
        return found[0] if found else None

    def load_with_key(self, path: Path, key: Mapping[str, Any]) -> tuple[FileResult, Mapping[str, Any]] | None:
        """The same, with the whole key under which it was recorded."""
        if not path.exists():
            return None
        data = json.loads(path.read_text())
        if data["key"] | _FORM | dict(key) != data["key"]:
            return None
        tests = {test: TestResult(**result) for test, result in data["tests"].items()}
        return FileResult(tests, data["collection"], data["at_exit"], data["seconds"]), data["key"]

    def save(self, path: Path, key: Mapping[str, Any], result: FileResult) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps({"key": _FORM | dict(key), **dataclasses.asdict(result)}, indent=1))
        unfinished.replace(path)
