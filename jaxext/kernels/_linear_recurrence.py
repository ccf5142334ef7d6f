"""First-order linear recurrences h[t] = a[t] h[t-1] + b[t], as state-space models scan, forward and backward.

Blelloch, "Prefix sums and their applications" (1990), computes them as a tree, and `jax.lax.associative_scan` so traces
them: some twelve passes over memory a level. Step by step they are one pass, which is all that two cores can use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxext.kernels._op import ArgSpec, Op, derive

__all__ = ["LINEAR_RECURRENCE", "combine"]

_NATIVE = ("float32", "bfloat16")
# Below, XLA computes all in one go. Measured in tests/bench/bench_linear_recurrence.py.
LEAST_STEPS, LEAST_COLUMNS = 8, 8


def combine(left: Sequence[jax.Array], right: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(a, b) of two steps taken one after the other."""
    return left[0] * right[0], right[0] * left[1] + right[1]


def _reference(a: jax.Array, b: jax.Array) -> Sequence[jax.Array]:
    """h[..., steps, columns], where h before the first step is zero."""
    return (jax.lax.associative_scan(combine, (a, b), axis=a.ndim - 2)[1],)


def _check(a: Any, b: Any, *_: Any, **__: Any) -> None:
    if len(a.shape) < 2 or a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(
            "jaxext linear_recurrence: arguments 'a' and 'b' must be [..., steps, columns] of one shape and type, got "
            f"{a.dtype}{tuple(a.shape)} and {b.dtype}{tuple(b.shape)}; broadcast and cast them first"
        )


def _refuses(a: Any, *_: Any, **__: Any) -> str | None:
    if a.dtype.name not in _NATIVE:
        return f"'a' is {a.dtype}; the kernel takes {' and '.join(_NATIVE)}"
    if a.shape[-2] < LEAST_STEPS or a.shape[-1] < LEAST_COLUMNS:
        return f"{a.shape[-2]} steps of {a.shape[-1]} columns are few"
    return None


def _backward_attributes(*, wrt: tuple[int, ...]) -> Mapping[str, Any]:
    return {"wants_a": 0 in wrt, "wants_b": 1 in wrt}


def _spec(name: str, *shape: int) -> ArgSpec:
    def make(rng: np.random.Generator, dtype: Any) -> list[np.ndarray]:
        a = 1 - 0.5 * rng.random(shape)
        return [x.astype(jnp.dtype(dtype)) for x in (a, rng.standard_normal(shape))]

    return ArgSpec(name, make)


LINEAR_RECURRENCE = Op(
    "linear_recurrence",
    _reference,
    target="linear_recurrence",
    core_rank=2,
    refuses=_refuses,
    check=_check,
    specs=(
        _spec("sequences", 2, 33, 24),
        _spec("batched twice", 2, 3, 16, 9),
        _spec("one sequence", 100, 40),
        _spec("blocks of columns", 2, 9, 600),
        _spec("no sequences", 0, 9, 16),
        _spec("few", 3, 4, 5),
    ),
)
# Tracing the tree to learn its type would take as long as the program's own trace of it.
LINEAR_RECURRENCE.out_avals = lambda a, b: (a.update(weak_type=False),)
_BACKWARD = Op(
    "linear_recurrence_backward",
    None,
    target="linear_recurrence_backward",
    core_rank=2,
    attributes=_backward_attributes,
    refuses=_refuses,
)
derive(LINEAR_RECURRENCE, _BACKWARD, saved=(0,))
