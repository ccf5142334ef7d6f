"""ZB-H1."""

from __future__ import annotations

from ..action import Action, Kind, Schedule


def zb_h1(num_ranks: int, num_microbatches: int) -> Schedule:
    """1F1B with the backward pass in two (Zero Bubble, Qi et al. 2023): rank r is r weight gradients late.

    From p microbatches on the bubble is (p − 1) max(F, I, F + I − W), which for W ≤ F and W ≤ I is what the paper has,
    (p − 1)(F + B − 2W). A rank keeps p microbatches at most, as 1F1B's first does: what later ranks of 1F1B leave free
    holds late weight gradients. Within p − r, what 1F1B keeps on rank r, none could be late.
    """
    actions = []
    for rank in range(num_ranks):
        ahead = num_ranks - rank - 1
        own = []
        for turn in range(-ahead, num_microbatches + rank):
            steps = ((Kind.F, turn + ahead), (Kind.I, turn), (Kind.W, turn - rank))
            own += [Action(kind, rank, m) for kind, m in steps if 0 <= m < num_microbatches]
        actions.append(tuple(own))
    return Schedule("zb_h1", num_microbatches, tuple(range(num_ranks)), tuple(actions))
