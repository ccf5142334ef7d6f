"""Schedules that fill the bubble with weight gradients: ZB-H1, ZB-V, DualPipe-V."""

from __future__ import annotations

from ..action import Action, Kind, Schedule
from ..simulate import Costs
from .list_schedule import list_schedule


def zb_h1(num_ranks: int, num_microbatches: int) -> Schedule:
    """1F1B with the backward pass in two (Qi et al. 2023): rank r is r microbatches late with its weight gradients.

    The bubble is (p − 1)(F + B − 2W) from p microbatches on, in the memory of 1F1B's first rank.
    """
    actions = []
    for rank in range(num_ranks):
        ahead = min(num_ranks - rank - 1, num_microbatches)
        own = [Action(Kind.F, rank, m) for m in range(ahead)]
        for m in range(num_microbatches):
            if ahead + m < num_microbatches:
                own.append(Action(Kind.F, rank, ahead + m))
            own.append(Action(Kind.I, rank, m))
            if m >= rank:
                own.append(Action(Kind.W, rank, m - rank))
        own += [Action(Kind.W, rank, m) for m in range(max(0, num_microbatches - rank), num_microbatches)]
        actions.append(tuple(own))
    return Schedule("zb_h1", num_microbatches, tuple(range(num_ranks)), tuple(actions))


def v_placement(num_ranks: int) -> tuple[int, ...]:
    """Two stages a rank, down and up again: the first and the last stage share rank 0."""
    return (*range(num_ranks), *reversed(range(num_ranks)))


def zb_v(num_ranks: int, num_microbatches: int) -> Schedule:
    """The V placement with the backward pass in two (Qi et al. 2024): no bubble but the way in, in the memory of 1F1B.

    For passes of equal cost a step takes 6m + p − 1 of them, and the last rank cannot begin before p − 1. A rank keeps
    2p of its half-sized stages' microbatches at most, what p whole ones need.
    """
    placement = v_placement(num_ranks)
    return list_schedule("zb_v", num_microbatches, placement, Costs.even(len(placement)), [2 * num_ranks] * num_ranks)


def dualpipe_v(num_ranks: int, num_microbatches: int) -> Schedule:
    """DualPipe cut in half (DeepSeek-AI 2025; Sea AI Lab): the V placement, forward of one stage beside backward of the
    other, which hides communication; weight gradients are set apart only on the way in and out.

    With fewer than 2p microbatches there is no steady part, and the order is that of `zb_v`.
    """
    placement = v_placement(num_ranks)
    if num_microbatches < 2 * num_ranks:
        return Schedule("dualpipe_v", num_microbatches, placement, zb_v(num_ranks, num_microbatches).actions)
    actions = [tuple(_DualPipe(rank, num_ranks, num_microbatches).run()) for rank in range(num_ranks)]
    return Schedule("dualpipe_v", num_microbatches, placement, tuple(actions))


class _DualPipe:
    def __init__(self, rank: int, num_ranks: int, count: int) -> None:
        self._rank, self._ranks, self._count = rank, num_ranks, count
        self._stages = (rank, 2 * num_ranks - 1 - rank)
        self._next = {(kind, chunk): 0 for kind in "FB" for chunk in (0, 1)}
        self._waiting: list[Action] = []
        self._actions: list[Action] = []

    def _forward(self, chunk: int) -> None:
        self._actions.append(Action(Kind.F, self._stages[chunk], self._take("F", chunk)))

    def _backward(self, chunk: int, split: bool = False) -> None:
        stage, microbatch = self._stages[chunk], self._take("B", chunk)
        if split:
            self._actions.append(Action(Kind.I, stage, microbatch))
            self._waiting.append(Action(Kind.W, stage, microbatch))
        else:
            self._actions.append(Action(Kind.B, stage, microbatch))

    def _weights(self) -> None:
        self._actions.append(self._waiting.pop(0))

    def _take(self, kind: str, chunk: int) -> int:
        self._next[kind, chunk] += 1
        return self._next[kind, chunk] - 1

    def run(self) -> list[Action]:
        down, up = self._ranks - self._rank - 1, self._rank + 1
        for _ in range(2 * down):
            self._forward(0)
        for _ in range(up):
            self._forward(0)
            self._forward(1)
        for _ in range(down):
            self._backward(1, split=True)
            self._weights()
            self._forward(1)
        for _ in range(self._count - 2 * self._ranks + up):
            self._forward(0)
            self._backward(1)
            self._forward(1)
            self._backward(0)
        for _ in range(down):
            self._backward(1)
            self._forward(1)
            self._backward(0)
        for number in range(up):
            # The weight gradients of the last passes wait for the way out, where ranks idle otherwise.
            late = 2 * number >= up
            self._backward(1, split=late)
            self._backward(0, split=late)
        for _ in range(down):
            if self._waiting:
                self._weights()
            self._backward(0, split=True)
        while self._waiting:
            self._weights()
        return self._actions
