"""What the tests of exchanged primitives share: any bits, equal bits, and proof that the kernel is called."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxext
from jaxext.kernels._element import ORDERED as DTYPES
from jaxext.kernels._op import native_status

__all__ = ["DTYPES", "any_bits", "assert_exchanged", "assert_same", "bits", "calls", "needs_kernels"]

needs_kernels = pytest.mark.skipif(bool(native_status()), reason="no native kernels here")


def bits(x):
    """The bits of an array; every NaN has the same."""
    x = np.asarray(x)
    if x.dtype == bool:
        return x
    raw = x.view(f"u{x.dtype.itemsize}")
    with np.errstate(invalid="ignore"):
        return np.where(x != x, np.iinfo(raw.dtype).max, raw)


def any_bits(rng, shape, dtype):
    """Every bit pattern: NaNs of both signs, infinities, both zeros, denormals; a fifth of the elements are zeros."""
    width = jnp.dtype(dtype).itemsize
    raw = rng.integers(0, 2 ** (8 * width), shape, dtype=np.uint64).astype(f"u{width}")
    raw = np.where(rng.random(shape) < 0.2, raw & (1 << (8 * width - 1)), raw).astype(f"u{width}")
    return jnp.asarray(raw.view(jnp.dtype(dtype)))


def assert_same(ours, stock):
    """Equal bit for bit, all NaNs being equal."""
    for mine, theirs in zip(jax.tree.leaves(ours), jax.tree.leaves(stock), strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        np.testing.assert_array_equal(bits(mine), bits(theirs))


def calls(target, function, *args):
    return jaxext.accelerate(function).lower(*args).as_text().count(f"@jaxext_{target}(")


def assert_exchanged(target, function, *args, times=1):
    """The kernel is called `times`, and its results are stock's."""
    assert calls(target, function, *args) == times
    assert_same(jaxext.accelerate(function)(*args), jax.jit(function)(*args))
