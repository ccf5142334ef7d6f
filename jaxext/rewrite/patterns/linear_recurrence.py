"""First-order linear recurrences written as `jax.lax.associative_scan` over pairs (a, b).

A trace of it is a tree of slices, pads and products whose form depends on the number of steps and on the version of
JAX. So the form is not written down here: the scan is traced anew, of the same shape, and the program's operations are
compared with that one by one, from the last to the two arrays they start from.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from ... import _jax_compat as compat
from ...kernels._linear_recurrence import LINEAR_RECURRENCE
from .. import trace
from ..facts import is_float, resolve, source
from ..match import Match, NoMatch, Pattern
from ..trace import Graph, Node, Value


@dataclasses.dataclass(frozen=True)
class Order:
    """How the products and the sum of `(a b', a' b + b')` are written: each so, or the other way round."""

    factors_turned: bool
    product_turned: bool
    sum_turned: bool

    def combine(self, left: Any, right: Any) -> tuple[Any, Any]:
        """(a, b) of two steps taken one after the other."""

        def turned(turns: bool, x: Any, y: Any) -> tuple[Any, Any]:
            return (y, x) if turns else (x, y)

        x, y = turned(self.factors_turned, left[0], right[0])
        a, b = turned(self.product_turned, right[0], left[1])
        first, second = turned(self.sum_turned, a * b, right[1])
        return x * y, first + second


@functools.lru_cache(maxsize=64)
def _example(shape: tuple[int, ...], dtype: Any, axis: int, order: Order) -> Graph:
    """The scan of arrays of `shape` as JAX traces it."""
    aval = jax.typeof(jax.ShapeDtypeStruct(shape, dtype))

    def run(a: Any, b: Any) -> list[Any]:
        return [jax.lax.associative_scan(order.combine, (a, b), axis=axis)[1]]

    return trace.build(compat.trace(run, [aval, aval]))


def match_linear_recurrence(root: Value, graph: Graph) -> Match:
    """The recurrence that `root` is the result of. Raises NoMatch."""
    found = _halves(root) if is_float(root) else None
    orders = _orders(*found[1:]) if found is not None else []
    if found is None or not orders:
        raise NoMatch("no scan over (a, b)")
    for order in orders:
        starts = _starts(_example(root.shape, root.dtype, found[0], order), root)
        if starts is not None:
            return _as_match(root, starts, found[0])
    raise NoMatch("another scan")


def _halves(root: Value) -> tuple[int, Value, Value] | None:
    """The axis along which `root` interleaves two arrays, padded with zeros in between and added, and the arrays."""
    node = root.node
    pads = [source(value) for value in node.inputs] if node is not None and node.primitive == "add" else []
    if len(pads) != 2 or any(pad is None or pad.primitive != "pad" for pad in pads):
        return None
    even, odd = (pad for pad in pads if pad is not None)
    padded = {axis for pad in (even, odd) for axis, sizes in enumerate(pad.params["padding_config"]) if any(sizes)}
    return (padded.pop(), even.inputs[0], odd.inputs[0]) if len(padded) == 1 else None


def _orders(even: Value, odd: Value) -> list[Order]:
    """The orders that fit the last step of the scan, [b[0], a[2] odd + b[2], ...]; [] where it is none."""
    whole = source(even)
    last = source(whole.inputs[1]) if whole is not None and whole.primitive == "concatenate" else None
    if last is None or last.primitive != "add":
        return []

    def is_odd(value: Value) -> bool:
        cut = source(value)
        return value is odd or (cut is not None and cut.primitive == "slice" and cut.inputs[0] is odd)

    for turned, value in enumerate(last.inputs):
        product = source(value)
        if product is not None and product.primitive == "mul" and any(map(is_odd, product.inputs)):
            return [Order(factors, is_odd(product.inputs[0]), bool(turned)) for factors in (False, True)]
    return []


def _starts(example: Graph, root: Value) -> tuple[Value, Value] | None:
    """The arrays in the place of the example's two, where `root` is computed from them as the example's result is."""
    same: dict[Value, Value] = {}
    stack = [(example.outputs[0], root)]
    while stack:
        expected, found = (resolve(value) for value in stack.pop())
        if expected in same:
            if same[expected] is not found:
                return None
            continue
        same[expected] = found
        if expected.shape != found.shape or expected.dtype != found.dtype:
            return None
        if expected.const is not None:
            if found.const is None or expected.shape != () or expected.const != found.const:
                return None
        elif expected.node is not None:
            if found.node is None or not _same_operation(expected.node, found.node):
                return None
            stack += zip(expected.node.inputs, found.node.inputs)
    a, b = (same.get(start) for start in example.inputs)
    return None if a is None or b is None else (a, b)


def _same_operation(a: Node, b: Node) -> bool:
    alike = a.primitive == b.primitive and len(a.inputs) == len(b.inputs) and not b.eqn.effects
    return alike and a.params.keys() == b.params.keys() and all(a.params[key] == b.params[key] for key in a.params)


@dataclasses.dataclass(frozen=True)
class Call:
    """`call(a, b) -> (h,)`, all of `shape`, along `axis`."""

    shape: tuple[int, ...]
    axis: int

    @property
    def flat(self) -> tuple[int, int, int]:
        before, after = self.shape[: self.axis], self.shape[self.axis + 1 :]
        return math.prod(before), self.shape[self.axis], math.prod(after)

    def __call__(self, *arrays: Any) -> tuple[Any, ...]:
        (h,) = LINEAR_RECURRENCE(*(x.reshape(self.flat) for x in arrays))
        return (h.reshape(self.shape),)


def _as_match(root: Value, inputs: tuple[Value, Value], axis: int) -> Match:
    call = Call(root.shape, axis)
    aval = jax.ShapeDtypeStruct(call.flat, jnp.dtype(root.dtype))
    return Match(
        kernel="linear_recurrence",
        roots=(root,),
        inputs=inputs,
        call=call,
        detail=f"{root.shape[axis]} steps",
        refusal=LINEAR_RECURRENCE.refusal(aval, aval),
    )


PATTERN = Pattern("linear_recurrence", frozenset(("add",)), match_linear_recurrence)
