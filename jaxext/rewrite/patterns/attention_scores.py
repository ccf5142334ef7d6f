"""From a softmax's input back to query times key: scale, soft cap, biases and masks."""

from __future__ import annotations

import dataclasses
import math

from ..axes import Axis, View, climb, contract, operand, operands, shrink, up
from ..facts import Facts, source
from ..match import NoMatch
from ..trace import Node
from .masks import Array, Condition, additive, conditions
from .softmax import predicate

# Softmax gives such a score, below any that matters, a probability of exactly zero.
_NEGLIGIBLE = -1e4
# Adding this to a score leaves nothing of the score in single precision.
_SWAMPS = -1e8
# Combinations of operands tried where both sides of a sum might hold the product of query and key.
_DEPTH = 12


@dataclasses.dataclass(frozen=True)
class Mask:
    """Scores are `fill` where the conditions do not all hold; `added`: fill was added to the score instead."""

    conditions: tuple[Condition, ...]
    fill: float
    added: bool
    # The whole mask as an additive array and its factor, for where it cannot be a condition.
    bias: View | None = None
    factor: float = 1.0


@dataclasses.dataclass
class Scores:
    """scores = cap * tanh(scale * query . key / cap) + biases, under masks."""

    query: View
    key: View
    features: tuple[Axis, ...]
    scale: float = 1.0
    soft_cap: float | None = None
    # Each with the number it is multiplied by.
    biases: tuple[tuple[View, float], ...] = ()
    masks: tuple[Mask, ...] = ()
    # Tensors that do not vary along the keys, multiplied onto the query.
    row_scales: tuple[View, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Walk:
    """What has been passed on the way up: scores = factor * (here) + biases, under masks."""

    rank: int
    factor: float = 1.0
    soft_cap: float | None = None
    biases: tuple[tuple[View, float], ...] = ()
    masks: tuple[Mask, ...] = ()
    row_scales: tuple[View, ...] = ()


def scores(facts: Facts, view: View, key_axis: Axis) -> Scores:
    """Raises NoMatch, near where an operation between the product and the softmax is one the kernel cannot do."""
    return _climb(facts, view, key_axis, _Walk(len(view.axes)), _DEPTH)


def _climb(facts: Facts, view: View, k: Axis, walk: _Walk, depth: int) -> Scores:
    if len(view.axes) != walk.rank:
        raise NoMatch("scores are broadcast after the product of query and key", near=_has_product(view))
    while True:
        above = up(view)
        if above is None:
            break
        if len(above.axes) != walk.rank:
            raise NoMatch("scores are broadcast after the product of query and key", near=_has_product(view))
        view = above
    node = source(view.value)
    if node is None:
        raise NoMatch("scores are not a product of query and key")
    handler = _HANDLERS.get(node.primitive)
    if handler is None:
        raise NoMatch(f"{node.primitive} stands between query times key and softmax", near=_has_product(view))
    return handler(facts, view, node, k, walk, depth)


def _has_product(view: View, depth: int = 8) -> bool:
    """Whether a matrix product lies close above: it decides if a failure is worth reporting."""
    node = source(view.value)
    if node is None or depth == 0:
        return False
    if node.primitive == "dot_general":
        return True
    large = [value for value in node.inputs if math.prod(value.shape) > 1]
    return any(_has_product(View(value, ()), depth - 1) for value in large[:2])


def _product(facts: Facts, view: View, node: Node, k: Axis, walk: _Walk, depth: int) -> Scores:
    left, right, features = contract(view, node)
    if k in left.axes and k not in right.axes:
        left, right = right, left
    if k not in right.axes or k in left.axes or len(features) != 1:
        raise NoMatch("scores are not a product of query and key over one dimension")
    cap = walk.soft_cap
    scale = walk.factor if cap is None else walk.factor * cap
    return Scores(left, right, features, scale, cap, walk.biases, walk.masks, walk.row_scales)


def _multiplied(facts: Facts, view: View, node: Node, k: Axis, walk: _Walk, depth: int) -> Scores:
    division = node.primitive == "div"
    sides = operands(view)
    for chain, other in ((sides[0], sides[1]), (sides[1], sides[0])):
        number = facts.scalar(other.value)
        if number is None:
            continue
        if division and other is sides[0]:
            raise NoMatch("scores are a divisor", near=False)
        factor = walk.factor / number if division else walk.factor * number
        return _climb(facts, chain, k, dataclasses.replace(walk, factor=factor), depth)
    if not division:
        for chain, other in ((sides[0], sides[1]), (sides[1], sides[0])):
            found = _multiplicative_mask(facts, chain, other, k, walk, depth)
            if found is not None:
                return found
    return _row_scaled(facts, sides, division, k, walk, depth)


def _row_scaled(facts: Facts, sides: list[View], division: bool, k: Axis, walk: _Walk, depth: int) -> Scores:
    """A tensor that all keys share can be multiplied onto the query instead."""
    for chain, other in ((sides[0], sides[1]), (sides[1], sides[0])):
        if k not in shrink(other).axes and not (division and other is sides[0]):
            if division:
                break
            return _climb(
                facts, chain, k, dataclasses.replace(walk, row_scales=(*walk.row_scales, shrink(other))), depth
            )
    raise NoMatch("scores are multiplied by a tensor that varies along the keys", near=_has_product(sides[0]))


def _multiplicative_mask(facts: Facts, chain: View, other: View, k: Axis, walk: _Walk, depth: int) -> Scores | None:
    """`scores * m + fill * (1 - m)`, of which the sum has been passed already."""
    for index, mask in enumerate(walk.masks):
        if not mask.added or _same_conditions(conditions(facts, other), mask.conditions) is False:
            continue
        masks = list(walk.masks)
        masks[index] = dataclasses.replace(mask, added=False)
        return _climb(facts, chain, k, dataclasses.replace(walk, masks=tuple(masks)), depth)
    return None


def _same_conditions(one: tuple[Condition, ...], other: tuple[Condition, ...]) -> bool:
    if len(one) != len(other):
        return False
    for a, b in zip(one, other):
        if isinstance(a, Array) and isinstance(b, Array):
            if climb(a.view) != climb(b.view) or a.wanted != b.wanted:
                return False
        elif a != b:
            return False
    return True


def _negated(facts: Facts, view: View, node: Node, k: Axis, walk: _Walk, depth: int) -> Scores:
    return _climb(facts, operand(node.inputs[0], view), k, dataclasses.replace(walk, factor=-walk.factor), depth)


def _added(facts: Facts, view: View, node: Node, k: Axis, walk: _Walk, depth: int) -> Scores:
    signs = (1.0, -1.0 if node.primitive == "sub" else 1.0)
    sides = operands(view)
    failure: NoMatch | None = None
    if depth == 0:
        raise NoMatch("too many sums between query times key and softmax", near=True)
    order = (0, 1) if _has_product(sides[0]) or not _has_product(sides[1]) else (1, 0)
    for chain in order:
        other = sides[1 - chain]
        try:
            ahead = _with_bias(facts, other, signs[1 - chain] * walk.factor, k, walk)
            ahead = dataclasses.replace(ahead, factor=walk.factor * signs[chain])
            if not _has_product(sides[chain], depth=2 * _DEPTH):
                continue
            return _climb(facts, sides[chain], k, ahead, depth - 1)
        except NoMatch as error:
            failure = error if failure is None or error.near else failure
    raise failure or NoMatch("scores are not a product of query and key")


def _with_bias(facts: Facts, other: View, factor: float, k: Axis, walk: _Walk) -> _Walk:
    number = facts.scalar(other.value)
    if walk.soft_cap is not None and number != 0.0:
        raise NoMatch("something is added to the scores before the soft cap", near=True)
    if number is not None:
        return walk  # softmax does not see a constant that all scores share
    if walk.row_scales:
        raise NoMatch("something is added to the scores before they are scaled by a tensor", near=True)
    found = additive(facts, other)
    if found is not None and found[1] * factor <= _NEGLIGIBLE:
        mask = Mask(found[0], found[1] * factor, added=True, bias=shrink(other), factor=factor)
        return dataclasses.replace(walk, masks=(*walk.masks, mask))
    return dataclasses.replace(walk, biases=(*walk.biases, (shrink(other), factor)))


def _selected(facts: Facts, view: View, node: Node, k: Axis, walk: _Walk, depth: int) -> Scores:
    numbers = [facts.scalar(case) for case in node.inputs[1:]]
    if len(numbers) != 2 or (numbers[0] is None) == (numbers[1] is None):
        raise NoMatch("scores are chosen by where() without a constant for the masked ones", near=_has_product(view))
    kept = 0 if numbers[0] is None else 1
    number = numbers[1 - kept]
    assert number is not None
    fill = number * walk.factor
    if walk.soft_cap is not None:
        raise NoMatch("scores are masked before the soft cap, which makes the mask finite", near=True)
    if not fill <= _NEGLIGIBLE:
        raise NoMatch(f"masked scores are {fill:g}, which softmax does not ignore", near=True)
    mask = Mask(conditions(facts, predicate(node, view), wanted=bool(kept)), fill, added=False)
    chain = operand(node.inputs[1 + kept], view)
    return _climb(facts, chain, k, dataclasses.replace(walk, masks=(*walk.masks, mask)), depth)


def _capped(facts: Facts, view: View, node: Node, k: Axis, walk: _Walk, depth: int) -> Scores:
    if walk.soft_cap is not None:
        raise NoMatch("scores pass two tanh", near=True)
    if walk.row_scales or walk.factor <= 0:
        raise NoMatch("the soft cap is not one positive number", near=True)
    ahead = dataclasses.replace(walk, soft_cap=walk.factor, factor=1.0)
    return _climb(facts, operand(node.inputs[0], view), k, ahead, depth)


_HANDLERS = {
    "dot_general": _product,
    "mul": _multiplied,
    "div": _multiplied,
    "neg": _negated,
    "add": _added,
    "sub": _added,
    "select_n": _selected,
    "tanh": _capped,
}


def added_only(mask: Mask) -> bool:
    """Whether a row that the mask hides entirely keeps its scores' differences in stock JAX."""
    return mask.added and mask.fill > _SWAMPS
