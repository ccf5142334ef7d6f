"""Matrix product of operands stored either way round, accumulated in float32, and added in place to a sum.

Blocked for registers and caches after Goto and van de Geijn, "Anatomy of high-performance matrix multiplication"
(2008).
XLA's dot cannot add to its result, so that a sum of products would take a second array of the result's size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import mlir

from jaxext.kernels import _sharding
from jaxext.kernels._op import ArgSpec, Op, Role

__all__ = ["OPS", "matrix_product"]

_NATIVE = (jnp.float32, jnp.bfloat16)


def _reference(
    *operands: jax.Array, a_turned: bool, b_turned: bool, rounds: bool, out_dtype: str | None = None
) -> tuple[jax.Array, ...]:
    a, b, *sums = operands
    wide = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    if rounds:
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    batch = tuple(range(a.ndim - 2))
    contract = ((len(batch) + (not a_turned),), (len(batch) + b_turned,))
    product = jax.lax.dot_general(a, b, (contract, (batch, batch)), preferred_element_type=wide)
    return (sums[0] + product if sums else product.astype(out_dtype or wide),)


def _refuses(*avals: Any, **_: Any) -> str | None:
    for name, aval in zip(("a", "b"), avals):
        if aval.dtype not in _NATIVE:
            return f"'{name}' is {aval.dtype}; the kernel takes float32 and bfloat16"
    return None


def _attributes(**params: Any) -> Mapping[str, Any]:
    return {name: params[name] for name in ("a_turned", "b_turned", "rounds")}


def _roles(n_operands: int, **_: Any) -> tuple[Role, ...]:
    return ("shared",) * n_operands


class _Product(Op):
    """Over several devices XLA's own dot: it knows how to divide one."""

    def _lower_native(self, ctx: mlir.LoweringRuleContext, *args: Any, **params: Any) -> Any:
        if _sharding.spans_devices(ctx):
            return self._lower(ctx, *args, **params)
        return super()._lower_native(ctx, *args, **params)


def _op(name: str, **options: Any) -> Op:
    return _Product(
        name, _reference, target="matrix_product", core_rank=2, attributes=_attributes, roles=_roles, refuses=_refuses,
        **options,
    )  # fmt: skip


def _spec(name: str, *shapes: tuple[int, ...], a_turned: bool = False, b_turned: bool = False) -> ArgSpec:
    def make(rng: np.random.Generator, dtype: Any) -> tuple[np.ndarray, ...]:
        # A sum is accumulated in float32 whatever the operands are.
        kinds = (dtype, dtype, jnp.promote_types(dtype, jnp.float32))
        return tuple(rng.standard_normal(shape).astype(kind) for shape, kind in zip(shapes, kinds))

    return ArgSpec(name, make, {"a_turned": a_turned, "b_turned": b_turned, "rounds": False})


PRODUCT = _op(
    "matrix_product",
    specs=(
        _spec("plain", (7, 33), (33, 17)),
        _spec("turned", (33, 7), (17, 33), a_turned=True, b_turned=True),
        _spec("several blocks", (300, 20), (20, 270)),
        _spec("batched", (3, 7, 9), (3, 9, 5)),
    ),
)
ADD_PRODUCT = _op("add_matrix_product", aliases={2: 0}, specs=(_spec("added", (7, 33), (33, 17), (7, 17)),))
OPS = (PRODUCT, ADD_PRODUCT)


def matrix_product(
    a: jax.Array,
    b: jax.Array,
    add_to: jax.Array | None = None,
    *,
    a_turned: bool = False,
    b_turned: bool = False,
    rounds: bool = False,
) -> jax.Array:
    """a @ b, accumulated in at least float32.

    Args:
      a: [m, k], or [k, m] where `a_turned`.
      b: [k, n], or [n, k] where `b_turned`.
      add_to: [m, n] or None: the product is added to it, in place where it is not used again.
      a_turned: whether a is stored as its transpose.
      b_turned: whether b is stored as its transpose.
      rounds: whether both may be rounded to bfloat16 first.

    Returns:
      [m, n]
    """
    params = {"a_turned": bool(a_turned), "b_turned": bool(b_turned), "rounds": bool(rounds)}
    return (PRODUCT(a, b, **params) if add_to is None else ADD_PRODUCT(a, b, add_to, **params))[0]
