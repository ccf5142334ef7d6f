"""Products of gathered rows with a matrix, as gathered rows of a smaller product.

A graph network multiplies each edge's two nodes, side by side, with a matrix. There are far fewer nodes than edges, and
a gather moves rows without looking at them: x[ids] @ w is (x @ w)[ids]. Differentiated, sums over edges come before the
products as well. (The Deep Graph Library's guide has its users write messages so by hand.)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..match import Match, NoMatch, Pattern
from ..trace import Graph, Node, Value
from .indexed_rows import gathers_whole_rows

# Rows of bfloat16 would be rounded before they are added up.
_DTYPES = ("float32", "float64")
# How often a table's row is gathered, on average; then what makes the product cost less than gathering its results:
# few columns to contract, or many results for each of them. Measured in tests/bench/bench_gathered_product.py.
LEAST_REPEATS = 1.5
LEAST_COLUMNS, MOST_WIDENING = 16, 4
LEAST_FLOPS = 1 << 19


@dataclasses.dataclass(frozen=True)
class _Part:
    """Some of the matrix's rows, from `first` on, and the array that they are multiplied with, maybe gathered."""

    rows: Value
    first: int
    gather: Node | None = None

    @property
    def last(self) -> int:
        return self.first + self.rows.shape[-1]


def _match(root: Value, graph: Graph) -> Match:
    node = root.node
    if node is None or root.dtype.name not in _DTYPES:
        raise NoMatch("not a product")
    rows, matrix = node.inputs
    (left, right), (batch, _) = node.params["dimension_numbers"]
    if batch or len(matrix.shape) != 2 or tuple(left) != (len(rows.shape) - 1,) or rows.dtype != root.dtype:
        raise NoMatch("not rows times a matrix")
    parts = [_gathered(part, root) for part in _parts(rows)]
    taken = [part for part in parts if part.gather is not None]
    if 2 * sum(part.last - part.first for part in taken) < rows.shape[-1] or _saved(taken, root) < LEAST_FLOPS:
        raise NoMatch("no gathered rows, or too few")
    parts = [*taken, *(part for part in parts if part.gather is None)]
    inputs = (matrix, *(value for part in parts for value in (part.rows, *_indices(part))))
    call = functools.partial(_multiply, parts=[_plain(part) for part in parts], turned=right[0], params=node.params)
    tables = " and ".join(str(math.prod(part.rows.shape[:-1])) for part in taken)
    detail = f"{math.prod(root.shape[:-1])} rows multiplied before they are gathered: {tables}"
    return Match("matmul", (root,), inputs, call, detail)


def _parts(rows: Value) -> list[_Part]:
    """What lies side by side in `rows`."""
    node = rows.node
    whole = node is None or node.primitive != "concatenate" or node.params["dimension"] != len(rows.shape) - 1
    pieces: Sequence[Value] = [rows] if whole or node is None else node.inputs
    firsts = np.cumsum([0, *(piece.shape[-1] for piece in pieces)])
    return [_Part(piece, int(first)) for piece, first in zip(pieces, firsts)]


def _gathered(part: _Part, root: Value) -> _Part:
    """The part as a table's rows where it is one that is better multiplied first."""
    node = part.rows.node
    if node is None or node.primitive != "gather" or not _gathers_rows(node):
        return part
    table, n, k = node.inputs[0], root.shape[-1], part.rows.shape[-1]
    repeats = math.prod(root.shape[:-1]) / max(math.prod(table.shape[:-1]), 1)
    pays = repeats >= LEAST_REPEATS and k >= LEAST_COLUMNS and n <= MOST_WIDENING * k
    return _Part(table, part.first, node) if pays else part


def _gathers_rows(node: Node) -> bool:
    table, indices = node.inputs
    filling = node.params["fill_value"]
    # A row of one number everywhere does not become one in the product, unless it is NaN or zero.
    keeps = filling is None or math.isnan(filling) or filling == 0
    one_row = len(table.shape) == indices.shape[-1] + 1
    return one_row and keeps and gathers_whole_rows(node.params, table, indices)


def _indices(part: _Part) -> tuple[Value, ...]:
    return () if part.gather is None else (part.gather.inputs[1],)


def _saved(taken: Sequence[_Part], root: Value) -> int:
    """Operations that the product takes less."""
    n, rows = root.shape[-1], math.prod(root.shape[:-1])
    return sum(2 * (rows - math.prod(part.rows.shape[:-1])) * part.rows.shape[-1] * n for part in taken)


def _plain(part: _Part) -> tuple[int, int, Mapping[str, Any] | None]:
    return part.first, part.last, None if part.gather is None else part.gather.params


def _multiply(
    matrix: jax.Array,
    *arrays: jax.Array,
    parts: Sequence[tuple[int, int, Mapping[str, Any] | None]],
    turned: int,
    params: Mapping[str, Any],
) -> tuple[jax.Array]:
    options = {name: params[name] for name in ("precision", "preferred_element_type")}
    given = iter(arrays)
    sums: list[jax.Array] = []
    rest: list[tuple[jax.Array, jax.Array]] = []
    for first, last, gather in parts:
        rows, piece = next(given), jax.lax.slice_in_dim(matrix, first, last, axis=turned)
        if gather is None:
            rest.append((rows, piece))
        else:
            product = jax.lax.dot_general(rows, piece, (((rows.ndim - 1,), (turned,)), ((), ())), **options)
            sums.append(_take(product, next(given), gather))
    if rest:
        rows, pieces = (jnp.concatenate(part, axis) for part, axis in zip(zip(*rest), (-1, turned)))
        sums.append(jax.lax.dot_general(rows, pieces, (((rows.ndim - 1,), (turned,)), ((), ())), **options))
    return (functools.reduce(jax.lax.add, sums),)


def _take(product: jax.Array, indices: jax.Array, gather: Mapping[str, Any]) -> jax.Array:
    """Rows of the product, as `gather` took them from the table."""
    sizes = (*gather["slice_sizes"][:-1], product.shape[-1])
    names = ("dimension_numbers", "mode", "fill_value", "unique_indices", "indices_are_sorted")
    return jax.lax.gather(product, indices, slice_sizes=sizes, **{name: gather[name] for name in names})


PATTERN = Pattern("matmul", frozenset(("dot_general",)), _match, for_cpu=True)
