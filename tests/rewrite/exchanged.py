"""What the tests of exchanged primitives share: operands, equal bits, errors, and proof that the kernel is called."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxext
from jaxext.kernels import _native_module
from jaxext.kernels._element import ORDERED as DTYPES
from jaxext.kernels._op import native_status

__all__ = [
    "DTYPES",
    "NHWC",
    "NWC",
    "any_bits",
    "arrays",
    "assert_exact",
    "assert_exchanged",
    "assert_same",
    "bits",
    "calls",
    "details",
    "needs_avx512",
    "needs_kernels",
    "products",
    "with_cotangents",
]

needs_kernels = pytest.mark.skipif(bool(native_status()), reason="no native kernels here")
needs_avx512 = pytest.mark.skipif(
    bool(native_status()) or _native_module.load().active_isa() not in ("v4", "v4bf16"), reason="no AVX-512 here"
)
# Convolutions' layouts with channels last, of images and sequences.
NHWC, NWC = ("NHWC", "HWIO", "NHWC"), ("NWC", "WIO", "NWC")


def arrays(*shapes, dtype="float32"):
    """Normally distributed ones, the same in every run."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def details(kernel, function, *args):
    """How `kernel` stands in each place where it replaces something."""
    report = jaxext.explain(function)(*args).to_dict()["replaced"]
    return [entry["detail"] for entry in report if entry["kernel"] == kernel]


def assert_exact(function, *args, in_float64=None):
    """Errors against float64 at most twice stock's and four roundings; `in_float64`: the function there, if another."""
    ours, stock = jaxext.accelerate(function)(*args), jax.jit(function)(*args)
    with jax.enable_x64(True):
        exact = jax.jit(in_float64 or function)(*jax.tree.map(lambda x: np.asarray(x, np.float64), args))
    for mine, theirs, true in zip(*map(jax.tree.leaves, (ours, stock, exact)), strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        true = np.asarray(true)
        error, allowed = (np.abs(np.asarray(x, np.float64) - true).max(initial=0) for x in (mine, theirs))
        assert error <= 2 * allowed + 4 * float(jnp.finfo(mine.dtype).eps) * np.abs(true).max(initial=0)


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


def products(function, *args):
    """How often the kernel of matrix products is called."""
    return calls("matrix_product", function, *args)


def with_cotangents(convolution):
    """The result, and the cotangents of image and kernel, for a cotangent of the result."""

    def run(x, w, cotangent):
        result, pull = jax.vjp(convolution, x, w)
        return result, *pull(cotangent)

    return run


def assert_exchanged(target, function, *args, times=1):
    """The kernel is called `times`, and its results are stock's."""
    assert calls(target, function, *args) == times
    assert_same(jaxext.accelerate(function)(*args), jax.jit(function)(*args))
