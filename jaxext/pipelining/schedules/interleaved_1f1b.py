"""Interleaved 1F1B."""

from __future__ import annotations

import itertools

from ..action import Action, Kind, Schedule
from .one_f_one_b import alternate


def interleaved_1f1b(num_ranks: int, num_microbatches: int, num_chunks: int) -> Schedule:
    """1F1B with v stages on each rank (Megatron-LM, Narayanan et al. 2021).

    Microbatches go in groups through a rank's first stage, then through its second. Megatron's groups are of p and must
    come out even; here m microbatches are m // p groups, as even as can be, so that none is too small to hide a round
    of the ranks. From p microbatches on the bubble is (p − 1)(F + B) / v, below it is (v − 1)(p − m)(F + B) / v more;
    F and B are of a whole rank. Rank r keeps 2(p − r − 1) + (v − 1)g + 1 passes of its stages at most, where g is the
    size of the largest group; with one stage a rank, it is 1F1B.
    """
    groups = _groups(num_microbatches, max(1, num_microbatches // num_ranks))
    actions = []
    for rank in range(num_ranks):
        stages = range(rank, num_ranks * num_chunks, num_ranks)
        forwards = [Action(Kind.F, stage, m) for group in groups for stage in stages for m in group]
        backwards = [Action(Kind.B, stage, m) for group in groups for stage in reversed(stages) for m in group]
        # The way to the last rank and back, and what a group does before its last stage.
        ahead = (1 if num_chunks == 1 else 2) * (num_ranks - rank - 1) + (num_chunks - 1) * len(groups[0])
        actions.append(alternate(forwards, backwards, ahead))
    return Schedule("interleaved_1f1b", num_microbatches, loop_placement(num_ranks, num_chunks), tuple(actions))


def loop_placement(num_ranks: int, num_chunks: int) -> tuple[int, ...]:
    """Stages go round the ranks, `num_chunks` times."""
    return tuple(range(num_ranks)) * num_chunks


def _groups(count: int, num_groups: int) -> list[range]:
    """So many runs of microbatches, the larger ones first."""
    size, larger = divmod(count, num_groups)
    starts = [n * size + min(n, larger) for n in range(num_groups + 1)]
    return [range(first, last) for first, last in itertools.pairwise(starts)]
