"""Layer norm and RMS norm over the last axis, as products of factors.

A norm is a product: the input (centred or not), one inverse root of a second moment plus epsilon, per-feature vectors
and numbers, in any order; a bias may be added. The factors are collected through casts, broadcasts and quotients, so
that the many ways to write the product are one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ...kernels import _norm
from ...kernels._norm import layer_norm, layer_norm_refusal, rms_norm, rms_norm_refusal
from ..axes import Axes, View, label, operands, same_view, shrink
from ..facts import CAST, Facts, casts_floats, is_float, source, users
from ..match import Match, NoMatch, Pattern
from ..trace import Graph, Node, Value
from .moments import Moment, centred, moment, size, statistic, uncast, unshifted

# A product of numbers this close to 1 is 1: it comes from rounding sqrt(n) and 1 / n.
_ONE = 1e-6
_DEPTH = 8


@dataclasses.dataclass
class Product:
    """number * (base factors) ^ exponents; a factor's exponent is 1 or -1, or half of that for a root."""

    number: float = 1.0
    factors: list[tuple[View, float]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Norm:
    """What was found: `x`, whether it is centred, and the operands of the call."""

    x: View
    is_centred: bool
    epsilon: float
    number: float
    scales: tuple[View, ...]
    bias: View | None


def match_layer_norm(root: Value, graph: Graph) -> Match:
    """The layer norm that `root` is the result of. Raises NoMatch."""
    return _match(root, graph, True)


def match_rms_norm(root: Value, graph: Graph) -> Match:
    """The RMS norm that `root` is the result of. Raises NoMatch."""
    return _match(root, graph, False)


def _match(root: Value, graph: Graph, is_centred: bool) -> Match:
    memo = graph.memo.setdefault(Norm, {})
    if root not in memo:
        try:
            memo[root] = _find(root, graph)
        except NoMatch as error:
            memo[root] = error
    found = memo[root]
    if isinstance(found, NoMatch):
        raise NoMatch(found.reason, found.near and is_centred)
    if found.is_centred != is_centred:
        raise NoMatch("the other norm")
    return _as_match(root, graph, found)


def _find(root: Value, graph: Graph) -> Norm:
    if root.node is None or not root.shape or not is_float(root) or root.shape[-1] < 2:
        raise NoMatch("not a norm")
    view = label(root)
    norm = find(graph, view, view.dims[-1], view.dims[-1])
    if norm.x.dims != view.dims:
        raise NoMatch("the norm is not over the last axis", near=True)
    if norm.bias is not None and not norm.is_centred:
        raise NoMatch("an RMS norm with a bias")
    return norm


def find(graph: Graph, view: View, over: Axes, channels: Axes) -> Norm:
    """The norm that `view` is the result of, with statistics over `over`, scales and a bias over `channels`."""
    node = view.value.node
    if node is None:
        raise NoMatch("not a norm")
    facts = Facts.of(graph)
    if node.primitive == CAST:
        view = _before_cast(graph, view, node)
    bias, view = _bias(graph, view, channels)
    top = source(view.value)
    if top is None or top.primitive not in ("mul", "div"):
        raise NoMatch("not a product")
    product = Product()
    _collect(facts, graph, view, 1.0, product, _DEPTH, top=True)
    return _read(facts, over, channels, product, bias)


def _before_cast(graph: Graph, view: View, node: Node) -> View:
    """The norm's result in the wider type it is computed in, where only its rounded form is used."""
    wide = node.inputs[0]
    if not casts_floats(node) or graph.escapes(wide) or len(users(graph, wide)) > 1 or wide.node is None:
        raise NoMatch("not a norm")
    if jnp.finfo(wide.dtype).bits <= jnp.finfo(view.value.dtype).bits:
        raise NoMatch("not a norm")
    return View(wide, view.dims)


def _vector(view: View, channels: Axes) -> View | None:
    """`view` as a vector over the channels, None where it is none."""
    small = shrink(view)
    return small if small.axes == channels and math.prod(small.value.shape) == size(channels) else None


def _bias(graph: Graph, view: View, channels: Axes) -> tuple[View | None, View]:
    node = source(view.value)
    if node is None or node.primitive != "add":
        return None, view
    left, right = operands(view)
    for chain, other in ((left, right), (right, left)):
        vector = _vector(other, channels)
        if vector is not None and len(chain.axes) == len(view.axes) and _only_used_by(graph, chain.value, node):
            chain = _through_casts(graph, chain)
            return vector, chain
    raise NoMatch("not a norm with a bias")


def _only_used_by(graph: Graph, value: Value, node: Node) -> bool:
    return node.position < 0 or (users(graph, value) == [node] and not graph.escapes(value))


def _through_casts(graph: Graph, view: View) -> View:
    while (node := source(view.value)) is not None and node.primitive == CAST and casts_floats(node):
        if not _only_used_by(graph, node.inputs[0], node):
            break
        view = View(node.inputs[0], view.dims)
    return view


def _collect(
    facts: Facts, graph: Graph, view: View, exponent: float, product: Product, depth: int, top: bool = False
) -> None:
    """Gather the factors of `view` ^ exponent."""
    number = facts.scalar(view.value)
    if number is not None and number > 0:
        product.number *= number**exponent
        return
    below = view
    view = unshifted(facts, view)
    node = source(view.value)
    if node is None or depth == 0:
        product.factors.append((view, exponent))
        return
    name, inputs = node.primitive, operands(view)
    if name in ("mul", "div") and (top or _may_open(graph, below, view, node)):
        _collect(facts, graph, inputs[0], exponent, product, depth - 1)
        _collect(facts, graph, inputs[1], exponent if name == "mul" else -exponent, product, depth - 1)
    elif name in ("sqrt", "rsqrt"):
        _collect(facts, graph, inputs[0], exponent * (0.5 if name == "sqrt" else -0.5), product, depth - 1)
    elif name == "integer_pow" and node.params["y"] == -1:
        _collect(facts, graph, inputs[0], -exponent, product, depth - 1)
    elif name == "pow" and facts.scalar(inputs[1].value) in (-0.5, 0.5, -1.0):
        _collect(facts, graph, inputs[0], exponent * float(facts.scalar(inputs[1].value) or 0), product, depth - 1)
    else:
        product.factors.append((view, exponent))


def _may_open(graph: Graph, below: View, view: View, node: Node) -> bool:
    """Whether a product inside the product is part of the norm and not a value in its own right.

    Statistics may be used anywhere: they are small. A whole array that is used elsewhere is left to be a root itself.
    """
    whole = len(view.axes) >= 2 and math.prod(view.value.shape) == math.prod(below.value.shape) > 1
    return not whole or (len(users(graph, view.value)) <= 1 and not graph.escapes(view.value))


def _read(facts: Facts, over: Axes, channels: Axes, product: Product, bias: View | None) -> Norm:
    roots = [(factor, exponent) for factor, exponent in product.factors if abs(exponent) == 0.5]
    if len(roots) != 1 or roots[0][1] != -0.5:
        near = not roots and len(product.factors) == 2 and bias is None and _divides_by_shifted_root(facts, product)
        raise NoMatch("epsilon is added to the standard deviation, not to the variance" if near else "no root", near)
    spread = moment(facts, roots[0][0], over)
    if spread is None:
        raise NoMatch("the root is not of a second moment over the axes of the norm")
    rest = [(factor, exponent) for factor, exponent in product.factors if abs(exponent) != 0.5]
    x = _input(facts, rest, spread, over)
    scales = []
    for factor, exponent in rest:
        vector = _vector(factor, channels)
        if vector is None or exponent != 1.0:
            raise NoMatch("a factor of the norm is not a vector over the channels")
        scales.append(vector)
    number = product.number / math.sqrt(spread.factor * size(over))
    epsilon = spread.epsilon / (spread.factor * size(over))
    return Norm(x, spread.is_centred, epsilon, number, tuple(scales), bias)


def _input(facts: Facts, rest: list[tuple[View, float]], spread: Moment, over: Axes) -> View:
    """Take the (centred) input out of the factors."""
    for index, (factor, exponent) in enumerate(rest):
        if exponent != 1.0:
            continue
        found = centred(facts, factor, over)
        if spread.is_centred and found is not None and same_view(facts, found, spread.x):
            del rest[index]
            return uncast(found)
        if not spread.is_centred and same_view(facts, factor, spread.x):
            del rest[index]
            return uncast(spread.x)
    raise NoMatch("no input among the factors")


def _divides_by_shifted_root(facts: Facts, product: Product) -> bool:
    """Whether a factor is 1 / (sqrt(moment) + epsilon)."""
    for factor, exponent in product.factors:
        node = source(factor.value)
        if exponent != -1.0 or node is None or node.primitive not in ("add", "max"):
            continue
        if any(statistic(facts, side) == "sqrt" for side in operands(factor)):
            return True
    return False


# ---------------------------------------------------------------- the call


def combined(scales: Sequence[Any], number: float, channels: int) -> Any:
    """One scale: the product of `scales` and `number`, None where that is 1."""
    scale = functools.reduce(operator.mul, scales) if scales else None
    if abs(number - 1.0) <= _ONE:
        return scale
    wide = jnp.ones(channels, jnp.float32) if scale is None else scale
    return wide.astype(jnp.promote_types(wide.dtype, jnp.float32)) * number


@dataclasses.dataclass(frozen=True)
class Call:
    """`call(x, [residual], *scales, [bias]) -> (result,)`, or with the sum as a second result."""

    is_centred: bool
    epsilon: float
    number: float
    dtype: Any
    n_scales: int
    has_bias: bool
    has_residual: bool = False
    # Whether x + residual is used elsewhere.
    gives_sum: bool = False

    def operands(self, arrays: tuple[Any, ...]) -> tuple[Any, dict[str, Any]]:
        x, *rest = arrays
        given: dict[str, Any] = {"residual": rest.pop(0) if self.has_residual else None}
        vectors = [array.reshape(-1) for array in rest]
        scales, bias = vectors[: self.n_scales], vectors[self.n_scales :]
        given["scale"] = combined(scales, self.number, x.shape[-1])
        if self.is_centred:
            given["bias"] = bias[0] if self.has_bias else None
        return x, given

    def __call__(self, *arrays: Any) -> tuple[Any, ...]:
        x, given = self.operands(arrays)
        norm = layer_norm if self.is_centred else rms_norm
        result = norm(x, **given, epsilon=self.epsilon, out_dtype=self.dtype)
        if not self.has_residual:
            return (result,)
        return tuple(result) if self.gives_sum else (result[0],)

    def refusal(self, inputs: tuple[Value, ...]) -> str | None:
        x, *rest = inputs
        given: dict[str, Any] = {"residual": rest.pop(0).aval if self.has_residual else None}
        vectors = [jax.ShapeDtypeStruct(x.shape[-1:], value.dtype) for value in rest]
        given["scale"] = vectors[0] if self.n_scales else None
        if self.is_centred:
            given["bias"] = vectors[-1] if self.has_bias else None
        refusal = layer_norm_refusal if self.is_centred else rms_norm_refusal
        return refusal(x.aval, **given, out_dtype=self.dtype)


def _as_match(root: Value, graph: Graph, found: Norm) -> Match:
    vectors = tuple(view.value for view in (*found.scales, *(() if found.bias is None else (found.bias,))))
    residual = _residual(graph, root, found.x.value)
    call = Call(
        found.is_centred,
        found.epsilon,
        found.number,
        root.dtype,
        len(found.scales),
        found.bias is not None,
        has_residual=residual is not None,
        gives_sum=residual is not None and residual[2],
    )
    start = (found.x.value,) if residual is None else residual[:2]
    inputs = (*start, *vectors)
    parts = [f"epsilon={found.epsilon:g}"]
    named = (("scale", found.scales), ("bias", found.bias), ("residual", residual))
    parts += [name for name, given in named if given]
    refusal = call.refusal(inputs)
    how = (_norm.LAYER_NORM if found.is_centred else _norm.RMS_NORM).how() if refusal is None else ""
    return Match(
        kernel="layer_norm" if found.is_centred else "rms_norm",
        roots=(root, found.x.value) if call.gives_sum else (root,),
        inputs=inputs,
        call=call,
        detail=", ".join([*parts, *filter(None, (how,))]),
        refusal=refusal,
    )


def _residual(graph: Graph, root: Value, x: Value) -> tuple[Value, Value, bool] | None:
    """(a, b, whether the sum is used elsewhere) where x is a + b, both of x's own shape and type."""
    node = x.node
    if node is None or node.primitive != "add" or node.position < 0:
        return None
    for value in node.inputs:
        whole = value.shape == x.shape and value.dtype == x.dtype and value.const is None
        if not whole or math.prod(shrink(label(value)).value.shape) != math.prod(x.shape):
            return None
    inside = _between(root, x)
    elsewhere = graph.escapes(x) or any(user not in inside for user in users(graph, x))
    return node.inputs[0], node.inputs[1], elsewhere


def _between(root: Value, x: Value) -> set[Node]:
    found: set[Node] = set()
    stack = [root.node]
    while stack:
        node = stack.pop()
        if node is not None and node not in found and node is not x.node:
            found.add(node)
            stack += [value.node for value in node.inputs]
    return found


_ROOTS = frozenset(("add", "mul", "div", CAST))
LAYER_NORM = Pattern("layer_norm", _ROOTS, match_layer_norm)
RMS_NORM = Pattern("rms_norm", _ROOTS, match_rms_norm)
