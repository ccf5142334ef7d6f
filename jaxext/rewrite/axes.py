"""Axis labels: following an array's dimensions through the operations that only move them around.

A pattern labels the dimensions of one array (the softmax's input, a norm's output) and walks the graph from there. Each
array it reaches is a `View`: the value with the labels of each of its dimensions, in order; a dimension of size 1 has
none, a merged one several. So `transpose`, `reshape`, `broadcast_in_dim` and `vmap` need no patterns of their own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp

from .facts import ALIASES, CAST, LAYOUT, Facts, casts_floats, resolve, source
from .match import NoMatch
from .trace import Node, Value


class Axis:
    """A label; equal only to itself."""

    __slots__ = ("size",)

    def __init__(self, size: int) -> None:
        self.size = size

    def __repr__(self) -> str:
        return f"Axis({self.size})"


Axes = tuple[Axis, ...]
Dims = tuple[Axes, ...]
Splits = dict[Axis, tuple[Axis, Axis]]


@dataclasses.dataclass(frozen=True)
class View:
    """A value and the labels of each of its dimensions."""

    value: Value
    dims: Dims

    @property
    def axes(self) -> tuple[Axis, ...]:
        return tuple(axis for dim in self.dims for axis in dim)


def operand(value: Value, view: View) -> View:
    """An input of the elementwise operation whose result is `view`; it may be broadcast, or a scalar."""
    if not value.shape:
        return View(value, ())
    return View(value, tuple(dim if size != 1 else () for dim, size in zip(view.dims, value.shape)))


def operands(view: View) -> list[View]:
    """All inputs of the elementwise operation whose result is `view`."""
    node = source(view.value)
    # An operation on what is no array, such as a read of an nnx variable, is elementwise in nothing.
    if node is None or not all(hasattr(value.aval, "shape") for value in node.inputs):
        return []
    return [operand(value, view) for value in node.inputs]


def label(value: Value) -> View:
    """`value` with fresh labels."""
    return View(value, fresh(value.shape))


def fresh(shape: Iterable[int]) -> Dims:
    return tuple((Axis(size),) if size != 1 else () for size in shape)


def refine(dims: Dims, splits: Splits) -> Dims:
    """`dims` with every split label replaced by its parts."""

    def parts(axis: Axis) -> tuple[Axis, ...]:
        if axis not in splits:
            return (axis,)
        return tuple(part for half in splits[axis] for part in parts(half))

    return tuple(tuple(part for axis in dim for part in parts(axis)) for dim in dims)


def regroup(dims: Dims, shape: Sequence[int], splits: Splits | None = None) -> Dims | None:
    """The labels of an array of `shape` that is a reshape of one labelled `dims`.

    None where a label would have to be cut in two and `splits` is None; else the cut is noted in `splits`. None for an
    array without elements, of which any shape is a reshape of any other.
    """
    queue = [axis for dim in dims for axis in dim][::-1]
    if any(axis.size == 0 for axis in queue):
        return None
    result: list[tuple[Axis, ...]] = []
    for size in shape:
        group: list[Axis] = []
        filled = 1
        while filled != size:
            if not queue or size % filled:
                return None
            axis = queue.pop()
            if (size // filled) % axis.size:
                halves = _cut(axis, size // filled, splits)
                if halves is None:
                    return None
                axis, rest = halves
                queue.append(rest)
            group.append(axis)
            filled *= axis.size
        result.append(tuple(group))
    return None if queue else tuple(result)


def _cut(axis: Axis, outer: int, splits: Splits | None) -> tuple[Axis, Axis] | None:
    if splits is None or outer <= 1 or axis.size % outer:
        return None
    if axis not in splits:
        splits[axis] = (Axis(outer), Axis(axis.size // outer))
    return splits[axis] if splits[axis][0].size == outer else None


def never(node: Node) -> bool:
    """For `up`: no cast may be passed."""
    return False


def up(view: View, casts: Callable[[Node], bool] = casts_floats, splits: Splits | None = None) -> View | None:
    """One step towards the inputs through an operation that keeps all values; None where there is none.

    `casts(node)`: whether a `convert_element_type` may be passed.
    """
    node = source(view.value)
    if node is None:
        return None
    name = node.primitive
    if name in ALIASES or (name == CAST and casts(node)):
        return View(node.inputs[0], view.dims)
    if name == "optimization_barrier":
        return View(node.inputs[node.outputs.index(resolve(view.value))], view.dims)
    if name not in LAYOUT:
        return None
    above = node.inputs[0]
    if name == "transpose":
        dims: list[tuple[Axis, ...]] = [()] * len(view.dims)
        for position, dim in zip(node.params["permutation"], view.dims):
            dims[position] = dim
        return View(above, tuple(dims))
    if name == "broadcast_in_dim":
        places = node.params["broadcast_dimensions"]
        kept = (view.dims[place] if size != 1 else () for place, size in zip(places, above.shape))
        return View(above, tuple(kept))
    if name == "reshape" and node.params.get("dimensions") is not None:
        return None
    grouped = regroup(view.dims, above.shape, splits)
    return None if grouped is None else View(above, grouped)


def climb(view: View, casts: Callable[[Node], bool] = casts_floats) -> View:
    """As far as `up` goes."""
    while True:
        above = up(view, casts)
        if above is None:
            return view
        view = above


def shrink(view: View) -> View:
    """The smallest array that `view` is a broadcast of, as near as possible; no cast is passed."""
    best, size = view, math.prod(view.value.shape)
    while True:
        above = up(view, never)
        if above is None:
            return best
        view = above
        if math.prod(view.value.shape) < size:
            best, size = view, math.prod(view.value.shape)


def same_view(facts: Facts, a: View, b: View, casts: Callable[[Node], bool] = casts_floats) -> bool:
    """True where both are one array with the same labels, whatever moved and cast it."""
    a, b = climb(a, casts), climb(b, casts)
    return a.dims == b.dims and facts.same(a.value, b.value)


def reduced(view: View, node: Node, axis: Axis) -> View:
    """The operand of a reduction over one dimension, which is given the label `axis`."""
    dims = list(view.dims)
    (place,) = node.params["axes"]
    dims.insert(int(place), (axis,))
    return View(node.inputs[0], tuple(dims))


def reduced_over(view: View, node: Node, axes: Axes) -> View | None:
    """The operand of a reduction whose dimensions are given the labels `axes`, in order; None where they do not fit."""
    places = sorted(node.params["axes"])
    grouped = regroup((axes,), [node.inputs[0].shape[place] for place in places])
    if grouped is None:
        return None
    dims = list(view.dims)
    for place, dim in zip(places, grouped):
        dims.insert(int(place), dim)
    return View(node.inputs[0], tuple(dims))


def contract(view: View, node: Node) -> tuple[View, View, tuple[Axis, ...]]:
    """Both operands of a `dot_general` whose result is `view`, and the fresh labels of what is contracted."""
    (left_sum, right_sum), (left_batch, right_batch) = node.params["dimension_numbers"]
    left, right = node.inputs
    left_dims: list[tuple[Axis, ...]] = [()] * len(left.shape)
    right_dims: list[tuple[Axis, ...]] = [()] * len(right.shape)
    results = iter(view.dims)
    for i, j in zip(left_batch, right_batch):
        left_dims[i] = right_dims[j] = next(results)
    for dims, batch, summed in ((left_dims, left_batch, left_sum), (right_dims, right_batch, right_sum)):
        for place in range(len(dims)):
            if place not in batch and place not in summed:
                dims[place] = next(results)
    contracted = []
    for i, j in zip(left_sum, right_sum):
        (dim,) = fresh((left.shape[i],))
        left_dims[i] = right_dims[j] = dim
        contracted += dim
    return View(left, tuple(left_dims)), View(right, tuple(right_dims)), tuple(contracted)


def arrange(array: Any, dims: Dims, groups: Sequence[Sequence[Axis]]) -> Any:
    """`array`, labelled `dims`, with one dimension per group of labels, in that order.

    A group none of whose labels the array has becomes a dimension of size 1; where it has some of them, the others are
    broadcast.
    """
    present = [axis for dim in dims for axis in dim]
    wanted = [axis for group in groups for axis in group if axis in present]
    if len(wanted) != len(present):
        raise NoMatch("an operand has a dimension that the kernel has no place for")
    array = array.reshape([axis.size for axis in present])
    order = [present.index(axis) for axis in wanted]
    if order != sorted(order):
        array = jnp.transpose(array, order)
    shape: list[int] = []
    spread: list[int] = []
    merged: list[int] = []
    for group in groups:
        some = any(axis in present for axis in group)
        shape += [axis.size if axis in present else 1 for axis in group]
        spread += [axis.size if some else 1 for axis in group]
        merged.append(math.prod(axis.size for axis in group) if some else 1)
    if spread != shape:
        array = jnp.broadcast_to(array.reshape(shape), spread)
    return array.reshape(merged)
