"""`lax.sort` on its kernel: the very results of stock JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exchanged import DTYPES, any_bits, assert_exchanged, assert_same, calls, needs_kernels
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxext.kernels._sort import SORT

pytestmark = needs_kernels


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_pattern_has_the_place_that_stock_gives_it(dtype):
    x = any_bits(np.random.default_rng(0), (3, 5000), dtype)
    assert_exchanged("sort", jnp.sort, x)
    assert_exchanged("sort", jnp.argsort, x)


@given(n=st.integers(1, 70), levels=st.integers(1, 40), rows=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_equal_elements_keep_their_order_for_any_length(n, levels, rows):
    x = np.random.default_rng(n + levels).integers(0, levels, (rows, n)).astype(np.float32)
    places = np.broadcast_to(np.arange(n, dtype=np.int32), x.shape)
    ordered, order = SORT(jnp.asarray(x), jnp.asarray(places))
    np.testing.assert_array_equal(order, np.argsort(x, axis=-1, kind="stable"))
    np.testing.assert_array_equal(ordered, np.sort(x, axis=-1))


@pytest.mark.parametrize("n", [23, 24, 25, 255, 4095, 4096, 4097, 70000])
def test_both_digit_widths_and_the_insertion_agree_with_stock(n):
    x = jnp.asarray(np.random.default_rng(n).standard_normal((2, n)), jnp.float32)
    places = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), x.shape)
    assert_same(SORT(x, places), jax.jit(lambda *xs: jax.lax.sort(xs, num_keys=1))(x, places))


@pytest.mark.parametrize("dtype", ["bool", "int8", "bfloat16", "float32", "int32"])
def test_operands_of_every_width_follow_their_key(dtype):
    rng = np.random.default_rng(1)
    keys = jnp.asarray(rng.integers(0, 9, (4, 700)), jnp.int32)
    follower = jnp.asarray(rng.integers(0, 2, (4, 700))).astype(dtype)
    assert_exchanged("sort", lambda k, f: jax.lax.sort((k, f, k + 1), num_keys=1), keys, follower)


def test_eight_byte_operands_follow_their_key():
    with jax.enable_x64(True):
        keys = jnp.asarray(np.random.default_rng(2).integers(0, 9, (4, 700)), jnp.int32)
        assert_exchanged(
            "sort", lambda k, f: jax.lax.sort((k, f), num_keys=1), keys, jnp.arange(2800.0).reshape(4, 700)
        )


def test_permutations_and_descending_orders_are_stocks():
    key = jax.random.key(3)
    assert_exchanged("sort", lambda k: jax.random.permutation(k, 20000), key, times=2)
    x = jax.random.normal(key, (3, 2000))
    assert_exchanged("sort", lambda x: jnp.argsort(x, descending=True), x)


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x: jnp.sort(x, axis=0), (2000, 3)),
        (lambda x: jax.lax.sort((x, x), num_keys=2), (2, 2000)),
        (jnp.sort, (2, 9)),
    ],
    ids=["another axis", "two keys", "few elements"],
)
def test_what_the_kernel_does_not_gain_on_stays_with_stock(function, shape):
    assert calls("sort", function, jnp.ones(shape)) == 0


def test_gradients_of_a_sorted_array_go_where_stock_sends_them():
    x = jnp.asarray(np.random.default_rng(4).standard_normal((2, 1000)), jnp.float32)
    weights = jnp.arange(1000.0)
    assert_exchanged("sort", jax.grad(lambda x: jnp.sum(jnp.sort(x) * weights)), x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
@pytest.mark.parametrize("shape", [(1, 32768), (1, 100_001), (1, 1, 70_000)])
def test_a_long_row_that_several_threads_share_is_sorted_and_stable(shape, dtype):
    x = any_bits(np.random.default_rng(8), shape, dtype)
    assert_exchanged("sort", lambda x: jnp.sort(x), x)
    levels = jnp.asarray(np.random.default_rng(9).integers(-3, 4, shape), dtype)
    assert_exchanged("sort", lambda x: jnp.argsort(x, stable=True), levels)
