"""Many programs, each as a user runs it: `jaxext ab --suite FILE`.

Every program runs in processes of its own on three sides, interleaved: stock JAX as it comes, stock JAX with memory
reuse, and `jaxext run`. The first against the third is what a user gains; the second against the third is what the
kernels alone bring.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxext.abtest import machine, parity, timing
from jaxext.abtest.experiment import Clock, Watcher
from jaxext.abtest.host import StepError
from jaxext.abtest.process import ProgramError, busy, conclude, pairs, run_sides
from jaxext.abtest.protocol import TargetError, parse_target
from jaxext.abtest.remote import RemoteHost
from jaxext.abtest.result import ProgramResult
from jaxext.abtest.settings import Setting, label
from jaxext.abtest.timing import Ratio

JAXEXT = Setting()
STOCK = Setting(kernels=False, memory="system")
STOCK_REUSE = Setting(kernels=False)
_KEYS = {"name": str, "target": str, "arguments": list, "tolerance": float, "repeats": int}


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a suite.

    Attributes:
      name: what the tables call it.
      path: its file.
      factory: the function of the file that gives one step, from which arithmetic and dtypes are counted; None: none.
      arguments: of its command line.
      tolerance: relative difference allowed to the losses; None: by the dtype of its products.
      repeats: rounds of the three sides.
    """

    name: str
    path: Path
    factory: str | None = None
    arguments: tuple[str, ...] = ()
    tolerance: float | None = None
    repeats: int = 2

    @property
    def command(self) -> str:
        return " ".join([self.path.name, *self.arguments])


@dataclasses.dataclass(frozen=True)
class Entry:
    """What one program gave; `error` says why nothing where `as_run` and `kernels` are None.

    Attributes:
      as_run: stock JAX as it comes against `jaxext run`.
      kernels: stock JAX with memory reuse against `jaxext run`.
      flops: operations of one step on stock JAX, of its matrix products and convolutions.
      dtypes: of those products.
    """

    program: Program
    as_run: ProgramResult | None = None
    kernels: ProgramResult | None = None
    flops: float | None = None
    dtypes: tuple[str, ...] = ()
    error: str = ""

    @property
    def agrees(self) -> bool:
        return self.as_run is not None and self.kernels is not None and self.as_run.agrees and self.kernels.agrees

    def share_of_peak(self, peaks: dict[str, float]) -> tuple[float | None, float | None]:
        """Stock's arithmetic by each side's step time, as a share of the machine's measured peak."""
        peak = peaks.get("bf16" if "bfloat16" in self.dtypes else "f32")
        if self.as_run is None or not self.flops or not peak or not self.as_run.reference.prints_steps:
            return None, None
        return tuple(self.flops / side.median / peak for side in (self.as_run.reference, self.as_run.candidate))  # type: ignore[return-value]

    def to_dict(self, peaks: dict[str, float]) -> dict[str, Any]:
        return {
            "name": self.program.name,
            "command": self.program.command,
            "error": self.error,
            "agrees": self.agrees,
            "flops": self.flops,
            "dtypes": list(self.dtypes),
            "share_of_peak": list(self.share_of_peak(peaks)),
            "as_run": self.as_run.to_dict() if self.as_run else None,
            "kernels": self.kernels.to_dict() if self.kernels else None,
        }


@dataclasses.dataclass(frozen=True)
class SuiteResult:
    """Outcome of a suite; print it with rich or str. `complete`: every program was reached."""

    name: str
    entries: list[Entry]
    peaks: dict[str, float]
    facts: dict[str, Any]
    seed: int
    elapsed: float
    notes: list[str]
    complete: bool

    def mean(self, kind: str) -> Ratio | None:
        """Geometric mean of the programs' ratios; `kind`: "as_run" or "kernels". None where none was measured."""
        found: list[ProgramResult] = [result for entry in self.entries if (result := getattr(entry, kind)) is not None]
        if not found:
            return None
        return timing.geometric_mean([pairs(item.reference.runs, item.candidate.runs) for item in found], self.seed)

    @property
    def agrees(self) -> bool:
        return all(entry.agrees for entry in self.entries)

    @property
    def exit_code(self) -> int:
        return 0 if self.agrees and self.complete else 1

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON has."""
        means = {kind: self.mean(kind) for kind in ("as_run", "kernels")}
        return {
            "name": self.name,
            "geometric_mean": {kind: mean.to_dict() if mean else None for kind, mean in means.items()},
            "agrees": self.agrees,
            "complete": self.complete,
            "programs": [entry.to_dict(self.peaks) for entry in self.entries],
            "facts": self.facts,
            "peaks": self.peaks,
            "seed": self.seed,
            "elapsed_seconds": self.elapsed,
            "notes": self.notes,
        }

    def __rich__(self) -> Any:
        from jaxext.abtest.suite_report import render

        return render(self)

    def __str__(self) -> str:
        from jaxext.abtest.suite_report import plain_text

        return plain_text(self)


def read(
    path: Path, only: tuple[str, ...] = (), tolerance: float | None = None, repeats: int | None = None
) -> list[Program]:
    """The programs that a suite's file lists as [[program]] tables: name, target, arguments, tolerance, repeats.

    `target`: file.py:factory or file.py, relative to the suite's file. `only`: names of those to take; empty: all.
    `tolerance` and `repeats` replace every program's own.

    Raises:
      TargetError: no such file, no TOML, a key that is unknown or missing, a wrong value, a missing program, or a name
        no program has.
    """
    if not path.is_file():
        raise TargetError(
            f"--suite {str(path)!r}: no such file. Give a TOML file that lists programs (docs/guide_ab.md)."
        )
    try:
        tables = tomllib.loads(path.read_text()).get("program", [])
    except tomllib.TOMLDecodeError as error:
        raise TargetError(f"--suite {str(path)!r}: {error}. Expected TOML with [[program]] tables.") from error
    programs = [_program(path, index, table) for index, table in enumerate(tables)]
    names = [program.name for program in programs]
    for name in only or names[:1]:
        if name not in names:
            raise TargetError(f"--only {name!r}: no such program in {path.name}, expected one of {', '.join(names)}.")
    if not programs:
        raise TargetError(f"--suite {str(path)!r}: lists no program. Expected [[program]] tables with name and target.")
    taken = [program for program in programs if not only or program.name in only]
    given = {"tolerance": tolerance, "repeats": repeats}
    instead = {name: value for name, value in given.items() if value is not None}
    return [dataclasses.replace(program, **instead) for program in taken]


def _program(suite: Path, index: int, table: dict[str, Any]) -> Program:
    where = f"{suite.name}, program {index + 1}"
    for key in ("name", "target"):
        if key not in table:
            raise TargetError(f"{where}: the key {key!r} is missing.")
    for key, value in table.items():
        kind = _KEYS.get(key)
        if kind is None:
            raise TargetError(f"{where}: unknown key {key!r}, expected one of {', '.join(_KEYS)}.")
        if not isinstance(value, kind):
            raise TargetError(f"{where}: {key} = {value!r}, expected a {kind.__name__}.")
    if table.get("repeats", 1) < 1:
        raise TargetError(f"{where}: repeats = {table['repeats']}, expected at least 1.")
    try:
        path, factory = parse_target(str(suite.parent / table["target"]))
    except TargetError as error:
        raise TargetError(f"{where}: {error}") from error
    arguments = tuple(str(argument) for argument in table.get("arguments", ()))
    repeats = table.get("repeats", Program.repeats)
    return Program(table["name"], path, factory, arguments, table.get("tolerance"), repeats)


def run(
    name: str,
    programs: list[Program],
    *,
    budget: float | None,
    seed: int,
    watcher: Watcher,
    after: Callable[[SuiteResult], None] = lambda result: None,
) -> SuiteResult:
    """Test every program; one that fails is recorded as an error, and the others go on.

    `budget`: seconds for all; no program is begun after them. `after` sees the result so far after each program, so
    that an interrupted suite has lost nothing.
    """
    clock = Clock(budget, watcher)
    load, peaks, entries = machine.load_average(), machine.peaks(0.5), []

    def so_far() -> SuiteResult:
        left = [program.name for program in programs[len(entries) :]]
        notes = busy(load) + ([f"not reached: {', '.join(left)}"] if left else [])
        return SuiteResult(name, list(entries), peaks, machine.facts(), seed, clock.spent(), notes, not left)

    for program in programs:
        if clock.left() <= 0:
            break
        entries.append(_test(program, seed, _Named(program.name, len(entries), len(programs), clock)))
        # Measured again and again, because a peak is what the machine reaches when nothing else runs.
        peaks = {kind: max(rate, peaks[kind]) for kind, rate in machine.peaks(0.2).items()}
        after(so_far())
    return so_far()


class _Named(Watcher):
    """Puts the program's name before each phase, and tells the whole suite's progress."""

    def __init__(self, name: str, done: int, of: int, clock: Clock) -> None:
        self._name, self._done, self._of, self._clock = name, done, of, clock
        self._before = clock.spent()

    def phase(self, text: str) -> None:
        self._clock.watcher.phase(f"{self._name}: {text}")

    def expect(self, done: float, total: float) -> None:
        parts = self._done + done / total
        self._clock.watcher.expect(
            self._before + done, max(self._before + done, (self._before + done) / parts * self._of)
        )


def _test(program: Program, seed: int, watcher: Watcher) -> Entry:
    try:
        watcher.phase("counting its arithmetic")
        flops, dtypes = _arithmetic(program, seed)
        settings = {label(STOCK, JAXEXT): STOCK, "stock with memory reuse": STOCK_REUSE, "jaxext": JAXEXT}
        clock = Clock(None, watcher)
        arguments = list(program.arguments)
        sides = run_sides(program.path, arguments, settings, repeats=program.repeats, seed=seed, clock=clock)
    except (ProgramError, StepError, TargetError) as error:
        return Entry(program, error=str(error))
    stock, stock_reuse, jaxext = sides.values()
    rule = parity.with_loss_tolerance(parity.tolerance_for(dtypes), program.tolerance)
    as_run, kernels = (
        conclude(program.command, reference, jaxext, rule, seed, clock.spent()) for reference in (stock, stock_reuse)
    )
    return Entry(program, as_run, kernels, flops, dtypes)


def _arithmetic(program: Program, seed: int) -> tuple[float | None, tuple[str, ...]]:
    if program.factory is None:
        return None, ()
    host = RemoteHost(program.path, program.factory, STOCK_REUSE, seed)
    try:
        host.wait()
        return host.arithmetic()
    finally:
        host.stop()
