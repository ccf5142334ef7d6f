"""Is a schedule right: complete, in order, free of deadlock, within its memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .action import COMPUTE, RECEIVES, SENDS, Action, Kind, Schedule
from .simulate import Costs, DeadlockError, peak_live, simulate

# How many actions before and after the one at fault are shown.
_AROUND = 6


class ScheduleError(ValueError):
    """A schedule is wrong; the text shows the place, the action at fault in brackets."""


def validate(schedule: Schedule, max_live: Sequence[int] | None = None) -> None:
    """Each stage passes each microbatch forward once and backward once, after what it needs; no rank waits for ever.

    max_live: by rank, how many forward passes may be kept at once, counted by stage.

    Raises:
      ScheduleError: with the ranks' actions around the one at fault.
    """
    _complete(schedule)
    _matched(schedule)
    try:
        simulate(schedule, Costs.even(schedule.num_stages))
    except DeadlockError as error:
        rank, action = next(iter(error.stuck.items()))
        raise _error(schedule, rank, action, f"deadlock: {error}") from error
    for rank, limit in enumerate(max_live or ()):
        peak = peak_live(schedule.actions[rank])
        if peak > limit:
            action = _at_peak(schedule.actions[rank], limit)
            raise _error(schedule, rank, action, f"rank {rank} keeps {peak} microbatches at once, {limit} are allowed")


def _complete(schedule: Schedule) -> None:
    for rank, actions in enumerate(schedule.actions):
        for action, count in Counter(actions).items():
            if schedule.placement[action.stage] != rank:
                raise _error(
                    schedule, rank, action, f"stage {action.stage} is on rank {schedule.placement[action.stage]}"
                )
            if count > 1:
                raise _error(schedule, rank, action, f"it is done {count} times")
    done = {action for actions in schedule.actions for action in actions}
    for stage, rank in enumerate(schedule.placement):
        for microbatch in range(schedule.num_microbatches):
            kinds = {kind for kind in COMPUTE if Action(kind, stage, microbatch) in done}
            if kinds not in ({Kind.F, Kind.B}, {Kind.F, Kind.I, Kind.W}):
                found = ", ".join(sorted(kind.value for kind in kinds)) or "nothing"
                raise ScheduleError(
                    f"schedule {schedule.name}: stage {stage} on rank {rank} does {found} for microbatch {microbatch}; "
                    "expected F and B, or F, I and W."
                )


def _matched(schedule: Schedule) -> None:
    """Every receive has its send, and a pair of ranks sends in the order in which it receives."""
    if not any(action.kind in SENDS for actions in schedule.actions for action in actions):
        return
    sent: dict[tuple[int | None, int | None], list[tuple[Kind, int, int]]] = {}
    received: dict[tuple[int | None, int | None], list[tuple[Kind, int, int]]] = {}
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            if action.kind in SENDS:
                forward = action.kind is Kind.SEND_F
                target = action.stage + (1 if forward else -1)
                sent.setdefault((rank, action.peer), []).append((action.kind, target, action.microbatch))
            elif action.kind in RECEIVES:
                kind = Kind.SEND_F if action.kind is Kind.RECV_F else Kind.SEND_B
                received.setdefault((action.peer, rank), []).append((kind, action.stage, action.microbatch))
    for channel in sent.keys() | received.keys():
        if sorted(sent.get(channel, [])) != sorted(received.get(channel, [])):
            raise ScheduleError(
                f"schedule {schedule.name}: what rank {channel[0]} sends to rank {channel[1]} is not what is received."
            )


def _at_peak(actions: Sequence[Action], limit: int) -> Action:
    live = 0
    for action in actions:
        live += (action.kind is Kind.F) - (action.kind in (Kind.B, Kind.W))
        if live > limit:
            return action
    raise AssertionError


def _error(schedule: Schedule, rank: int, action: Action, reason: str) -> ScheduleError:
    place = schedule.actions[rank].index(action)
    lines = []
    for number, actions in enumerate(schedule.actions):
        shown = range(max(0, place - _AROUND), min(len(actions), place + _AROUND + 1))
        cells = [
            schedule.cell(actions[n], number) if schedule.placement[actions[n].stage] == number else "?" for n in shown
        ]
        if number == rank:
            cells[place - shown.start] = f"[{cells[place - shown.start]}]"
        lines.append(f"  rank {number}: {' '.join(cells)}")
    return ScheduleError(f"schedule {schedule.name}: {reason}.\n" + "\n".join(lines))
