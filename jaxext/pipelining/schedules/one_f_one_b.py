"""1F1B."""

from __future__ import annotations

from collections.abc import Sequence

from ..action import Action, Kind, Schedule


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """One forward, one backward in turn (PipeDream-Flush, Narayanan et al. 2021).

    The bubble is (p − 1)(F + B); rank r keeps p − r microbatches at most.
    """
    actions = []
    for rank in range(num_ranks):
        forwards = [Action(Kind.F, rank, m) for m in range(num_microbatches)]
        backwards = [Action(Kind.B, rank, m) for m in range(num_microbatches)]
        actions.append(alternate(forwards, backwards, num_ranks - rank - 1))
    return Schedule("1f1b", num_microbatches, tuple(range(num_ranks)), tuple(actions))


def alternate(forwards: Sequence[Action], backwards: Sequence[Action], ahead: int) -> tuple[Action, ...]:
    """Forward and backward passes in turn, the forward ones `ahead`, or all of them if there are fewer."""
    ahead = min(ahead, len(forwards))
    turns = zip(forwards[ahead:], backwards)
    return (*forwards[:ahead], *(action for turn in turns for action in turn), *backwards[len(forwards) - ahead :])
