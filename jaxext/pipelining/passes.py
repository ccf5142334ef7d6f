"""Lowering a schedule: passes that add what an executor on several processes has to do, each a function of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from .action import Action, Kind, Schedule
from .validate import validate


def lower(schedule: Schedule, max_live: Sequence[int] | None = None) -> Schedule:
    """All passes, in order, and the validation of the result.

    Raises:
      ScheduleError: the schedule is wrong.
    """
    lowered = add_deletes(add_communication(schedule))
    validate(lowered, max_live)
    return lowered


def add_communication(schedule: Schedule) -> Schedule:
    """A send after each action whose result another rank needs, a receive before each that needs another's.

    Sends do not wait for their receiver, receives wait for their sender, so that no pair of ranks can block each other.
    """
    ranks = [
        tuple(new for action in actions for new in _with_moves(schedule, rank, action))
        for rank, actions in enumerate(schedule.actions)
    ]
    return dataclasses.replace(schedule, actions=tuple(ranks))


def _with_moves(schedule: Schedule, rank: int, action: Action) -> Iterator[Action]:
    stage, last = action.stage, schedule.num_stages - 1
    forward, backward = action.kind is Kind.F, action.kind in (Kind.B, Kind.I)
    before = stage - 1 if forward else stage + 1
    after = stage + 1 if forward else stage - 1
    if (forward or backward) and 0 <= before <= last and schedule.placement[before] != rank:
        kind = Kind.RECV_F if forward else Kind.RECV_B
        yield Action(kind, stage, action.microbatch, schedule.placement[before])
    yield action
    if (forward or backward) and 0 <= after <= last and schedule.placement[after] != rank:
        kind = Kind.SEND_F if forward else Kind.SEND_B
        yield Action(kind, stage, action.microbatch, schedule.placement[after])


def add_deletes(schedule: Schedule) -> Schedule:
    """What a microbatch kept is freed right after the last action that reads it."""
    ranks = []
    for actions in schedule.actions:
        own: list[Action] = []
        for action in actions:
            own.append(action)
            if action.kind in (Kind.B, Kind.W):
                own.append(Action(Kind.DELETE, action.stage, action.microbatch))
        ranks.append(tuple(own))
    return dataclasses.replace(schedule, actions=tuple(ranks))
