"""A scan's body cut into what runs before the loop, in it, and after it.

The product of every step's slice with a matrix that never changes becomes one product before the loop; such a product
that is nothing but a result becomes one after it; and a sum of products over the steps becomes a product with the steps
as one more dimension to contract. So most of a recurrent network's weights are read once, not once a step, and no
gradient is carried along (Appleyard, Kocisky and Blunsom, "Optimizing Performance of Recurrent Neural Networks on
GPUs", 2016, sections 3.1 and 3.3; here for any scan).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .. import _jax_compat as compat
from . import trace
from .facts import Facts
from .plan import HIGHER_ORDER
from .trace import Graph, Node, Value

# A sum over the steps may be taken before these: each moves numbers, negates or widens them.
_LINEAR = frozenset(
    ("transpose", "reshape", "squeeze", "expand_dims", "split", "slice", "neg", "copy", "convert_element_type")
)
_ADDITIONS = frozenset(("add", "add_any"))
_COSTLY = frozenset(("dot_general", "conv_general_dilated", *HIGHER_ORDER))

Worthwhile = Callable[[int], bool]
"""Whether a product that has so many rows in each step should leave the loop."""


@dataclasses.dataclass(frozen=True)
class Sum:
    """A carried value that starts as it is given; each step adds `term`, which is `source`'s result moved about."""

    source: Node
    term: Value


@dataclasses.dataclass(frozen=True)
class Cut:
    """What of a scan's body leaves the loop.

    `early`: products of slices. `late`: products, by the number of the stacked result that each is. `sums`: by the
    number of the carried value.
    """

    graph: Graph
    constants: Sequence[Value]
    carried: Sequence[Value]
    slices: Sequence[Value]
    early: Sequence[Node]
    late: Mapping[int, Node]
    sums: Mapping[int, Sum]

    @property
    def results(self) -> Sequence[Value]:
        """What the body gives for the stacked results."""
        return self.graph.outputs[len(self.carried) :]

    @functools.cached_property
    def alike(self) -> Mapping[Value, Value]:
        """Each operand of what runs after the loop, and the first of them that is the same array."""
        facts = Facts.of(self.graph)
        found: dict[Value, Value] = {}
        for node in (*self.late.values(), *(sum_.source for sum_ in self.sums.values())):
            for value in node.inputs:
                found[value] = next((known for known in found.values() if facts.same(value, known)), value)
        return found

    @functools.cached_property
    def stacked(self) -> list[Value]:
        """The loop's values that are needed after it; slices are there anyhow."""
        there = _made_from(self.graph, self.constants) | {*self.slices}
        return [value for value in dict.fromkeys(self.alike.values()) if value.const is None and value not in there]

    def more_bytes(self) -> int:
        """The bytes that one step stacks because of the cut."""
        return sum(_bytes(value) for value in (*self.stacked, *(node.outputs[0] for node in self.early)))

    def own_bytes(self) -> int:
        """The bytes that one step reads and stacks anyhow."""
        return sum(_bytes(value) for value in (*self.slices, *self.results))


def cut(eqn: Any, worthwhile: Worthwhile) -> Cut | None:
    """What leaves the scan that `eqn` is, None for nothing."""
    graph = trace.build(eqn.params["jaxpr"])
    constants, carried = compat.scan_counts(eqn.params)
    fixed = _made_from(graph, graph.inputs[:constants])
    in_each = _made_from(graph, [*fixed, *graph.inputs[constants + carried :]])

    def leaves(node: Node | None) -> bool:
        return node is not None and worthwhile(_rows(node, fixed))

    early = [
        node
        for node in graph.nodes
        if in_each.issuperset(node.outputs) and leaves(node) and not _costly(trace.between(node.inputs, fixed))
    ]
    starts = graph.inputs[constants : constants + carried]
    ends = enumerate(zip(starts, graph.outputs))
    sums = {number: s for number, (start, end) in ends if (s := _sum(graph, start, end, fixed, worthwhile))}
    late = {
        number: value.node
        for number, value in enumerate(graph.outputs[carried:])
        if value.node not in early and leaves(value.node) and _is_only_returned(graph, value) and value.node
    }
    if not (early or late or sums):
        return None
    return Cut(graph, graph.inputs[:constants], starts, graph.inputs[constants + carried :], early, late, sums)


def _bytes(value: Value) -> int:
    return math.prod(value.shape) * value.dtype.itemsize


def _made_from(graph: Graph, known: Collection[Value]) -> set[Value]:
    """The values that depend on nothing but `known`."""
    made = {*known, *graph.captures}
    for node in graph.nodes:
        if all(value in made or value.const is not None for value in node.inputs):
            made.update(node.outputs)
    return made


def _costly(nodes: Iterable[Node]) -> bool:
    return any(node.primitive in _COSTLY or node.primitive.startswith("jaxext_") for node in nodes)


def _is_only_returned(graph: Graph, value: Value) -> bool:
    return not graph.users(value) and graph.outputs.count(value) == 1


def _is_product(node: Node) -> bool:
    return node.primitive == "dot_general" and node.params.get("out_sharding") is None


def _rows(node: Node, fixed: set[Value]) -> int:
    """How many rows of each step are multiplied with a matrix that never changes; 0 for any other operation."""
    if not _is_product(node):
        return 0
    contracted, (batch, _) = node.params["dimension_numbers"]
    side = [place for place, value in enumerate(node.inputs) if value not in fixed and value.const is None]
    if batch or len(side) != 1:
        return 0
    shape = node.inputs[side[0]].shape
    return math.prod(n for d, n in enumerate(shape) if d not in contracted[side[0]])


def _sum(graph: Graph, start: Value, end: Value, fixed: set[Value], worthwhile: Worthwhile) -> Sum | None:
    """How `end`, what a carried value becomes, is `start`, what it was, and a sum of products; None where it is not."""
    addition = end.node
    if addition is None or addition.primitive not in _ADDITIONS or not _is_only_returned(graph, end):
        return None
    terms = [value for value in addition.inputs if value is not start]
    if len(terms) != 1 or graph.users(start) != [addition] or graph.escapes(start) or terms[0].shape != start.shape:
        return None
    source = terms[0].node
    while source is not None and _moves(source) and not any(graph.escapes(value) for value in source.outputs):
        source = source.inputs[0].node
    if source is None or not _is_product(source) or source.params["dimension_numbers"][1][0]:
        return None
    if len(graph.users(source.outputs[0])) > 1 or graph.escapes(source.outputs[0]):
        return None
    if any(value in fixed or value.const is not None for value in source.inputs):
        return None
    contracted = source.params["dimension_numbers"][0][0]
    rows = math.prod(source.inputs[0].shape[d] for d in contracted)
    return Sum(source, terms[0]) if worthwhile(rows) else None


def _moves(node: Node) -> bool:
    if node.primitive == "convert_element_type":
        narrow, wide = node.inputs[0].dtype, node.outputs[0].dtype
        floats = all(jnp.issubdtype(dtype, jnp.floating) for dtype in (narrow, wide))
        return floats and narrow.itemsize <= wide.itemsize
    return node.primitive in _LINEAR


# ---------------------------------------------------------------- running the three parts


def run(cut: Cut, params: Mapping[str, Any], operands: Sequence[Any]) -> list[Any]:
    """What the scan with these parameters gives for its operands: the last carried values, then the stacked results."""
    bounds = len(cut.constants), len(cut.constants) + len(cut.carried)
    fixed = dict(zip(cut.constants, operands[: bounds[0]]))
    carry = dict(zip(cut.carried, operands[bounds[0] : bounds[1]]))
    steps = dict(zip(cut.slices, operands[bounds[1] :]))
    steps |= _products(cut.graph, [node.outputs[0] for node in cut.early], fixed, steps)
    last, results, steps = _loop(cut, params, fixed, carry, steps)
    for number, sum_ in cut.sums.items():
        last[number] = carry[cut.carried[number]] + _total(cut, sum_, fixed, steps)
    for number, node in cut.late.items():
        own = {value: steps[one] for value in node.inputs if (one := cut.alike[value]) in steps}
        results[number] = _products(cut.graph, node.outputs, fixed, own)[node.outputs[0]]
    return [*(last[i] for i in range(len(last))), *(results[i] for i in range(len(results)))]


def _products(
    graph: Graph, wanted: Sequence[Value], fixed: Mapping[Value, Any], steps: Mapping[Value, Any]
) -> dict[Value, Any]:
    """`wanted` for all steps at once, from the stacked values `steps`."""
    if not wanted:
        return {}
    every_step = jax.vmap(lambda slices: _compute(graph, wanted, {**fixed, **dict(zip(steps, slices))}))
    return dict(zip(wanted, every_step(list(steps.values()))))


def _loop(
    cut: Cut,
    params: Mapping[str, Any],
    fixed: Mapping[Value, Any],
    carry: Mapping[Value, Any],
    steps: Mapping[Value, Any],
) -> tuple[dict[int, Any], dict[int, Any], dict[Value, Any]]:
    """What is left of the loop: last carried values and stacked results by number, and `steps` with what it stacked."""
    kept = [i for i in range(len(cut.carried)) if i not in cut.sums]
    given = [i for i in range(len(cut.results)) if i not in cut.late]
    stacked = cut.stacked

    def body(carried: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        known = {**fixed, **dict(zip((cut.carried[i] for i in kept), carried)), **dict(zip(steps, slices))}
        wanted = [*(cut.graph.outputs[i] for i in kept), *(cut.results[i] for i in given), *stacked]
        values = _compute(cut.graph, wanted, known)
        after = [compat.with_weak_type(x, cut.carried[i].aval) for x, i in zip(values, kept)]
        return after, values[len(kept) :]

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    start = [carry[cut.carried[i]] for i in kept]
    last, results = jax.lax.scan(body, start, list(steps.values()), **options)
    seen = dict(zip(stacked, results[len(given) :]))
    return dict(zip(kept, last)), dict(zip(given, results)), {**steps, **seen}


def _total(cut: Cut, sum_: Sum, fixed: Mapping[Value, Any], steps: Mapping[Value, Any]) -> Any:
    """The terms of all steps, summed."""
    node = sum_.source
    sides, _ = node.params["dimension_numbers"]
    contracted = tuple((0, *(d + 1 for d in side)) for side in sides)
    operands = [steps[cut.alike[value]] for value in node.inputs]
    params = {**node.params, "dimension_numbers": (contracted, ((), ()))}
    wide = sum_.term.dtype
    if wide != node.outputs[0].dtype:
        # Rounded to narrow numbers the whole sum would be, where the loop rounds each step's.
        operands = [x.astype(wide) for x in operands]
        params["preferred_element_type"] = wide
    with compat.source_of(node.eqn):
        (total,) = compat.bind(node.eqn, operands, params)
    return _compute(cut.graph, [sum_.term], {**fixed, node.outputs[0]: total})[0]


def _compute(graph: Graph, wanted: Sequence[Value], known: Mapping[Value, Any]) -> list[Any]:
    env: dict[Value, Any] = {**graph.captures, **known}
    for node in sorted(trace.between(wanted, known), key=lambda node: node.position):
        inputs = [env.get(value, value.const) for value in node.inputs]
        with compat.source_of(node.eqn):
            results = compat.bind(node.eqn, inputs, node.params)
        env |= {value: result for value, result in zip(node.outputs, results) if value not in known}
    return [compat.as_array(env.get(value, value.const), value.aval) for value in wanted]
