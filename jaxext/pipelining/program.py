"""The compiled functions of a stage: forward, backward, and the two halves that a backward pass can be cut into.

The forward function keeps what `jax.vjp` keeps (residuals). The backward function is traced once and is a graph: what
the cotangents of the stage before need is the first half, what is left are the gradients of the weights (Qi et al.
2023, "Zero Bubble Pipeline Parallelism"). Gradients are added up inside of it, into an accumulator that is donated.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .. import _jax_compat as compat
from .._accelerate import accelerate
from ..rewrite import trace
from ..rewrite.trace import Node, Value
from . import cost
from .microbatch import Typing
from .residuals import Kept, reduced
from .spread import Spread, localised
from .stage import Stage, ancestors, evaluate, function, is_float


@dataclasses.dataclass(eq=False)
class StageProgram:
    """Functions of flat arrays.

    Attributes:
      forward: (*parameters, *received, *data, microbatch) → (*sent, *collected, *residuals).
      backward: ([*residuals, *cotangents], accumulators) → (*cotangents of the received, *accumulators).
      cotangents: (*residuals, *cotangents) → (*cotangents of the received, *for the weights).
      weights: ([*residuals, *cotangents, *for the weights], accumulators) → accumulators.
      kept: where the residuals are. gradients: parameters that have one, by place; accumulators: their types.
      float_received, float_sent: by place, what has a cotangent.
      residual_bytes: kept for one microbatch. costs: of `forward`, `cotangents`, `weights`, as in `cost.of_node`.
    """

    stage: Stage
    forward: Callable[..., list[Any]]
    backward: Accumulating
    cotangents: Callable[..., list[Any]]
    weights: Accumulating
    kept: Kept
    gradients: list[int]
    accumulators: list[jax.ShapeDtypeStruct]
    float_received: list[int]
    float_sent: list[int]
    residual_bytes: int
    costs: tuple[float, float, float]


def accumulator_dtype(dtype: Any) -> Any:
    """Half-precision gradients are added up in float32."""
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype


def build(stage: Stage, typing: Typing, spread: Spread, name: str) -> StageProgram:
    """Trace a stage's forward and backward functions; kernels are put in where jaxext has them."""
    return _Builder(stage, typing, spread, name).build()


class _Builder:
    def __init__(self, stage: Stage, typing: Typing, spread: Spread, name: str) -> None:
        self._stage, self._typing, self._spread, self._name = stage, typing, spread, name
        self._loss = typing.micro.outputs[0]
        self._parameters = [n for n, value in enumerate(stage.parameters) if is_float(value)]
        self._received = [n for n, value in enumerate(stage.receives) if is_float(value)]
        self._sent = [n for n, value in enumerate(stage.sends) if is_float(value)]
        self._pull: Any = None
        self._kept: Any = None

    def build(self) -> StageProgram:
        stage = self._stage
        data = [self._parts(value) for value in stage.data]
        avals = [
            *(v.aval for v in stage.parameters),
            *(v.aval for v in stage.receives),
            *data,
            jax.typeof(jnp.int32(0)),
        ]
        place = self._spread.place
        closed = localised(compat.trace(self._forward, avals, name=f"{self._name}_forward"), place)
        plain = len(stage.sends) + len(stage.collected)
        forward, self._kept, types = reduced(closed, len(stage.parameters), plain)
        sent = [stage.sends[n].aval for n in self._sent]
        backward = localised(compat.trace(self._backward, [*types, *sent], name=f"{self._name}_backward"), place)
        halves = _Halves(backward, len(self._received))
        accumulators = [
            jax.ShapeDtypeStruct(v.shape, accumulator_dtype(v.dtype))
            for v in (stage.parameters[n] for n in self._parameters)
        ]
        residual_bytes = sum(cost.nbytes(t) for t, (given, _) in zip(types, self._kept.sources) if not given)
        return StageProgram(
            stage=stage,
            forward=_jitted(forward, f"{self._name}_forward"),
            backward=Accumulating(halves.both, len(self._received), f"{self._name}_backward"),
            cotangents=_jitted(halves.first, f"{self._name}_cotangents"),
            weights=Accumulating(halves.second, 0, f"{self._name}_weights"),
            kept=self._kept,
            gradients=self._parameters,
            accumulators=accumulators,
            float_received=self._received,
            float_sent=self._sent,
            residual_bytes=residual_bytes,
            costs=(stage.cost, *halves.costs),
        )

    def _forward(self, *arrays: Any) -> list[Any]:
        stage = self._stage
        parameters, rest = list(arrays[: len(stage.parameters)]), arrays[len(stage.parameters) :]
        received, rest = list(rest[: len(stage.receives)]), rest[len(stage.receives) :]
        data, microbatch = rest[:-1], rest[-1]
        sliced = {value: self._slice(value, array, microbatch) for value, array in zip(stage.data, data)}

        def run(own: list[Any], incoming: list[Any]) -> tuple[list[Any], list[Any]]:
            env: dict[Value, Any] = dict(sliced)
            env.update(zip(stage.parameters, parameters))
            env.update(zip(stage.receives, received))
            env.update((stage.parameters[n], x) for n, x in zip(self._parameters, own))
            env.update((stage.receives[n], x) for n, x in zip(self._received, incoming))
            evaluate(stage.operations, env, lambda value: self._read(env, value), self._adjust(microbatch))
            env.update((v, self._spread.pin(env[v], self._typing.types[v].axis)) for v in stage.sends)
            differentiated = [env[stage.sends[n]] for n in self._sent]
            if self._loss in stage.collected:
                differentiated.append(env[self._loss])
            return differentiated, [*(env[v] for v in stage.sends), *(self._read(env, v) for v in stage.collected)]

        own = [parameters[n] for n in self._parameters]
        incoming = [received[n] for n in self._received]
        _, pull, results = jax.vjp(run, own, incoming, has_aux=True)
        residuals, self._pull = jax.tree.flatten(pull)
        return [*results, *residuals]

    def _backward(self, *arrays: Any) -> list[Any]:
        """Cotangents of what was received, then gradients of the parameters."""
        count = len(arrays) - len(self._sent)
        pull = jax.tree.unflatten(self._pull, self._kept.all(*arrays[:count]))
        cotangents = list(arrays[count:])
        if self._loss in self._stage.collected:
            cotangents.append(jnp.ones((), self._loss.dtype))
        own, incoming = pull(cotangents)
        return [*incoming, *own]

    def _parts(self, value: Value) -> Any:
        """The type of all microbatches of a value of the batch."""
        whole = self._typing.pair[value].aval
        parts = functools.partial(self._spread.parts, axis=self._typing.types[value].axis, count=self._typing.count)
        return jax.typeof(jax.eval_shape(parts, whole))

    def _slice(self, value: Value, array: Any, microbatch: Any) -> Any:
        axis = self._typing.types[value].axis
        if axis is None:
            return array
        return self._spread.pin(jax.lax.dynamic_index_in_dim(array, microbatch, axis, keepdims=False), axis)

    def _read(self, env: dict[Value, Any], value: Value) -> Any:
        # A constant that depends on the batch size, such as the 1/N of a mean, is that of the batch.
        return env[value] if value.const is None else self._typing.pair.get(value, value).const

    def _adjust(self, microbatch: Any) -> dict[Node, Callable[[list[Any]], list[Any]]]:
        rules: dict[Node, Callable[[list[Any]], list[Any]]] = {}
        for node, shared in self._typing.shared.items():
            rules[node] = lambda inputs, shared=shared: [
                x * jnp.asarray(1 / self._typing.count, jnp.result_type(x)) if is_shared else x
                for x, is_shared in zip(inputs, shared)
            ]
        for node, column in self._typing.numbered.items():
            rules[node] = lambda inputs, node=node, column=column: self._renumber(node, column, microbatch, inputs)
        return rules

    def _renumber(self, node: Node, column: int, microbatch: Any, inputs: list[Any]) -> list[Any]:
        """Numbers of examples in the batch become numbers in the microbatch."""
        operand, indices = inputs
        axis = self._typing.types[node.inputs[1]].axis
        assert axis is not None
        first = microbatch * node.inputs[1].shape[axis]
        return [operand, indices.at[..., column].add(-first.astype(indices.dtype))]


def _jitted(run: Callable[..., list[Any]], name: str, **options: Any) -> Callable[..., list[Any]]:
    def named(*arrays: Any) -> list[Any]:
        return run(*arrays)

    named.__name__ = named.__qualname__ = name
    return accelerate(named, **options)


class _Halves:
    """A backward function cut in two: its first `count` results, then the rest, from what the first half hands on."""

    def __init__(self, closed: Any, count: int) -> None:
        graph = trace.build(closed)
        first, second = ancestors(graph.outputs[:count]), ancestors(graph.outputs[count:])
        rest = [node for node in graph.nodes if node in second and node not in first]
        made = {value for node in first for value in node.outputs}
        wanted = [*(value for node in rest for value in node.inputs), *graph.outputs[count:]]
        handed = [value for value in dict.fromkeys(wanted) if value in made]
        ordered = [node for node in graph.nodes if node in first]
        self.both = function(graph.nodes, graph.inputs, graph.outputs, graph.captures)
        self.first = function(ordered, graph.inputs, [*graph.outputs[:count], *handed], graph.captures)
        self.second = function(rest, [*graph.inputs, *handed], graph.outputs[count:], graph.captures)
        self.costs = (sum(map(cost.of_node, ordered)), sum(map(cost.of_node, rest)))


class Accumulating:
    """`run`, whose results after the first `before` are gradients, adding them to accumulators that are donated."""

    def __init__(self, run: Callable[..., list[Any]], before: int, name: str) -> None:
        def add(given: list[Any], accumulators: list[Any]) -> list[Any]:
            results = run(*given)
            sums = [old + new.astype(old.dtype) for old, new in zip(accumulators, results[before:], strict=True)]
            return [*results[:before], *sums]

        add.__name__ = add.__qualname__ = name
        self._add, self._before = add, before
        self._jitted: dict[tuple[Any, ...], Callable[[list[Any], list[Any]], list[Any]]] = {}

    def resolve(self, accumulators: Sequence[Any]) -> Callable[[list[Any], list[Any]], list[Any]]:
        """The jitted function for accumulators that are sharded like these, and stay so."""
        shardings = tuple(array.sharding for array in accumulators)
        found = self._jitted.get(shardings)
        if found is None:
            results = [*[None] * self._before, *shardings]
            found = self._jitted[shardings] = accelerate(self._add, donate_argnums=1, out_shardings=results)
        return found
