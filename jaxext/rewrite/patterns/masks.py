"""What an attention mask says, read off the expression or the array that it is.

A mask is a condition over query rows, keys and batch dimensions. `conditions` splits it into what the kernel takes as
an attribute (a band: low <= key - row <= high), what it takes as two vectors (equal segment ids) and the arrays that
are left. A mask made from `iota`, or a constant array that is a band, costs the kernel nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
from jax import numpy as jnp

from ..axes import Axis, View, climb, operand, shrink, up
from ..facts import ALIASES, CAST, LAYOUT, Facts, constant, resolve, source
from ..trace import HIDDEN, Node, Value


@dataclasses.dataclass(frozen=True)
class Band:
    """low <= column - row <= high; None is unbounded."""

    row: Axis
    column: Axis
    low: int | None
    high: int | None


@dataclasses.dataclass(frozen=True)
class Segments:
    """left == right: integer arrays of which one does not vary along a column that the other has, and the reverse."""

    left: View
    right: View


@dataclasses.dataclass(frozen=True)
class Array:
    """The elements of `view` are true (nonzero), or false where `wanted` is False.

    `prefix`: along this axis it holds up to some place and no further, which may differ along others.
    `factors`: arrays that it is the conjunction of, together with bands, in an enclosing function that has them.
    """

    view: View
    wanted: bool
    prefix: Axis | None = None
    factors: tuple[Array, ...] = ()


@dataclasses.dataclass(frozen=True)
class Never:
    """No pair is visible."""


Condition = Band | Segments | Array | Never


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a dimension of an array lies: start + step * axis, or one fixed place without an axis."""

    axis: Axis | None
    start: int = 0
    step: int = 1


@dataclasses.dataclass(frozen=True)
class Slice:
    """A value of the mask's expression and the place of each of its dimensions."""

    value: Value
    places: tuple[Position, ...]

    @property
    def view(self) -> View | None:
        """The same as labels, None where it is only a part of the array."""
        dims: list[tuple[Axis, ...]] = []
        for place, size in zip(self.places, self.value.shape):
            whole = place.axis is None if size == 1 else place.axis is not None and place.axis.size == size
            if not whole or place.start != 0 or place.step != 1:
                return None
            dims.append(() if place.axis is None else (place.axis,))
        return View(self.value, tuple(dims))


def conditions(facts: Facts, view: View, wanted: bool = True) -> tuple[Condition, ...]:
    """What holds exactly where `view` is `wanted` (nonzero counts as True), as a conjunction."""
    if any(len(dim) > 1 for dim in view.dims):
        return (Array(shrink(view), wanted),)
    places = tuple(Position(dim[0]) if dim else Position(None) for dim in view.dims)
    found = _conditions(facts, Slice(view.value, places), wanted)
    return found if found is not None else (Array(shrink(view), wanted),)


_COMPARISONS = {"ge": (1, 0), "gt": (1, 1), "le": (-1, 0), "lt": (-1, 1)}
_OPPOSITE = {"ge": "lt", "gt": "le", "le": "gt", "lt": "ge"}
_SWAPPED = {"ge": "le", "gt": "lt", "le": "ge", "lt": "gt"}


def _conditions(facts: Facts, part: Slice, wanted: bool) -> tuple[Condition, ...] | None:
    """As `conditions`; None where the only answer would be the whole array and it is not at hand."""
    number = facts.scalar(part.value)
    if number is not None:
        return () if bool(number) == wanted else (Never(),)
    known = constant(part.value)
    if known is not None:
        return _of_constant(part, known, wanted)
    split = _split(facts, part, wanted)
    if split is not None:
        return split
    view = part.view
    if view is None or not _at_hand(view.value):
        return None
    return (Array(shrink(view), wanted, _prefix(facts, part, wanted)),)


def _input(value: Value, part: Slice) -> Slice:
    """An input of the elementwise operation whose result is `part`."""
    places = (place if size != 1 else Position(None) for place, size in zip(part.places, value.shape))
    return Slice(value, tuple(places))


def _at_hand(value: Value) -> bool:
    """Whether the graph computes the value, or an enclosing one does, and not only a custom_jvp body."""
    return value.node is None or value.node.position != HIDDEN


def _split(facts: Facts, part: Slice, wanted: bool) -> tuple[Condition, ...] | None:
    value = resolve(part.value)
    node = value.node
    if node is None:
        origin = value.origin
        return None if origin is None else _from_outside(facts, part, origin, wanted)
    above = step(facts, part)
    if above is not None:
        return _conditions(facts, above, wanted)
    name = node.primitive
    operands = [_input(value, part) for value in node.inputs]
    if name == "not" and value.dtype == np.bool_:
        return _conditions(facts, operands[0], not wanted)
    # On integers `and`, `or` and `not` work bit by bit.
    if name in ("and", "or", "mul", "min", "max") and _is_indicator(facts, value):
        if (name in ("and", "mul", "min")) == wanted:
            return _all(facts, operands, wanted)
        return _either(facts, operands, wanted)
    if name == "sub" and facts.scalar(node.inputs[0]) == 1.0 and _is_indicator(facts, node.inputs[1]):
        return _conditions(facts, operands[1], not wanted)
    if name in ("eq", "ne", "gt", "ge", "lt", "le"):
        return _of_comparison(facts, name, operands, wanted)
    if name == "select_n" and len(operands) == 3:
        return _of_select(facts, operands, wanted)
    return None


def _all(facts: Facts, operands: Iterable[Slice], wanted: bool) -> tuple[Condition, ...] | None:
    found: list[Condition] = []
    for part in operands:
        more = _conditions(facts, part, wanted)
        if more is None:
            return None
        found += more
    return tuple(found)


def _either(facts: Facts, operands: list[Slice], wanted: bool) -> tuple[Condition, ...] | None:
    """A disjunction is split only where one side is constant."""
    for one, other in (operands, operands[::-1]):
        number = facts.scalar(one.value)
        if number is not None:
            return () if bool(number) == wanted else _conditions(facts, other, wanted)
    return None


def _from_outside(facts: Facts, part: Slice, origin: Value, wanted: bool) -> tuple[Condition, ...] | None:
    """The value is the same array as one of the enclosing function, whose expression says more."""
    found = _conditions(facts, Slice(origin, part.places), wanted)
    view = part.view
    if found is None:
        return None
    if all(isinstance(condition, (Band, Never)) for condition in found):
        return found
    if view is None:
        return None
    bands = tuple(condition for condition in found if isinstance(condition, Band))
    arrays = tuple(condition for condition in found if isinstance(condition, Array))
    if len(found) == len(arrays) == 1:
        return (dataclasses.replace(arrays[0], view=shrink(view), wanted=wanted),)
    factors = tuple(factor for array in arrays for factor in (array.factors or (array,)))
    return (*bands, Array(shrink(view), wanted, factors=factors if len(found) == len(bands) + len(arrays) else ()))


def _of_select(facts: Facts, operands: list[Slice], wanted: bool) -> tuple[Condition, ...] | None:
    """`where(which, a, b)` with a constant for one of them."""
    which, cases = operands[0], operands[1:]
    for index, case in enumerate(cases):
        number = facts.scalar(case.value)
        if number is None:
            continue
        chosen_else = bool(1 - index)
        other = cases[1 - index]
        if bool(number) != wanted:
            # Where this case is chosen the answer is no: the other one must be, and hold.
            return _all_pairs(_conditions(facts, which, chosen_else), _conditions(facts, other, wanted))
        second = facts.scalar(other.value)
        if second is not None and bool(second) != wanted:
            return _conditions(facts, which, not chosen_else)
    return None


def _all_pairs(one: tuple[Condition, ...] | None, other: tuple[Condition, ...] | None) -> tuple[Condition, ...] | None:
    return None if one is None or other is None else (*one, *other)


def _of_comparison(facts: Facts, name: str, operands: list[Slice], wanted: bool) -> tuple[Condition, ...] | None:
    left, right = operands
    for one, other, flipped in ((left, right, False), (right, left, True)):
        number = facts.scalar(other.value)
        if number is None:
            continue
        symbol = _SWAPPED.get(name, name) if flipped else name
        if one.value.dtype == np.bool_ or _is_indicator(facts, one.value):
            return _of_indicator(facts, one, symbol, number, wanted)
        if symbol == "ne" and number == 0:
            return _nonzero(facts, one, wanted)
        if symbol == "eq" and number == 0:
            return _nonzero(facts, one, not wanted)
    if name in ("eq", "ne"):
        return _of_equality(facts, left, right, wanted == (name == "eq"))
    if not wanted:
        name = _OPPOSITE[name]
    sign, strict = _COMPARISONS[name]
    inside = _of_distance(facts, left, right, name)
    if inside is not None:
        return inside
    a, b = affine(facts, left), affine(facts, right)
    if a is None or b is None:
        return None
    difference = a.minus(b).times(sign).plus(-strict)
    return difference.nonnegative()


def _prefix(facts: Facts, part: Slice, wanted: bool) -> Axis | None:
    """The axis whose positions are compared with something that does not vary along it, and have to be smaller."""
    node = source(part.value)
    if node is None or node.primitive not in _COMPARISONS:
        return None
    left, right = (_input(value, part) for value in node.inputs)
    upwards = (node.primitive in ("lt", "le")) == wanted
    for counted, bound, sign in ((left, right, 1 if upwards else -1), (right, left, -1 if upwards else 1)):
        found = affine(facts, counted)
        if found is None or len(found.terms) != 1:
            continue
        ((axis, step_size),) = found.terms
        if step_size * sign > 0 and all(place.axis is not axis for place in _reach(facts, bound).places):
            return axis
    return None


def _of_indicator(facts: Facts, part: Slice, symbol: str, number: float, wanted: bool) -> tuple[Condition, ...] | None:
    """A comparison of something that is 0 or 1 with a number."""
    compare = {"eq": np.equal, "ne": np.not_equal, "gt": np.greater, "ge": np.greater_equal, "lt": np.less}
    compare["le"] = np.less_equal
    if_zero, if_one = (bool(compare[symbol](x, number)) for x in (0.0, 1.0))
    if if_zero == if_one:
        return () if if_zero == wanted else (Never(),)
    return _conditions(facts, part, wanted == if_one)


def _nonzero(facts: Facts, part: Slice, wanted: bool) -> tuple[Condition, ...] | None:
    return _conditions(facts, part, wanted)


def _of_equality(facts: Facts, left: Slice, right: Slice, wanted: bool) -> tuple[Condition, ...] | None:
    a, b = affine(facts, left), affine(facts, right)
    if a is not None and b is not None and wanted:
        difference = a.minus(b)
        one, other = difference.nonnegative(), difference.times(-1).nonnegative()
        return None if one is None or other is None else (*one, *other)
    if not jnp.issubdtype(left.value.dtype, np.integer) or left.value.dtype.itemsize > 4:
        return None  # the kernel compares integers of 32 bits
    sides = [_reach(facts, side) for side in (left, right)]
    views = [side.view for side in sides]
    if not wanted or any(view is None or not _at_hand(view.value) for view in views):
        return None
    first, second = (shrink(view) for view in views if view is not None)
    if set(first.axes) <= set(second.axes) or set(second.axes) <= set(first.axes):
        return None
    return (Segments(first, second),)


def _reach(facts: Facts, part: Slice) -> Slice:
    """Up through what only moves and widens."""
    while part.view is not None:
        above = step(facts, part)
        if above is None or above.view is None or not _at_hand(above.value):
            break
        part = above
    return part


def _of_distance(facts: Facts, left: Slice, right: Slice, name: str) -> tuple[Condition, ...] | None:
    """|a| <= b as two inequalities."""
    if name in ("ge", "gt"):
        left, right, name = right, left, _SWAPPED[name]
    node = source(left.value)
    while node is not None and node.primitive in (*LAYOUT, *ALIASES, CAST):
        above = step(facts, left)
        if above is None:
            return None
        left, node = above, source(above.value)
    bound = affine(facts, right)
    if node is None or node.primitive != "abs" or bound is None:
        return None
    distance = affine(facts, _input(node.inputs[0], left))
    if distance is None:
        return None
    strict = -1 if name == "lt" else 0
    sides = [bound.plus(strict).minus(distance.times(sign)).nonnegative() for sign in (1, -1)]
    return None if sides[0] is None or sides[1] is None else (*sides[0], *sides[1])


# ---------------------------------------------------------------- positions


def step(facts: Facts, part: Slice) -> Slice | None:
    """One step towards the inputs through an operation that moves elements or selects a range of them."""
    node = source(part.value)
    if node is None:
        return None
    name, places = node.primitive, part.places
    if name in ALIASES or (name == CAST and not _truncates(node)):
        return Slice(node.inputs[0], places)
    if name not in (*LAYOUT, "slice", "dynamic_slice", "rev"):
        return None
    above = node.inputs[0]
    if name == "transpose":
        moved = [Position(None)] * len(places)
        for position, place in zip(node.params["permutation"], places):
            moved[position] = place
        return Slice(above, tuple(moved))
    if name == "broadcast_in_dim":
        dimensions = zip(node.params["broadcast_dimensions"], above.shape)
        return Slice(above, tuple(places[d] if size != 1 else Position(None) for d, size in dimensions))
    if name == "slice":
        strides = node.params["strides"] or (1,) * len(places)
        return _moved(above, places, node.params["start_indices"], strides)
    if name == "dynamic_slice":
        starts = [facts.scalar(start) for start in node.inputs[1:]]
        sizes = zip(starts, above.shape, part.value.shape)
        if any(start is None and size != width for start, size, width in sizes):
            return None
        clamped = [
            0 if start is None else int(min(max(start if start >= 0 else start + size, 0), size - width))
            for start, size, width in zip(starts, above.shape, part.value.shape)
        ]
        return _moved(above, places, clamped, (1,) * len(places))
    if name == "rev":
        flipped = [
            Position(p.axis, size - 1 - p.start, -p.step) if d in node.params["dimensions"] else p
            for d, (p, size) in enumerate(zip(places, above.shape))
        ]
        return Slice(above, tuple(flipped))
    return _unit_reshape(part, above)


def _truncates(cast: Node) -> bool:
    kinds = [np.dtype(value.dtype).kind for value in (cast.inputs[0], cast.outputs[0])]
    return kinds[0] not in "biu" and kinds[1] in "iu"


def _moved(operand: Value, places: tuple[Position, ...], starts: Iterable[int], strides: Iterable[int]) -> Slice:
    moved = (
        Position(p.axis, int(start) + int(stride) * p.start, int(stride) * p.step)
        for p, start, stride in zip(places, starts, strides)
    )
    return Slice(operand, tuple(moved))


def _unit_reshape(part: Slice, operand: Value) -> Slice | None:
    """A reshape that only adds and removes dimensions of size 1."""
    if [s for s in part.value.shape if s != 1] != [s for s in operand.shape if s != 1]:
        return None
    large = iter(p for p, size in zip(part.places, part.value.shape) if size != 1)
    return Slice(operand, tuple(next(large) if size != 1 else Position(None) for size in operand.shape))


@dataclasses.dataclass(frozen=True)
class Affine:
    """constant + sum of coefficient * axis, in whole numbers."""

    terms: tuple[tuple[Axis, int], ...]
    constant: int

    def plus(self, number: int) -> Affine:
        return Affine(self.terms, self.constant + number)

    def times(self, factor: int) -> Affine:
        return Affine(tuple((axis, factor * c) for axis, c in self.terms), factor * self.constant)

    def minus(self, other: Affine) -> Affine:
        total = dict(self.terms)
        for axis, coefficient in other.terms:
            total[axis] = total.get(axis, 0) - coefficient
        return Affine(tuple((a, c) for a, c in total.items() if c), self.constant - other.constant)

    def extremes(self) -> tuple[int, int]:
        """The smallest and the largest value."""
        low = self.constant + sum(min(0, c * (axis.size - 1)) for axis, c in self.terms)
        high = self.constant + sum(max(0, c * (axis.size - 1)) for axis, c in self.terms)
        return low, high

    def nonnegative(self) -> tuple[Condition, ...] | None:
        """Where the value is at least 0, None where that is no band."""
        low, high = self.extremes()
        if low >= 0:
            return ()
        if high < 0:
            return (Never(),)
        if len(self.terms) != 2 or {c for _, c in self.terms} != {1, -1}:
            return None
        plus = next(axis for axis, c in self.terms if c == 1)
        minus = next(axis for axis, c in self.terms if c == -1)
        return (Band(minus, plus, -self.constant, None),)


def affine(facts: Facts, part: Slice) -> Affine | None:
    """The integer expression `part` as a function of its positions, None too where it would not fit its type."""
    found = _affine(facts, part)
    if found is None:
        return None
    (low, high), (least, largest) = found.extremes(), _exact(part.value.dtype)
    return found if least <= low and high <= largest else None


def _exact(dtype: np.dtype) -> tuple[int, int]:
    """The range in which a type holds every whole number."""
    if dtype == np.bool_:
        return 0, 1
    if jnp.issubdtype(dtype, np.integer):
        return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    largest = 2 ** (int(jnp.finfo(dtype).nmant) + 1)
    return -largest, largest


def _affine(facts: Facts, part: Slice) -> Affine | None:
    number = facts.scalar(part.value)
    if number is not None:
        return Affine((), int(number)) if number == int(number) else None
    known = constant(part.value)
    if known is not None:
        return _affine_constant(part, known)
    node = source(part.value)
    if node is None:
        origin = resolve(part.value).origin
        return None if origin is None else affine(facts, Slice(origin, part.places))
    if node.primitive == "iota":
        return _placed(part.places[node.params["dimension"]])
    above = step(facts, part)
    if above is not None:
        return affine(facts, above)
    if node.primitive not in ("add", "sub", "mul", "neg"):
        return None
    sides = [affine(facts, _input(value, part)) for value in node.inputs]
    if any(side is None for side in sides):
        return None
    left, right = sides[0], sides[-1]
    assert left is not None and right is not None
    if node.primitive == "neg":
        return left.times(-1)
    if node.primitive == "mul":
        if left.terms and right.terms:
            return None
        return left.times(right.constant) if left.terms else right.times(left.constant)
    return left.minus(right if node.primitive == "sub" else right.times(-1))


def _placed(place: Position) -> Affine:
    return Affine((), place.start) if place.axis is None else Affine(((place.axis, place.step),), place.start)


def _affine_constant(part: Slice, known: np.ndarray) -> Affine | None:
    """A constant array that counts along one dimension, such as np.arange."""
    if not np.issubdtype(known.dtype, np.integer):
        return None
    for dimension, size in enumerate(known.shape):
        if size == 1:
            continue
        line = np.moveaxis(known, dimension, 0).reshape(size, -1)
        slope = int(line[1, 0]) - int(line[0, 0])
        if slope and np.array_equal(line, np.broadcast_to((line[0, 0] + slope * np.arange(size))[:, None], line.shape)):
            return _placed(part.places[dimension]).times(slope).plus(int(line[0, 0]))
    return None


# ---------------------------------------------------------------- constants and indicators


def _of_constant(part: Slice, known: np.ndarray, wanted: bool) -> tuple[Condition, ...] | None:
    """A concrete array: a band if it is one, what does not vary along some of its dimensions else."""
    chosen = known.astype(bool) == wanted
    index = tuple(place.start if place.axis is None else slice(None) for place in part.places)
    if any(
        p.axis is not None and (p.start or p.step != 1 or p.axis.size != s) for p, s in zip(part.places, known.shape)
    ):
        index = tuple(p.start if p.axis is None else p.start + p.step * np.arange(p.axis.size) for p in part.places)
        chosen = chosen[np.ix_(*(np.atleast_1d(i) for i in index))] if index else chosen
        chosen = chosen.reshape([p.axis.size for p in part.places if p.axis is not None])
    else:
        chosen = chosen[index]
    axes = [place.axis for place in part.places if place.axis is not None]
    varies = [d for d in range(chosen.ndim) if not (chosen == chosen.take([0], d)).all()]
    core = chosen[tuple(slice(None) if d in varies else 0 for d in range(chosen.ndim))]
    if not varies:
        return () if core.all() else (Never(),)
    if len(varies) == 2:
        found = _band(core, axes[varies[0]], axes[varies[1]])
        if found is not None:
            return found
    view = part.view
    return None if view is None or not _at_hand(view.value) else (Array(shrink(view), wanted),)


def _band(chosen: np.ndarray, row: Axis, column: Axis) -> tuple[Condition, ...] | None:
    """The band that a Boolean matrix is; its diagonals decide."""
    rows, columns = chosen.shape
    edge = np.concatenate([chosen[::-1, 0], chosen[0, 1:]])
    inside = np.flatnonzero(edge) - (rows - 1)
    if inside.size == 0 or inside[-1] - inside[0] + 1 != inside.size:
        return None
    low, high = int(inside[0]), int(inside[-1])
    offset = np.arange(columns)[None, :] - np.arange(rows)[:, None]
    if not np.array_equal(chosen, (offset >= low) & (offset <= high)):
        return None
    return (Band(row, column, low, high),)


def _is_indicator(facts: Facts, value: Value, depth: int = 8) -> bool:
    """True where all elements are known to be 0 or 1."""
    if value.dtype == np.bool_:
        return True
    number = facts.scalar(value)
    if number is not None:
        return number in (0.0, 1.0)
    known = constant(value)
    if known is not None:
        return known.dtype.kind in "fiub" and bool(((known == 0) | (known == 1)).all())
    node = source(value)
    if node is None or depth == 0:
        origin = resolve(value).origin
        return origin is not None and depth > 0 and _is_indicator(facts, origin, depth - 1)
    name = node.primitive
    if name in LAYOUT or name in ALIASES or name in (CAST, "slice", "dynamic_slice", "rev"):
        return _is_indicator(facts, node.inputs[0], depth - 1)
    if name in ("and", "or", "mul", "min", "max"):
        return all(_is_indicator(facts, operand, depth - 1) for operand in node.inputs)
    if name == "select_n":
        return all(_is_indicator(facts, case, depth - 1) for case in node.inputs[1:])
    return name == "sub" and facts.scalar(node.inputs[0]) == 1.0 and _is_indicator(facts, node.inputs[1], depth - 1)


def additive(facts: Facts, view: View) -> tuple[tuple[Condition, ...], float] | None:
    """(what is kept, fill) where `view` is 0 for what is kept and `fill` elsewhere; None where it is anything else."""
    view = climb(view)
    known = constant(view.value)
    if known is not None and known.dtype.kind == "f":
        fills = np.unique(known)
        if len(fills) != 2 or 0 not in fills:
            return None
        return conditions(facts, view, wanted=False), float(fills[0] or fills[1])
    node = source(view.value)
    if node is None:
        origin = resolve(view.value).origin
        found = None if origin is None else additive(facts, View(origin, view.dims))
        return found if found is not None and all(isinstance(c, Band) for c in found[0]) else None
    if node.primitive == "mul":
        for number, other in (node.inputs, node.inputs[::-1]):
            fill = facts.scalar(number)
            if fill is not None and np.isfinite(fill) and _is_indicator(facts, other):
                return conditions(facts, operand(other, view), wanted=False), fill
    if node.primitive == "select_n" and len(node.inputs) == 3:
        numbers = [facts.scalar(case) for case in node.inputs[1:]]
        for kept in (0, 1):
            fill = numbers[1 - kept]
            if numbers[kept] == 0.0 and fill is not None:
                return conditions(facts, operand(node.inputs[0], view), wanted=bool(kept)), fill
    above = up(view)
    return additive(facts, above) if above is not None else None
