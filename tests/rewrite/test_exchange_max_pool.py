"""Max-pooling and its gradient on their kernels: stock's results bit for bit, ties, NaN and padding included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exchanged import assert_exchanged, assert_same, calls, needs_kernels

import jaxext

pytestmark = needs_kernels
WINDOWS = [
    ((2, 2), (2, 2), "VALID"),
    ((3, 3), (2, 2), "SAME"),
    ((3, 3), (1, 1), "SAME"),
    ((2, 3), (3, 1), "SAME"),
    ((3, 2), (1, 2), ((2, 1), (1, 1))),
    ((2, 2), (5, 4), "VALID"),
    ((1, 4), (1, 4), "VALID"),
    ((4, 4), (1, 1), ((6, 6), (6, 6))),  # some windows hold nothing but padding
]
SHAPES = [(2, 12, 11, 19), (1, 70, 9, 64), (9, 6, 6, 4)]


def pool(x, window, strides, padding):
    explicit = padding if isinstance(padding, str) else ((0, 0), *padding, (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, *window, 1), (1, *strides, 1), explicit)


def gradient_of(pool):
    return lambda x, g: jax.vjp(pool, x)[1](g)[0]


def numbers(rng, shape, dtype):
    """Few different ones, so that windows have ties; a tenth of them special."""
    special = np.array([np.nan, np.inf, -np.inf, -np.inf, 0.0, -0.0])
    x = np.where(rng.random(shape) < 0.9, rng.integers(-3, 4, shape), special[rng.integers(0, 6, shape)])
    return jnp.asarray(x, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("window", "strides", "padding"), WINDOWS)
def test_the_largest_and_their_gradients_are_stocks(window, strides, padding, shape, dtype):
    rng = np.random.default_rng(0)
    x = numbers(rng, shape, dtype)
    function = lambda x: pool(x, window, strides, padding)  # noqa: E731
    assert_exchanged("max_pool", function, x, times=int(window != strides))
    g = jnp.asarray(rng.standard_normal(jax.eval_shape(function, x).shape), dtype)
    assert_exchanged("max_pool_gradient", gradient_of(function), x, g)


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf, 0.0])
def test_windows_of_one_value_are_stocks(special):
    x = jnp.full((2, 9, 8, 16), special, jnp.float32)
    function = lambda x: pool(x, (3, 3), (2, 2), "SAME")  # noqa: E731
    assert_exchanged("max_pool", function, x)
    assert_exchanged("max_pool_gradient", gradient_of(function), x, jnp.ones((2, 5, 4, 16)))


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf, -0.0])
def test_special_gradients_reach_their_element_and_no_other(special):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((2, 9, 8, 16)), jnp.float32)
    g = jnp.asarray(np.where(rng.random((2, 5, 4, 16)) < 0.2, special, 1.0), jnp.float32)
    assert_exchanged("max_pool_gradient", gradient_of(lambda x: pool(x, (3, 3), (2, 2), "SAME")), x, g)


@pytest.mark.parametrize("shape", [(3, 200, 8), (2, 1, 9, 300), (2, 3, 20, 20, 8)])
def test_windows_over_one_dimension_and_several_batch_dimensions(shape):
    rank = len(shape)
    window, strides = ((1,) * (rank - 2) + (n, 1) if rank < 5 else (1, 1, n, n, 1) for n in (3, 2))
    function = lambda x: jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, "SAME")  # noqa: E731
    x = numbers(np.random.default_rng(2), shape, "float32")
    assert_exchanged("max_pool", function, x)
    assert_exchanged("max_pool_gradient", gradient_of(function), x, jnp.ones(jax.eval_shape(function, x).shape))


def test_a_train_step_calls_each_kernel_once_and_its_gradient_is_stocks():
    x = numbers(np.random.default_rng(3), (4, 16, 16, 8), "float32")
    loss = lambda x: jnp.sum(jnp.tanh(pool(x, (3, 3), (2, 2), "SAME")))  # noqa: E731
    step = jax.grad(lambda x: loss(jnp.where(jnp.isfinite(x), x, 0)))
    assert calls("max_pool", step, x) == calls("max_pool_gradient", step, x) == 1
    np.testing.assert_allclose(jaxext.accelerate(step)(x), jax.jit(step)(x), rtol=1e-6)


def test_second_derivatives_are_stocks():
    x = jnp.asarray(np.random.default_rng(4).standard_normal((2, 8, 8, 8)), jnp.float32)
    once = jax.grad(lambda x: jnp.sum(pool(x, (2, 2), (2, 2), "VALID") ** 3))
    twice = jax.grad(lambda x: jnp.sum(once(x) ** 2))
    assert_same(jaxext.accelerate(twice)(x), jax.jit(twice)(x))


def test_what_the_kernels_do_not_take_stays_with_stock():
    square = lambda x, window=(1, 3, 3, 1): jax.lax.reduce_window(  # noqa: E731
        x, -jnp.inf, jax.lax.max, window, (1, 1, 1, 1), "VALID"
    )
    x = jnp.ones((4, 16, 16, 16))
    assert calls("max_pool", square, x) == 1
    assert calls("max_pool", square, x.astype(jnp.float16)) == 0
    assert calls("max_pool", square, x[..., :3]) == 0
    assert calls("max_pool", lambda x: square(x, (1, 1, 2, 2)), x) == 0  # channels first
    assert calls("max_pool", lambda x: square(x, (1, 2, 2, 2)), x) == 0
    assert calls("max_pool", lambda x: pool(x, (2, 2), (2, 2), "VALID"), x) == 0  # XLA reshapes and reduces
    smallest = lambda x: jax.lax.reduce_window(x, jnp.inf, jax.lax.min, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")  # noqa: E731
    assert calls("max_pool_gradient", jax.grad(lambda x: jnp.sum(smallest(x))), x) == 0
    holes = lambda x: jax.lax.reduce_window(  # noqa: E731
        x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "VALID", window_dilation=(1, 2, 2, 1)
    )
    assert calls("max_pool", holes, x) == 0
    left_out = jaxext.accelerate(square, exclude="max_pool").lower(x).as_text()
    assert "@jaxext_max_pool" not in left_out
