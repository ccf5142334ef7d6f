"""A schedule made by always doing the most urgent thing that can be done: list scheduling (Graham 1969)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from ..action import Action, Kind, Schedule, needs
from ..simulate import Costs, Outbox

# Of a kind, stage and microbatch: what is least goes first.
Priority = Callable[[Kind, int, int], tuple[float, ...]]
_KINDS = (Kind.F, Kind.I, Kind.W)
# Share of a pattern's period after which a rank hands a microbatch on to a stage of its own: there are six passes.
_TURN = 1 / 6


def list_schedule(
    name: str,
    num_microbatches: int,
    placement: Sequence[int],
    costs: Costs,
    max_live: Sequence[int],
    priority: Priority,
) -> Schedule:
    """Each rank does what can start earliest; of what can start at once, what has priority.

    Always ends: a stage takes microbatches in their order, and one that is not the last of its rank leaves a place for
    each later one, so that the oldest microbatch under way finds room wherever it goes.

    max_live: by rank, how many forward passes may be kept at once, counted by stage; at least the rank's stages.
    """
    run = _Run(num_microbatches, placement, costs, max_live, priority)
    return Schedule(name, num_microbatches, tuple(placement), run.actions())


@dataclasses.dataclass
class _Passes:
    """All passes of one kind through one stage.

    ended: when, by microbatch; as many as are done. inputs: what each needs, as other passes. later: stages behind this
    one on its rank. enables: ranks that wait for it.
    """

    kind: Kind
    stage: int
    duration: float
    later: int
    ended: list[float] = dataclasses.field(default_factory=list)
    inputs: list[_Passes] = dataclasses.field(default_factory=list)
    enables: set[int] = dataclasses.field(default_factory=set)


# When a rank's next pass starts, how urgent it is, and which it is.
_Choice = tuple[float, tuple[float, ...], _Passes]


class _Run:
    """The state of the ranks while their actions are chosen."""

    def __init__(
        self, count: int, placement: Sequence[int], costs: Costs, max_live: Sequence[int], priority: Priority
    ) -> None:
        self._count, self._priority, self._room = count, priority, list(max_live)
        self._placement, self._outbox = placement, Outbox(placement, costs)
        self._clock = [0.0] * len(max_live)
        self._ranks: list[list[_Passes]] = [[] for _ in max_live]
        self._actions: list[list[Action]] = [[] for _ in max_live]
        passes = {}
        for stage, rank in enumerate(placement):
            for kind in _KINDS:
                own = _Passes(kind, stage, costs.of(Action(kind, stage, 0)), placement[stage + 1 :].count(rank))
                passes[kind, stage] = own
                self._ranks[rank].append(own)
        for (kind, stage), own in passes.items():
            for needed, other, _ in needs(Action(kind, stage, 0), len(placement)):
                own.inputs.append(passes[needed, other])
                passes[needed, other].enables.add(placement[stage])

    def actions(self) -> tuple[tuple[Action, ...], ...]:
        choices = [self._choice(rank) for rank in range(len(self._ranks))]
        while any(choices):
            rank, (start, _, own) = min(
                ((rank, choice) for rank, choice in enumerate(choices) if choice), key=lambda pair: pair[1][0]
            )
            self._actions[rank].append(Action(own.kind, own.stage, len(own.ended)))
            self._clock[rank] = start + own.duration
            self._room[rank] += (own.kind is Kind.W) - (own.kind is Kind.F)
            self._outbox.send((own.kind, own.stage, len(own.ended)), self._clock[rank])
            own.ended.append(self._clock[rank])
            for other in {rank, *own.enables}:
                choices[other] = self._choice(other)
        return tuple(map(tuple, self._actions))

    def _choice(self, rank: int) -> _Choice | None:
        best: _Choice | None = None
        for own in self._ranks[rank]:
            start = self._start(rank, own)
            if start is None or (best is not None and start > best[0]):
                continue
            urgency = self._priority(own.kind, own.stage, len(own.ended))
            if best is None or (start, urgency) < best[:2]:
                best = (start, urgency, own)
        return best

    def _start(self, rank: int, own: _Passes) -> float | None:
        """When the next microbatch can pass; None if none is left, or no room, or what it needs is not chosen."""
        microbatch = len(own.ended)
        if microbatch == self._count or (own.kind is Kind.F and self._room[rank] <= own.later):
            return None
        start = self._clock[rank]
        for needed in own.inputs:
            if len(needed.ended) <= microbatch:
                return None
            crosses = self._placement[needed.stage] != rank
            result = (needed.kind, needed.stage, microbatch)
            start = max(start, self._outbox.arrived[result] if crosses else needed.ended[microbatch])
        return start


def by_kind(*kinds: Kind) -> Priority:
    """Kinds in this order; of the same kind, later stages first, so that what was begun is ended."""
    order = {kind: float(number) for number, kind in enumerate(kinds)}
    return lambda kind, stage, microbatch: (order[kind], -float(stage))


def by_pattern(placement: Sequence[int], period: float, forward: float, backward: float) -> Priority:
    """In the order of a pattern that repeats for each microbatch, weight gradients last (Qi et al. 2024).

    period: time between microbatches. forward, backward: share of it that a microbatch takes from rank to rank on the
    way down to the last rank; on the way up it takes the rest, so that on no rank do two passes ever fall together.
    """
    hops = [0.0]
    for ranks, share in ((placement, forward), (placement[::-1], backward)):
        hops += [period * (share if after > rank else 1 - share if after < rank else _TURN)
                 for rank, after in itertools.pairwise(ranks)]  # fmt: skip
        hops.append(period * _TURN)
    times = list(itertools.accumulate(hops[:-1]))
    return lambda kind, stage, microbatch: (
        float(kind is Kind.W),
        period * microbatch + times[stage if kind is Kind.F else -1 - stage],
    )
