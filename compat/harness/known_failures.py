"""Tests that are known to fail on jaxext alone, and why (compat/known_failures/NAME.toml)."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path

from .conditions import holds
from .errors import CompatError


@dataclasses.dataclass(frozen=True)
class KnownFailure:
    """
    Attributes:
      test: the pytest id.
      reason: why jaxext cannot pass it.
      condition: where it fails, such as ``python<3.12 and jax>=0.11``; "" for everywhere.
    """

    test: str
    reason: str
    condition: str = ""


def read(path: Path, versions: Mapping[str, str]) -> dict[str, str]:
    """Reason by test id of the failures that hold for `versions` (of `python` and `jax`); none where no file is.

    Raises:
      CompatError: a key is missing or unknown, a test is listed twice, or a condition cannot be read.
    """
    if not path.exists():
        return {}
    try:
        table = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise CompatError(f"{path}: {error}. Known failures are a TOML file of [[failure]] tables.") from error
    if set(table) - {"failure"}:
        raise CompatError(f"{path.name}: unknown key {sorted(set(table) - {'failure'})[0]!r}, expected [[failure]].")
    reasons: dict[str, str] = {}
    for entry in table.get("failure", []):
        failure = _checked(entry, path)
        if not holds(failure.condition, versions):
            continue
        if failure.test in reasons:
            raise CompatError(f"{path.name}: {failure.test} is listed twice. Drop one of them.")
        reasons[failure.test] = failure.reason
    return reasons


def _checked(entry: dict[str, str], path: Path) -> KnownFailure:
    for key in ("test", "reason"):
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            raise CompatError(f"{path.name}: a [[failure]] without {key}, expected a string: {entry}.")
    unknown = sorted(set(entry) - {"test", "reason", "condition"})
    if unknown:
        raise CompatError(f"{path.name}: unknown key {unknown[0]!r} in [[failure]], expected test, reason, condition.")
    return KnownFailure(**entry)
