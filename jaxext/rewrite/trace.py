"""A traced function as a flat graph of operations, the form that patterns are matched on.

Plain calls of jitted functions (``jnp.where`` and friends are such calls) are flattened, so that a pattern never has to
know how a library cut its code into functions. Calls that carry meaning of their own (scan, cond, checkpoint,
custom derivatives, shardings) stay one node each.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from .. import _jax_compat as compat

HIDDEN, OUTSIDE = -1, -2
# How many operations of an enclosing function are looked at for one array that comes from there.
_OUTSIDE_BUDGET = 64


class Value:
    """One array in a graph.

    ``node`` produced it (None for an input or a constant). ``const`` is the concrete array of a literal or of a
    constant that the function closed over, else None. ``inner`` is the value inside a custom_jvp body of JAX's own that
    this value is computed as: matchers may look through it, and what they do not match is emitted as the opaque call it
    was. A user's custom derivative is never looked into, as a kernel would not keep it.
    ``origin``, of an input of a function inside an operation, is the value of the enclosing graph that it always is
    (not a loop's carry or slice); of a tracer that the function closed over, the value in the enclosing function's
    trace. It says what the value is, and cannot be computed with.
    """

    __slots__ = ("aval", "const", "inner", "node", "origin")

    def __init__(self, aval: Any, node: Node | None = None, const: Any = None, inner: Value | None = None) -> None:
        self.aval = aval
        self.node = node
        self.const = const
        self.inner = inner
        self.origin: Value | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.aval.shape

    @property
    def dtype(self) -> np.dtype:
        return self.aval.dtype

    def __repr__(self) -> str:
        kind = "const" if self.const is not None else self.node.primitive if self.node else "input"
        return f"<{kind} {compat.short_type(self.aval)}>"


class Node:
    """One operation: ``outputs = primitive(*inputs, **params)``; ``eqn`` is the JAX equation that it came from.

    ``position`` numbers a graph's nodes in program order, HIDDEN for the nodes inside a custom_jvp body and OUTSIDE for
    those of an enclosing function: they can be looked at, not emitted.
    """

    __slots__ = ("eqn", "inputs", "outputs", "params", "position", "primitive")

    def __init__(self, eqn: Any, inputs: list[Value], position: int) -> None:
        self.primitive: str = eqn.primitive.name
        self.params: dict[str, Any] = eqn.params
        self.inputs = inputs
        self.outputs = [Value(var.aval, self) for var in eqn.outvars]
        self.eqn = eqn
        self.position = position

    def __repr__(self) -> str:
        shapes = ", ".join(compat.short_type(value.aval) for value in self.inputs)
        return f"<{self.primitive}({shapes})>"


class Call:
    """A flattened call of a jitted function: nodes ``start`` to ``stop`` of the graph.

    Kept so that a call without a replacement in it is emitted as the call it was.
    """

    __slots__ = ("calls", "eqn", "inputs", "outputs", "start", "stop")

    def __init__(self, eqn: Any, inputs: list[Value], start: int) -> None:
        self.eqn = eqn
        self.inputs = inputs
        self.outputs: list[Value] = []
        self.start = start
        self.stop = start
        self.calls: list[Call] = []


class Graph:
    """A function: ``nodes`` in program order, ``inputs``, ``outputs``.

    ``captures`` holds what the function closed over, arrays and tracers of enclosing functions alike.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.inputs: list[Value] = []
        self.outputs: list[Value] = []
        self.captures: dict[Value, Any] = {}
        self.calls: list[Call] = []
        # What matchers found out about this graph, so that it is found out once.
        self.memo: dict[Any, Any] = {}
        self._users: dict[Value, list[Node]] | None = None
        self._returned: set[Value] | None = None

    def users(self, value: Value) -> list[Node]:
        """The nodes that take `value` as an input, in program order, each once."""
        if self._users is None:
            self._users = {}
            for node in self.nodes:
                for operand in dict.fromkeys(node.inputs):
                    self._users.setdefault(operand, []).append(node)
        return self._users.get(value, [])

    def escapes(self, value: Value) -> bool:
        """True where the function returns `value`."""
        if self._returned is None:
            self._returned = set(self.outputs)
        return value in self._returned


def between(wanted: Iterable[Value], known: Container[Value]) -> set[Node]:
    """The operations that compute `wanted` from `known`."""
    found: set[Node] = set()
    stack = list(wanted)
    while stack:
        value = stack.pop()
        if value not in known and value.node is not None and value.node not in found:
            found.add(value.node)
            stack += value.node.inputs
    return found


def build(closed_jaxpr: Any, origins: Sequence[Value | None] = ()) -> Graph:
    """The graph of a traced function (a ClosedJaxpr, as `jax.make_jaxpr` gives it); `origins`: those of its inputs."""
    graph = Graph()
    jaxpr, consts = compat.open_jaxpr(closed_jaxpr)
    graph.inputs = [Value(var.aval) for var in jaxpr.invars]
    for value, origin in zip(graph.inputs, origins):
        value.origin = origin
    captured = [_capture(graph, const) for const in consts]
    graph.outputs = _flatten(graph, jaxpr, captured, graph.inputs, graph.calls, None)
    return graph


def _capture(graph: Graph, const: Any) -> Value:
    concrete = not isinstance(const, compat.Tracer) and not compat.is_ref(const)
    value = Value(jax.typeof(const), const=const if concrete else None)
    graph.captures[value] = const
    if not concrete and not compat.is_ref(const):
        value.origin = _outside(graph, const, {}, [_OUTSIDE_BUDGET])
    return value


def _outside(graph: Graph, const: Any, seen: dict[int, Value], budget: list[int]) -> Value:
    """What an array of an enclosing function that is being traced is computed from, as far as the budget goes."""
    const = compat.lowered(const)
    if not isinstance(const, compat.Tracer):
        return Value(jax.typeof(const), const=None if compat.is_ref(const) else const)
    if id(const) in seen:
        return seen[id(const)]
    record = compat.recorded(const)
    if record is None or budget[0] <= 0:
        return seen.setdefault(id(const), Value(jax.typeof(const)))
    eqn, place = record
    budget[0] -= 1
    operands = [_outside(graph, operand, seen, budget) for operand in eqn.in_tracers]
    if compat.is_plain_call(eqn):
        outputs = _flatten_call(graph, eqn, operands, [], OUTSIDE)
    else:
        outputs = Node(eqn, operands, OUTSIDE).outputs
    return seen.setdefault(id(const), outputs[place])


def _flatten(
    graph: Graph, jaxpr: Any, consts: list[Value], inputs: list[Value], calls: list[Call], place: int | None
) -> list[Value]:
    """Append the equations of `jaxpr` to `graph`; `place`: HIDDEN or OUTSIDE for those only to be looked at."""
    env: dict[Any, Value] = dict(zip(jaxpr.constvars, consts))
    env.update(zip(jaxpr.invars, inputs))

    def read(atom: Any) -> Value:
        if isinstance(atom, compat.Literal):
            return Value(atom.aval, const=atom.val)
        return env[atom]

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        if compat.is_plain_call(eqn):
            outputs = _flatten_call(graph, eqn, operands, calls, place)
        else:
            node = Node(eqn, operands, len(graph.nodes) if place is None else place)
            outputs = node.outputs
            if place is None:
                graph.nodes.append(node)
            if node.primitive == "custom_jvp_call" and compat.differentiates_its_body(eqn):
                _look_inside(graph, node)
        env.update(zip(eqn.outvars, outputs))
    return [read(atom) for atom in jaxpr.outvars]


def _flatten_call(graph: Graph, eqn: Any, operands: list[Value], calls: list[Call], place: int | None) -> list[Value]:
    inner, consts = compat.open_jaxpr(compat.called_jaxpr(eqn))
    captured = [_capture(graph, const) for const in consts]
    call = Call(eqn, operands, len(graph.nodes))
    call.outputs = _flatten(graph, inner, captured, operands, call.calls, place)
    call.stop = len(graph.nodes)
    if call.stop > call.start:
        calls.append(call)
    return call.outputs


def _look_inside(graph: Graph, node: Node) -> None:
    body, consts = compat.open_jaxpr(node.params["call_jaxpr"])
    captured = [_capture(graph, const) for const in consts]
    computed = _flatten(graph, body, captured, node.inputs, [], HIDDEN)
    for output, inner in zip(node.outputs, computed):
        output.inner = inner
