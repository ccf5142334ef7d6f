"""`lax.dot_general` of bfloat16 operands, of few float32 rows or columns, and of many small float32 matrices.

XLA widens bfloat16 on CPU and multiplies at float32's rate; AVX512-BF16 has twice that. Where the dimensions lie one
after the other in memory (those of the batch first) they are read where they are, otherwise XLA transposes them first.
A few float32 rows times a matrix, as in a step of a recurrent network, XLA runs at a quarter of the peak; so it does
two tall matrices of few columns multiplied over their rows, as in the gradient of a narrow layer's weights; a batch of
small float32 products, one after the other, at a twentieth to a half.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxext.kernels import _native_module
from jaxext.kernels._op import ArgSpec, Op
from jaxext.kernels._product import PRODUCT

__all__ = ["DOT", "dot_gains"]

Dimensions = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]

# Below, starting the call costs what the multiplication gains; measured in tests/bench/bench_dot.py.
LEAST_FLOPS = 1 << 24
LEAST_SIDE = 16
# Of float32 rows, with the matrix in the second-level caches; below, XLA is as fast.
FEW_ROWS, FEW_ROWS_MATRIX = (8, 64), (1 << 17, 1 << 20)
FEW_ROWS_LEAST_FLOPS = 1 << 22
# Of two tall float32 matrices, multiplied over their rows; of one column XLA is as fast, with more it divides the work.
FEW_COLUMNS, FEW_COLUMNS_LEAST_ROWS = (2, 128), 256
FEW_COLUMNS_LEAST_FLOPS = 1 << 18
# Of a batch of small float32 products, each of at least four rows, steps and columns. Few columns leave lanes idle; few
# rows do not pay for turning the matrix on the right.
SMALL_LEAST, SMALL_MOST, SMALL_MOST_EACH = 4, (128, 128, 64), 1 << 20
SMALL_BATCH, SMALL_LEAST_FLOPS = 16, 1 << 16
NARROW, NARROW_MATRIX = 8, 512
TURNED_ROWS, TURNED_STEPS = 16, 8


@dataclasses.dataclass(frozen=True)
class _View:
    """An operand as [batch, rows, columns], after a transposition by `order`; `turned`: it is contracted over rows."""

    order: tuple[int, ...]
    shape: tuple[int, int, int]
    turned: bool


def _view(shape: Sequence[int], contract: Sequence[int], batch: Sequence[int], contracted_last: bool) -> _View:
    free = [d for d in range(len(shape)) if d not in contract and d not in batch]
    sizes = [math.prod(shape[d] for d in group) for group in (batch, free, contract)]
    last, first = (*batch, *free, *contract), (*batch, *contract, *free)
    stays = tuple(range(len(shape)))
    # Without a dimension of either kind both orders are the same.
    turned = first == stays and last != stays
    order = first if turned else last
    rows_first = (sizes[0], sizes[2], sizes[1]) if turned else (sizes[0], sizes[1], sizes[2])
    return _View(order, rows_first, turned if contracted_last else not turned)


def _views(a: Any, b: Any, dimension_numbers: Dimensions) -> tuple[_View, _View]:
    (a_contract, b_contract), (a_batch, b_batch) = dimension_numbers
    pairs = sorted(zip(a_contract, b_contract))
    a_contract, b_contract = [p[0] for p in pairs], [p[1] for p in pairs]
    return _view(a.shape, a_contract, a_batch, True), _view(b.shape, b_contract, b_batch, False)


def _reference(
    a: jax.Array, b: jax.Array, *, dimension_numbers: Dimensions, preferred_element_type: str
) -> tuple[jax.Array, ...]:
    preferred = jnp.promote_types(preferred_element_type, a.dtype)  # float64 where it serves as the oracle
    return (jax.lax.dot_general(a, b, dimension_numbers, preferred_element_type=preferred),)


def _product(
    a: jax.Array, b: jax.Array, *, dimension_numbers: Dimensions, preferred_element_type: str
) -> tuple[jax.Array, ...]:
    left, right = _views(a, b, dimension_numbers)
    a_free = [n for d, n in enumerate(a.shape) if d not in (*dimension_numbers[0][0], *dimension_numbers[1][0])]
    b_free = [n for d, n in enumerate(b.shape) if d not in (*dimension_numbers[0][1], *dimension_numbers[1][1])]
    batch = [a.shape[d] for d in dimension_numbers[1][0]]
    operands = [jax.lax.transpose(x, v.order).reshape(v.shape) for x, v in ((a, left), (b, right))]
    turned = {"a_turned": left.turned, "b_turned": right.turned}
    (out,) = PRODUCT(*operands, **turned, rounds=a.dtype == jnp.bfloat16, out_dtype=preferred_element_type)
    return (out.reshape((*batch, *a_free, *b_free)),)


def _refuses(a: Any, b: Any, *, dimension_numbers: Dimensions, preferred_element_type: str) -> str | None:
    if preferred_element_type == "float32" and a.dtype == b.dtype == jnp.float32:
        return None
    for name, aval in (("a", a), ("b", b)):
        if aval.dtype != jnp.bfloat16:
            return f"'{name}' is {aval.dtype}; the kernel takes bfloat16, or float32 for a float32 result"
    if preferred_element_type not in ("bfloat16", "float32"):
        return f"the result is {preferred_element_type}; the kernel gives bfloat16 and float32"
    return None


def dot_gains(a: Any, b: Any, dimension_numbers: Dimensions) -> bool:
    """Whether the kernel beats XLA: bfloat16, large both ways; float32 of few rows or columns, or many small ones."""
    native = _native_module.load()
    isa = None if native is None else native.active_isa()
    left, right = _views(a, b, dimension_numbers)
    batch, k, m = left.shape if left.turned else (left.shape[0], left.shape[2], left.shape[1])
    n = right.shape[1] if right.turned else right.shape[2]
    if a.dtype == jnp.float32:
        if isa not in ("v4", "v4bf16"):
            return False
        if batch > 1:
            return _small_gain(batch, m, k, n, left, right)
        return _few_columns_gain(m, k, n, left, right) or _few_rows_gain(m, k, n, left, right)
    if isa != "v4bf16":
        return False
    return min(m, n, k) >= LEAST_SIDE and 2 * batch * m * n * k >= LEAST_FLOPS


def _few_columns_gain(m: int, k: int, n: int, left: _View, right: _View) -> bool:
    few = left.turned and not right.turned and FEW_COLUMNS[0] <= min(m, n) and max(m, n) <= FEW_COLUMNS[1]
    return few and k >= FEW_COLUMNS_LEAST_ROWS and 2 * m * k * n >= FEW_COLUMNS_LEAST_FLOPS


def _few_rows_gain(m: int, k: int, n: int, left: _View, right: _View) -> bool:
    stays = not left.turned and (right.turned or n % 16 == 0) and min(k, n) >= LEAST_SIDE
    few = FEW_ROWS[0] <= m <= FEW_ROWS[1] and FEW_ROWS_MATRIX[0] <= k * n <= FEW_ROWS_MATRIX[1]
    return stays and few and 2 * m * k * n >= FEW_ROWS_LEAST_FLOPS


def _small_gain(batch: int, m: int, k: int, n: int, left: _View, right: _View) -> bool:
    stay = all(view.order == tuple(range(len(view.order))) for view in (left, right))
    sides = all(SMALL_LEAST <= side <= most for side, most in zip((m, k, n), SMALL_MOST))
    fills = n >= NARROW or m * k <= NARROW_MATRIX
    turns = not right.turned or (m >= TURNED_ROWS and k >= TURNED_STEPS)
    each = 2 * m * k * n
    enough = batch >= SMALL_BATCH and batch * each >= SMALL_LEAST_FLOPS
    return stay and sides and fills and turns and enough and each <= SMALL_MOST_EACH


def _spec(
    name: str, a: tuple[int, ...], b: tuple[int, ...], dimension_numbers: Dimensions, out: str, dtype: str = "bfloat16"
) -> ArgSpec:
    def make(rng: np.random.Generator, dtype: Any) -> tuple[np.ndarray, ...]:
        return rng.standard_normal(a).astype(dtype), rng.standard_normal(b).astype(dtype)

    params = {"dimension_numbers": dimension_numbers, "preferred_element_type": out}
    return ArgSpec(name, make, params, dtypes=(dtype,))


DOT = Op(
    "dot_general",
    _reference,
    target="matrix_product",
    core_rank=None,  # over several devices XLA's own, which it knows how to divide
    refuses=_refuses,
    specs=(
        _spec("dense", (2, 5, 9), (9, 7), (((2,), (0,)), ((), ())), "bfloat16"),
        _spec("weight gradient", (2, 5, 9), (2, 5, 7), (((0, 1), (0, 1)), ((), ())), "float32"),
        _spec("input gradient", (2, 5, 7), (9, 7), (((2,), (1,)), ((), ())), "bfloat16"),
        _spec("batched heads", (2, 5, 3, 8), (2, 6, 3, 8), (((3,), (3,)), ((0, 2), (0, 2))), "float32"),
        _spec("few rows", (19, 33), (33, 48), (((1,), (0,)), ((), ())), "float32", "float32"),
        _spec("few columns", (1100, 13), (1100, 41), (((0,), (0,)), ((), ())), "float32", "float32"),
        _spec("few columns, swapped", (300, 70), (300, 3), (((0,), (0,)), ((), ())), "float32", "float32"),
        _spec("many small", (17, 27, 19), (17, 19, 21), (((2,), (1,)), ((0,), (0,))), "float32", "float32"),
        _spec("many small, turned", (17, 19, 27), (17, 66, 19), (((1,), (2,)), ((0,), (0,))), "float32", "float32"),
        _spec("few rows, turned", (13, 300), (37, 300), (((1,), (1,)), ((), ())), "float32", "float32"),
    ),
)
DOT.on("cpu", dataclasses.replace(DOT.lowerings["cpu"], expression=_product))
