"""Is a schedule right: complete, in order, free of deadlock, within its memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

from .action import COMPUTE, MOVES, RECEIVES, SENDS, Action, Kind, Result, Schedule, counterpart, needs
from .simulate import Costs, DeadlockError, live, simulate

# How many actions before and after the one at fault are shown.
_AROUND = 6
_PASSES = ({Kind.F, Kind.B}, {Kind.F, Kind.I, Kind.W})


class ScheduleError(ValueError):
    """A schedule is wrong; the text has the reason and each rank's actions around the ones at fault, in brackets.

    Attributes:
      at: for each rank at fault, the position of its action.
    """

    def __init__(self, schedule: Schedule, at: Mapping[int, int], reason: str) -> None:
        self.at = dict(at)
        lines = [f"schedule {schedule.name}: {reason}", *_picture(schedule, self.at)]
        super().__init__("\n".join(lines))


def validate(schedule: Schedule, max_live: Sequence[int] | None = None) -> None:
    """Each stage passes each microbatch forward once and backward once, after what it needs; no rank waits for ever.

    If there are sends and receives, they are paired, in the same order on both ranks, and wait for each other: a
    schedule that passes works with any transport. If anything is freed, everything is, after its last use.

    max_live: by rank, how many forward passes may be kept at once, counted by stage.

    Raises:
      ScheduleError: with the ranks' actions around the one at fault.
      ValueError: limits of another number of ranks.
    """
    _once(schedule)
    _complete(schedule)
    _in_order(schedule)
    if any(action.kind in MOVES for actions in schedule.actions for action in actions):
        _paired(schedule)
        _moved_in_time(schedule)
        _rendezvous(schedule)
    if any(action.kind is Kind.DELETE for actions in schedule.actions for action in actions):
        _freed(schedule)
    if max_live is not None:
        _within(schedule, max_live)


def _once(schedule: Schedule) -> None:
    """Every action is of a stage of its rank and of a microbatch that there is, and done once."""
    for rank, actions in enumerate(schedule.actions):
        seen = set()
        for place, action in enumerate(actions):
            stage, microbatch = action.stage, action.microbatch
            if stage not in range(schedule.num_stages) or schedule.placement[stage] != rank:
                raise ScheduleError(schedule, {rank: place}, f"stage {stage} is not on rank {rank}.")
            if microbatch not in range(schedule.num_microbatches):
                reason = f"microbatch {microbatch} is not one of the {schedule.num_microbatches}."
                raise ScheduleError(schedule, {rank: place}, reason)
            if action in seen:
                raise ScheduleError(schedule, {rank: place}, f"{schedule.cell(action)} is done a second time.")
            seen.add(action)


def _complete(schedule: Schedule) -> None:
    for rank, actions in enumerate(schedule.actions):
        done: dict[tuple[int, int], dict[Kind, int]] = {}
        for place, action in enumerate(actions):
            if action.kind in COMPUTE:
                done.setdefault((action.stage, action.microbatch), {})[action.kind] = place
        for stage in schedule.stages_of(rank):
            for microbatch in range(schedule.num_microbatches):
                kinds = done.get((stage, microbatch), {})
                if kinds.keys() not in _PASSES:
                    found = ", ".join(sorted(kind.value for kind in kinds)) or "nothing"
                    reason = f"stage {stage} does {found} of microbatch {microbatch}; expected F and B, or F, I and W."
                    raise ScheduleError(schedule, {rank: max(kinds.values(), default=len(actions))}, reason)


def _in_order(schedule: Schedule) -> None:
    """What a computation needs comes before it: on its own rank in the order, on others in some order of all."""
    try:
        simulate(schedule, Costs.even(schedule.num_stages))
    except DeadlockError as error:
        for rank, (place, result) in error.waiting.items():
            if schedule.placement[result[1]] == rank:
                reason = f"{_name(schedule, rank, place)} needs {_maker(schedule, result)}, which comes later."
                raise ScheduleError(schedule, {rank: place}, reason) from error
        each = (f"{_name(schedule, r, n)} needs {_maker(schedule, result)}" for r, (n, result) in error.waiting.items())
        at = {rank: place for rank, (place, _) in error.waiting.items()}
        raise ScheduleError(schedule, at, f"deadlock: {'; '.join(each)}.") from error


def _paired(schedule: Schedule) -> None:
    """From each rank to each other, what is sent is what is received, in the same order."""
    sent: dict[tuple[int, int], list[tuple[Action, int]]] = {}
    received: dict[tuple[int, int], list[tuple[Action, int]]] = {}
    for rank, actions in enumerate(schedule.actions):
        for place, action in enumerate(actions):
            if action.kind in MOVES and action.peer not in range(schedule.num_ranks):
                reason = f"peer={action.peer}: expected the other rank of the move."
                raise ScheduleError(schedule, {rank: place}, reason)
            if action.kind in SENDS and action.peer is not None:
                sent.setdefault((rank, action.peer), []).append((counterpart(action, rank), place))
            elif action.kind in RECEIVES and action.peer is not None:
                received.setdefault((action.peer, rank), []).append((action, place))
    for sender, receiver in sorted(sent.keys() | received.keys()):
        moves = itertools.zip_longest(sent.get((sender, receiver), []), received.get((sender, receiver), []))
        for here, there in moves:
            if here is None or there is None or here[0] != there[0]:
                at = {rank: half[1] for rank, half in ((sender, here), (receiver, there)) if half is not None}
                first, second = (_name(schedule, r, at[r]) if r in at else "nothing" for r in (sender, receiver))
                reason = f"{first} is sent where {second} is received; expected the two halves of one move."
                raise ScheduleError(schedule, at, reason)


def _moved_in_time(schedule: Schedule) -> None:
    """A rank sends what it has made, and has received what it needs of others."""
    for rank, actions in enumerate(schedule.actions):
        there: set[Result] = set()
        for place, action in enumerate(actions):
            if action.kind in COMPUTE:
                missing = [need for need in needs(action, schedule.num_stages) if need not in there]
                if missing:
                    reason = (
                        f"{_name(schedule, rank, place)} has not received the result of {_maker(schedule, missing[0])}."
                    )
                    raise ScheduleError(schedule, {rank: place}, reason)
            elif action.kind in SENDS and action.result not in there:
                reason = (
                    f"{_name(schedule, rank, place)} precedes {_maker(schedule, action.result)}, whose result it sends."
                )
                raise ScheduleError(schedule, {rank: place}, reason)
            if action.kind not in SENDS:
                there.add(action.result)


def _rendezvous(schedule: Schedule) -> None:
    """No deadlock even where a send and its receive each wait for the other."""
    place = [0] * schedule.num_ranks

    def current(rank: int) -> Action | None:
        return schedule.actions[rank][place[rank]] if place[rank] < len(schedule.actions[rank]) else None

    ready = list(range(schedule.num_ranks))
    while ready:
        rank = ready.pop()
        while (action := current(rank)) is not None:
            if action.peer is not None:
                other = current(action.peer)
                if other is None or other.peer != rank or other.result != action.result:
                    break
                place[action.peer] += 1
                ready.append(action.peer)
            place[rank] += 1
    at = {rank: n for rank, n in enumerate(place) if n < len(schedule.actions[rank])}
    if at:
        each = ", ".join(_name(schedule, rank, n) for rank, n in at.items())
        raise ScheduleError(schedule, at, f"deadlock: {each} wait for each other; run order_communication.")


def _freed(schedule: Schedule) -> None:
    """What a microbatch kept is freed once nothing reads it any more."""
    for rank, actions in enumerate(schedule.actions):
        kept: dict[tuple[int, int], int] = {}
        for place, action in enumerate(actions):
            of = action.stage, action.microbatch
            if action.kind in (Kind.B, Kind.W):
                kept[of] = place
            elif action.kind is Kind.DELETE and kept.pop(of, None) is None:
                reason = f"{_name(schedule, rank, place)} comes before the last pass that reads what it frees."
                raise ScheduleError(schedule, {rank: place}, reason)
        for place in kept.values():
            raise ScheduleError(schedule, {rank: place}, f"no D after {_name(schedule, rank, place)}.")


def _within(schedule: Schedule, max_live: Sequence[int]) -> None:
    if len(max_live) != schedule.num_ranks:
        raise ValueError(f"max_live={list(max_live)}: expected one limit for each of {schedule.num_ranks} ranks.")
    for rank, (actions, limit) in enumerate(zip(schedule.actions, max_live)):
        for place, held in enumerate(live(actions)):
            if held > limit:
                reason = f"rank {rank} keeps {held} microbatches at once from here, {limit} are allowed."
                raise ScheduleError(schedule, {rank: place}, reason)


def _name(schedule: Schedule, rank: int, place: int) -> str:
    return f"rank {rank}'s {schedule.cell(schedule.actions[rank][place])}"


def _maker(schedule: Schedule, result: Result) -> str:
    """The computation that makes a result, as text."""
    rank = schedule.placement[result[1]]
    makers = (a for a in schedule.actions[rank] if a.kind in COMPUTE and a.result == result)
    return f"rank {rank}'s {schedule.cell(next(makers))}"


def _picture(schedule: Schedule, at: Mapping[int, int]) -> Iterable[str]:
    """Each rank's actions around the one at fault, or around as many actions from its start as those are."""
    usual = max(at.values(), default=0)
    for rank, actions in enumerate(schedule.actions):
        centre = at.get(rank, usual)
        first, last = max(0, centre - _AROUND), min(len(actions), centre + _AROUND + 1)
        cells = [schedule.cell(action) for action in actions[first:last]]
        if rank in at:
            # At the end of the row, what is missing there is at fault.
            cells[centre - first : centre - first + 1] = [f"[{''.join(cells[centre - first : centre - first + 1])}]"]
        yield f"  rank {rank}: " + " ".join(["…"] * (first > 0) + cells + ["…"] * (last < len(actions)))
