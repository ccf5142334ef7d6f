"""What one kernel brings: jaxext with and without it, side by side."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import TYPE_CHECKING

from jaxext.abtest import timing
from jaxext.abtest.result import Row

if TYPE_CHECKING:
    from jaxext.abtest.experiment import Experiment

LEAST_ROUNDS = 3


def measure(experiment: Experiment, kernel: str, inner: int, until: float) -> Row:
    """Time jaxext without `kernel` against jaxext, `inner` steps a sample, until about `until` (monotonic seconds).

    Above 1: leaving the kernel out makes the step slower. Kernels overlap, so the rows do not multiply up.
    """
    options = experiment.options
    setting = dataclasses.replace(options.candidate, exclude=(*options.candidate.exclude, kernel))
    experiment.open_side("without", setting)
    try:
        experiment.warm("without")
        seconds = timing.measure_rounds(
            ["without", "candidate"],
            lambda side: experiment.step(side, inner),
            rounds=max(LEAST_ROUNDS, options.repeats // 2),
            seed=options.seed,
            out_of_time=lambda: time.monotonic() > until,
            least=LEAST_ROUNDS,
        )
    finally:
        experiment.close_side("without")
    ratio = timing.paired_ratio(seconds["without"], seconds["candidate"], options.seed)
    middles = [statistics.median(seconds[side]) for side in ("without", "candidate")]
    return Row(kernel, ratio, middles[0], middles[1])
