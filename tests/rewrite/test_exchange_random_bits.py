"""The default generator's bits on their kernel: the very numbers of stock JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exchanged import assert_exchanged, calls, needs_kernels
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxext.kernels._random_bits import RANDOM_BITS

pytestmark = needs_kernels
KEY = jax.random.key(5)


@pytest.mark.parametrize(
    "draw",
    [
        lambda k: jax.random.bits(k, (777,)),
        lambda k: jax.random.bits(k, (777,), jnp.uint8),
        lambda k: jax.random.bits(k, (777,), jnp.uint16),
        lambda k: jax.random.uniform(k, (30, 77)),
        lambda k: jax.random.normal(k, (30, 77)),
        lambda k: jax.random.normal(k, (30, 77), jnp.bfloat16),
        lambda k: jax.random.bernoulli(k, 0.1, (30, 77)),
        lambda k: jax.random.categorical(k, jnp.zeros((300, 7))),
        lambda k: jax.random.truncated_normal(k, -2, 2, (30, 77)),
        lambda k: jax.random.normal(jax.random.key_data(k), (30, 77)),
    ],
    ids=["bits", "bytes", "halves", "uniform", "normal", "bf16", "bernoulli", "categorical", "truncated", "raw key"],
)
def test_every_distribution_draws_the_same_numbers(draw):
    assert_exchanged("random_bits", draw, KEY)


def test_the_numbers_are_the_same_under_vmap_scan_and_differentiation():
    keys = jax.random.split(KEY, 5)
    assert_exchanged("random_bits", jax.vmap(lambda k: jax.random.normal(k, (100, 7))), keys)

    def body(key, _):
        key, now = jax.random.split(key)
        return key, jax.random.uniform(now, (999,))

    assert_exchanged("random_bits", lambda k: jax.lax.scan(body, k, None, length=4)[1], KEY)
    dropout = lambda x, k: jnp.sum(jnp.where(jax.random.bernoulli(k, 0.5, x.shape), x * x, 0))  # noqa: E731
    assert_exchanged("random_bits", jax.grad(dropout), jnp.ones((40, 50)), KEY)


@given(
    words=st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
    n=st.sampled_from([1, 7, 31, 32, 33, 63, 64, 65, 16383, 16384, 16385, 40000]),
    width=st.sampled_from([8, 16, 32]),
)
@settings(max_examples=30, deadline=None)
def test_any_key_and_any_length(words, n, width):
    key = jnp.asarray(words, jnp.uint32)
    (ours,) = RANDOM_BITS(key, bit_width=width, shape=(n,))
    np.testing.assert_array_equal(ours, RANDOM_BITS.reference(key, bit_width=width, shape=(n,))[0])


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_other_generators_stay_with_stock(impl):
    assert calls("random_bits", lambda k: jax.random.normal(k, (3000,)), jax.random.key(0, impl=impl)) == 0


def test_the_generators_older_form_stays_with_stock():
    with jax.threefry_partitionable(False):
        assert calls("random_bits", lambda k: jax.random.normal(k, (3000,)), KEY) == 0


def test_reuse_of_a_key_is_still_found():
    with jax.debug_key_reuse(True):
        assert calls("random_bits", lambda k: jax.random.normal(k, (3000,)), KEY) == 0


def test_few_numbers_stay_with_stock():
    assert calls("random_bits", lambda k: jax.random.normal(k, (4,)), KEY) == 0
