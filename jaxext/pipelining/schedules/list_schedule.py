"""A schedule made by always doing the most urgent thing that can be done: list scheduling (Graham 1969)."""

from __future__ import annotations

from collections.abc import Sequence

from ..action import Action, Kind, Schedule
from ..simulate import Costs, needs


def list_schedule(
    name: str,
    num_microbatches: int,
    placement: Sequence[int],
    costs: Costs,
    max_live: Sequence[int],
    urgency: Sequence[Kind] = (Kind.I, Kind.W, Kind.F),
) -> Schedule:
    """Each rank does what can start earliest; of what can start at once, the kind that comes first in `urgency`.

    max_live: by rank, how many forward passes may be kept at once, counted by stage. Later stages go first, so that
    what was begun is ended. A rank on the way to a full memory keeps room for the stages that follow on it.
    """
    return _Greedy(name, num_microbatches, tuple(placement), costs, max_live, urgency).run()


class _Greedy:
    def __init__(
        self,
        name: str,
        count: int,
        placement: tuple[int, ...],
        costs: Costs,
        max_live: Sequence[int],
        urgency: Sequence[Kind],
    ) -> None:
        self._name, self._count, self._placement, self._costs = name, count, placement, costs
        self._limit, self._urgency = list(max_live), urgency
        ranks = max(placement) + 1
        self._clock = [0.0] * ranks
        self._live = [0] * ranks
        self._done: dict[tuple[Kind, int, int], float] = {}
        self._next = {(kind, stage): 0 for kind in (Kind.F, Kind.I, Kind.W) for stage in range(len(placement))}
        self._actions: list[list[Action]] = [[] for _ in range(ranks)]
        self._stages = [[s for s, own in enumerate(placement) if own == r][::-1] for r in range(ranks)]

    def run(self) -> Schedule:
        left = 3 * self._count * len(self._placement)
        while left:
            rank, action, start = min(
                (choice for rank in range(len(self._clock)) if (choice := self._best(rank)) is not None),
                key=lambda choice: (choice[2], choice[0]),
            )
            self._do(rank, action, start)
            left -= 1
        return Schedule(self._name, self._count, self._placement, tuple(map(tuple, self._actions)))

    def _do(self, rank: int, action: Action, start: float) -> None:
        self._clock[rank] = start + self._costs.of(action)
        self._done[action.kind, action.stage, action.microbatch] = self._clock[rank]
        self._next[action.kind, action.stage] += 1
        self._live[rank] += (action.kind is Kind.F) - (action.kind is Kind.W)
        self._actions[rank].append(action)

    def _best(self, rank: int) -> tuple[int, Action, float] | None:
        """What a rank does next, and when: the first in order of urgency that starts as early as any."""
        choices = [(start, n, a) for n, a in enumerate(self._candidates(rank)) if (start := self._start(a)) is not None]
        if not choices:
            return None
        start, _, action = min(choices, key=lambda choice: choice[:2])
        return rank, action, start

    def _candidates(self, rank: int) -> list[Action]:
        found = []
        for kind in self._urgency:
            for stage in self._stages[rank]:
                microbatch = self._next[kind, stage]
                if microbatch < self._count and (kind is not Kind.F or self._has_room(rank, stage)):
                    found.append(Action(kind, stage, microbatch))
        return found

    def _has_room(self, rank: int, stage: int) -> bool:
        """A first stage leaves room for the later ones of its rank, which must run before anything is freed."""
        place = self._stages[rank].index(stage)
        return self._live[rank] + place < max(self._limit[rank], len(self._stages[rank]))

    def _start(self, action: Action) -> float | None:
        rank = self._placement[action.stage]
        start = self._clock[rank]
        for kinds, stage in needs(action, len(self._placement)):
            end = next((t for k in kinds if (t := self._done.get((k, stage, action.microbatch))) is not None), None)
            if end is None:
                return None
            start = max(start, end + self._costs.transfer * (self._placement[stage] != rank))
        return start
