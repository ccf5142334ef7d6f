"""Softmax cross-entropy: log-softmax or log-sum-exp, and the labels' elements, in any spelling."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from ...kernels._cross_entropy import softmax_cross_entropy, softmax_cross_entropy_refusal
from ..axes import Axis, View, arrange, climb, contract, label, operands, same_view, shrink
from ..facts import Facts, is_float, source, users
from ..match import Match, NoMatch, Pattern
from ..trace import Graph, Value
from .labels import Labels, picked, summed_over, targets
from .moments import uncast
from .softmax import log_softmax, logsumexp


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """root = factor * sum(weights * loss) over the rows' dimensions that the root does not have."""

    root: View
    logits: View
    axis: Axis
    labels: Labels | None
    # Target distributions, where there are no labels: arrays to be multiplied.
    targets: tuple[View, ...]
    factor: float
    weights: tuple[View, ...] = ()

    @property
    def rows(self) -> tuple[Axis, ...]:
        return tuple(axis for axis in self.logits.axes if axis is not self.axis)


def find(root: Value, graph: Graph) -> CrossEntropy:
    """The cross-entropy that `root` is the result of. Raises NoMatch."""
    found = graph.memo.setdefault(CrossEntropy, {})
    if root not in found:
        try:
            found[root] = find_labelled(label(root), graph)
        except NoMatch as error:
            found[root] = error
    if isinstance(found[root], NoMatch):
        raise found[root]
    return found[root]


def find_labelled(view: View, graph: Graph) -> CrossEntropy:
    """As `find`, in the labels that `view` has."""
    facts, node = Facts.of(graph), view.value.node
    if node is None or not is_float(view.value):
        raise NoMatch("not a cross-entropy")
    if node.primitive == "gather":
        found = _of_gather(graph, facts, view)
    elif node.primitive == "sub":
        found = _of_difference(facts, view)
    elif node.primitive == "reduce_sum":
        found = _of_products(graph, facts, view, [summed_over(view, node)])
    else:
        left, right, _ = contract(view, node)
        if set(left.axes) != set(right.axes):
            raise NoMatch("not a cross-entropy")
        found = _of_products(graph, facts, view, [left, right])
    if found.axis.size == 0:
        raise NoMatch("there are no classes")
    if found.logits.axes[-1] is not found.axis and not _made_last(graph, found):
        raise NoMatch("the classes are not the last axis of the logits", near=True)
    return found


def _made_last(graph: Graph, found: CrossEntropy) -> bool:
    """Whether the program itself transposes the logits so that the classes are last, as CLIP does for one side."""
    place = [found.axis in dim for dim in found.logits.dims].index(True)
    transposes = (node for node in users(graph, found.logits.value) if node.primitive == "transpose")
    return any(node.params["permutation"][-1] == place for node in transposes)


def _of_gather(graph: Graph, facts: Facts, view: View) -> CrossEntropy:
    """log_softmax(logits)[label]"""
    found = picked(facts, view)
    logits, axis, _ = log_softmax(facts, found.array)
    _used_once(graph, found.array)
    if axis is not found.axis:
        raise NoMatch("the labels pick along another axis than the softmax", near=True)
    return CrossEntropy(view, uncast(logits), axis, found.labels, (), -1.0)


def _used_once(graph: Graph, chances: View) -> None:
    if len(users(graph, chances.value)) > 1 or chances.value in graph.outputs:
        raise NoMatch("the log-probabilities are used elsewhere too, so that they are computed anyway", near=True)


def _of_difference(facts: Facts, view: View) -> CrossEntropy:
    """logsumexp(logits) - logits[label], or the other way round."""
    for lse, other, sign in _ordered(view):
        try:
            logits, axis = logsumexp(facts, lse)
        except NoMatch:
            continue
        found = picked(facts, other)
        renamed = View(found.array.value, _renamed(found.array, found.axis, axis))
        if not same_view(facts, renamed, logits):
            raise NoMatch("the logarithm and the label's logit are of different arrays", near=True)
        return CrossEntropy(view, uncast(logits), axis, found.labels, (), sign)
    raise NoMatch("not a cross-entropy")


def _ordered(view: View) -> list[tuple[View, View, float]]:
    left, right = operands(view)
    return [(left, right, 1.0), (right, left, -1.0)]


def _renamed(view: View, old: Axis, new: Axis) -> tuple[tuple[Axis, ...], ...]:
    return tuple(tuple(new if axis is old else axis for axis in dim) for dim in view.dims)


def _of_products(graph: Graph, facts: Facts, view: View, summed: list[View]) -> CrossEntropy:
    """sum(targets * log_softmax(logits)) over the classes, and maybe over rows too; `summed`: factors of the terms."""
    factors: list[View] = []
    number = math.prod(_factors(facts, part, factors, 6) for part in summed)
    for index, factor in enumerate(factors):
        try:
            logits, axis, _ = log_softmax(facts, factor)
        except NoMatch:
            continue
        if axis in view.axes:
            raise NoMatch("not a sum over the classes")
        others = factors[:index] + factors[index + 1 :]
        weights = tuple(shrink(other) for other in others if axis not in shrink(other).axes)
        dense = tuple(shrink(other) for other in others if axis in shrink(other).axes)
        found = targets(facts, dense[0], axis) if len(dense) == 1 else None
        if not dense:
            raise NoMatch("log-probabilities are summed without targets")
        if any(not is_float(target) for target in (d.value for d in dense)) and found is None:
            raise NoMatch("targets are not floating point", near=True)
        _used_once(graph, factor)
        return CrossEntropy(view, uncast(logits), axis, found, dense if found is None else (), -number, weights)
    raise NoMatch("not a cross-entropy")


def _factors(facts: Facts, view: View, factors: list[View], depth: int) -> float:
    """Collect the arrays whose product `view` is; returns the product of the numbers among them."""
    number = facts.scalar(view.value)
    if number is not None:
        return number
    view = climb(view)
    node = source(view.value)
    if node is None or depth == 0 or node.primitive not in ("mul", "neg"):
        factors.append(view)
        return 1.0
    product = -1.0 if node.primitive == "neg" else 1.0
    return math.prod((_factors(facts, side, factors, depth - 1) for side in operands(view)), start=product)


# ---------------------------------------------------------------- the call


@dataclasses.dataclass(frozen=True)
class Call:
    """`call(logits, labels or targets…, weights…) -> (root,)`."""

    found: CrossEntropy

    @property
    def inputs(self) -> tuple[Value, ...]:
        found = self.found
        asked = found.targets if found.labels is None else (found.labels.view,)
        return (found.logits.value, *(view.value for view in (*asked, *found.weights)))

    def operands(self, *arrays: Any) -> tuple[Any, Any]:
        """(logits [rows…, classes], labels [rows…] or targets [rows…, classes])"""
        found, rows = self.found, [(axis,) for axis in self.found.rows]
        logits = arrange(arrays[0], found.logits.dims, (*rows, (found.axis,)))
        if found.labels is None:
            dense = [arrange(a, v.dims, (*rows, (found.axis,))) for a, v in zip(arrays[1:], found.targets)]
            return logits, jnp.broadcast_to(math.prod(dense[1:], start=dense[0]), logits.shape)
        return logits, labels_of(found, arrays[1])

    def __call__(self, *arrays: Any) -> tuple[Any, ...]:
        found = self.found
        logits, asked = self.operands(*arrays)
        dtype = found.root.value.dtype
        if found.labels is None:
            loss = softmax_cross_entropy(logits, asked, out_dtype=dtype)
        else:
            given, out_of_range = found.labels.given(asked, found.axis.size)
            loss = softmax_cross_entropy(
                logits, given, label_smoothing=found.labels.smoothing, out_of_range=out_of_range, out_dtype=dtype
            )
        n_weights = len(found.weights)
        return (finished(found, loss, arrays[len(arrays) - n_weights :]),)

    def refusal(self) -> str | None:
        found, dtype = self.found, self.found.root.value.dtype
        rows = tuple(axis.size for axis in found.rows)
        logits = jax.ShapeDtypeStruct((*rows, found.axis.size), found.logits.value.dtype)
        if found.labels is not None:
            asked = jax.ShapeDtypeStruct(rows, found.labels.view.value.dtype)
        else:
            asked = jax.ShapeDtypeStruct(logits.shape, jnp.result_type(*(view.value.dtype for view in found.targets)))
        return softmax_cross_entropy_refusal(logits, asked, out_dtype=dtype)


def labels_of(found: CrossEntropy, array: Any) -> Any:
    """The label array with one dimension per row dimension of the logits."""
    assert found.labels is not None
    labels = arrange(array, found.labels.view.dims, [(axis,) for axis in found.rows])
    return jnp.broadcast_to(labels, [axis.size for axis in found.rows])


def finished(found: CrossEntropy, loss: Any, weights: Any) -> Any:
    """The root from the loss of every row."""
    rows = [(axis,) for axis in found.rows]
    for array, view in zip(weights, found.weights):
        loss = loss * arrange(array, view.dims, rows).astype(loss.dtype)
    gone = [place for place, axis in enumerate(found.rows) if axis not in found.root.axes]
    loss = jnp.sum(loss, axis=gone) if gone else loss
    dims = tuple((axis,) for axis in found.rows if axis in found.root.axes)
    result = arrange(loss, dims, found.root.dims)
    return result if found.factor == 1.0 else result * jnp.asarray(found.factor, result.dtype)


def detail(found: CrossEntropy) -> str:
    """What is shown of a match."""
    parts = [f"classes={found.axis.size}", "targets" if found.labels is None else "labels"]
    if found.labels is not None and found.labels.smoothing:
        parts.append(f"smoothing={found.labels.smoothing:g}")
    return ", ".join(parts)


def match(root: Value, graph: Graph) -> Match:
    """The cross-entropy of logits that `root` is the result of. Raises NoMatch."""
    found = find(root, graph)
    call = Call(found)
    return Match("softmax_cross_entropy", (root,), call.inputs, call, detail(found), call.refusal())


ROOTS = frozenset(("gather", "sub", "reduce_sum", "dot_general"))
PATTERN = Pattern("softmax_cross_entropy", ROOTS, match)
