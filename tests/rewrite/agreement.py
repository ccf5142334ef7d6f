"""Checks that a function on jaxext's kernels says what stock JAX says, values and gradients, and what it ran on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxext


def _loss(function: Callable[..., Any]) -> Callable[..., jax.Array]:
    """A scalar of all outputs whose cotangents differ from element to element and are of order 1."""

    def loss(*args: Any) -> jax.Array:
        total = jnp.zeros(())
        for leaf in jax.tree.leaves(function(*args)):
            weights = 1.0 + 0.5 * np.sin(np.arange(leaf.size)).reshape(leaf.shape)
            total += jnp.sum(weights.astype(np.float32) * leaf.astype(jnp.float32))
        return total

    return loss


def report_of(function: Callable[..., Any], *args: Any) -> jaxext.Report:
    """What `jaxext.explain` says of the gradient of `function`."""
    which = tuple(i for i, arg in enumerate(args) if jnp.issubdtype(jnp.asarray(arg).dtype, jnp.floating))
    return jaxext.explain(jax.jit(jax.grad(_loss(function), argnums=which)))(*args)


def assert_agrees(function: Callable[..., Any], *args: Any, tolerance: float = 2e-5) -> None:
    """Values and gradients with and without jaxext agree, relative to each leaf's largest element."""
    which = tuple(i for i, arg in enumerate(args) if jnp.issubdtype(jnp.asarray(arg).dtype, jnp.floating))
    step = jax.value_and_grad(_loss(function), argnums=which)

    def both(*args: Any) -> Any:
        return function(*args), step(*args)

    with jaxext.disabled():
        expected = jax.jit(both)(*args)
    found = jaxext.accelerate(both)(*args)
    for stock, ours in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert stock.dtype == ours.dtype
        stock, ours = (np.asarray(x, np.float64) for x in (stock, ours))
        finite = stock[np.isfinite(stock)]
        scale = np.abs(finite).max(initial=1e-3)
        np.testing.assert_allclose(ours / scale, stock / scale, rtol=0, atol=tolerance)


def assert_matched(
    function: Callable[..., Any],
    *args: Any,
    kernel: str,
    detail: str | None = None,
    count: int = 1,
    tolerance: float = 2e-5,
) -> None:
    """`kernel` was found `count` times, described as `detail`, and agrees with stock JAX."""
    report = report_of(function, *args)
    entries = [entry for entry in report.replaced if entry.kernel == kernel]
    assert len(entries) == count, str(report)
    if detail is not None:
        assert {entry.detail for entry in entries} == {detail}
    assert_agrees(function, *args, tolerance=tolerance)


def assert_missed(function: Callable[..., Any], *args: Any, kernel: str, reason: str) -> None:
    """`kernel` was a near miss for this reason, and the result is stock JAX's."""
    report = report_of(function, *args)
    assert kernel not in report.kernels(), str(report)
    assert reason in [entry.reason for entry in report.missed if entry.kernel == kernel], str(report)
    assert_agrees(function, *args)


def normals(seed: int, *shapes: Sequence[int], dtype: Any = jnp.float32) -> list[jax.Array]:
    """Arrays of standard normals."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
