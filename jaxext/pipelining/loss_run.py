"""One pass of all microbatches through the stages: what each action is brought, does, and hands on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from .. import _jax_compat as compat
from .action import Action, Kind
from .links import REMOTE, Links, Parcel
from .measuring import Stopwatch
from .places import Place
from .program import StageProgram


class StageRun:
    """A stage of this process in one pass.

    parameters, parts, numbers: what its forward pass takes besides what it receives; numbers: of the microbatches.

    Attributes:
      totals: sums of gradients. collected: by microbatch. peak: most microbatches whose residuals were held at once.
    """

    def __init__(
        self, program: StageProgram, parameters: list[Any], parts: list[Any], numbers: list[Any], totals: list[Any]
    ) -> None:
        self.totals = totals
        self.collected: list[list[Any]] = [[] for _ in numbers]
        self.peak = 0
        self.run: dict[Kind, Callable[[int, list[Any]], list[Any]]] = {
            Kind.F: self._forward, Kind.B: self._backward, Kind.I: self._cotangents, Kind.W: self._weights,
        }  # fmt: skip
        self.sends, self.returns = len(program.stage.sends), len(program.float_received)
        self.made = self.sends + len(program.stage.collected)
        self._program, self._parameters, self._parts, self._numbers = program, parameters, parts, numbers
        self._whole, self._later = program.backward.resolve(totals), program.weights.resolve(totals)
        self._residuals: dict[int, list[Any]] = {}
        self._live = 0

    def _forward(self, microbatch: int, received: list[Any]) -> list[Any]:
        arguments = [*self._parameters, *received, *self._parts, self._numbers[microbatch]]
        returned = self._program.forward(*arguments)
        self.collected[microbatch] = returned[self.sends : self.made]
        self._residuals[microbatch] = self._program.kept.gather(arguments, returned)
        self._live += 1
        self.peak = max(self.peak, self._live)
        return returned

    def _backward(self, microbatch: int, incoming: list[Any]) -> list[Any]:
        results = self._whole([*self._residuals.pop(microbatch), *incoming], self.totals)
        self.totals = results[self.returns :]
        self._live -= 1
        return results

    def _cotangents(self, microbatch: int, incoming: list[Any]) -> list[Any]:
        given = [*self._residuals[microbatch], *incoming]
        results = self._program.cotangents(*given)
        self._residuals[microbatch] = [*given, *results[self.returns :]]
        return results

    def _weights(self, microbatch: int, _: list[Any]) -> list[Any]:
        self.totals = self._later(self._residuals.pop(microbatch), self.totals)
        self._live -= 1
        return self.totals


class LossRun:
    """One pass of all microbatches; `stages`: of the loss, None for those of another process."""

    def __init__(self, links: Links, programs: Sequence[StageProgram], stages: Sequence[StageRun | None]) -> None:
        self.stages = stages
        self._links, self._last = links, len(stages) - 1
        self._counts = [(len(program.stage.sends), len(program.float_received)) for program in programs]
        # What is on its way, by whether it is activations, the stage that it goes to, and microbatch.
        self._parcels: dict[tuple[bool, int, int], Parcel] = {}
        self._forbidden = compat.forbidden_values()

    def act(self, action: Action, watch: Stopwatch | None) -> None:
        """Dispatch an action, if it is this process's."""
        kind, stage, microbatch = action.kind, action.stage, action.microbatch
        parcel = None if kind is Kind.W else self._parcels.pop((kind is Kind.F, stage, microbatch), None)
        brought = [] if parcel is None else self._links.take(parcel)
        own = self.stages[stage]
        if own is None:
            self._hand_on(kind, stage, microbatch, None)
            return
        if watch is not None:
            watch.start(brought)
        try:
            results = own.run[kind](microbatch, brought)
            if self._forbidden:
                # What is kept for the backward pass may hold anything, as in plain JAX.
                self._check(results[: own.made] if kind is Kind.F else results)
        except FloatingPointError as error:
            name = f"{kind}{microbatch} of stage {stage} (microbatch {microbatch} of {len(own.collected)})"
            raise floating_point_error(name, self._links.places[stage], error) from error
        self._hand_on(kind, stage, microbatch, results)
        if watch is not None:
            watch.stop(action, results)

    def _hand_on(self, kind: Kind, stage: int, microbatch: int, results: list[Any] | None) -> None:
        """What a neighbouring stage needs of the results, None for those of another process, on its way at once."""
        forward = kind is Kind.F
        target = stage + 1 if forward else stage - 1
        if kind is Kind.W or not 0 <= target <= self._last:
            return
        count = self._counts[stage][not forward]
        arrays = [REMOTE] * count if results is None else results[:count]
        name = f"{kind}{microbatch} of stage {stage}"
        self._parcels[forward, target, microbatch] = self._links.send(arrays, stage, target, name)

    def _check(self, arrays: Sequence[Any]) -> None:
        """Under `jax_debug_nans`; JAX was seen not to look at every dispatch of a compiled pass."""
        for name, test in self._forbidden.items():
            for array in arrays:
                if jnp.issubdtype(array.dtype, jnp.inexact) and test(array).any():
                    raise FloatingPointError(f"{name} in a result of type {array.dtype}{list(array.shape)}")


def floating_point_error(what: str, place: Place, error: FloatingPointError) -> FloatingPointError:
    """Under `jax_debug_nans`, the error that says what gave the NaN."""
    reason = str(error).splitlines()[0].rstrip(". ")
    return FloatingPointError(
        f"pipeline: {what}, on {place} of process {place.process_index}: {reason}. Look at these examples and at "
        "the learning rate; without jax_debug_nans and jax_debug_infs, training goes on as in plain JAX."
    )
