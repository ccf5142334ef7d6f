"""Results beyond the caches, which are stored past them: the bits of the same rows in parts that are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxext import kernels

BYTES, COLUMNS = 16 << 20, 1024  # native/cpu/rows.h: from here on stores do not read the line they write

FUNCTIONS = {
    "layer_norm": lambda x, _: kernels.layer_norm(x),
    "rms_norm": lambda x, _: kernels.rms_norm(x),
    "group_norm": lambda x, _: kernels.group_norm(x.reshape(-1, 64, COLUMNS), groups=8).reshape(x.shape),
    "cross_entropy": kernels.softmax_cross_entropy,
    "target_cross_entropy": lambda x, _: kernels.softmax_cross_entropy(x, jnp.full(x.shape, 1 / COLUMNS, x.dtype)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_large_results_have_the_bits_of_small_ones(name, dtype):
    rows = BYTES // (COLUMNS * jnp.dtype(dtype).itemsize)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((rows, COLUMNS), np.float32), dtype)
    labels = jnp.asarray(rng.integers(0, COLUMNS, rows), jnp.int32)

    @jax.jit
    def both(x, labels):
        out, pull = jax.vjp(lambda x: FUNCTIONS[name](x, labels), x)
        return out, pull(jnp.ones_like(out))[0]

    half = rows // 2
    parts = both(x[:half], labels[:half]), both(x[half:], labels[half:])
    for whole, *pieces in zip(both(x, labels), *parts):
        np.testing.assert_array_equal(whole, jnp.concatenate(pieces))
