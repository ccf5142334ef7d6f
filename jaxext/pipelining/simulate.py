"""When every action of a schedule would start and end, given what each costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .action import COMPUTE, Action, Kind, Schedule


@dataclasses.dataclass(frozen=True)
class Costs:
    """Time of each stage's passes of one microbatch, by stage, in any one unit; `transfer`: between two ranks.

    A whole backward pass takes `backward_input` + `backward_weight`.
    """

    forward: tuple[float, ...]
    backward_input: tuple[float, ...]
    backward_weight: tuple[float, ...]
    transfer: float = 0.0

    @classmethod
    def even(cls, num_stages: int, forward: float = 1.0, backward_input: float = 1.0, backward_weight: float = 1.0,
             transfer: float = 0.0) -> Costs:  # fmt: skip
        """The same for every stage."""
        return cls(
            (forward,) * num_stages, (backward_input,) * num_stages, (backward_weight,) * num_stages, transfer
        )  # fmt: skip

    def of(self, action: Action) -> float:
        """The duration of an action; moving and freeing take no time of the rank."""
        stage = action.stage
        match action.kind:
            case Kind.F:
                return self.forward[stage]
            case Kind.B:
                return self.backward_input[stage] + self.backward_weight[stage]
            case Kind.I:
                return self.backward_input[stage]
            case Kind.W:
                return self.backward_weight[stage]
        return 0.0


@dataclasses.dataclass(frozen=True)
class Event:
    rank: int
    action: Action
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Timeline:
    """A schedule in time.

    Attributes:
      events: in order of their start. makespan: from the first start to the last end.
      busy: by rank, time in which it works. peak_live: by rank, most microbatches whose residuals it holds at once,
        counted by stage.
    """

    schedule: Schedule
    events: tuple[Event, ...]
    makespan: float
    busy: tuple[float, ...]
    peak_live: tuple[int, ...]

    @property
    def bubble(self) -> float:
        """Idle time of the busiest rank."""
        return self.makespan - max(self.busy)


class DeadlockError(ValueError):
    """Ranks wait for each other: by rank, the action that it cannot start."""

    def __init__(self, stuck: dict[int, Action]) -> None:
        self.stuck = stuck
        waiting = ", ".join(
            f"rank {rank} at {a.kind.value}{a.microbatch} of stage {a.stage}" for rank, a in stuck.items()
        )
        super().__init__(f"the schedule cannot go on: {waiting} wait for what is never done before.")


def needs(action: Action, num_stages: int) -> list[tuple[tuple[Kind, ...], int]]:
    """What has to be done before an action, for the same microbatch: any one of these kinds, on this stage."""
    stage = action.stage
    match action.kind:
        case Kind.F:
            return [((Kind.F,), stage - 1)] if stage else []
        case Kind.B | Kind.I:
            own = [((Kind.F,), stage)]
            return own if stage == num_stages - 1 else [*own, ((Kind.B, Kind.I), stage + 1)]
        case Kind.W:
            return [((Kind.I,), stage)]
    return []


def simulate(schedule: Schedule, costs: Costs) -> Timeline:
    """Run a schedule in which each rank does its actions in order, each as soon as what it needs is there.

    Raises:
      DeadlockError: it never ends.
    """
    done: dict[tuple[Kind, int, int], float] = {}
    clock = [0.0] * schedule.num_ranks
    place = [0] * schedule.num_ranks
    events: list[Event] = []
    waiting: dict[tuple[Kind, int, int], list[int]] = {}
    ready = list(range(schedule.num_ranks))
    while ready:
        rank = ready.pop()
        while place[rank] < len(schedule.actions[rank]):
            action = schedule.actions[rank][place[rank]]
            start, missing = _start(action, schedule, costs, done, clock[rank])
            if missing is not None:
                for kind in missing[0]:
                    waiting.setdefault((kind, missing[1], action.microbatch), []).append(rank)
                break
            end = start + costs.of(action)
            place[rank] += 1
            if action.kind in COMPUTE:
                clock[rank] = end
                done[action.kind, action.stage, action.microbatch] = end
                events.append(Event(rank, action, start, end))
                ready += waiting.pop((action.kind, action.stage, action.microbatch), [])
    stuck = {r: schedule.actions[r][p] for r, p in enumerate(place) if p < len(schedule.actions[r])}
    if stuck:
        raise DeadlockError(stuck)
    return _timeline(schedule, events, costs)


def _start(
    action: Action, schedule: Schedule, costs: Costs, done: dict[tuple[Kind, int, int], float], clock: float
) -> tuple[float, tuple[tuple[Kind, ...], int] | None]:
    start = clock
    for kinds, stage in needs(action, schedule.num_stages):
        end = next((t for kind in kinds if (t := done.get((kind, stage, action.microbatch))) is not None), None)
        if end is None:
            return start, (kinds, stage)
        crosses = schedule.placement[stage] != schedule.placement[action.stage]
        start = max(start, end + costs.transfer * crosses)
    return start, None


def _timeline(schedule: Schedule, events: Sequence[Event], costs: Costs) -> Timeline:
    busy = [0.0] * schedule.num_ranks
    for event in events:
        busy[event.rank] += event.end - event.start
    makespan = max((event.end for event in events), default=0.0)
    ordered = tuple(sorted(events, key=lambda e: (e.start, e.end, e.rank)))
    peaks = tuple(peak_live(actions) for actions in schedule.actions)
    return Timeline(schedule, ordered, makespan, tuple(busy), peaks)


def peak_live(actions: Sequence[Action]) -> int:
    """The most forward passes whose residuals are held at once."""
    live = peak = 0
    for action in actions:
        live += (action.kind is Kind.F) - (action.kind in (Kind.B, Kind.W))
        peak = max(peak, live)
    return peak


def global_order(schedule: Schedule, costs: Costs) -> list[Action]:
    """All actions in one order in which a single thread can dispatch them: as they are predicted to start."""
    position = {rank: {a: n for n, a in enumerate(actions)} for rank, actions in enumerate(schedule.actions)}
    events = simulate(schedule, costs).events
    depth = {(e.rank, e.action): (e.start, e.end, position[e.rank][e.action], -e.action.stage) for e in events}
    order = sorted(events, key=lambda e: depth[e.rank, e.action])
    return _stable(schedule, [event.action for event in order])


def _stable(schedule: Schedule, order: Sequence[Action]) -> list[Action]:
    """The same order, with actions of no duration behind what they need."""
    done: set[tuple[Kind, int, int]] = set()
    places = [0] * schedule.num_ranks
    result: list[Action] = []
    pending = list(order)
    while pending:
        later = []
        for action in pending:
            rank = schedule.placement[action.stage]
            met = all(
                any((kind, stage, action.microbatch) in done for kind in kinds)
                for kinds, stage in needs(action, schedule.num_stages)
            )
            own = [a for a in schedule.actions[rank] if a.kind in COMPUTE]
            if met and own[places[rank]] == action:
                places[rank] += 1
                done.add((action.kind, action.stage, action.microbatch))
                result.append(action)
            else:
                later.append(action)
        pending = later
    return result
