"""A product with a term for each row and one for each column, as squared distances are, as one longer product.

|x - y|² is written sum(x²) - 2 x y + sum(y²), a product and two passes over its result, which XLA makes one slow
operation of. Two more columns to contract give the same: [-2 x, 1, sum(x²)] times [y, sum(y²), 1].
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from .. import written
from ..axes import View, label, operands, shrink
from ..facts import Facts, users
from ..match import Match, NoMatch, Pattern
from ..trace import Graph, Node, Value

# With more to contract the product is all that counts; with fewer results the longer operands cost what they save.
# Measured in tests/bench/bench_distances.py.
MOST_CONTRACTED, RESULTS_TO_OPERANDS, LEAST_RESULTS = 64, 3, 1 << 15
# XLA adds the terms in the same pass as these, which is read and written all the same.
_ELEMENTWISE = frozenset(
    ("abs", "add", "clamp", "convert_element_type", "div", "eq", "exp", "exp2", "ge", "gt", "integer_pow", "is_finite",
     "le", "log", "logistic", "lt", "max", "min", "mul", "ne", "neg", "pow", "rsqrt", "select_n", "sqrt", "square",
     "sub", "tanh")
)  # fmt: skip
_SIGNS = {"add": (1, 1), "sub": (1, -1), "neg": (-1,)}


@dataclasses.dataclass
class _Form:
    """scale * (product) + the terms of rows + the terms of columns, each with its factor."""

    product: Node | None = None
    scale: float = 1.0
    rows: list[tuple[Value, float]] = dataclasses.field(default_factory=list)
    columns: list[tuple[Value, float]] = dataclasses.field(default_factory=list)


def _match(root: Value, graph: Graph) -> Match:
    if len(root.shape) != 2 or root.dtype.name != "float32" or 1 in root.shape:
        raise NoMatch("not a matrix")
    view, form = label(root), _Form()
    _collect(graph, view, view, 1.0, form)
    node = form.product
    if node is None or not form.rows or not form.columns:
        raise NoMatch("not a product with both terms")
    a, b = node.inputs
    ((contracted,), _), _ = node.params["dimension_numbers"]
    (m, n), k = root.shape, a.shape[contracted]
    if k > MOST_CONTRACTED or m * n < max(LEAST_RESULTS, RESULTS_TO_OPERANDS * k * (m + n)):
        raise NoMatch("much to contract, or few results")
    if not graph.escapes(root) and all(user.primitive in _ELEMENTWISE for user in users(graph, root)):
        raise NoMatch("its terms cost nothing")
    terms = (*form.rows, *form.columns)
    call = functools.partial(
        _call,
        params=node.params,
        scale=form.scale,
        factors=[factor for _, factor in terms],
        n_rows=len(form.rows),
    )
    inputs = (a, b, *(value for value, _ in terms))
    detail = f"terms of rows and columns as {k} + 2 contracted, for {m}x{n}"
    return Match("matmul", (root,), inputs, call, detail)


def _collect(graph: Graph, root: View, view: View, factor: float, form: _Form) -> None:
    small = shrink(view)
    for axis, terms in zip(root.axes, (form.rows, form.columns)):
        if small.axes == (axis,) and math.prod(small.value.shape) == axis.size:
            terms.append((small.value, factor))
            return
    node = view.value.node
    inner = view is not root and (graph.escapes(view.value) or len(users(graph, view.value)) > 1)
    if node is None or inner or view.value.dtype != root.value.dtype or view.dims != root.dims:
        raise NoMatch("not of this form")
    inputs = operands(view)
    if node.primitive in _SIGNS:
        for above, sign in zip(inputs, _SIGNS[node.primitive]):
            _collect(graph, root, above, sign * factor, form)
    elif node.primitive == "mul":
        _collect_scaled(graph, root, inputs, factor, form)
    elif node.primitive == "dot_general" and form.product is None and _is_plain(node):
        form.product, form.scale = node, factor
    else:
        raise NoMatch("not of this form")


def _collect_scaled(graph: Graph, root: View, inputs: list[View], factor: float, form: _Form) -> None:
    facts = Facts.of(graph)
    for scalar, other in (inputs, inputs[::-1]):
        number = facts.scalar(scalar.value)
        if number is not None and math.isfinite(number):
            return _collect(graph, root, other, number * factor, form)
    raise NoMatch("not of this form")


def _is_plain(node: Node) -> bool:
    (left, _), (batch, _) = node.params["dimension_numbers"]
    a, b = node.inputs
    kinds = {a.dtype.name, b.dtype.name}
    return len(left) == 1 and not batch and kinds == {"float32"} and len(a.shape) == len(b.shape) == 2


def _call(a: jax.Array, b: jax.Array, *terms: jax.Array, **given: Any) -> tuple[jax.Array, ...]:
    return tuple(written.call(functools.partial(_longer, **given), functools.partial(_plain, **given), a, b, *terms))


def _sums(terms: tuple[jax.Array, ...], factors: list[float], n_rows: int) -> list[jax.Array]:
    """The term of each row, and that of each column."""
    scaled = [term.reshape(-1) * jnp.asarray(factor, term.dtype) for term, factor in zip(terms, factors)]
    return [functools.reduce(jnp.add, part) for part in (scaled[:n_rows], scaled[n_rows:])]


def _product(a: jax.Array, b: jax.Array, params: Any, left: int, right: int) -> jax.Array:
    options = {name: params[name] for name in ("precision", "preferred_element_type")}
    return jax.lax.dot_general(a, b, (((left,), (right,)), ((), ())), **options)


def _plain(
    a: jax.Array, b: jax.Array, *terms: jax.Array, params: Any, scale: float, factors: list[float], n_rows: int
) -> list[jax.Array]:
    rows, columns = _sums(terms, factors, n_rows)
    ((left,), (right,)), _ = params["dimension_numbers"]
    return [rows[:, None] + _product(a, b, params, left, right) * jnp.asarray(scale, a.dtype) + columns]


def _longer(
    a: jax.Array, b: jax.Array, *terms: jax.Array, params: Any, scale: float, factors: list[float], n_rows: int
) -> list[jax.Array]:
    rows, columns = _sums(terms, factors, n_rows)
    ((left,), (right,)), _ = params["dimension_numbers"]
    a, b = a if left == 1 else a.T, b if right == 1 else b.T
    # Terms come last, where the sum of the product is complete: each is rounded once, as in stock.
    a = jnp.concatenate([a * jnp.asarray(scale, a.dtype), jnp.ones_like(a[:, :1]), rows[:, None]], axis=1)
    b = jnp.concatenate([b, columns[:, None], jnp.ones_like(b[:, :1])], axis=1)
    return [_product(a, b, params, 1, 1)]


PATTERN = Pattern("matmul", frozenset((*_SIGNS, "mul")), _match, for_cpu=True)
