"""Which class a cross-entropy asks for: gathers, one-hot sums, smoothed and dense targets."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from ..axes import Axis, View, climb, operand, operands
from ..facts import Facts, source
from ..match import NoMatch
from ..trace import Node, Value
from .masks import Position, Slice, affine

OutOfRange = Literal["wrap", "nan", "clip", "zero"]
"""What stock JAX makes of a label outside 0..V-1: "wrap": -V..-1 count from the end, others give NaN; "nan": all give
NaN; "clip": the nearest class, after counting from the end; "zero": no class."""


@dataclasses.dataclass(frozen=True)
class Labels:
    """One class per row: `view` without the class axis; `smoothing`: the share spread over all classes."""

    view: View
    out_of_range: OutOfRange
    smoothing: float = 0.0

    def given(self, labels: Any, classes: int) -> tuple[Any, Literal["nan", "zero"]]:
        """The labels that the op is given, and what it is told of those out of range."""
        if self.out_of_range == "nan":
            labels = jnp.where(labels < 0, jnp.asarray(classes, labels.dtype), labels)
        if self.out_of_range == "clip":
            labels = jnp.clip(jnp.where(labels < 0, labels + classes, labels), 0, classes - 1)
        return labels, "zero" if self.out_of_range == "zero" else "nan"


@dataclasses.dataclass(frozen=True)
class Picked:
    """One element per row of `array` along `axis`."""

    array: View
    axis: Axis
    labels: Labels


def picked(facts: Facts, view: View) -> Picked:
    """`view` as a gather of one element per row. Raises NoMatch."""
    while True:
        view = climb(view)
        node = source(view.value)
        if node is None or node.primitive != "gather":
            raise NoMatch("no gather of the labels' elements")
        if not _is_squeeze(facts, node):
            return _picked(facts, view, node)
        numbers = node.params["dimension_numbers"]
        dims = list(view.dims)
        for place in sorted(numbers.collapsed_slice_dims):
            dims.insert(place, ())
        view = View(node.inputs[0], tuple(dims))


def _is_squeeze(facts: Facts, node: Node) -> bool:
    """Indexing a dimension of size 1 at 0."""
    numbers = node.params["dimension_numbers"]
    sizes = [node.inputs[0].shape[dim] for dim in numbers.start_index_map]
    return (
        all(size == 1 for size in sizes)
        and facts.scalar(node.inputs[1]) == 0.0
        and tuple(numbers.collapsed_slice_dims) == tuple(numbers.start_index_map)
        and len(node.inputs[1].shape) == 1
    )


def _picked(facts: Facts, view: View, node: Node) -> Picked:
    numbers, array, indices = node.params["dimension_numbers"], *node.inputs
    offsets = {int(dim) for dim in numbers.offset_dims}
    of_indices = [dim for place, dim in enumerate(view.dims) if place not in offsets]
    dims: dict[int, tuple[Axis, ...]] = {}
    for dim, place in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims):
        dims[int(dim)] = of_indices[int(place)]
    gone = {*map(int, numbers.collapsed_slice_dims), *dims}
    windows = iter(dim for place, dim in enumerate(view.dims) if place in offsets)
    indexed = [int(dim) for dim in numbers.start_index_map]
    for dim in range(len(array.shape)):
        if dim not in gone:
            dims[dim] = next(windows)
    label: View | None = None
    classes: int | None = None
    for dim, column in zip(indexed, _columns(View(indices, (*of_indices, ())), len(indexed))):
        if node.params["slice_sizes"][dim] != 1:
            raise NoMatch("a gather of more than one element")
        plain, wraps = _unwrapped(facts, column, array.shape[dim])
        counted = affine(facts, Slice(plain.value, tuple(Position(d[0]) if d else Position(None) for d in plain.dims)))
        if counted is not None and counted.constant == 0 and len(counted.terms) == 1:
            axis, step = counted.terms[0]
            if step == 1 and axis.size == array.shape[dim]:
                dims[dim] = (axis,)
                continue
        if label is not None:
            raise NoMatch("a gather over two dimensions")
        label, classes, wrapped = plain, dim, wraps
    if label is None or classes is None or array.shape[classes] < 2:
        raise NoMatch("no gather of the labels' elements")
    axis = Axis(array.shape[classes])
    dims[classes] = (axis,)
    mode = str(node.params["mode"]).upper()
    out: OutOfRange = "clip" if "FILL" not in mode else "wrap" if wrapped else "nan"
    return Picked(View(array, tuple(dims[d] for d in range(len(array.shape)))), axis, Labels(label, out))


def _columns(indices: View, count: int) -> list[View]:
    """The index arrays that were put side by side in the last dimension."""
    if count == 1:
        return [indices]
    node = source(indices.value)
    if node is None or node.primitive != "concatenate" or len(node.inputs) != count:
        raise NoMatch("a gather over two dimensions")
    return [operand(value, indices) for value in node.inputs]


def _unwrapped(facts: Facts, view: View, size: int) -> tuple[View, bool]:
    """An index before `where(i < 0, i + size, i)`."""
    view = climb(view, _between_integers)
    node = source(view.value)
    if node is None or node.primitive != "select_n" or len(node.inputs) != 3:
        return view, False
    test, added = source(node.inputs[0]), source(node.inputs[2])
    index = node.inputs[1]
    if test is None or added is None or test.primitive != "lt" or added.primitive != "add":
        return view, False
    if facts.scalar(test.inputs[1]) != 0.0 or not facts.same(test.inputs[0], index):
        return view, False
    if not any(facts.scalar(n) == size and facts.same(i, index) for i, n in (added.inputs, added.inputs[::-1])):
        return view, False
    return climb(operand(index, view), _between_integers), True


def _between_integers(node: Node) -> bool:
    kinds = [np.dtype(value.dtype).kind for value in (node.inputs[0], node.outputs[0])]
    return all(kind in "iu" for kind in kinds) and node.inputs[0].dtype.itemsize <= node.outputs[0].dtype.itemsize


# ---------------------------------------------------------------- targets


def one_hot(facts: Facts, view: View, axis: Axis) -> View | None:
    """The labels whose one-hot encoding along `axis` is `view`."""
    view = climb(view, lambda cast: True)
    node = source(view.value)
    if node is None or node.primitive != "eq":
        return None
    for labels, classes in (operands(view), operands(view)[::-1]):
        places = tuple(Position(dim[0]) if dim else Position(None) for dim in classes.dims)
        counted = affine(facts, Slice(classes.value, places))
        plain = climb(labels, _between_integers)
        if counted is None or axis in plain.axes or counted.constant != 0 or counted.terms != ((axis, 1),):
            continue
        if np.dtype(plain.value.dtype).kind in "iu":
            return plain
    return None


def targets(facts: Facts, view: View, axis: Axis) -> Labels | None:
    """`view` as (1 - smoothing) * one_hot + smoothing / classes, None where it is anything else."""
    found = _mixture(facts, view, axis, 4)
    if found is None:
        return None
    labels, on, base = found
    smoothing = base * axis.size
    if abs(on + smoothing - 1.0) > 1e-6 or not -1e-9 <= smoothing <= 1.0:
        return None
    return Labels(labels, "zero", max(smoothing, 0.0))


def _mixture(facts: Facts, view: View, axis: Axis, depth: int) -> tuple[View, float, float] | None:
    """(labels, a, b) where `view` is a * one_hot(labels) + b."""
    labels = one_hot(facts, view, axis)
    if labels is not None:
        return labels, 1.0, 0.0
    view = climb(view)
    node = source(view.value)
    if node is None or depth == 0:
        return None
    sides = operands(view)
    numbers = [facts.scalar(side.value) for side in sides]
    if node.primitive == "select_n" and len(sides) == 3 and None not in numbers[1:]:
        labels = one_hot(facts, sides[0], axis)
        off, on = numbers[1] or 0.0, numbers[2] or 0.0
        return None if labels is None else (labels, on - off, off)
    if node.primitive not in ("add", "sub", "mul", "div") or all(number is None for number in numbers):
        return None
    index = 0 if numbers[1] is not None else 1
    number = numbers[1 - index] or 0.0
    if (index == 1 and node.primitive in ("sub", "div")) or (number == 0.0 and node.primitive == "div"):
        return None
    inner = _mixture(facts, sides[index], axis, depth - 1)
    if inner is None:
        return None
    labels, a, b = inner
    if node.primitive in ("add", "sub"):
        return labels, a, b + (number if node.primitive == "add" else -number)
    factor = number if node.primitive == "mul" else 1.0 / number
    return labels, a * factor, b * factor


def summed_over(view: View, node: Node) -> View:
    """The operand of a `reduce_sum` over any number of dimensions, with fresh labels for those."""
    value: Value = node.inputs[0]
    gone = {int(dim) for dim in node.params["axes"]}
    kept = iter(view.dims)
    dims = tuple(
        ((Axis(size),) if size != 1 else ()) if place in gone else next(kept) for place, size in enumerate(value.shape)
    )
    return View(value, dims)
