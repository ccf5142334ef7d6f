"""A linear layer whose logits go into a cross-entropy and nowhere else: the logits need not exist."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from ...kernels._linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_refusal
from ..axes import Axis, View, arrange, climb, contract, label, operands, shrink
from ..facts import CAST, LAYOUT, Facts, primitive, source, users
from ..match import Match, NoMatch, Pattern
from ..trace import Graph, Node, Value
from .cross_entropy import ROOTS, CrossEntropy, detail, find, find_labelled, finished, labels_of

_MASKS = frozenset(("mul", "select_n"))


@dataclasses.dataclass(frozen=True)
class Linear:
    """logits = x . weight (+ bias) over `features`; `dtype`: what the program rounds them to."""

    x: View
    weight: View
    features: Axis
    bias: View | None
    dtype: Any


def _linear(facts: Facts, logits: View, classes: Axis) -> Linear:
    view, bias = climb(logits), None
    dtype, node = view.value.dtype, source(view.value)
    if node is not None and node.primitive == "add":
        for chain, other in (operands(view), operands(view)[::-1]):
            vector = shrink(other)
            if vector.axes == (classes,) and math.prod(vector.value.shape) == classes.size:
                bias, view = vector, climb(chain)
                node = source(view.value)
                break
    if node is None or node.primitive != "dot_general":
        raise NoMatch("the logits are not a matrix product")
    left, right, contracted = contract(view, node)
    x, weight = (left, right) if classes in right.axes else (right, left)
    if len(contracted) != 1 or set(weight.axes) != {classes, *contracted} or len(weight.value.shape) != 2:
        raise NoMatch("the logits are not a product with one matrix")
    if set(x.axes) & {classes} or any(axis not in x.axes for axis in contracted):
        raise NoMatch("the logits are not a product with one matrix")
    return Linear(x, weight, contracted[0], bias, dtype)


def _check_confined(graph: Graph, root: Value, inputs: tuple[Value, ...], start: tuple[Value, ...]) -> None:
    """Raises NoMatch where something computed from the logits is used outside the cross-entropy."""
    inside: set[Node] = set()
    stack = [root.node]
    while stack:
        node = stack.pop()
        if node is None or node in inside:
            continue
        inside.add(node)
        stack += [value.node for value in node.inputs if value not in inputs]
    derived = set(start)
    for node in sorted(inside, key=lambda node: node.position):
        if derived.isdisjoint(node.inputs):
            continue
        derived.update(node.outputs)
        for value in node.outputs:
            outside = any(user not in inside for user in users(graph, value))
            if value is not root and (outside or graph.escapes(value)):
                raise NoMatch("the logits are used elsewhere, so that they have to exist")


@dataclasses.dataclass(frozen=True)
class Kept:
    """Which rows' losses count: those where the boolean `which` is `when`; the others are 0 whatever they are."""

    which: View
    when: bool


def _find(root: Value, graph: Graph) -> tuple[CrossEntropy, Kept | None]:
    """The cross-entropy that `root` is, alone or with the weights or the mask of its rows."""
    node, view = source(root), label(root)
    if node is None or node.primitive not in _MASKS:
        return find(root, graph), None
    if node.primitive == "mul":
        for chain, other in (operands(view), operands(view)[::-1]):
            if (found := _only_masked(chain, view, graph)) is not None:
                return dataclasses.replace(found, weights=(*found.weights, shrink(other))), None
    elif len(node.inputs) == 3:
        which, *cases = operands(view)
        for when in (True, False):
            found = _only_masked(cases[when], view, graph)
            if found is not None and not found.weights and Facts.of(graph).scalar(cases[not when].value) == 0:
                return found, Kept(which, when)
    raise NoMatch("not a cross-entropy")


def _only_masked(chain: View, view: View, graph: Graph) -> CrossEntropy | None:
    """The cross-entropy that `chain` is in the labels of `view`, the only one that reads it."""
    factor = 1.0
    while len(users(graph, chain.value)) == 1:
        loss = climb(chain)
        if primitive(loss.value) in ROOTS and loss.axes == view.axes:
            found = find_labelled(loss, graph)
            return dataclasses.replace(found, root=view, factor=factor * found.factor)
        if primitive(loss.value) != "neg":
            break
        factor, (chain,) = -factor, operands(loss)
    return None


def _counts_evenly(graph: Graph, value: Value) -> bool:
    """Whether the program only ever sums `value` up whole, so that all its elements have one cotangent."""
    if math.prod(value.shape) == 1:
        return True
    readers = users(graph, value)
    if not readers or graph.escapes(value):
        return False
    return all(_keeps_even(node, value) and _counts_evenly(graph, node.outputs[0]) for node in readers)


def _keeps_even(node: Node, value: Value) -> bool:
    if node.primitive in ("mul", "div"):
        first, second = node.inputs
        other = second if first is value else first
        number = math.prod(shrink(label(other)).value.shape) == 1
        return number and (node.primitive == "mul" or first is value)
    return node.primitive in LAYOUT or node.primitive in (CAST, "neg", "reduce_sum")


@dataclasses.dataclass(frozen=True)
class Call:
    """`call(x, weight, labels, [bias], weights…) -> (root,)`.

    uniform: the root's elements all have one cotangent.
    """

    found: CrossEntropy
    linear: Linear
    uniform: bool
    kept: Kept | None

    @property
    def inputs(self) -> tuple[Value, ...]:
        assert self.found.labels is not None
        views = [self.linear.x, self.linear.weight, self.found.labels.view]
        views += [] if self.linear.bias is None else [self.linear.bias]
        views += [] if self.kept is None else [self.kept.which]
        return tuple(view.value for view in (*views, *self.found.weights))

    def operands(self, *arrays: Any) -> tuple[Any, Any, Any, Any]:
        """(x [rows…, features], weight [features, classes] or turned, labels [rows…], bias)"""
        linear, rows = self.linear, self.found.rows
        x = arrange(arrays[0], linear.x.dims, (*((axis,) for axis in rows), (linear.features,)))
        x = jnp.broadcast_to(x, (*(axis.size for axis in rows), linear.features.size))
        return x, arrays[1], labels_of(self.found, arrays[2]), None if linear.bias is None else arrays[3].reshape(-1)

    @property
    def classes_first(self) -> bool:
        return self.linear.weight.axes[0] is self.found.axis

    def __call__(self, *arrays: Any) -> tuple[Any, ...]:
        found = self.found
        assert found.labels is not None
        x, weight, labels, bias = self.operands(*arrays)
        given, out_of_range = found.labels.given(labels, found.axis.size)
        loss = linear_cross_entropy(
            x,
            weight,
            given,
            bias,
            weights=self.weights(arrays),
            classes_first=self.classes_first,
            label_smoothing=found.labels.smoothing,
            out_of_range=out_of_range,
            out_dtype=found.root.value.dtype,
            logits_dtype=self.linear.dtype,
            uniform=self.uniform,
        )
        return (finished(dataclasses.replace(found, weights=()), loss, ()),)

    def weights(self, arrays: tuple[Any, ...]) -> Any:
        """The product of the weights, or the mask, [rows…]: inside the kernel they leave every row one cotangent."""
        found, product = self.found, None
        if self.kept is not None:
            product = arrange(arrays[-1], self.kept.which.dims, [(axis,) for axis in found.rows]) == self.kept.when
        for array, view in zip(arrays[len(arrays) - len(found.weights) :], found.weights):
            factor = arrange(array, view.dims, [(axis,) for axis in found.rows])
            product = factor if product is None else product * factor
        return None if product is None else jnp.broadcast_to(product, [axis.size for axis in found.rows])

    def refusal(self) -> str | None:
        found, linear = self.found, self.linear
        assert found.labels is not None
        rows = tuple(axis.size for axis in found.rows)
        x = jax.ShapeDtypeStruct((*rows, linear.features.size), linear.x.value.dtype)
        labels = jax.ShapeDtypeStruct(rows, found.labels.view.value.dtype)
        bias = None
        if linear.bias is not None:
            bias = jax.ShapeDtypeStruct((found.axis.size,), linear.bias.value.dtype)
        return linear_cross_entropy_refusal(x, linear.weight.value.aval, labels, bias)


def match(root: Value, graph: Graph) -> Match:
    """The linear layer and cross-entropy that `root` is the result of. Raises NoMatch."""
    (found, kept), even = _find(root, graph), _counts_evenly(graph, root)
    if found.labels is None:
        raise NoMatch("target distributions are as large as the logits")
    if primitive(root) in _MASKS and not even:
        raise NoMatch("the losses are weighed unevenly in the end")
    call = Call(found, _linear(Facts.of(graph), found.logits, found.axis), even, kept)
    _check_confined(graph, root, call.inputs, (call.linear.x.value, call.linear.weight.value))
    parts = [detail(found), *(["bias"] if call.linear.bias is not None else [])]
    return Match("linear_cross_entropy", (root,), call.inputs, call, ", ".join(parts), call.refusal())


PATTERN = Pattern("linear_cross_entropy", ROOTS | _MASKS, match)
