"""Running sums, products and extremes on their kernel: nearer to the exact ones than stock JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exchanged import any_bits, assert_exchanged, assert_same, calls, needs_kernels

import jaxext
from jaxext.kernels._cumulative import CUMULATIVE

pytestmark = needs_kernels
KINDS = {
    "cumsum": np.cumsum,
    "cumprod": np.cumprod,
    "cummax": np.maximum.accumulate,
    "cummin": np.minimum.accumulate,
    "cumlogsumexp": np.logaddexp.accumulate,
}


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


# Around the ends of XLA's blocks of 16, of 16 of those and so on, and lengths that are none of them.
LENGTHS = (8, 15, 16, 17, 32, 33, 255, 256, 257, 272, 273, 1000, 4095, 4096, 4097, 5000, 65536, 65537, 300_001)


def assert_stocks_bits(x, axis, reverse):
    (ours,) = CUMULATIVE(x, axis=axis - x.ndim, kind="cumsum", reverse=reverse)
    assert_same(ours, jax.lax.cumsum(x, axis=axis, reverse=reverse))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_sums_of_float32_are_stocks_to_the_bit_at_every_length(axis, reverse):
    rng = np.random.default_rng(6)
    for n in (*LENGTHS, *rng.integers(35, 5000, 3).tolist()):
        x = rng.standard_normal((max(1, 4096 // n), n)).astype(np.float32)
        assert_stocks_bits(x if axis else x.T.copy(), axis, reverse)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("shape", "axis"), [((3, 700, 5), 1), ((700, 3, 77), 0), ((2, 1, 9, 300), 3), ((40, 300, 1), 1)]
)
def test_sums_along_any_axis_of_a_batch_are_stocks_to_the_bit(shape, axis, reverse):
    x = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    assert_stocks_bits(x, axis, reverse)
    batched = jax.vmap(lambda row: jax.lax.cumsum(row, axis=axis, reverse=reverse), in_axes=-1, out_axes=-1)
    assert calls("cumulative", batched, x[..., None]) == 1
    assert_exchanged("cumulative", batched, x[..., None])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("scale", [1e-38, 1e38], ids=["denormals", "overflows"])
def test_sums_that_leave_the_normal_range_are_stocks_to_the_bit(scale, axis, reverse):
    rng = np.random.default_rng(8)
    x = (scale * rng.uniform(-3, 3, (5000, 300))).astype(np.float32)
    x[rng.random(x.shape) < 0.5] = -0.0
    assert_stocks_bits(x if axis == 0 else x.T.copy(), axis, reverse)


def test_a_sum_inside_a_larger_program_has_the_bits_of_stocks_sum():
    x, y = (np.random.default_rng(9).standard_normal((3, 5000)).astype(np.float32) for _ in range(2))
    # What is added is a product, and the sum is multiplied and added to: nothing is contracted across its borders.
    function = lambda x, y: jnp.cumsum(x * y + x, 1) * y + x  # noqa: E731
    assert_same(*(f(function)(x, y) for f in (jaxext.accelerate, jax.jit)))


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


@pytest.mark.parametrize("dtype", ["int32", "uint32"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(3, 1500), (1, 70001), (2000, 77), (5000, 1)])
@pytest.mark.parametrize("kind", ["cumsum", "cumprod", "cummax", "cummin"])
def test_whole_numbers_wrap_around_as_stocks(kind, shape, reverse, dtype):
    x = any_bits(np.random.default_rng(3), shape, "uint32").view(dtype)
    x = x | 1 if kind == "cumprod" else x  # odd: a product of others is soon zero
    axis = int(np.argmax(shape))
    assert_exchanged("cumulative", lambda x: getattr(jax.lax, kind)(x, axis=axis, reverse=reverse), x)


def of_logarithms(rng, kind, shape):
    along = np.arange(shape[0])[:, None]
    return {
        "far apart": 1000 * rng.standard_normal(shape),
        "rising slowly": 1e-3 * along * np.ones(shape),
        "rising fast": 1.0 * along * np.ones(shape),
        "falling": -1e-2 * along * np.ones(shape),
        "probabilities": np.full(shape, -np.log(shape[0])),
        "large": 1e37 * rng.standard_normal(shape),
    }[kind]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", ["far apart", "rising slowly", "rising fast", "falling", "probabilities", "large"])
def test_logarithms_of_sums_are_as_exact_as_stocks_whatever_the_order_of_the_terms(kind, axis, dtype):
    x = jnp.asarray(of_logarithms(np.random.default_rng(4), kind, (5000, 3)), dtype)
    x = x if axis == 0 else x.T
    function = lambda x: jax.lax.cumlogsumexp(x, axis=axis)  # noqa: E731
    assert calls("cumulative", function, x) == 1
    exact = np.logaddexp.accumulate(np.asarray(x, np.float64), axis=axis)
    ours, stock = (np.asarray(f(x), np.float64) for f in (jaxext.accelerate(function), jax.jit(function)))
    # One rounding of the result where stock is exact by chance.
    rounding = float(jnp.finfo(dtype).eps) * np.abs(exact).max()
    assert np.abs(ours - exact).max() <= 2 * np.abs(stock - exact).max() + rounding


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("axis", [0, 1])
def test_logarithms_of_sums_meet_infinities_and_nan_as_stocks(axis, dtype):
    rng = np.random.default_rng(5)
    x = rng.standard_normal((300, 90))
    x = np.where(rng.random(x.shape) < 0.01, rng.choice([np.inf, -np.inf, -np.inf, np.nan], x.shape), x)
    x[:, :9], x[:9] = -np.inf, -np.inf
    x[0, 0], x[1, 0], x[0, 1], x[1, 1] = np.nan, np.inf, np.inf, np.nan
    x = jnp.asarray(x, dtype)
    function = lambda x: jax.lax.cumlogsumexp(x, axis=axis)  # noqa: E731
    assert calls("cumulative", function, x) == 1
    ours, stock = (np.asarray(f(x), np.float64) for f in (jaxext.accelerate(function), jax.jit(function)))
    special = ~np.isfinite(stock)
    np.testing.assert_array_equal(ours[special], stock[special])
    assert np.isfinite(ours[~special]).all()


def test_what_the_kernel_does_not_take_stays_with_stock():
    assert calls("cumulative", lambda x: jnp.cumsum(x, 1), jnp.ones((8, 800), jnp.int8)) == 0
    assert calls("cumulative", lambda x: jax.lax.cumlogsumexp(x, axis=1), jnp.ones((8, 800), jnp.float16)) == 0
    assert calls("cumulative", lambda x: jnp.cumsum(x, 1), jnp.ones((8, 8))) == 0
