"""What was replaced, what nearly was, and what fell back: for `jaxext.explain`, `require=` and JAXEXT_STRICT."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@dataclasses.dataclass(frozen=True)
class Entry:
    """One place in the program.

    Attributes:
      kernel: ``attention``, ``layer_norm``, …; "" where no single kernel is meant.
      shapes: types of the kernel's inputs, such as ``f32[2,8,4,16]``.
      dtype: dtype of the result.
      source: the user's line, such as ``model.py:41 (attend)``; "" where JAX kept none.
      location: the functions and control flow around it, such as ``loss/scan/remat``.
      reason: why it was missed or fell back; "" for a replacement.
      detail: what the kernel was given (masks, heads, options).
    """

    kernel: str
    shapes: tuple[str, ...] = ()
    dtype: str = ""
    source: str = ""
    location: str = ""
    reason: str = ""
    detail: str = ""

    def __str__(self) -> str:
        parts = [self.kernel or "whole function", self.detail, ", ".join(self.shapes)]
        where = " ".join(filter(None, [self.location and f"in {self.location}", self.source and f"at {self.source}"]))
        line = " ".join(filter(None, [*parts, where]))
        return f"{line}: {self.reason}" if self.reason else line


class Report:
    """Replacements, near misses and fall-backs of one function, each an `Entry` with the user's source line.

    Attributes:
      replaced: patterns that run on a jaxext kernel.
      missed: patterns that were recognisable but for one operation, which `reason` names.
      fallbacks: patterns that were found but run on stock JAX, with the reason.
      notes: what else bears on the result, one line each (hooks that this JAX lacks, memory settings).
    """

    def __init__(self) -> None:
        self.replaced: list[Entry] = []
        self.missed: list[Entry] = []
        self.fallbacks: list[Entry] = []
        self.notes: list[str] = []

    def __bool__(self) -> bool:
        return bool(self.replaced or self.missed or self.fallbacks)

    def kernels(self) -> set[str]:
        """Names of the kernels that were used."""
        return {entry.kernel for entry in self.replaced}

    def extend(self, other: Report) -> None:
        self.replaced += other.replaced
        self.missed += other.missed
        self.fallbacks += other.fallbacks
        self.notes += [note for note in other.notes if note not in self.notes]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and strings, ready for JSON."""
        sections = {name: getattr(self, name) for name in ("replaced", "missed", "fallbacks")}
        result: dict[str, Any] = {
            name: [dataclasses.asdict(entry) | {"shapes": list(entry.shapes)} for entry in entries]
            for name, entries in sections.items()
        }
        return result | {"notes": list(self.notes)}

    def __str__(self) -> str:
        lines = [
            *_section("replaced", self.replaced, "nothing replaced"),
            *_section("missed", self.missed),
            *_section("fell back to stock JAX", self.fallbacks),
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Report: {len(self.replaced)} replaced, {len(self.missed)} missed, {len(self.fallbacks)} fell back>"


def _section(title: str, entries: list[Entry], empty: str = "") -> Iterator[str]:
    if not entries:
        if empty:
            yield empty
        return
    yield f"{title} ({len(entries)}):"
    counts: dict[Entry, int] = {}
    for entry in entries:
        counts[entry] = counts.get(entry, 0) + 1
    for entry, count in counts.items():
        yield f"  {entry}" if count == 1 else f"  {count} x {entry}"


class FallbackError(RuntimeError):
    """A fall-back to stock JAX under JAXEXT_STRICT=1."""


class RequirementError(RuntimeError):
    """A kernel that `accelerate(require=…)` names was not used everywhere it was expected."""


class _Collectors(threading.local):
    def __init__(self) -> None:
        self.reports: list[Report] = []


_collectors = _Collectors()


@contextmanager
def collecting(report: Report) -> Iterator[Report]:
    """What is rewritten by this thread inside is recorded in `report` too."""
    _collectors.reports.append(report)
    try:
        yield report
    finally:
        _collectors.reports.remove(report)


_everywhere: list[Report] = []


def collect_everywhere(report: Report) -> None:
    """What is rewritten by any thread from now on is recorded in `report` too."""
    _everywhere.append(report)


@contextmanager
def collect() -> Iterator[Report]:
    """What programs are given inside the `with`, in any thread: replacements, near misses and fall-backs, as they come.

    A program is rewritten when JAX traces it. A jitted function that has run with these shapes before is not traced
    again, and so is not in the report; `jaxext.explain` traces anew. Several may be open at once, each has all.

    Yields:
      a `Report`, empty where neither `install` nor `accelerate` is at work.
    """
    report = Report()
    collect_everywhere(report)
    try:
        yield report
    finally:
        _everywhere.remove(report)


def is_collecting() -> bool:
    """True where somebody in this thread wants to know."""
    return bool(_collectors.reports)


def record(report: Report, strict: bool) -> None:
    """Add `report` to those being collected.

    Raises:
      FallbackError: `strict`, and the report has a fall-back.
    """
    for collector in (*_collectors.reports, *_everywhere):
        collector.extend(report)
    if strict and report.fallbacks:
        raise FallbackError(
            f"JAXEXT_STRICT: {report.fallbacks[0]}. Unset JAXEXT_STRICT to let it run on stock JAX, "
            "or switch the kernel off with JAXEXT_KERNELS."
        )


def check_required(report: Report, require: tuple[str, ...]) -> None:
    """
    Raises:
      RequirementError: a kernel of `require` was not used, or not in every place that looks like it.
    """
    for kernel in require:
        problems = [entry for entry in (*report.missed, *report.fallbacks) if entry.kernel == kernel]
        if kernel in report.kernels() and not problems:
            continue
        found = "was not replaced everywhere" if kernel in report.kernels() else "was not replaced"
        reasons = "".join(f"\n  {entry}" for entry in problems) or "\n  nothing in the function looks like it"
        raise RequirementError(
            f"accelerate(require=({kernel!r},)): {kernel} {found}:{reasons}\n"
            "Rewrite the operation that is named, call jaxext.kernels directly, or drop it from require."
        )
