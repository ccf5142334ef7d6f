"""Running sums, products and extremes on their kernel: nearer to the exact ones than stock JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exchanged import assert_exchanged, calls, needs_kernels

import jaxext

pytestmark = needs_kernels
KINDS = {"cumsum": np.cumsum, "cumprod": np.cumprod, "cummax": np.maximum.accumulate, "cummin": np.minimum.accumulate}


@pytest.mark.parametrize("shape", [(3, 1, 5000), (2, 700, 64), (1, 300, 77), (1, 1, 70001), (2, 2500, 1)])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_at_most_those_of_stock(kind, reverse, shape):
    axis = int(np.argmax(shape))
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(shape) if kind != "cumprod" else 1 + 0.01 * rng.standard_normal(shape)).astype(np.float32)
    function = lambda x: getattr(jax.lax, kind)(x, axis=axis, reverse=reverse)  # noqa: E731
    assert calls("cumulative", function, x) == 1
    order = (slice(None),) * axis + (slice(None, None, -1 if reverse else 1),)
    exact = KINDS[kind](x.astype(np.float64)[order], axis=axis)[order]
    ours, stock = (np.asarray(f(x), np.float64) for f in (jaxext.accelerate(function), jax.jit(function)))
    # One rounding of the exact result where stock itself is exact.
    assert np.abs(ours - exact).max() <= np.abs(stock - exact).max() + np.finfo(np.float32).eps * np.abs(exact).max()


@pytest.mark.parametrize("kind", ["cummax", "cummin"])
@pytest.mark.parametrize("axis", [0, 1])
def test_extremes_with_nans_infinities_and_zeros_of_both_signs_are_stocks(kind, axis):
    rng = np.random.default_rng(1)
    special = np.array([0.0, -0.0, np.inf, -np.inf, 1.0, -1.0], np.float32)
    x = special[rng.integers(0, 6, (80, 90))]
    x[40, 50] = np.nan
    for dtype in (jnp.float32, jnp.bfloat16):
        assert_exchanged("cumulative", lambda x: getattr(jax.lax, kind)(x, axis=axis), jnp.asarray(x, dtype))


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_a_sum_that_meets_infinity_or_nan_stays_there(special):
    x = np.ones((2, 5000), np.float32)
    x[1, 3000] = special
    ours, stock = (np.asarray(f(lambda x: jnp.cumsum(x, 1))(x)) for f in (jaxext.accelerate, jax.jit))
    np.testing.assert_array_equal(ours, stock)


def test_gradients_are_running_sums_too():
    x = jnp.asarray(np.random.default_rng(2).standard_normal((4, 3000)), jnp.float32)
    function = jax.grad(lambda x: jnp.sum(jnp.sin(jnp.cumsum(x, 1))))
    assert calls("cumulative", function, x) == 2
    np.testing.assert_allclose(jaxext.accelerate(function)(x), jax.jit(function)(x), rtol=1e-4, atol=1e-3)


def test_what_the_kernel_does_not_take_stays_with_stock():
    assert calls("cumulative", lambda x: jnp.cumsum(x, 1), jnp.ones((8, 800), jnp.int32)) == 0
    assert calls("cumulative", lambda x: jnp.cumsum(x, 1), jnp.ones((8, 8))) == 0
