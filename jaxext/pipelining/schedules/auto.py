"""A schedule made for measured costs and a limit of memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from ..action import Kind, Schedule
from ..simulate import Costs, simulate
from .dualpipe_v import dualpipe_v
from .gpipe import gpipe
from .interleaved_1f1b import interleaved_1f1b, loop_placement
from .list_schedule import Priority, by_kind, by_pattern, list_schedule
from .one_f_one_b import one_f_one_b
from .zb_h1 import zb_h1
from .zb_v import v_placement, zb_v


def auto(
    num_ranks: int, num_microbatches: int, num_chunks: int = 1, costs: Costs | None = None,
    max_live: Sequence[int] | None = None,
) -> Schedule:  # fmt: skip
    """The fastest by simulation of the known schedules with so many stages and of list schedules made for the costs.

    costs: of each stage; by default all the same. max_live: by rank, how many forward passes may be kept at once,
    counted by stage; by default p for each stage of a rank, 1F1B's memory on its first rank.

    Raises:
      ValueError: a limit below the number of a rank's stages, which no schedule can keep; limits or costs of another
        number of ranks or stages.
    """
    costs = costs or Costs.even(num_ranks * num_chunks)
    costs.check(num_ranks * num_chunks)
    limits = list(max_live) if max_live is not None else [num_ranks * num_chunks] * num_ranks
    if len(limits) != num_ranks or min(limits) < num_chunks:
        raise ValueError(
            f"max_live={limits}: expected one limit for each of {num_ranks} ranks, and at least the {num_chunks} that "
            "one microbatch needs on its way. Raise it, or have fewer stages on a rank."
        )
    best, shortest = None, 0.0
    for schedule in _candidates(num_ranks, num_microbatches, num_chunks, costs, limits):
        found = simulate(schedule, costs)
        fits = all(peak <= limit for peak, limit in zip(found.peak_live, limits, strict=True))
        # Of two that are as fast it is the one known by name, whose whole backward passes hand less over.
        if fits and (best is None or found.makespan < shortest * (1 - 1e-9)):
            best, shortest = schedule, found.makespan
    assert best is not None, "list schedules keep within any limit"
    return dataclasses.replace(best, name="auto")


def _candidates(
    num_ranks: int, num_microbatches: int, num_chunks: int, costs: Costs, limits: Sequence[int]
) -> Iterator[Schedule]:
    yield interleaved_1f1b(num_ranks, num_microbatches, num_chunks)
    known = {1: (one_f_one_b, zb_h1, gpipe), 2: (zb_v, dualpipe_v)}
    for make in known.get(num_chunks, ()):
        yield make(num_ranks, num_microbatches)
    placements = {loop_placement(num_ranks, num_chunks)} | ({v_placement(num_ranks)} if num_chunks == 2 else set())
    for placement in sorted(placements):
        for priority in _priorities(placement, costs):
            yield list_schedule("auto", num_microbatches, placement, costs, limits, priority)


def _priorities(placement: Sequence[int], costs: Costs) -> Iterator[Priority]:
    # No one of them is the best for all costs and limits; these four came within 0.1% of a larger set.
    yield by_kind(Kind.I, Kind.W, Kind.F)
    yield by_kind(Kind.I, Kind.F, Kind.W)
    yield by_kind(Kind.F, Kind.I, Kind.W)
    work = [0.0] * (max(placement) + 1)
    for stage, rank in enumerate(placement):
        work[rank] += costs.forward[stage] + costs.backward_input[stage] + costs.backward_weight[stage]
    yield by_pattern(placement, period=max(work), forward=1 / 6, backward=1 / 6)
