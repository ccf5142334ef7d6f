"""What the passes of each stage cost, measured by running them one at a time."""

from __future__ import annotations

import statistics
import time
from typing import Any

import jax

from .action import Action, Kind, Schedule
from .simulate import Costs


class Stopwatch:
    """Told of every action of this process before and after its dispatch, it waits for it and keeps the time."""

    def __init__(self, schedule: Schedule) -> None:
        self._seconds: dict[tuple[Kind, int], list[float]] = {}
        self._stages = schedule.num_stages
        self._started = time.perf_counter()

    def start(self, given: list[Any]) -> None:
        """An action begins, once what it was `given` by its neighbours is there."""
        jax.block_until_ready(given)
        self._started = time.perf_counter()

    def stop(self, action: Action, results: list[Any]) -> None:
        jax.block_until_ready(results)
        self._seconds.setdefault((action.kind, action.stage), []).append(time.perf_counter() - self._started)

    def costs(self, counted: Costs) -> Costs:
        """The median seconds of each stage's passes; a whole backward pass is divided as it was counted."""

        def median(kind: Kind, stage: int) -> float | None:
            found = self._seconds.get((kind, stage))
            return statistics.median(found) if found else None

        forward, cotangents, weights = [], [], []
        for stage in range(self._stages):
            forward.append(median(Kind.F, stage) or 0.0)
            both = median(Kind.B, stage)
            parts = counted.backward_input[stage], counted.backward_weight[stage]
            share = parts[0] / (sum(parts) or 1.0)
            split = median(Kind.I, stage), median(Kind.W, stage)
            cotangents.append((both or 0.0) * share if split[0] is None else split[0])
            weights.append((both or 0.0) * (1 - share) if split[1] is None else split[1])
        return Costs(tuple(forward), tuple(cotangents), tuple(weights), counted.transfer)
