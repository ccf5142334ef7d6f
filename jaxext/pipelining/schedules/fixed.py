"""Schedules whose order is known beforehand: GPipe, 1F1B, interleaved 1F1B."""

from __future__ import annotations

from ..action import Action, Kind, Schedule


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """All forward passes, then all backward passes (Huang et al. 2019). Keeps every microbatch."""
    actions = [
        [Action(kind, rank, m) for kind in (Kind.F, Kind.B) for m in range(num_microbatches)]
        for rank in range(num_ranks)
    ]
    return _schedule("gpipe", num_microbatches, range(num_ranks), actions)


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """One forward, one backward in turn (PipeDream-Flush, Narayanan et al. 2021). Rank r keeps p − r microbatches."""
    actions = []
    for rank in range(num_ranks):
        forwards = [Action(Kind.F, rank, m) for m in range(num_microbatches)]
        backwards = [Action(Kind.B, rank, m) for m in range(num_microbatches)]
        actions.append(_alternate(forwards, backwards, num_ranks - rank - 1))
    return _schedule("1f1b", num_microbatches, range(num_ranks), actions)


def interleaved_1f1b(num_ranks: int, num_microbatches: int, num_chunks: int) -> Schedule:
    """1F1B with several stages on each rank (Megatron-LM, Narayanan et al. 2021): the bubble shrinks by their number.

    Microbatches go in groups of p through a rank's first stage, then through its second. A last group that is not full
    is as good as its number allows.
    """
    groups = [range(g, min(g + num_ranks, num_microbatches)) for g in range(0, num_microbatches, num_ranks)]
    actions = []
    for rank in range(num_ranks):
        stages = [rank + chunk * num_ranks for chunk in range(num_chunks)]
        forwards = [Action(Kind.F, s, m) for group in groups for s in stages for m in group]
        backwards = [Action(Kind.B, s, m) for group in groups for s in reversed(stages) for m in group]
        warm_up = 2 * (num_ranks - rank - 1) + (num_chunks - 1) * num_ranks
        if num_microbatches % num_ranks:
            # A short group moves the last stages' passes forward in the order: all of its group must have gone ahead.
            warm_up += num_ranks * num_chunks
        actions.append(_alternate(forwards, backwards, warm_up))
    placement = [stage % num_ranks for stage in range(num_ranks * num_chunks)]
    return _schedule("interleaved_1f1b", num_microbatches, placement, actions)


def _alternate(forwards: list[Action], backwards: list[Action], warm_up: int) -> list[Action]:
    """`warm_up` forwards, then forward and backward in turn, then the backwards that are left."""
    warm_up = min(warm_up, len(forwards))
    pairs = zip(forwards[warm_up:], backwards)
    steady = [action for pair in pairs for action in pair]
    return [*forwards[:warm_up], *steady, *backwards[len(forwards) - warm_up :]]


def _schedule(name, num_microbatches, placement, actions) -> Schedule:  # type: ignore[no-untyped-def]
    return Schedule(name, num_microbatches, tuple(placement), tuple(map(tuple, actions)))
