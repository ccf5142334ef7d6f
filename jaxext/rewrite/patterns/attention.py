"""softmax(query . key) . value, in any spelling and layout, as the attention kernel.

The root's dimensions are labelled, and the labels followed upwards: through the product with the values, the softmax,
everything between it and the product of query and key, and what repeats key and value over heads. Which dimensions are
batch, heads, rows and keys is then a matter of which operands have which labels.
"""

from __future__ import annotations

import dataclasses
import math

from ...kernels._attention import ATTENTION, attention_refusal
from ..axes import Axis, Splits, View, climb, contract, label, never, operand, operands, shrink, up
from ..facts import Facts, source, widens
from ..match import Match, NoMatch, Pattern
from ..trace import Graph, Node, Value
from .attention_call import Plan, operand_types, plan
from .attention_scores import scores
from .softmax import Softmax, exponential, normalised, predicate, quotients, softmax


@dataclasses.dataclass
class Probabilities:
    """The softmax behind the left operand of the product with the values."""

    softmax: Softmax
    # Multiplied onto the probabilities: Boolean arrays with the truth value that keeps, and one number.
    keeps: list[tuple[View, bool]]
    keep_scale: float
    # Tensors that do not vary along the keys, such as head masks: they are multiplied onto the result instead.
    scales: list[View] = dataclasses.field(default_factory=list)


def match(root: Value, graph: Graph) -> Match:
    """The attention that `root` is the result of. Raises NoMatch."""
    node = root.node
    if node is None or len(root.shape) < 2:
        raise NoMatch("not attention")
    facts, view, splits = Facts.of(graph), label(root), Splits()
    if node.primitive == "dot_general":
        probabilities, value = _normalised_first(facts, view, node, splits)
    else:
        probabilities, value = _normalised_last(facts, view, node)
    found = scores(facts, probabilities.softmax.scores, probabilities.softmax.axis)
    found.query, factor = _unscaled(facts, found.query)
    found.scale *= factor
    found.key, factor = _unscaled(facts, found.key)
    found.scale *= factor
    found.key, found.query, value = _narrow(found.key, found.query, value)
    found.key = _unrepeated(found.key, splits)
    value = _unrepeated(value, splits)
    call = plan(facts, view, found, probabilities, value, splits)
    refusal = _refusal(call)
    how = ATTENTION.how() if refusal is None else ""
    return Match(
        kernel="attention",
        roots=(root,),
        inputs=call.inputs,
        call=call,
        detail=", ".join(filter(None, (call.detail, how))),
        refusal=refusal,
    )


def _refusal(call: Plan) -> str | None:
    query, key, value, options = operand_types(call)
    return attention_refusal(query, key, value, **options)


def _normalised_first(facts: Facts, view: View, node: Node, splits: Splits) -> tuple[Probabilities, View]:
    left, right, contracted = contract(view, node)
    if len(contracted) != 1:
        raise NoMatch("not attention")
    failure = NoMatch("not attention")
    for side, value in ((left, right), (right, left)):
        try:
            found = _probabilities(facts, side, contracted[0], splits)
            return found, value
        except NoMatch as error:
            failure = error if error.near else failure
    raise failure


def _normalised_last(facts: Facts, view: View, node: Node) -> tuple[Probabilities, View]:
    """(exp(scores) . value) / sum(exp(scores))."""
    for product, denominator in quotients(facts, node, view):
        product = climb(product)
        dot = source(product.value)
        if dot is None or dot.primitive != "dot_general":
            continue
        left, right, contracted = contract(product, dot)
        for side, value in ((left, right), (right, left)):
            try:
                exp, masks = exponential(facts, side)
            except NoMatch:
                continue
            found = normalised(facts, exp, masks, climb(side), denominator)
            if contracted == (found.axis,):
                return Probabilities(found, [], 1.0), value
    raise NoMatch("not attention")


def _probabilities(facts: Facts, view: View, axis: Axis, splits: Splits) -> Probabilities:
    """Up from an operand of the last product to the softmax, through dropout."""
    factors: list[_Factor] = []
    while True:
        view = _climb_splitting(view, splits)
        try:
            found = softmax(facts, view)
        except NoMatch as error:
            if error.near:
                raise
        else:
            if found.axis is not axis:
                raise NoMatch("the softmax is not over the keys")
            keeps = [keep for factor in factors for keep in factor.keeps]
            scales = [scale for factor in factors for scale in factor.scales]
            return Probabilities(found, keeps, math.prod(factor.number for factor in factors), scales)
        view, factor = _without_factor(facts, view, axis)
        factors.append(factor)


def _climb_splitting(view: View, splits: Splits) -> View:
    while True:
        above = up(view, splits=splits)
        if above is None:
            return view
        if math.prod(above.value.shape) != math.prod(view.value.shape):
            raise NoMatch("probabilities are broadcast")
        view = above


@dataclasses.dataclass(frozen=True)
class _Factor:
    """What the probabilities were multiplied by: Boolean arrays, a number, tensors that all keys share."""

    keeps: tuple[tuple[View, bool], ...] = ()
    number: float = 1.0
    scales: tuple[View, ...] = ()


def _without_factor(facts: Facts, view: View, axis: Axis) -> tuple[View, _Factor]:
    """One factor less: what it multiplies, and itself. `axis`: the keys."""
    node = source(view.value)
    if node is None or node.primitive not in ("mul", "div", "select_n", "dot_general") or len(node.inputs) > 3:
        raise NoMatch("not a softmax")
    if node.primitive == "select_n":
        zeros = [facts.scalar(case) == 0.0 for case in node.inputs[1:]]
        if sum(zeros) != 1:
            raise NoMatch("not a softmax")
        kept = 2 if zeros[0] else 1
        return operand(node.inputs[kept], view), _Factor(keeps=((predicate(node, view), bool(kept - 1)),))
    sides = _factors(view, node)
    both = (sides, sides[::-1]) if node.primitive != "div" else (sides,)
    for chain, other in both:
        number = facts.scalar(other.value)
        if number is not None:
            return chain, _Factor(number=1.0 / number if node.primitive == "div" else number)
    for chain, other in both if node.primitive == "mul" else ():
        keep = _keep_factor(facts, other)
        if keep is not None:
            return chain, _Factor(keeps=(keep[0],), number=keep[1])
    for chain, other in both if node.primitive != "div" else ():
        if axis not in shrink(other).axes and set(chain.axes) == set(view.axes):
            return chain, _Factor(scales=(shrink(other),))
    raise NoMatch("not a softmax")


def _factors(view: View, node: Node) -> list[View]:
    """Both operands of a product, which an einsum without a sum is too."""
    if node.primitive != "dot_general":
        return operands(view)
    left, right, contracted = contract(view, node)
    if contracted:
        raise NoMatch("not a softmax")
    return [left, right]


def _keep_factor(facts: Facts, view: View) -> tuple[tuple[View, bool], float] | None:
    """(Boolean array, number) whose product `view` is."""
    factor = 1.0
    while True:
        if view.value.dtype == bool:
            return (view, True), factor
        node = source(view.value)
        if node is None:
            return None
        if node.primitive in ("mul", "div"):
            numbers = [facts.scalar(value) for value in node.inputs]
            index = 0 if numbers[1] is not None else 1
            number = numbers[1 - index]
            if number is None or (node.primitive == "div" and index == 1):
                return None
            factor *= number if node.primitive == "mul" else 1.0 / number
            view = operand(node.inputs[index], view)
        elif node.primitive == "select_n" and len(node.inputs) == 3:
            numbers = [facts.scalar(case) for case in node.inputs[1:]]
            if None in numbers or 0.0 not in numbers:
                return None
            kept = 1 - numbers.index(0.0)
            return (predicate(node, view), bool(kept)), factor * float(numbers[kept] or 0.0)
        else:
            above = up(view, lambda cast: True)
            if above is None:
                return None
            view = above


def _unscaled(facts: Facts, view: View) -> tuple[View, float]:
    """An operand before it was multiplied by numbers, and their product."""
    factor, best = 1.0, view
    while True:
        node = source(view.value)
        if node is not None and node.primitive in ("mul", "div"):
            numbers = [facts.scalar(value) for value in node.inputs]
            index = 0 if numbers[1] is not None else 1
            number = numbers[1 - index]
            if number is None or number == 0 or (node.primitive == "div" and index == 1):
                return best, factor
            factor *= number if node.primitive == "mul" else 1.0 / number
            best = view = operand(node.inputs[index], view)
            continue
        above = up(view, widens)
        if above is None or math.prod(above.value.shape) != math.prod(view.value.shape):
            return best, factor
        view = above


def _narrow(key: View, query: View, value: View) -> tuple[View, View, View]:
    """Query and key before they were widened, where the values are as narrow: the kernel sums in float32 anyway."""
    bare = [climb(view, widens) for view in (key, query)]
    if all(view.value.dtype == value.value.dtype for view in bare):
        return _at_narrow(key), _at_narrow(query), value
    return key, query, value


def _at_narrow(view: View) -> View:
    """`view` just above its last widening cast."""
    best, dtype = view, view.value.dtype
    while True:
        above = up(view, widens)
        if above is None:
            return best
        if above.value.dtype != dtype:
            best, dtype = above, above.value.dtype
        view = above


def _unrepeated(view: View, splits: Splits) -> View:
    """Key or value before they were repeated over the heads of a group."""
    best, cuts = view, splits
    trial: Splits = dict(splits)
    while True:
        above = up(view, never, trial)
        if above is None:
            break
        if math.prod(above.value.shape) < math.prod(best.value.shape):
            best, cuts = above, dict(trial)
        view = above
    splits.update(cuts)
    return best


PATTERN = Pattern("attention", frozenset(("dot_general", "div", "mul")), match)
