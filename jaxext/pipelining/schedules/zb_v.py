"""ZB-V."""

from __future__ import annotations

from collections.abc import Iterator

from ..action import Kind, Schedule
from ..simulate import Costs, simulate
from .list_schedule import Priority, by_kind, by_pattern, list_schedule


def zb_v(num_ranks: int, num_microbatches: int) -> Schedule:
    """Two stages a rank, in a V, and the backward pass in two (Zero Bubble, Qi et al. 2023; as a repeated pattern: the
    controllable memory of Qi et al. 2024). A rank keeps 2p passes of its half-sized stages at most: 1F1B's memory.

    The shortest of a few list schedules for passes of equal cost. No schedule is shorter than 6m + p − 1 such passes of
    a stage, as the last rank begins p − 1 late. This is reached if p divides m, and from 2p microbatches on missed by 4
    at most (tried: up to 16 ranks, 64 microbatches). 1F1B takes 6m + 6(p − 1).
    """
    placement = v_placement(num_ranks)
    costs = Costs.even(len(placement))
    least = 6 * num_microbatches + num_ranks - 1
    best, shortest = None, 0.0
    for priority in _priorities(placement):
        found = list_schedule("zb_v", num_microbatches, placement, costs, [2 * num_ranks] * num_ranks, priority)
        makespan = simulate(found, costs).makespan
        if best is None or makespan < shortest:
            best, shortest = found, makespan
        if shortest <= least:
            break
    assert best is not None
    return best


def v_placement(num_ranks: int) -> tuple[int, ...]:
    """Two stages a rank, down and up again: the first and the last stage share rank 0."""
    return (*range(num_ranks), *reversed(range(num_ranks)))


def _priorities(placement: tuple[int, ...]) -> Iterator[Priority]:
    # Runs of p microbatches: as short as can be if p divides m.
    yield by_kind(Kind.I, Kind.W, Kind.F)
    for passes in (3, 4, 2, 1):
        yield by_pattern(placement, period=6.0, forward=passes / 6, backward=1 / 6)
