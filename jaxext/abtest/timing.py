"""Interleaved, randomised, paired timing: the order of measurements and what is concluded from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

RESAMPLES = 4000


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times faster: the median of reference time / candidate time over pairs measured side by side.

    `interval` is the 95% percentile bootstrap interval of that median (Efron and Tibshirani, 1993); None with fewer
    than three pairs.
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
    """Ratio of two equally long lists of seconds, pair by pair.

    Raises:
      ValueError: the lists are empty or of unequal length.
    """
    if len(reference) != len(candidate) or not reference:
        raise ValueError(
            f"reference has {len(reference)} and candidate {len(candidate)} measurements, expected as many of each, "
            "at least one."
        )
    ratios = np.asarray(reference, np.float64) / np.asarray(candidate, np.float64)
    if len(ratios) < 3:
        return Ratio(float(np.median(ratios)), None, len(ratios))
    rng = np.random.default_rng(seed)
    medians = np.median(rng.choice(ratios, size=(RESAMPLES, len(ratios))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return Ratio(float(np.median(ratios)), (float(low), float(high)), len(ratios))


def geometric_mean(pairs: Sequence[tuple[Sequence[float], Sequence[float]]], seed: int) -> Ratio:
    """Geometric mean of the paired ratios of several programs, each given as its (reference, candidate) seconds.

    The interval resamples the pairs of each program; None where a program has fewer than three. `pairs` of the result
    counts programs.

    Raises:
      ValueError: no program, or lists as `paired_ratio` refuses them.
    """
    if not pairs:
        raise ValueError("pairs is empty: expected the measurements of at least one program.")
    value = float(np.exp(np.mean([np.log(paired_ratio(*item, seed).value) for item in pairs])))
    if any(len(reference) < 3 for reference, _ in pairs):
        return Ratio(value, None, len(pairs))
    rng = np.random.default_rng(seed)
    logs = np.zeros(RESAMPLES)
    for reference, candidate in pairs:
        ratios = np.asarray(reference, np.float64) / np.asarray(candidate, np.float64)
        logs += np.log(np.median(rng.choice(ratios, size=(RESAMPLES, len(ratios))), axis=1))
    low, high = np.percentile(np.exp(logs / len(pairs)), [2.5, 97.5])
    return Ratio(value, (float(low), float(high)), len(pairs))


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
