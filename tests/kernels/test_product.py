"""The matrix product of linear + cross-entropy: both ways round, any size, in place, on every instruction set."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxext.kernels._op import native_status
from jaxext.kernels._product import PRODUCT, matrix_product

needs_native = pytest.mark.skipif(bool(native_status()), reason="no native kernels here: " + native_status())

SIZES = [(1, 1, 1), (7, 5, 65), (6, 513, 70), (265, 300, 270), (3, 1025, 17), (0, 4, 5), (4, 0, 5)]
# Few float32 rows are multiplied where they are: one to four registers of them, tiles of 12, 8, 6, 4 and 1.
SIZES += [(16, 300, 512), (31, 257, 48), (45, 20, 1104), (64, 515, 80)]


def stored(rng, rows, columns, turned, dtype):
    return jnp.asarray(rng.standard_normal((columns, rows) if turned else (rows, columns)), dtype)


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("size", SIZES)
def test_products_are_exact_to_accumulated_rounding(size, turned, adds, dtypes):
    m, k, n = size
    rng = np.random.default_rng(0)
    a, b = stored(rng, m, k, turned[0], dtypes[0]), stored(rng, k, n, turned[1], dtypes[1])
    add_to = jnp.asarray(rng.standard_normal((m, n)), jnp.float32) if adds else None
    rounds = "bfloat16" in dtypes
    if rounds:  # rounding is allowed, not promised: values that it leaves alone
        a, b = (v.astype(jnp.bfloat16).astype(v.dtype) for v in (a, b))
    out = matrix_product(a, b, add_to, a_turned=turned[0], b_turned=turned[1], rounds=rounds)
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    a, b = a.T if turned[0] else a, b.T if turned[1] else b
    sums = 0.0 if add_to is None else np.asarray(add_to, np.float64)
    # Higham (2002), 3.1: k roundings of the sum of absolute products; one more for the addition.
    bound = (k + 2) * float(jnp.finfo(jnp.float32).eps) * (np.abs(a) @ np.abs(b) + np.abs(sums)) + 1e-30
    assert out.dtype == jnp.float32 and out.shape == (m, n)
    assert (np.abs(np.asarray(out, np.float64) - (a @ b + sums)) <= bound).all()


@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(
    "size",
    [(3, 27, 16, 27), (2, 1, 1, 1), (9, 2, 3, 5), (130, 13, 7, 3), (33, 128, 128, 64), (5, 25, 31, 47), (4, 6, 9, 16)],
)
def test_small_products_of_a_batch_are_exact_to_accumulated_rounding(size, turned):
    batch, m, k, n = size
    rng = np.random.default_rng(0)
    a, b = (
        rng.standard_normal((batch, *(sides[::-1] if turn else sides))).astype(np.float32)
        for sides, turn in zip(((m, k), (k, n)), turned)
    )
    (out,) = PRODUCT(a, b, a_turned=turned[0], b_turned=turned[1], rounds=False)
    a, b = (
        np.swapaxes(x, 1, 2) if turn else x for x, turn in zip((a.astype(np.float64), b.astype(np.float64)), turned)
    )
    # Higham (2002), 3.1: k roundings of the sum of absolute products.
    bound = (k + 1) * float(jnp.finfo(jnp.float32).eps) * (np.abs(a) @ np.abs(b)) + 1e-30
    assert (np.abs(np.asarray(out, np.float64) - a @ b) <= bound).all()


@needs_native
def test_the_sum_is_added_to_in_place():
    a, b, add_to = jnp.ones((300, 8)), jnp.ones((8, 400)), jnp.ones((300, 400))
    compiled = jax.jit(lambda a, b, s: matrix_product(a, b, s), donate_argnums=2).lower(a, b, add_to).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < add_to.nbytes / 8
    np.testing.assert_array_equal(compiled(a, b, add_to), np.full((300, 400), 9.0))


def test_a_sum_that_is_used_again_is_kept():
    a, b, add_to = jnp.ones((3, 2)), jnp.ones((2, 4)), jnp.ones((3, 4))
    np.testing.assert_array_equal(matrix_product(a, b, add_to), np.full((3, 4), 3.0))
    np.testing.assert_array_equal(add_to, np.ones((3, 4)))


def test_derivatives_and_batching_are_those_of_the_dot():
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((5, 7), (7, 9)))
    ours = jax.grad(lambda a, b: jnp.sin(matrix_product(a, b)).sum(), (0, 1))(a, b)
    for mine, exact in zip(ours, jax.grad(lambda a, b: jnp.sin(a @ b).sum(), (0, 1))(a, b)):
        np.testing.assert_allclose(mine, exact, rtol=1e-5, atol=1e-5)
    batched = jax.vmap(matrix_product, (0, None))(jnp.stack([a, -a]), b)
    np.testing.assert_allclose(batched, jnp.stack([a @ b, -a @ b]), rtol=1e-5, atol=1e-5)


@needs_native
@pytest.mark.parametrize("isa", ["v2", "v3", "v4", "v4bf16"])
def test_every_instruction_set_agrees(isa):
    from jaxext import _native

    if isa not in _native.compiled_isas():
        pytest.skip(f"{isa} is not compiled here")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "size3 or in_place"]
    done = subprocess.run(command, env={**os.environ, "JAXEXT_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
