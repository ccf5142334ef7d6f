"""A stage: a stretch of the loss on one microbatch, what goes into it and what comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .. import _jax_compat as compat
from ..rewrite.trace import Node, Value


@dataclasses.dataclass(eq=False)
class Layers:
    """Layers `start` to `stop` of a scan over layers, in the order of execution, as an operation of its own.

    inputs: constants, the carry so far, whole stacked slices. outputs: the carry, then these layers' stacked results.
    """

    node: Node
    start: int
    stop: int
    inputs: list[Value]
    outputs: list[Value]

    def span(self) -> tuple[int, int]:
        """Which of the stacked slices these layers take."""
        length = self.node.params["length"]
        return (length - self.stop, length - self.start) if self.node.params["reverse"] else (self.start, self.stop)

    def run(self, inputs: list[Any]) -> list[Any]:
        constants, carry = compat.scan_counts(self.node.params)
        low, high = self.span()
        slices = [x[low:high] for x in inputs[constants + carry :]]
        params = {**self.node.params, "length": high - low}
        return compat.bind(self.node.eqn, [*inputs[: constants + carry], *slices], params)


@dataclasses.dataclass(eq=False)
class Join:
    """The stacked results of a scan whose layers were cut apart. inputs: chunks by execution; outputs: the results."""

    node: Node
    inputs: list[Value]
    outputs: list[Value]

    def run(self, inputs: list[Any]) -> list[Any]:
        count = len(self.outputs)
        chunks = [inputs[start::count] for start in range(count)]
        reverse = self.node.params["reverse"]
        return [jnp.concatenate(parts[::-1] if reverse else parts) for parts in chunks]


Operation = Node | Layers | Join


@dataclasses.dataclass(eq=False)
class Stage:
    """One stage.

    Attributes:
      operations: in order, those on parameters alone included.
      parameters: inputs of the loss that it uses. data: values that depend on no parameter, of the micro graph.
      receives: values from the stage before. sends: values for the stage after.
      collected: values that are wanted when all microbatches are through.
      cost: of a forward pass of one microbatch, as in `cost.of_node`.
      lines: the user's lines of its first and last operation; layers: name scopes in it, in order.
    """

    operations: list[Operation]
    parameters: list[Value]
    data: list[Value]
    receives: list[Value]
    sends: list[Value]
    collected: list[Value]
    cost: float
    lines: tuple[str, str] = ("", "")
    layers: tuple[str, ...] = ()


def evaluate(
    operations: Iterable[Operation],
    env: dict[Value, Any],
    read: Callable[[Value], Any],
    adjust: Mapping[Node, Callable[[list[Any]], list[Any]]],
) -> None:
    """Run operations, in order, into `env`; `adjust`: what is done to the operands of some of them first."""
    for operation in operations:
        inputs = [read(value) for value in operation.inputs]
        eqn = operation.eqn if isinstance(operation, Node) else operation.node.eqn
        with compat.source_of(eqn):
            if not isinstance(operation, Node):
                outputs = operation.run(inputs)
            else:
                if operation in adjust:
                    inputs = adjust[operation](inputs)
                outputs = compat.bind(eqn, inputs, operation.params)
        env.update(zip(operation.outputs, outputs, strict=True))


def function(
    nodes: Sequence[Node],
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    captures: Mapping[Value, Any] | None = None,
) -> Callable[..., list[Any]]:
    """The function from arrays for `inputs` to those for `outputs` that `nodes` compute; `captures`: of their graph."""

    def run(*arrays: Any) -> list[Any]:
        env: dict[Value, Any] = dict(captures or {})
        env.update(zip(inputs, arrays, strict=True))

        def read(value: Value) -> Any:
            return env.get(value, value.const)

        evaluate(nodes, env, read, {})
        return [read(value) for value in outputs]

    return run


def ancestors(values: Iterable[Value]) -> set[Node]:
    """The nodes that these values are computed by."""
    found: set[Node] = set()
    stack = list(values)
    while stack:
        node = stack.pop().node
        if node is not None and node not in found:
            found.add(node)
            stack += node.inputs
    return found


def is_float(value: Value) -> bool:
    return jax.numpy.issubdtype(value.dtype, jnp.inexact)
