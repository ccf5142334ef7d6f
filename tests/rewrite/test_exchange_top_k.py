"""`lax.top_k` on its kernel: the very results of stock JAX, wherever it stands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exchanged import DTYPES, needs_kernels
from exchanged import calls as calls_of
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxext
from jaxext.kernels._top_k import TOP_K, top_k_gains


def bits(x):
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}")


def any_bits(rng, shape, dtype):
    """Every bit pattern: NaNs of both signs, infinities, both zeros, denormals.

    NaNs of bfloat16 have JAX's own payload: XLA widens them to compare, and loses any other.
    """
    width = jnp.dtype(dtype).itemsize
    x = rng.integers(0, 2 ** (8 * width), shape, dtype=np.uint64).astype(f"u{width}")
    if dtype == "bfloat16":
        x = np.where((x & 0x7FFF) > 0x7F80, (x & 0x8000) | 0x7FC0, x).astype("u2")
    return jnp.asarray(x.view(jnp.dtype(dtype)))


def assert_same(ours, stock):
    for mine, theirs in zip(ours, stock):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        np.testing.assert_array_equal(bits(mine), bits(theirs))


def calls(function, *args):
    return calls_of("top_k", function, *args)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_pattern_has_the_place_that_stock_gives_it(dtype):
    x = any_bits(np.random.default_rng(0), (6, 3000), dtype)
    assert_same(TOP_K(x, k=700), jax.jit(lambda x: jax.lax.top_k(x, 700))(x))
    function = lambda x: jax.lax.top_k(x, 9)  # noqa: E731
    assert calls(function, x) == 1
    assert_same(jaxext.accelerate(function)(x), jax.jit(function)(x))


@needs_kernels
@given(
    n=st.sampled_from([1, 2, 31, 63, 64, 65, 127, 128, 129, 300, 1025]),
    share=st.floats(0, 1),
    levels=st.integers(1, 40),
)
@settings(max_examples=40, deadline=None)
def test_ties_go_to_the_earlier_place_for_any_length(n, share, levels):
    k = round(share * n)
    x = jnp.asarray(np.random.default_rng(n + levels).integers(0, levels, (3, n)), jnp.float32)
    assert TOP_K.refusal(x, k=k) is None
    values, indices = TOP_K(x, k=k)
    order = np.argsort(-np.asarray(x), axis=-1, kind="stable")[:, :k]
    np.testing.assert_array_equal(np.asarray(indices), order)
    np.testing.assert_array_equal(np.asarray(values), np.take_along_axis(np.asarray(x), order, -1))


@needs_kernels
@pytest.mark.parametrize("k", [3, 100])
@pytest.mark.parametrize("order", ["ascending", "descending", "constant"])
def test_rows_in_order_are_as_exact(order, k):
    row = {"ascending": np.arange(20000), "descending": np.arange(20000)[::-1], "constant": np.ones(20000)}[order]
    x = jnp.asarray(np.stack([row, row]), jnp.float32)
    assert_same(TOP_K(x, k=k), jax.jit(lambda x: jax.lax.top_k(x, k))(x))


def routed(x):
    """A mixture of experts' weights: the softmax of each token's largest two, in place."""
    values, indices = jax.lax.top_k(x, 2)
    return jnp.sum(jax.nn.softmax(values)[..., None] * jax.nn.one_hot(indices, x.shape[-1]), -2)


PROGRAMS = {
    "routing": routed,
    "gradient": jax.grad(lambda x: jnp.sum(jnp.sin(routed(x)))),
    "vmap": lambda x: jax.vmap(lambda x: jax.lax.top_k(x, 3))(x.reshape(8, -1, 16)),
    "scan": lambda x: jax.lax.scan(lambda c, _: (c - jax.lax.top_k(c, 1)[0], None), x, None, length=2)[0],
    "cond": lambda x: jax.lax.cond(x[0, 0] > 0, lambda: jax.lax.top_k(x, 2), lambda: jax.lax.top_k(-x, 2)),
    "jit inside": jax.jit(lambda x: jax.lax.top_k(x, 4)),
}


@needs_kernels
@pytest.mark.parametrize("name", PROGRAMS)
def test_it_is_exchanged_wherever_it_is(name):
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1024, 16)), jnp.float32)
    function = PROGRAMS[name]
    assert calls(function, x) >= 1
    for mine, theirs in zip(*(jax.tree.leaves(f(x)) for f in (jaxext.accelerate(function), jax.jit(function)))):
        np.testing.assert_allclose(mine, theirs, rtol=2**-20, atol=2**-22)


@needs_kernels
def test_what_stock_does_as_well_stays():
    x = jnp.ones((64, 256))
    assert calls(lambda x: jax.lax.top_k(x, 200), x) == 0  # most of the row
    assert calls(lambda x: jax.lax.top_k(x, 60), x) == 0  # float32, for which XLA has a selection
    assert calls(lambda x: jax.lax.top_k(x, 60), x.astype(jnp.bfloat16)) == 1
    assert calls(lambda x: jax.lax.top_k(x, 2), x[:4]) == 0  # small
    assert calls(lambda x: jax.lax.top_k(x, 2, axis=0), x) == 0
    assert not top_k_gains(x, 0)


@needs_kernels
def test_it_can_be_switched_off_and_is_reported():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1024, 16)), jnp.float32)
    assert "jaxext_top_k" not in jaxext.accelerate(routed, exclude=("top_k",)).lower(x).as_text()
    (entry,) = jaxext.explain(routed)(x).replaced
    assert (entry.kernel, entry.shapes) == ("top_k", ("f32[1024,16]",))
    assert "test_exchange_top_k.py" in entry.source
    jaxext.install(memory="system")
    try:
        assert "jaxext_top_k" in jax.jit(routed).lower(x).as_text()
    finally:
        jaxext.uninstall()
    assert "jaxext_top_k" not in jax.jit(routed).lower(x).as_text()
