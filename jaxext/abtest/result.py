"""What a test found, as plain values: what every report is made from."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

from jaxext.abtest.host import Compilation
from jaxext.abtest.parity import Parity
from jaxext.abtest.settings import Setting
from jaxext.abtest.timing import Ratio


@dataclasses.dataclass(frozen=True)
class SideResult:
    """One side: its setting, seconds of each timed step, and what compiling it took.

    `share_of_peak`: stock's arithmetic divided by this side's time and the machine's measured peak.
    """

    label: str
    setting: Setting
    seconds: list[float]
    compilation: Compilation
    share_of_peak: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        return {
            "label": self.label,
            "setting": self.setting.to_dict(),
            "median_seconds": self.median,
            "seconds": self.seconds,
            "share_of_peak": self.share_of_peak,
            **dataclasses.asdict(self.compilation),
        }


@dataclasses.dataclass(frozen=True)
class Row:
    """One further comparison; `ratio` None where it was not measured, and `note` says why."""

    name: str
    ratio: Ratio | None
    reference_seconds: float | None = None
    candidate_seconds: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            **(self.ratio.to_dict() if self.ratio else {"ratio": None, "interval": None, "pairs": 0}),
            "reference_seconds": self.reference_seconds,
            "candidate_seconds": self.candidate_seconds,
            "note": self.note,
        }


class Outcome:
    """What both kinds of result have in common."""

    speed: Ratio
    parity: Parity

    @property
    def ratio(self) -> float:
        return self.speed.value

    @property
    def interval(self) -> tuple[float, float] | None:
        return self.speed.interval

    @property
    def losses_agree(self) -> bool:
        return self.parity.losses_agree

    @property
    def agrees(self) -> bool:
        return self.parity.agrees

    @property
    def exit_code(self) -> int:
        return 0 if self.agrees else 1

    def __rich__(self) -> Any:
        from jaxext.abtest.report import render

        return render(self)

    def __str__(self) -> str:
        from jaxext.abtest.report import plain_text

        return plain_text(self)


@dataclasses.dataclass(frozen=True)
class Result(Outcome):
    """Outcome of one A/B test of a step.

    `ratio`: reference time / candidate time, above 1 where jaxext is faster. `interval`: its 95% interval.
    `contributions`: what each kernel brings, by excluding it. `memory`: what memory reuse brings, in processes of
    their own. `replacements`: jaxext's own account (see jaxext.explain). `exit_code`: 0 agrees, 1 disagrees.
    """

    name: str
    reference: SideResult
    candidate: SideResult
    speed: Ratio
    parity: Parity
    contributions: list[Row]
    memory: list[Row]
    replacements: dict[str, Any]
    facts: dict[str, Any]
    peaks: dict[str, float]
    wiring: str
    seed: int
    elapsed: float
    notes: list[str]

    def counts(self) -> dict[str, int]:
        """How many patterns were replaced, missed and left to stock JAX."""
        return {key: len(self.replacements.get(key, [])) for key in ("replaced", "missed", "fallbacks")}

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON has."""
        return {
            "name": self.name,
            "ratio": self.ratio,
            "interval": list(self.interval) if self.interval else None,
            "pairs": self.speed.pairs,
            "agrees": self.agrees,
            "reference": self.reference.to_dict(),
            "candidate": self.candidate.to_dict(),
            "parity": self.parity.to_dict(),
            "contributions": [row.to_dict() for row in self.contributions],
            "memory": [row.to_dict() for row in self.memory],
            "replacements": self.replacements,
            "facts": self.facts,
            "peaks": self.peaks,
            "wiring": self.wiring,
            "seed": self.seed,
            "elapsed_seconds": self.elapsed,
            "notes": self.notes,
        }


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a program: seconds in all, of each printed step, printed losses, peak resident bytes."""

    wall: float
    step_seconds: list[float]
    losses: list[float]
    peak_rss: int


@dataclasses.dataclass(frozen=True)
class ProgramSide:
    """All runs of one side of a whole-program test."""

    label: str
    setting: Setting
    runs: list[Run]

    @property
    def seconds(self) -> list[float]:
        """Step times without each run's first, which compiles; the running times where none were printed."""
        steps = [seconds for run in self.runs for seconds in run.step_seconds[1:]]
        return steps or [run.wall for run in self.runs]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def wall(self) -> float:
        return statistics.median(run.wall for run in self.runs)

    @property
    def peak_rss(self) -> int:
        return max(run.peak_rss for run in self.runs)

    @property
    def prints_steps(self) -> bool:
        return any(len(run.step_seconds) > 1 for run in self.runs)

    def to_dict(self) -> dict[str, Any]:
        return {
            "label": self.label,
            "setting": self.setting.to_dict(),
            "median_seconds": self.median,
            "median_wall_seconds": self.wall,
            "peak_rss": self.peak_rss,
            "runs": [dataclasses.asdict(run) for run in self.runs],
        }


@dataclasses.dataclass(frozen=True)
class ProgramResult(Outcome):
    """Outcome of a whole-program test. `speed`: of the steps it prints, else of the runs; `wall`: of the runs."""

    name: str
    reference: ProgramSide
    candidate: ProgramSide
    speed: Ratio
    wall: Ratio
    parity: Parity
    facts: dict[str, Any]
    seed: int
    elapsed: float
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON has."""
        return {
            "name": self.name,
            "ratio": self.ratio,
            "interval": list(self.interval) if self.interval else None,
            "pairs": self.speed.pairs,
            "wall": self.wall.to_dict(),
            "agrees": self.agrees,
            "reference": self.reference.to_dict(),
            "candidate": self.candidate.to_dict(),
            "parity": self.parity.to_dict(),
            "facts": self.facts,
            "seed": self.seed,
            "elapsed_seconds": self.elapsed,
            "notes": self.notes,
        }
