"""Lowering a schedule: passes that add what an executor on several processes has to do, each a function of its own."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from collections.abc import Iterator, Sequence

from .action import COMPUTE, MOVES, SENDS, Action, Kind, Schedule, counterpart
from .simulate import Costs, simulate
from .validate import validate


def lower(schedule: Schedule, max_live: Sequence[int] | None = None, costs: Costs | None = None) -> Schedule:
    """All passes, in order, and the validation of the result.

    max_live: see `validate`. costs: see `order_communication`.

    Raises:
      ScheduleError: the schedule is wrong.
    """
    validate(schedule, max_live)
    lowered = add_deletes(order_communication(add_communication(schedule), costs))
    validate(lowered, max_live)
    return lowered


def add_communication(schedule: Schedule) -> Schedule:
    """A send right after each action whose result another rank needs, a receive right before the one that needs it."""
    ranks = (
        tuple(new for action in actions for new in _with_moves(schedule, rank, action))
        for rank, actions in enumerate(schedule.actions)
    )
    return dataclasses.replace(schedule, actions=tuple(ranks))


def _with_moves(schedule: Schedule, rank: int, action: Action) -> Iterator[Action]:
    if action.kind not in (Kind.F, Kind.B, Kind.I):
        yield action
        return
    ahead, receive, send = (1, Kind.RECV_F, Kind.SEND_F) if action.kind is Kind.F else (-1, Kind.RECV_B, Kind.SEND_B)
    before, after = (_peer(schedule, rank, action.stage + step) for step in (-ahead, ahead))
    if before is not None:
        yield Action(receive, action.stage, action.microbatch, before)
    yield action
    if after is not None:
        yield Action(send, action.stage, action.microbatch, after)


def _peer(schedule: Schedule, rank: int, stage: int) -> int | None:
    """The rank of a stage, if there is one and it is another."""
    peer = schedule.placement[stage] if 0 <= stage < schedule.num_stages else rank
    return peer if peer != rank else None


def order_communication(schedule: Schedule, costs: Costs | None = None) -> Schedule:
    """Sends and receives where no rank can block another, even if each waits until its other half is reached.

    All actions are put into one sequence, by simulated time, in which a send and its receive are one step, as soon as
    there is something to send. Each rank does its part of that sequence: the first step that is not done yet can always
    be done. 1F1B as `add_communication` leaves it would stop, one rank sending activations, the next cotangents.

    costs: of the simulation, by default of equal passes; any give a right order, measured ones the shortest waits.
    """
    ranks: list[list[Action]] = [[] for _ in schedule.actions]
    rest = [iter([a for a in actions if a.kind not in MOVES]) for actions in schedule.actions]
    sends = {a.result: a for actions in schedule.actions for a in actions if a.kind in SENDS}
    under_way: list[tuple[float, int, int, Action]] = []

    def arrive(now: float) -> None:
        while under_way and under_way[0][0] <= now:
            *_, rank, send = heapq.heappop(under_way)
            ranks[rank].append(send)
            if send.peer is not None:
                ranks[send.peer].append(counterpart(send, rank))

    for number, event in enumerate(simulate(schedule, costs or Costs.even(schedule.num_stages)).events):
        arrive(event.start)
        own = ranks[event.rank]
        # Takes the computation itself off `rest` too.
        own += itertools.takewhile(lambda action: action.kind not in COMPUTE, rest[event.rank])
        own.append(event.action)
        if event.action.result in sends:
            heapq.heappush(under_way, (event.end, number, event.rank, sends[event.action.result]))
    arrive(math.inf)
    return dataclasses.replace(schedule, actions=tuple((*own, *left) for own, left in zip(ranks, rest, strict=True)))


def add_deletes(schedule: Schedule) -> Schedule:
    """What a microbatch kept on a stage is freed right after the last action that reads it."""
    ranks = (
        tuple(
            new
            for action in actions
            for new in (action, Action(Kind.DELETE, action.stage, action.microbatch))
            if new is action or action.kind in (Kind.B, Kind.W)
        )
        for actions in schedule.actions
    )
    return dataclasses.replace(schedule, actions=tuple(ranks))
