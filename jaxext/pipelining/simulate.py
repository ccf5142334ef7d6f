"""When every action of a schedule would start and end, given what each costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

from .action import COMPUTE, Action, Kind, Result, Schedule, needs


@dataclasses.dataclass(frozen=True)
class Costs:
    """Durations for one microbatch, by stage, in seconds or any other one unit.

    A whole backward pass takes `backward_input` + `backward_weight`. What a rank sends leaves it one message after the
    other, each for bytes / `bandwidth`, as by one network interface, and arrives `transfer` after it has left.

    Attributes:
      forward, backward_input, backward_weight: of each stage. transfer: latency of a crossing.
      sent_bytes: by stage, what it hands to the next, and takes back as cotangents. bandwidth: bytes per unit of time.
    """

    forward: tuple[float, ...]
    backward_input: tuple[float, ...]
    backward_weight: tuple[float, ...]
    transfer: float = 0.0
    sent_bytes: tuple[float, ...] = ()
    bandwidth: float = float("inf")

    @classmethod
    def even(
        cls, num_stages: int, forward: float = 1.0, backward_input: float = 1.0, backward_weight: float = 1.0,
        transfer: float = 0.0,
    ) -> Costs:  # fmt: skip
        """The same for every stage."""
        return cls((forward,) * num_stages, (backward_input,) * num_stages, (backward_weight,) * num_stages, transfer)

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

    def leaving(self, stage: int) -> float:
        """How long what goes between a stage and the next, either way, takes to leave its rank."""
        return self.sent_bytes[stage] / self.bandwidth if self.sent_bytes else 0.0

    def check(self, num_stages: int) -> None:
        """
        Raises:
          ValueError: these are not the costs of so many stages, or not all are times.
        """
        for name, least in (("forward", num_stages), ("backward_input", num_stages), ("backward_weight", num_stages),
                            ("sent_bytes", num_stages - 1 if self.sent_bytes else 0)):  # fmt: skip
            if not least <= len(getattr(self, name)) <= num_stages:
                raise ValueError(
                    f"costs.{name} has {len(getattr(self, name))} values, the schedule {num_stages} stages; give one "
                    "value a stage."
                )
            if not all(0 <= value < math.inf for value in getattr(self, name)):
                raise ValueError(f"costs.{name}={getattr(self, name)}: expected finite numbers of at least 0.")
        if not (self.transfer >= 0 and self.bandwidth > 0):
            raise ValueError(
                f"costs.transfer={self.transfer}, costs.bandwidth={self.bandwidth}: expected a time of at least 0, and "
                "more than 0 bytes per unit of time."
            )


@dataclasses.dataclass(frozen=True)
class Event:
    """An action in time, in the unit of the costs."""

    rank: int
    action: Action
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Timeline:
    """A schedule in time.

    Attributes:
      events: computations in order of their start; of those that start together, what is needed comes first.
      makespan: from 0 to the last end. busy: by rank, time in which it computes.
      peak_live: by rank, most forward passes of its stages whose residuals it holds at once.
    """

    schedule: Schedule
    events: tuple[Event, ...]
    makespan: float
    busy: tuple[float, ...]
    peak_live: tuple[int, ...]

    @classmethod
    def of(cls, schedule: Schedule, events: Iterable[Event]) -> Timeline:
        """From the times of all computations, simulated or measured; each behind those whose results it needs."""
        # A stable sort: what takes no time stays behind what it needs.
        ordered = tuple(sorted(events, key=lambda event: event.start))
        busy = [0.0] * schedule.num_ranks
        for event in ordered:
            busy[event.rank] += event.end - event.start
        makespan = max((event.end for event in ordered), default=0.0)
        return cls(schedule, ordered, makespan, tuple(busy), tuple(map(peak_live, schedule.actions)))

    @property
    def idle(self) -> tuple[float, ...]:
        """Time in which a rank does not compute, by rank; what papers call its bubble."""
        return tuple(self.makespan - busy for busy in self.busy)

    @property
    def bubble(self) -> float:
        """Idle time of the busiest rank: what a better order could save at most."""
        return min(self.idle)

    @property
    def bubble_fraction(self) -> float:
        """Share of the makespan in which the busiest rank idles."""
        return self.bubble / self.makespan if self.makespan else 0.0

    @property
    def mean_idle_fraction(self) -> float:
        """Share of all ranks' time that is idle."""
        return sum(self.idle) / (self.makespan * len(self.idle)) if self.makespan else 0.0


class DeadlockError(ValueError):
    """Ranks wait for what never comes.

    Attributes:
      waiting: for each rank that cannot go on, the position of its next action and the result which that lacks.
    """

    def __init__(self, waiting: dict[int, tuple[int, Result]]) -> None:
        self.waiting = waiting
        super().__init__(f"ranks {', '.join(map(str, waiting))} wait for what is never done before.")


class Outbox:
    """What ranks send each other. `arrived`: when each result that another rank needs is there."""

    def __init__(self, placement: Sequence[int], costs: Costs) -> None:
        self._placement, self._costs = placement, costs
        self._free = [0.0] * (max(placement) + 1)
        self.arrived: dict[Result, float] = {}

    def send(self, result: Result, end: float) -> None:
        """A rank's result is there at `end`; those of one rank are told in their order."""
        kind, stage, _ = result
        target = stage + {Kind.F: 1, Kind.I: -1}.get(kind, 0)
        rank = self._placement[stage]
        if not 0 <= target < len(self._placement) or self._placement[target] == rank:
            return
        self._free[rank] = max(end, self._free[rank]) + self._costs.leaving(min(stage, target))
        self.arrived[result] = self._free[rank] + self._costs.transfer


def simulate(schedule: Schedule, costs: Costs) -> Timeline:
    """Run a schedule: each rank does its actions in order, each as soon as what it needs has arrived.

    Every action is looked at once, and once more for each result it had to wait for.

    Raises:
      DeadlockError: it never ends.
      ValueError: `costs` are of another number of stages.
    """
    costs.check(schedule.num_stages)
    ended: dict[Result, float] = {}
    outbox = Outbox(schedule.placement, costs)
    waiters: dict[Result, list[int]] = {}
    waiting: dict[int, tuple[int, Result]] = {}
    clock = [0.0] * schedule.num_ranks
    place = [0] * schedule.num_ranks
    events: list[Event] = []
    ready = list(range(schedule.num_ranks))
    while ready:
        rank = ready.pop()
        waiting.pop(rank, None)
        for action in schedule.actions[rank][place[rank] :]:
            if action.kind in COMPUTE:
                start = _start(action, schedule, outbox.arrived, ended, clock[rank])
                if isinstance(start, tuple):
                    waiters.setdefault(start, []).append(rank)
                    waiting[rank] = place[rank], start
                    break
                clock[rank] = ended[action.result] = start + costs.of(action)
                outbox.send(action.result, clock[rank])
                events.append(Event(rank, action, start, clock[rank]))
                ready += waiters.pop(action.result, [])
            place[rank] += 1
    if waiting:
        raise DeadlockError(dict(sorted(waiting.items())))
    return Timeline.of(schedule, events)


def _start(
    action: Action, schedule: Schedule, arrived: dict[Result, float], ended: dict[Result, float], clock: float
) -> float | Result:
    """When an action can start, or a result that it still waits for."""
    start = clock
    for result in needs(action, schedule.num_stages):
        if result not in ended:
            return result
        crosses = schedule.placement[result[1]] != schedule.placement[action.stage]
        start = max(start, arrived[result] if crosses else ended[result])
    return start


def live(actions: Iterable[Action]) -> Iterator[int]:
    """After each action, of how many forward passes residuals are held.

    A B or W frees them; until then, what an I leaves for its W counts as much as all that it found.
    """
    held = 0
    for action in actions:
        held += (action.kind is Kind.F) - (action.kind is Kind.B or action.kind is Kind.W)
        yield held


def peak_live(actions: Iterable[Action]) -> int:
    """Of how many forward passes residuals are held at most."""
    return max(live(actions), default=0)


def global_order(schedule: Schedule, costs: Costs) -> list[Action]:
    """All computations in one order in which a single thread can dispatch them: as they are predicted to start.

    Raises:
      DeadlockError: there is none.
    """
    return [event.action for event in simulate(schedule, costs).events]
