"""DualPipe-V."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator

from ..action import Action, Kind, Schedule
from .zb_v import v_placement


def dualpipe_v(num_ranks: int, num_microbatches: int) -> Schedule:
    """DualPipe cut in half (DeepSeek-V3, 2024; the cut by Sea AI Lab, 2025): the V placement, in the middle a forward
    of one stage beside a backward of the other, which hides communication; the backward is in two at both ends.

    From 2p microbatches on, and for W ≤ I, the bubble is (p − 1)(F&B + B − 3W) at most, where F&B is a forward beside a
    backward and all are of one stage; for passes of equal cost it is p − 1 of them, as in ZB-V. A rank keeps 2p + 1
    passes of its half-sized stages. With fewer microbatches it is the order for 2p without those that are missing.
    """
    placement = v_placement(num_ranks)
    actions = []
    for rank in range(num_ranks):
        order = _order(rank, num_ranks, max(num_microbatches, 2 * num_ranks))
        numbered = _numbered(order, (rank, 2 * num_ranks - 1 - rank))
        actions.append(tuple(action for action in numbered if action.microbatch < num_microbatches))
    return Schedule("dualpipe_v", num_microbatches, placement, tuple(actions))


def _order(rank: int, num_ranks: int, count: int) -> list[str]:
    """Kinds and chunks of a rank's actions; W: of the oldest cotangents whose weight gradients are left."""
    after, before = num_ranks - rank - 1, rank + 1
    last = ["1", "0"] * before
    return [
        *["F0"] * (2 * after),
        *["F0", "F1"] * before,
        *["I1", "W", "F1"] * after,
        *["F0", "B1", "F1", "B0"] * (count - 2 * num_ranks + before),
        *["B1", "F1", "B0"] * after,
        *["B" + chunk for chunk in last[:before]],
        *["I" + chunk for chunk in last[before:]],
        *["W", "I0"] * after,
        *["W"] * before,
    ]


def _numbered(order: Iterable[str], stages: tuple[int, int]) -> Iterator[Action]:
    """With stages and microbatches: a stage takes these in order, forward and backward."""
    taken: Counter[tuple[int, bool]] = Counter()
    left: deque[tuple[int, int]] = deque()
    for word in order:
        if word == "W":
            yield Action(Kind.W, *left.popleft())
            continue
        kind, stage = Kind(word[0]), stages[int(word[1])]
        microbatch = taken[stage, kind is Kind.F]
        taken[stage, kind is Kind.F] += 1
        yield Action(kind, stage, microbatch)
        if kind is Kind.I:
            left.append((stage, microbatch))
