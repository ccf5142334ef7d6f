"""`argmax` and `argmin` on their kernel: the very results of stock JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exchanged import DTYPES, any_bits, assert_exchanged, calls, needs_kernels
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxext.kernels._arg_reduce import ARG_REDUCE

pytestmark = needs_kernels


@pytest.mark.parametrize("find", [jnp.argmax, jnp.argmin])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_pattern_along_every_axis(dtype, axis, find):
    x = any_bits(np.random.default_rng(0), (9, 30, 77), dtype)
    assert_exchanged("arg_reduce", lambda x: find(x, axis), x)


@pytest.mark.parametrize("find", [jnp.argmax, jnp.argmin])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_denormals_and_zeros_of_both_signs_are_compared_as_stock_does(dtype, find):
    rng = np.random.default_rng(1)
    width = jnp.dtype(dtype).itemsize
    raw = rng.integers(0, 40, (50, 300)) | (rng.integers(0, 2, (50, 300)) << (8 * width - 1))
    x = jnp.asarray(raw.astype(f"u{width}").view(jnp.dtype(dtype)))
    for axis in (0, 1):
        assert_exchanged("arg_reduce", lambda x, axis=axis: find(x, axis), x)


@given(n=st.integers(1, 70), levels=st.integers(1, 5), inner=st.sampled_from([1, 2, 15, 16, 17, 33, 64, 65]))
@settings(max_examples=40, deadline=None)
def test_the_first_of_equal_elements_wins_for_any_shape(n, levels, inner):
    x = np.random.default_rng(n * inner).integers(0, levels, (2, n, inner)).astype(np.float32)
    (found,) = ARG_REDUCE(jnp.asarray(x), axis=-2, largest=True)
    np.testing.assert_array_equal(found, x.argmax(1))
    (found,) = ARG_REDUCE(jnp.asarray(x.swapaxes(1, 2)), axis=-1, largest=False)
    np.testing.assert_array_equal(found, x.argmin(1))


@pytest.mark.parametrize("place", [0, 1, 2047, 2048, 5000, 69999])
def test_the_block_that_has_the_largest_element_is_found(place):
    x = jnp.zeros(70000).at[place].set(1).at[69999].set(1)
    (found,) = ARG_REDUCE(x, axis=-1, largest=True)
    assert found == place
    (found,) = ARG_REDUCE(x.at[place].set(jnp.nan), axis=-1, largest=False)
    assert found == place


def test_what_the_kernel_does_not_gain_on_stays_with_stock():
    assert calls("arg_reduce", lambda x: jnp.argmax(x, 1), jnp.ones((8, 8))) == 0
    with jax.enable_x64(True):
        assert calls("arg_reduce", lambda x: jnp.argmax(x, 1), jnp.ones((80, 8000))) == 0  # 64-bit places
