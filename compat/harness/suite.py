"""A suite: which release's tests run, where, and how (compat/suites/NAME.toml)."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .conditions import holds
from .errors import CompatError


@dataclasses.dataclass(frozen=True)
class Suite:
    """One project's tests.

    Attributes:
      name: the file's name, and the suite's on the command line.
      package: the project on the package index.
      version: the exact release, whose source distribution holds the tests.
      paths: test files or folders inside the unpacked source.
      requires: further requirements of the tests, installed next to the package.
      exclude: files or folders below `paths` that are no part of the suite.
      cwd: folder inside the source in which pytest runs.
      options: further options of pytest, the same on both sides.
      environment: further environment variables, the same on both sides.
      quick: the files of the quick subset.
      timeout: seconds that one process, which runs one test file, may take.
      expects_replacements: the whole suite must run at least one replaced kernel call.
      skip: why it is not run at all; "" where it is.
    """

    name: str
    package: str
    version: str
    paths: tuple[str, ...]
    requires: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    cwd: str = "."
    options: tuple[str, ...] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    quick: tuple[str, ...] = ()
    timeout: float = 600
    expects_replacements: bool = False
    skip: str = ""


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


_KINDS: dict[str, tuple[str, Callable[[Any], bool], Callable[[Any], Any]]] = {
    "str": ("a string", lambda value: isinstance(value, str), str),
    "tuple[str, ...]": ("a list of strings", _is_strings, tuple),
    "Mapping[str, str]": ("a table of strings", _is_table, dict),
    "float": ("a positive number", lambda v: isinstance(v, (int, float)) and v > 0 and v is not True, float),
    "bool": ("true or false", lambda value: isinstance(value, bool), bool),
}


def read(path: Path, versions: Mapping[str, str]) -> Suite:
    """The suite as it is for `versions` (of `python` and `jax`): each [[when]] whose condition holds replaces keys.

    Raises:
      CompatError: the file is no TOML, or a key is missing, unknown or of another type.
    """
    try:
        table = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise CompatError(f"{path.name}: {error}. A suite is a TOML file.") from error
    variants = table.pop("when", [])
    if not isinstance(variants, list) or not all(isinstance(v, dict) and "condition" in v for v in variants):
        raise CompatError(f"{path.name}: when = {variants!r}, expected [[when]] tables with a condition each.")
    fields = {field.name: field for field in dataclasses.fields(Suite)}
    for name, value in [item for part in (table, *variants) for item in part.items()]:
        if name in fields:
            expected, fits, _ = _KINDS[str(fields[name].type)]
            if not fits(value):
                raise CompatError(f"{path.name}: {name} = {value!r}, expected {expected}.")
        elif name != "condition" or name in table:
            raise CompatError(f"{path.name}: unknown key {name!r}, expected one of {', '.join(fields)}.")
    for variant in variants:
        if holds(variant["condition"], versions):
            table |= {name: value for name, value in variant.items() if name != "condition"}
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in table:
            raise CompatError(f"{path.name}: {name} is missing, expected {_KINDS[str(field.type)][0]}.")
    suite = Suite(**{name: _KINDS[str(fields[name].type)][2](value) for name, value in table.items()})
    if suite.name != path.stem:
        raise CompatError(f"{path.name}: name = {suite.name!r}, expected the file's own, {path.stem!r}.")
    return suite


def find(folder: Path, names: list[str], versions: Mapping[str, str]) -> list[Suite]:
    """The suites called `names`; all of them where no name is given.

    Raises:
      CompatError: an unknown name, or a faulty file.
    """
    known = {path.stem: path for path in sorted(folder.glob("*.toml"))}
    for name in names:
        if name not in known:
            raise CompatError(
                f"--suite {name}: unknown, expected one of {', '.join(known) or 'none, for none is there'}."
            )
    return [read(known[name], versions) for name in dict.fromkeys(names or known)]


def list_files(suite: Suite, source: Path, quick: bool) -> list[str]:
    """The suite's test files in the unpacked source, relative to it.

    Raises:
      CompatError: a path that is not there, or holds no tests.
    """
    skipped = {file for path in suite.exclude for file in _files_of(suite, source, path)}
    files = [file for path in (suite.quick if quick else suite.paths) for file in _files_of(suite, source, path)]
    return [file for file in dict.fromkeys(files) if file not in skipped]


def _files_of(suite: Suite, source: Path, path: str) -> list[str]:
    found = sorted(source.glob(path))
    files = [file for place in found for file in ([place] if place.is_file() else _tests_below(place))]
    if not files:
        remedy = "Name files or folders of the unpacked source distribution."
        raise CompatError(f"suite {suite.name}: {path!r} names no test file of {source.name}. {remedy}")
    return [file.relative_to(source).as_posix() for file in files]


def _tests_below(folder: Path) -> list[Path]:
    return sorted({*folder.rglob("test_*.py"), *folder.rglob("*_test.py"), *folder.rglob("*_tests.py")})
