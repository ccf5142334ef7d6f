"""Means and second moments over some axes: what norms divide by."""

from __future__ import annotations

import dataclasses
import math

from ..axes import Axes, Axis, View, climb, contract, operand, operands, reduced_over, same_view, up
from ..facts import Facts, source, widens

# The relative difference to which 1 / n and its rounded form agree.
_CLOSE = 1e-5


@dataclasses.dataclass(frozen=True)
class Moment:
    """factor * sum(x^2) + epsilon over the features, of x less its mean where `is_centred`."""

    x: View
    is_centred: bool
    factor: float
    epsilon: float


@dataclasses.dataclass(frozen=True)
class Sum:
    """factor * sum(x) over some axes."""

    x: View
    factor: float


def uncast(view: View) -> View:
    """`view` before it was widened, in its own layout."""
    best, start = view, view
    while (above := up(best, widens)) is not None and above.dims == start.dims:
        best = above
    return best


def total(facts: Facts, view: View, over: Axes) -> Sum | None:
    """`view` as a number times a sum over `over`: a mean, in any spelling."""
    factor = 1.0
    while True:
        view = climb(view)
        node = source(view.value)
        if node is None:
            return None
        sides = operands(view) if node.primitive in ("mul", "div", "sub", "max", "select_n") else []
        numbers = [facts.scalar(side.value) for side in sides]
        if node.primitive == "div" and numbers[1]:
            factor, view = factor / numbers[1], sides[0]
        elif node.primitive == "mul" and (numbers[0] or numbers[1]):
            index = 1 if numbers[0] else 0
            factor, view = factor * (numbers[1 - index] or 0.0), sides[index]
        elif node.primitive == "max" and 0.0 in numbers:
            view = sides[1 - numbers.index(0.0)]
        elif node.primitive == "sub" and numbers[1] == 0.0:
            view = sides[0]
        elif node.primitive == "select_n" and len(sides) == 3 and numbers[0] is not None:
            view = sides[1 + int(bool(numbers[0]))]
        elif node.primitive == "reduce_sum" and not any(axis in view.axes for axis in over):
            above = reduced_over(view, node, over)
            return None if above is None else Sum(above, factor)
        else:
            return None


def squared(facts: Facts, view: View) -> View | None:
    """x where `view` is x^2."""
    view = climb(view)
    node = source(view.value)
    if node is None:
        return None
    sides = operands(view)
    if node.primitive == "square" or (node.primitive == "integer_pow" and node.params["y"] == 2):
        x = climb(sides[0])
        inner = source(x.value)
        return operands(x)[0] if inner is not None and inner.primitive == "abs" else x
    if node.primitive == "pow" and facts.scalar(sides[1].value) == 2.0:
        return sides[0]
    if node.primitive == "mul" and same_view(facts, sides[0], sides[1]):
        return sides[0]
    return None


def unshifted(facts: Facts, view: View) -> View:
    """`view` before zero was subtracted, as flax's RMSNorm does."""
    view = climb(view)
    while (node := source(view.value)) is not None and node.primitive == "sub":
        if facts.scalar(node.inputs[1]) != 0.0:
            break
        view = climb(operand(node.inputs[0], view))
    return view


def centred(facts: Facts, view: View, over: Axes) -> View | None:
    """x where `view` is x - mean(x) over `over`."""
    view = climb(view)
    node = source(view.value)
    if node is None or node.primitive != "sub":
        return None
    x, mean = operands(view)
    found = total(facts, mean, over)
    if found is None or not _is_mean(found, over) or not same_view(facts, found.x, x):
        return None
    return x


def size(over: Axes) -> int:
    """How many values are added up over `over`."""
    return math.prod(axis.size for axis in over)


def _is_mean(found: Sum, over: Axes) -> bool:
    return abs(found.factor * size(over) - 1.0) < _CLOSE


def statistic(facts: Facts, view: View) -> str:
    """The operation that a value per row comes from."""
    node = source(climb(view).value)
    return node.primitive if node is not None else ""


def moment(facts: Facts, view: View, over: Axes) -> Moment | None:
    """`view` as a second moment plus epsilon over `over`."""
    epsilon = 0.0
    view = climb(view)
    node = source(view.value)
    if node is not None and node.primitive == "add":
        for number, other in (node.inputs, node.inputs[::-1]):
            scalar = facts.scalar(number)
            if scalar is not None:
                epsilon, view = scalar, operand(other, view)
                break
        else:
            return None
    found = _fast_variance(facts, view, over) or _of_products(facts, view, over)
    if found is None:
        summed = total(facts, view, over)
        if summed is None:
            return None
        x = squared(facts, summed.x)
        if x is None:
            return None
        inner = centred(facts, x, over)
        found = Moment(x, False, summed.factor, 0.0) if inner is None else Moment(inner, True, summed.factor, 0.0)
    return dataclasses.replace(found, epsilon=epsilon)


def _fast_variance(facts: Facts, view: View, over: Axes) -> Moment | None:
    """mean(x^2) - mean(x)^2, clipped at zero or not."""
    view = climb(view)
    node = source(view.value)
    if node is not None and node.primitive == "max":
        sides = operands(view)
        numbers = [facts.scalar(side.value) for side in sides]
        if 0.0 not in numbers:
            return None
        view = climb(sides[1 - numbers.index(0.0)])
        node = source(view.value)
    if node is None or node.primitive != "sub":
        return None
    of_squares, square_of = operands(view)
    first = total(facts, of_squares, over)
    mean = squared(facts, square_of)
    if first is None or mean is None:
        return None
    second, x = total(facts, mean, over), squared(facts, first.x)
    if second is None or x is None or not same_view(facts, second.x, x):
        return None
    if not (_is_mean(first, over) and _is_mean(second, over)):
        return None
    return Moment(x, True, 1.0 / size(over), 0.0)


def _of_products(facts: Facts, view: View, over: Axes) -> Moment | None:
    """sum(x * x) written as a product of x with itself, times a number."""
    factor = 1.0
    view = climb(view)
    node = source(view.value)
    while node is not None and node.primitive in ("mul", "div"):
        sides = operands(view)
        numbers = [facts.scalar(side.value) for side in sides]
        index = 0 if numbers[1] else 1
        number = numbers[1 - index]
        if not number or (node.primitive == "div" and index == 1):
            return None
        factor = factor * number if node.primitive == "mul" else factor / number
        view = climb(sides[index])
        node = source(view.value)
    if node is None or node.primitive != "dot_general":
        return None
    (_, _), (batch, _) = node.params["dimension_numbers"]
    if len(batch) != len(view.dims):
        return None
    left, right, contracted = contract(view, node)
    if len(contracted) != 1 or len(over) != 1 or contracted[0].size != over[0].size:
        return None
    x, other = (_renamed(side, contracted[0], over[0]) for side in (left, right))
    if not same_view(facts, x, other):
        return None
    inner = centred(facts, x, over)
    x = x if inner is None else inner
    return Moment(x, inner is not None, factor, 0.0)


def _renamed(view: View, old: Axis, new: Axis) -> View:
    return View(view.value, tuple(tuple(new if axis is old else axis for axis in dim) for dim in view.dims))
