"""Softmax, log-softmax and log-sum-exp, however they are written."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ..axes import Axis, View, climb, operand, operands, reduced, same_view
from ..facts import ALIASES, Facts, source
from ..match import NoMatch
from ..trace import Node

# An epsilon beside a sum that is at least 1 changes nothing that single precision can hold.
_HARMLESS_EPSILON = 1e-6

Empty = Literal["uniform", "nan", "zero", "unknown"]
"""What a row gives whose scores are all the same very negative, finite number."""


@dataclasses.dataclass(frozen=True)
class Softmax:
    """`scores` normalised over `axis`; `masks`: what else the exponentials were multiplied by (True = kept)."""

    scores: View
    axis: Axis
    empty: Empty
    # The maximum is protected from being infinite, so that a row of -inf gives exponentials of zero and not NaN.
    finite_maximum: bool
    epsilon: bool
    masks: tuple[tuple[View, bool], ...] = ()


def softmax(facts: Facts, view: View) -> Softmax:
    """The softmax that `view` is the result of. Raises NoMatch."""
    view = climb(view)
    node = source(view.value)
    if node is None or node.primitive not in ("div", "mul", "exp"):
        raise NoMatch("not a softmax")
    if node.primitive == "exp":
        scores, axis, shift = log_softmax(facts, operand(node.inputs[0], view))
        empty: Empty = "uniform" if shift == "maximum" else "unknown"
        return Softmax(scores, axis, empty, finite_maximum=False, epsilon=False)
    for numerator, denominator in quotients(facts, node, view):
        exponential, masks = _without_mask(facts, climb(numerator))
        if (exp := source(exponential.value)) is None or exp.primitive != "exp":
            continue
        return normalised(facts, exponential, masks, climb(numerator), denominator)
    raise NoMatch("not a softmax")


def exponential(facts: Facts, view: View) -> tuple[View, tuple[tuple[View, bool], ...]]:
    """`view` as the result of an exp, and the masks that it was multiplied by afterwards."""
    result, masks = _without_mask(facts, climb(view))
    node = source(result.value)
    if node is None or node.primitive != "exp":
        raise NoMatch("no exponential")
    return result, masks


def normalised(
    facts: Facts, exponential: View, masks: tuple[tuple[View, bool], ...], numerator: View, denominator: View
) -> Softmax:
    """The softmax with these two parts. Raises NoMatch where `denominator` is not the sum of `numerator`."""
    summed, axis, epsilon = _sum(facts, denominator, exponential.axes)
    if not same_view(facts, summed, numerator):
        bare, _ = _without_mask(facts, climb(summed))
        if not same_view(facts, bare, exponential):
            raise NoMatch("the denominator is not the sum of the exponentials", near=True)
        masks = masks or _without_mask(facts, climb(summed))[1]
    exp = source(exponential.value)
    assert exp is not None
    scores, shift = _unshift(facts, climb(operand(exp.inputs[0], exponential)), axis)
    if epsilon and (epsilon > _HARMLESS_EPSILON or shift not in ("maximum", "finite maximum")):
        raise NoMatch(f"{epsilon:g} is added to the sum of the exponentials", near=True)
    empty: Empty = "nan" if shift is None else "unknown" if shift == "other" else "uniform"
    return Softmax(scores, axis, empty, shift == "finite maximum", epsilon > 0, masks)


def quotients(facts: Facts, node: Node, view: View) -> list[tuple[View, View]]:
    left, right = operands(view)
    if node.primitive == "div":
        return [(left, right)]
    pairs = []
    for one, other in ((left, right), (right, left)):
        inverse = reciprocal(facts, other)
        if inverse is not None:
            pairs.append((one, inverse))
    return pairs


def reciprocal(facts: Facts, view: View) -> View | None:
    """x where `view` is 1 / x."""
    view = climb(view)
    node = source(view.value)
    if node is None:
        return None
    if node.primitive == "div" and facts.scalar(node.inputs[0]) == 1.0:
        return operand(node.inputs[1], view)
    if node.primitive == "integer_pow" and node.params["y"] == -1:
        return operand(node.inputs[0], view)
    if node.primitive == "pow" and facts.scalar(node.inputs[1]) == -1.0:
        return operand(node.inputs[0], view)
    return None


def _without_mask(facts: Facts, view: View) -> tuple[View, tuple[tuple[View, bool], ...]]:
    """`view` before `where(mask, x, 0)`, and those masks with the truth value that keeps."""
    masks: list[tuple[View, bool]] = []
    while True:
        node = source(view.value)
        if node is None or node.primitive != "select_n" or len(node.inputs) != 3:
            return view, tuple(masks)
        zeros = [facts.scalar(case) == 0.0 for case in node.inputs[1:]]
        if sum(zeros) != 1:
            return view, tuple(masks)
        masks.append((predicate(node, view), zeros[0]))
        view = climb(operand(node.inputs[2 if zeros[0] else 1], view))


def predicate(node: Node, view: View) -> View:
    """The first operand of a `select_n` whose result is `view`; it may be a scalar."""
    return operand(node.inputs[0], view)


def _sum(facts: Facts, view: View, axes: tuple[Axis, ...]) -> tuple[View, Axis, float]:
    """(x, axis, epsilon) where `view` is sum(x, axis) + epsilon."""
    view = climb(view)
    node = source(view.value)
    epsilon = 0.0
    if node is not None and node.primitive in ("add", "max"):
        for number, other in (node.inputs, node.inputs[::-1]):
            scalar = facts.scalar(number)
            if scalar is not None:
                epsilon, view = scalar, climb(operand(other, view))
                node = source(view.value)
                break
    missing = [axis for axis in axes if axis not in view.axes]
    if node is None or node.primitive != "reduce_sum" or len(node.params["axes"]) != 1 or len(missing) != 1:
        raise NoMatch("not a softmax")
    return reduced(view, node, missing[0]), missing[0], epsilon


Shift = Literal["maximum", "finite maximum", "other"] | None


def _unshift(facts: Facts, view: View, axis: Axis) -> tuple[View, Shift]:
    """x, and what was subtracted, where `view` is x less a maximum along `axis`."""
    node = source(view.value)
    if node is None or node.primitive != "sub":
        return view, None
    scores = climb(operand(node.inputs[0], view))
    found = maximum(facts, operand(node.inputs[1], view), axis)
    if found is None:
        return view, None
    reduced_from, finite = found
    if not same_view(facts, reduced_from, scores):
        return scores, "other"
    return scores, "finite maximum" if finite else "maximum"


def maximum(facts: Facts, view: View, axis: Axis) -> tuple[View, bool] | None:
    """(x, finite) where `view` is the maximum of x along `axis`; finite: infinities were replaced by a number."""
    finite = False
    while True:
        view = climb(view)
        node = source(view.value)
        if node is None:
            return None
        if node.primitive == "stop_gradient" or node.primitive in ALIASES:
            view = operand(node.inputs[0], view)
        elif node.primitive == "max" and facts.scalar(node.inputs[0]) is not None:
            view = operand(node.inputs[1], view)
        elif node.primitive == "max" and facts.scalar(node.inputs[1]) is not None:
            view = operand(node.inputs[0], view)
        elif node.primitive == "select_n" and len(node.inputs) == 3:
            numbers = [facts.scalar(case) is not None for case in node.inputs[1:]]
            test = source(node.inputs[0])
            if sum(numbers) != 1 or test is None or test.primitive not in ("is_finite", "eq", "ne", "gt", "lt", "not"):
                return None
            finite, view = True, operand(node.inputs[2 if numbers[0] else 1], view)
        elif node.primitive == "reduce_max" and len(node.params["axes"]) == 1 and axis not in view.axes:
            return reduced(view, node, axis), finite
        else:
            return None


def log_softmax(facts: Facts, view: View) -> tuple[View, Axis, Shift]:
    """(x, axis, what was subtracted first) where `view` is log_softmax(x, axis). Raises NoMatch."""
    view = climb(view)
    node = source(view.value)
    if node is None or node.primitive != "sub":
        raise NoMatch("not a log-softmax")
    summed = climb(operand(node.inputs[1], view))
    missing = [axis for axis in view.axes if axis not in summed.axes]
    if len(missing) != 1:
        raise NoMatch("not a log-softmax")
    scores, _ = logsumexp(facts, summed, missing[0])
    minuend = operand(node.inputs[0], view)
    if not same_view(facts, scores, minuend):
        raise NoMatch("not a log-softmax")
    bare, shift = _unshift(facts, climb(minuend), missing[0])
    return bare, missing[0], shift


def logsumexp(facts: Facts, view: View, axis: Axis | None = None) -> tuple[View, Axis]:
    """(x, axis) where `view` is log(sum(exp(x), axis)); `axis`: the label to give. Raises NoMatch."""
    view = climb(view)
    node = source(view.value)
    shift: View | None = None
    if node is not None and node.primitive == "add":
        for log, other in (node.inputs, node.inputs[::-1]):
            above = climb(operand(log, view))
            inner = source(above.value)
            if inner is not None and inner.primitive == "log":
                shift, view, node = operand(other, view), above, inner
                break
    if node is None or node.primitive != "log":
        raise NoMatch("not a log-sum-exp")
    total = climb(operand(node.inputs[0], view))
    node = source(total.value)
    if node is not None and node.primitive == "abs":
        total = climb(operand(node.inputs[0], total))
        node = source(total.value)
    if node is None or node.primitive != "reduce_sum" or len(node.params["axes"]) != 1:
        raise NoMatch("not a log-sum-exp")
    axis = axis or Axis(node.inputs[0].shape[node.params["axes"][0]])
    power = climb(reduced(total, node, axis))
    node = source(power.value)
    if node is None or node.primitive != "exp":
        raise NoMatch("not a log-sum-exp")
    exponent = climb(operand(node.inputs[0], power))
    if shift is None:
        return exponent, axis
    node = source(exponent.value)
    if node is None or node.primitive != "sub" or not same_view(facts, operand(node.inputs[1], exponent), shift):
        raise NoMatch("not a log-sum-exp")
    return climb(operand(node.inputs[0], exponent)), axis
