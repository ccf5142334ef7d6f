"""GPipe."""

from __future__ import annotations

from ..action import Action, Kind, Schedule


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """All forward passes, then all backward passes (Huang et al. 2019).

    The bubble is (p − 1)(F + B), as that of 1F1B; every rank keeps all microbatches.
    """
    actions = tuple(
        tuple(Action(kind, rank, m) for kind in (Kind.F, Kind.B) for m in range(num_microbatches))
        for rank in range(num_ranks)
    )
    return Schedule("gpipe", num_microbatches, tuple(range(num_ranks)), actions)
