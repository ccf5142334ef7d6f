"""What can be told about a graph's values without running it: scalars, equality, the operation behind a value."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from .trace import Graph, Node, Value

# One input, same values: the shape may change.
LAYOUT = frozenset(("reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim"))
# One input, same values, same shape.
ALIASES = frozenset(("copy", "copy_p", "pvary", "pcast", "name", "sharding_constraint", "reshard"))
CAST = "convert_element_type"

_FOLDS: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.true_divide,
    "neg": np.negative,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1.0 / np.sqrt(a),
    "exp": np.exp,
    "log": np.log,
    "pow": np.power,
    "max": np.maximum,
    "min": np.minimum,
    "square": np.square,
    "abs": np.abs,
    "sign": np.sign,
    "stop_gradient": lambda a: a,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lt": np.less,
    "le": np.less_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "and": np.logical_and,
    "or": np.logical_or,
    "not": np.logical_not,
    "is_finite": np.isfinite,
}
# On integers these work bit by bit.
_LOGICAL = frozenset(("and", "or", "not"))
_SCALAR_DEPTH = 16
# Constants above this many elements are not searched for a single value.
_LARGEST_UNIFORM = 1 << 16
# How many pairs of operations one comparison of duplicate subgraphs may look at.
_SAME_BUDGET = 400


def resolve(value: Value) -> Value:
    """`value` as a custom_jvp body computes it, where there is one."""
    while value.inner is not None:
        value = value.inner
    return value


def source(value: Value) -> Node | None:
    """The operation that computes `value`, seen through custom_jvp."""
    return resolve(value).node


def primitive(value: Value) -> str:
    """The name of that operation, "" for inputs and constants."""
    node = source(value)
    return node.primitive if node is not None else ""


def is_float(value: Value) -> bool:
    return jax.numpy.issubdtype(value.dtype, np.floating)


def widens(node: Node) -> bool:
    """True for a cast that loses nothing: a floating type to one that holds all its values."""
    operand, result = node.inputs[0], node.outputs[0]
    if not (is_float(operand) and is_float(result)):
        return False
    return jax.numpy.promote_types(operand.dtype, result.dtype) == result.dtype


def casts_floats(node: Node) -> bool:
    return is_float(node.inputs[0]) and is_float(node.outputs[0])


def users(graph: Graph, value: Value) -> list[Node]:
    """The nodes that take `value` as an input and that an output or an effect of the function needs."""
    live = graph.memo.get("live")
    if live is None:
        live = graph.memo["live"] = _live(graph)
    return [node for node in graph.users(value) if node in live]


def _live(graph: Graph) -> set[Node]:
    live = {node for node in graph.nodes if node.eqn.effects}
    stack = [value.node for value in graph.outputs] + [value.node for node in live for value in node.inputs]
    while stack:
        node = stack.pop()
        if node is not None and node not in live:
            live.add(node)
            stack += [value.node for value in node.inputs]
    return live


class Facts:
    """Facts about one graph, each found out once."""

    def __init__(self) -> None:
        self._scalars: dict[Value, float | None] = {}

    @classmethod
    def of(cls, graph: Graph) -> Facts:
        facts = graph.memo.get(cls)
        if facts is None:
            facts = graph.memo[cls] = cls()
        return facts

    def scalar(self, value: Value) -> float | None:
        """The one number that all elements of `value` are, None where it is not known to be a constant."""
        return self._scalar(value, _SCALAR_DEPTH)

    def _scalar(self, value: Value, depth: int) -> float | None:
        value = resolve(value)
        if value in self._scalars:
            return self._scalars[value]
        if value.const is not None:
            result = _uniform(value.const)
        elif value.node is None or depth == 0:
            result = self._scalar(value.origin, depth - 1) if value.origin is not None and depth else None
        else:
            result = self._fold(value, value.node, depth - 1)
        if depth > _SCALAR_DEPTH // 2 or result is not None:
            self._scalars[value] = result
        return result

    def _fold(self, value: Value, node: Node, depth: int) -> float | None:
        name = node.primitive
        if name in LAYOUT or name in ALIASES or name in ("slice", "stop_gradient", "dynamic_slice"):
            return self._scalar(node.inputs[0], depth)
        if name == CAST:
            return _rounded(self._scalar(node.inputs[0], depth), value)
        if name == "integer_pow":
            base = self._scalar(node.inputs[0], depth)
            return _rounded(None if base is None else _quiet(np.power, base, float(node.params["y"])), value)
        if name == "select_n" and len(node.inputs) == 3:
            which = self._scalar(node.inputs[0], depth)
            return None if which is None else self._scalar(node.inputs[1 + int(bool(which))], depth)
        if name not in _FOLDS or (name in _LOGICAL and value.dtype != np.bool_):
            return None
        operands = []
        for operand in node.inputs:
            operands.append(self._scalar(operand, depth))
            if operands[-1] is None:
                return None
        return _rounded(_quiet(_FOLDS[name], *operands), value)

    def same(self, a: Value, b: Value) -> bool:
        """True where both are the same array: one value, or the same operations on the same values written twice."""
        return a is b or self._same(a, b, {}, [_SAME_BUDGET])

    def _same(self, a: Value, b: Value, seen: dict[tuple[Value, Value], bool], budget: list[int]) -> bool:
        a, b = resolve(a), resolve(b)
        if a is b:
            return True
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if a.const is not None or b.const is not None:
            return a.const is not None and b.const is not None and _equal_constants(a.const, b.const)
        if a.node is None or b.node is None or (a, b) in seen:
            return seen.get((a, b), False)
        budget[0] -= 1
        seen[a, b] = budget[0] > 0 and self._same_nodes(a, b, a.node, b.node, seen, budget)
        return seen[a, b]

    def _same_nodes(
        self,
        a: Value,
        b: Value,
        left: Node,
        right: Node,
        seen: dict[tuple[Value, Value], bool],
        budget: list[int],
    ) -> bool:
        if left.primitive != right.primitive or len(left.inputs) != len(right.inputs) or left.eqn.effects:
            return False
        if left is right:
            return left.outputs.index(a) == right.outputs.index(b)
        if left.outputs.index(a) != right.outputs.index(b) or not _same_params(left.params, right.params):
            return False
        return all(self._same(x, y, seen, budget) for x, y in zip(left.inputs, right.inputs))


def _same_params(a: dict[str, Any], b: dict[str, Any]) -> bool:
    if a is b:
        return True
    if a.keys() != b.keys() or any(isinstance(x, (np.ndarray, jax.Array)) for x in a.values()):
        return False
    return all(a[key] is b[key] or bool(a[key] == b[key]) for key in a)


def _equal_constants(a: Any, b: Any) -> bool:
    if a is b:
        return True
    left, right = _numpy(a), _numpy(b)
    if left is None or right is None or left.size > _LARGEST_UNIFORM:
        return False
    return bool(np.array_equal(left, right))


def _numpy(const: Any) -> np.ndarray | None:
    if jax.numpy.issubdtype(jax.typeof(const).dtype, jax.dtypes.extended):
        return None
    if isinstance(const, jax.Array) and not const.is_fully_addressable:
        return None
    return np.asarray(const)


def constant(value: Value) -> np.ndarray | None:
    """The concrete array of a constant, None for everything else."""
    value = resolve(value)
    while value.const is None and value.node is None and value.origin is not None:
        value = resolve(value.origin)
    return None if value.const is None else _numpy(value.const)


def _uniform(const: Any) -> float | None:
    size = math.prod(np.shape(const))
    if size == 0 or size > _LARGEST_UNIFORM:
        return None
    array = _numpy(const)
    if array is None or array.dtype.kind == "c":
        return None
    first = array.reshape(-1)[0]
    if size > 1 and not np.all(array == first):
        return None
    return float(first)


def _rounded(number: Any, value: Value) -> float | None:
    """`number` in the precision that the graph computes it in; None where an integer would wrap around."""
    if number is None:
        return None
    if value.dtype.kind in "iu":
        held = np.iinfo(value.dtype)
        return float(int(number)) if held.min <= number <= held.max else None
    with np.errstate(all="ignore"):
        return float(np.asarray(number).astype(value.dtype))


def _quiet(function: Callable[..., Any], *operands: Any) -> Any:
    with np.errstate(all="ignore"):
        return function(*operands)
