"""docs/compat.md, from the records of every Python and JAX."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from . import suite
from .compare import Comparison
from .records import Record, read, versions_of

_INTRODUCTION = """# Compatibility

Written by `make compat`: do not edit.

Other projects' own tests run twice, each file in a process of its own: on stock JAX, and with `jaxext.install()` called
before pytest collects anything. Tests, assertions and tolerances are those of the projects' releases. Only a test that
passes on stock JAX counts, and each of those has to pass on jaxext; a known failure is listed with its reason, and one
that passes after all is an error. Replaced kernel calls are those put into programs that JAX traced in a test; a
fall-back is a pattern that was recognised and left to stock JAX, for the reason given. The build is the digest of the
jaxext that a suite ran on; different ones were recorded at different times.
"""
_SHOWN = 12  # reasons of a suite


def text(records: Path, suites: Path) -> str:
    """
    Args:
      records: the folder of records, with `sweep.json` from the sweep over architectures where that was run.
      suites: the folder of suites.
    """
    lines = [_INTRODUCTION]
    for folder in sorted(path for path in records.glob("*") if path.is_dir()):
        versions = versions_of(folder.name)
        found = suite.find(suites, [], versions)
        recorded = [record for item in found if (record := read(records, folder.name, item)) is not None]
        if recorded:
            lines += _platform(recorded, f"Python {versions['python']}, JAX {versions['jax']}")
            lines += [f"{item.name} is not run: {item.skip}\n" for item in found if item.skip]
    sweep = records / "sweep.json"
    if sweep.exists():
        lines += _architectures(json.loads(sweep.read_text()))
    return "\n".join(lines) + "\n"


def _platform(recorded: list[Record], title: str) -> Iterator[str]:
    yield f"## Test suites: {title}\n"
    rows = []
    for found in recorded:
        item = found.comparison
        files = str(found.files) if found.there == found.files else f"{found.there} of {found.files}"
        share = f"{100 * item.jaxext / item.stock:.4g}%" if item.stock else ""
        calls, left = sum(item.replaced.values()), sum(item.fallbacks.values())
        name = f"{found.package} {found.version}"
        rows.append(
            (name, files, item.tests, item.stock, item.jaxext, share, len(item.known), calls, left, _builds(found))
        )
    header = ("suite", "files", "tests", "pass on stock", "of these on jaxext", "", "known failures")
    yield from _table((*header, "replaced kernel calls", "fall-backs", "build"), rows)
    for found in recorded:
        yield from _suite(found.comparison)


def _builds(record: Record) -> str:
    return ", ".join(f"`{build[:6]}`" for build in record.builds)


def _suite(item: Comparison) -> Iterator[str]:
    if item.replaced or item.fallbacks or item.missed or item.problems or item.known or item.uncollected:
        yield f"### {item.suite.name}\n"
    if item.replaced:
        yield "Replaced: " + ", ".join(f"{name} {count}" for name, count in item.replaced.items()) + ".\n"
    if item.problems:
        yield from _table(("test that differs", "on jaxext"), [(f"`{p.test}`", p.what) for p in item.problems])
    if item.known:
        yield from _table(("known failure", "reason"), [(f"`{test}`", why) for test, why in item.known.items()])
    if item.uncollected:
        yield from _table(("not collected on stock JAX", "error"), [(f"`{f}`", e) for f, e in item.uncollected.items()])
    yield from _reasons("fell back", item.fallbacks)
    yield from _reasons("nearly replaced", item.missed)


def _reasons(title: str, counts: Mapping[str, int]) -> Iterator[str]:
    rows = list(counts.items())
    rest = rows[_SHOWN:]
    if rest:
        rows = [*rows[:_SHOWN], (f"{len(rest)} further reasons", sum(count for _, count in rest))]
    if rows:
        yield from _table((title, "times"), rows)


def _architectures(sweep: list[dict[str, Any]]) -> Iterator[str]:
    yield "## Architectures\n"
    yield (
        "One train step with random weights, on stock JAX and on jaxext. Kernels are found of expected; differences\n"
        "are the largest relative ones.\n"
    )
    rows = []
    for found in sweep:
        kernels = ", ".join(f"{name} {there} of {expected}" for name, (there, expected) in found["kernels"].items())
        differences = (f"{found['loss_difference']:.1e}", f"{found['gradient_difference']:.1e}")
        agrees = "yes" if found["agree"] else "**no**"
        missed = "; ".join(dict.fromkeys(found["missed"]))
        rows.append((found["architecture"], f"`{found['class']}`", kernels, *differences, agrees, missed))
    yield from _table(("architecture", "class", "kernels", "loss", "gradients", "same", "missed"), rows)


def _table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> Iterator[str]:
    names = list(header)
    yield "| " + " | ".join(names) + " |"
    yield "|" + "---|" * len(names)
    for row in rows:
        yield "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |"
    yield ""
