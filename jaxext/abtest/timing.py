"""Interleaved, randomised, paired timing: the order of measurements and what is concluded from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

RESAMPLES = 4000
Pairs = tuple[Sequence[float], Sequence[float]]


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times faster: the median of reference time / candidate time over pairs measured side by side.

    `interval` is the 95% percentile bootstrap interval of that median (Efron and Tibshirani, 1993); None with fewer
    than three pairs. Of few runs it is about the range of the runs' own ratios.
    """

    value: float
    interval: tuple[float, float] | None
    pairs: int

    def __str__(self) -> str:
        text = f"{self.value:.2f}x"
        return text if self.interval is None else f"{text} [{self.interval[0]:.2f}, {self.interval[1]:.2f}]"

    def to_dict(self) -> dict[str, object]:
        return {"ratio": self.value, "interval": list(self.interval) if self.interval else None, "pairs": self.pairs}


def paired_ratio(reference: Sequence[float], candidate: Sequence[float], seed: int) -> Ratio:
    """Ratio of two equally long lists of seconds, pair by pair, each pair as independent as the next.

    Raises:
      ValueError: the lists are empty or of unequal length.
    """
    return ratio_over_runs([(reference, candidate)], seed)


def ratio_over_runs(runs: Sequence[Pairs], seed: int) -> Ratio:
    """Ratio of the pairs of several runs, each run given as its (reference, candidate) seconds.

    The interval resamples runs, and pairs within them: what differs from process to process counts.

    Raises:
      ValueError: no run, or lists that are empty or of unequal length.
    """
    ratios = _ratios_of_runs(runs)
    pairs = np.concatenate(ratios)
    if len(pairs) < 3:
        return Ratio(float(np.median(pairs)), None, len(pairs))
    low, high = np.percentile(_resampled_medians(ratios, np.random.default_rng(seed)), [2.5, 97.5])
    return Ratio(float(np.median(pairs)), (float(low), float(high)), len(pairs))


def geometric_mean(programs: Sequence[Sequence[Pairs]], seed: int) -> Ratio:
    """Geometric mean of the ratios of several programs, each given as its runs' (reference, candidate) seconds.

    The interval resamples each program as `ratio_over_runs` does; None where a program has fewer than three pairs.
    `pairs` of the result counts programs.

    Raises:
      ValueError: no program, or runs as `ratio_over_runs` refuses them.
    """
    if not programs:
        raise ValueError("programs is empty: expected the measurements of at least one program.")
    found = [_ratios_of_runs(runs) for runs in programs]
    value = float(np.exp(np.mean([np.log(np.median(np.concatenate(ratios))) for ratios in found])))
    if any(sum(map(len, ratios)) < 3 for ratios in found):
        return Ratio(value, None, len(programs))
    rng = np.random.default_rng(seed)
    logs = [np.log(_resampled_medians(ratios, rng)) for ratios in found]
    low, high = np.percentile(np.exp(np.mean(logs, axis=0)), [2.5, 97.5])
    return Ratio(value, (float(low), float(high)), len(programs))


def _ratios_of_runs(runs: Sequence[Pairs]) -> list[np.ndarray]:
    if not runs:
        raise ValueError("runs is empty: expected the measurements of at least one run.")
    return [_ratios(*run) for run in runs]


def _ratios(reference: Sequence[float], candidate: Sequence[float]) -> np.ndarray:
    if len(reference) != len(candidate) or not reference:
        raise ValueError(
            f"reference has {len(reference)} and candidate {len(candidate)} measurements, expected as many of each, "
            "at least one."
        )
    return np.asarray(reference, np.float64) / np.asarray(candidate, np.float64)


def _resampled_medians(runs: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Medians of resamples in two stages, runs and then pairs within each (Davison and Hinkley, 1997, section 3.8)."""
    lengths = np.array([len(run) for run in runs])
    starts = np.cumsum(lengths) - lengths
    taken = rng.integers(len(runs), size=(RESAMPLES, len(runs), 1))
    within = rng.integers(lengths[taken], size=(RESAMPLES, len(runs), lengths.max()))
    return np.median(np.concatenate(runs)[starts[taken] + within].reshape(RESAMPLES, -1), axis=1)


def orders(sides: Sequence[str], seed: int) -> Iterator[list[str]]:
    """Endless rounds, each all `sides` in random order: slow drift and who-follows-whom favour no side."""
    rng = np.random.default_rng(seed)
    while True:
        yield [sides[int(index)] for index in rng.permutation(len(sides))]


def measure_rounds(
    sides: Sequence[str],
    measure: Callable[[str], float],
    *,
    rounds: int,
    seed: int,
    out_of_time: Callable[[], bool],
    least: int = 3,
    after: Callable[[int], None] = lambda index: None,
) -> dict[str, list[float]]:
    """Call `measure(side)` for every side once a round; all lists come out equally long.

    Stops after `rounds`, or after `least` once `out_of_time()`. `after(index)` follows each round, untimed.
    """
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for index, order in enumerate(orders(sides, seed)):
        if index >= rounds or (index >= least and out_of_time()):
            return seconds
        for side in order:
            seconds[side].append(measure(side))
        after(index)
    return seconds
