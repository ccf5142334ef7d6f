"""How arrays get from one stage's place to another's: within a process, or between processes.

With several processes, all of them walk through the whole step alike. What belongs to another process's stages is not
computed but stands as `REMOTE`; where a value crosses, the one side sends and the other receives.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from . import link_costs
from .places import Place
from .simulate import Costs
from .transport import PeerError, Received, Transport


class Remote:
    """Stands for an array on another process's device."""

    def __repr__(self) -> str:
        return "REMOTE"


REMOTE = Remote()


@dataclasses.dataclass(slots=True)
class Parcel:
    """Arrays on their way from one stage to another; `name`: what they are."""

    arrays: list[Any]
    source: int
    target: int
    name: str


class Links:
    """Moves between stages whose places all belong to this process."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = list(places)

    def is_local(self, stage: int) -> bool:
        return True

    def send(self, arrays: Sequence[Any], source: int, target: int, name: str) -> Parcel:
        """Send `arrays`, which are on stage `source`. Returns at once."""
        return Parcel(list(arrays), source, target, name)

    def take(self, parcel: Parcel) -> list[Any]:
        """The arrays at their target's place; waits for those of another process."""
        if not parcel.arrays or self.places[parcel.source] is self.places[parcel.target]:
            return parcel.arrays
        return self.places[parcel.target].bring(parcel.arrays)

    def move(self, arrays: Sequence[Any], source: int, target: int, name: str) -> list[Any]:
        """`arrays`, which are on stage `source`, on stage `target`; `name`: what they are."""
        return self.take(self.send(arrays, source, target, name))

    def share(self, array: Any, source: int, aval: Any) -> Any:
        """A result of the step, of that type, on stage `source`, for whoever looks at it."""
        return array

    def handle(self, aval: Any, stage: int) -> Any:
        raise AssertionError("all stages are here")

    def joined(self, costs: Costs, sent_bytes: Sequence[int]) -> Costs:
        """The measured costs of all stages and links, from those of the stages that are here."""
        return costs

    def tell(self, error: Exception) -> None:
        """Other processes get to know that this one fails."""


class ProcessLinks(Links):
    """Moves between stages on several processes of JAX's distributed runtime.

    `timeout`: seconds after which a missing array is an error.
    """

    def __init__(self, places: Sequence[Place], transport: Transport, timeout: float) -> None:
        super().__init__(places)
        self._transport, self._timeout = transport, timeout
        self._processes = [place.process_index for place in self.places]

    def is_local(self, stage: int) -> bool:
        return self._processes[stage] == self._transport.rank

    def send(self, arrays: Sequence[Any], source: int, target: int, name: str) -> Parcel:
        here, there = self._processes[source], self._processes[target]
        parcel = super().send(arrays, source, target, f"{name} #{next(self._transport.moves)}")
        if arrays and here != there and here == self._transport.rank:
            self._transport.send(there, parcel.name, arrays)
        if here != there:
            parcel.arrays = [REMOTE] * len(arrays)
        return parcel

    def take(self, parcel: Parcel) -> list[Any]:
        here, there = self._processes[parcel.source], self._processes[parcel.target]
        if not parcel.arrays or there != self._transport.rank:
            return [REMOTE] * len(parcel.arrays)
        if here == there:
            return super().take(parcel)
        found = self._transport.receive(here, parcel.name, self._timeout)
        return [_array(item, self.places[parcel.target]) for item in found]

    def share(self, array: Any, source: int, aval: Any) -> Any:
        here = self._processes[source]
        tag = f"a result {aval} #{next(self._transport.moves)}"
        if here != self._transport.rank:
            return _array(self._transport.receive(here, tag, self._timeout)[0])
        for other in set(self._processes) - {here}:
            self._transport.send(other, tag, [array])
        return array

    def handle(self, aval: Any, stage: int) -> Any:
        """A `jax.Array` at another process's place: its type can be seen, its values not."""
        place = self.places[stage].whole()
        return jax.make_array_from_single_device_arrays(aval.shape, place, [], dtype=aval.dtype)

    def joined(self, costs: Costs, sent_bytes: Sequence[int]) -> Costs:
        return link_costs.joined(costs, self._processes, sent_bytes, self._transport, self._timeout)

    def tell(self, error: Exception) -> None:
        self._transport.tell(" ".join(str(error).split()) or repr(error))

    def agree(self, plan: str) -> None:
        """
        Raises:
          PeerError: another process has another plan, or another JAX.
        """
        own = f"JAX {jax.__version__}, plan {hashlib.sha256(plan.encode()).hexdigest()[:12]}"
        words = np.frombuffer(own.encode(), np.uint8)
        plans = self._transport.exchange(words, sorted(set(self._processes)), "the plan", self._timeout)
        for other, found in plans.items():
            theirs = found.tobytes().decode()
            if theirs != own:
                raise PeerError(
                    f"pipeline: process {self._transport.rank} has {own}, process {other} has {theirs}. Start all "
                    "processes with the same program, arguments and packages."
                )


def _array(found: Received, place: Place | None = None) -> Any:
    array = jax.device_put(found.words) if place is None else place.received(found.words, found.spec)
    return jax.random.wrap_key_data(array, impl=found.key) if found.key else array
