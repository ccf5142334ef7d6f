"""Group norm and instance norm of images whose channels come last: a norm over pixels and neighbouring channels.

The product is that of a layer norm (`.norm`). What is summed over says how pixels, groups and a group's channels lie in
the array; the result is labelled accordingly, however its dimensions are merged.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax

from ...kernels._group_norm import group_norm, group_norm_refusal
from ..axes import View, fresh, refine, regroup
from ..facts import CAST, is_float
from ..match import Match, NoMatch, Pattern
from ..trace import Graph, Node, Value
from .norm import Norm, combined, find


@dataclasses.dataclass(frozen=True)
class Layout:
    """An array of [images, pixels, groups, channels of a group], in whatever shape."""

    images: int
    pixels: int
    groups: int
    width: int

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.images, self.pixels, self.groups, self.width)


def _layout(node: Node) -> Layout | None:
    """How an array lies of which `node` sums pixels and, where they come after the groups, channels."""
    shape, summed = node.inputs[0].shape, set(node.params["axes"])
    place = len(shape)

    def run(is_summed: bool) -> int:
        nonlocal place
        end = place
        while place and ((place - 1) in summed) == is_summed:
            place -= 1
        return math.prod(shape[place:end])

    width, groups, pixels = run(True), run(False), run(True)
    if pixels < 2 or any(axis < place for axis in summed):
        return None
    # Statistics of one channel over everything else are a batch norm's, which are wanted for themselves too.
    return Layout(math.prod(shape[:place]), pixels, groups, width) if place or width > 1 else None


def _layouts(graph: Graph) -> list[Layout]:
    """The layouts of all sums in the graph."""
    if Layout not in graph.memo:
        sums = (_layout(node) for node in graph.nodes if node.primitive == "reduce_sum")
        graph.memo[Layout] = list(dict.fromkeys(layout for layout in sums if layout is not None))
    return graph.memo[Layout]


def match_group_norm(root: Value, graph: Graph) -> Match:
    """The group norm that `root` is the result of. Raises NoMatch."""
    miss = NoMatch("not a norm")
    if root.node is None or not root.shape or not is_float(root):
        raise miss
    for layout, view, (_, pixels, groups, width) in _labelled(root, graph):
        try:
            found = find(graph, view, (*pixels, *width), (*groups, *width))
            if found.is_centred and found.x.axes == view.axes:
                return _as_match(root, found, layout)
        except NoMatch as error:
            miss = miss if miss.near else error
    raise miss


def _labelled(root: Value, graph: Graph) -> Iterator[tuple[Layout, View, Any]]:
    """`root` labelled in every way that it may lie, and the labels of images, pixels, groups and a group's channels."""
    for layout in _layouts(graph):
        splits: Any = {}
        dims = fresh(root.shape)
        if math.prod(layout.sizes) == math.prod(root.shape):
            parts = regroup(dims, layout.sizes, splits)
            if parts is not None:
                yield layout, View(root, refine(dims, splits)), refine(parts, splits)


@dataclasses.dataclass(frozen=True)
class Call:
    """`call(x, *scales, [bias]) -> (result,)`, of `shape`."""

    layout: Layout
    epsilon: float
    number: float
    shape: tuple[int, ...]
    dtype: Any
    n_scales: int
    has_bias: bool

    @property
    def flat(self) -> tuple[int, ...]:
        return (self.layout.images, self.layout.pixels, self.layout.groups * self.layout.width)

    def __call__(self, *arrays: Any) -> tuple[Any, ...]:
        x, *vectors = arrays
        vectors = [array.reshape(-1) for array in vectors]
        scale = combined(vectors[: self.n_scales], self.number, self.flat[-1])
        bias = vectors[-1] if self.has_bias else None
        options = {"groups": self.layout.groups, "epsilon": self.epsilon, "out_dtype": self.dtype}
        return (group_norm(x.reshape(self.flat), scale, bias, **options).reshape(self.shape),)

    def refusal(self, inputs: tuple[Value, ...]) -> str | None:
        x, *rest = inputs
        vectors = [jax.ShapeDtypeStruct(self.flat[-1:], value.dtype) for value in rest]
        scale = vectors[0] if self.n_scales else None
        bias = vectors[-1] if self.has_bias else None
        return group_norm_refusal(jax.ShapeDtypeStruct(self.flat, x.dtype), scale, bias, out_dtype=self.dtype)


def _as_match(root: Value, found: Norm, layout: Layout) -> Match:
    has_bias = found.bias is not None
    call = Call(layout, found.epsilon, found.number, root.shape, root.dtype, len(found.scales), has_bias)
    vectors = (*found.scales, *(() if found.bias is None else (found.bias,)))
    inputs = (found.x.value, *(view.value for view in vectors))
    parts = [f"groups={layout.groups}, epsilon={found.epsilon:g}"]
    parts += [name for name, given in (("scale", found.scales), ("bias", has_bias)) if given]
    return Match(
        kernel="group_norm",
        roots=(root,),
        inputs=inputs,
        call=call,
        detail=", ".join(parts),
        refusal=call.refusal(inputs),
    )


PATTERN = Pattern("group_norm", frozenset(("add", "mul", "div", CAST)), match_group_norm)
