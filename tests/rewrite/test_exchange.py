"""Primitives exchanged one for one: bfloat16 matrix products after differentiation, wherever they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import jaxext
from jaxext.kernels import _native_module
from jaxext.kernels._op import native_status

bf16 = jnp.bfloat16
needs_bf16 = pytest.mark.skipif(
    bool(native_status()) or _native_module.load().active_isa() != "v4bf16", reason="no bfloat16 instructions here"
)


def arrays(*shapes, dtype=bf16):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape) * 0.1, dtype) for shape in shapes]


def products(function, *args):
    return jaxext.accelerate(function).lower(*args).as_text().count("@jaxext_matrix_product")


def dense(w, x):
    return jnp.sum(jnp.tanh(x @ w).astype(jnp.float32))


PROGRAMS = {
    "plain": lambda w, x: x @ w,
    "float32 result": lambda w, x: jnp.matmul(x, w, preferred_element_type=jnp.float32),
    "gradients": jax.grad(dense, (0, 1)),
    "scan": lambda w, x: jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=3)[0],
    "while": lambda w, x: jax.lax.fori_loop(0, 3, lambda _, c: jnp.tanh(c @ w), x),
    "cond": lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: -x @ w),
    "remat": jax.grad(lambda w, x: dense(w, jax.checkpoint(lambda x: jnp.tanh(x @ w))(x))),
    "vmap": lambda w, x: jax.vmap(lambda w: x @ w)(jnp.stack([w, -w])),
    "jit inside": lambda w, x: jax.jit(lambda w, x: x @ w)(w, x),
    "heads": lambda w, x: jnp.einsum("bthd,bshd->bhts", x.reshape(2, 128, 4, 64), w.reshape(2, 128, 4, 64)),
}


@needs_bf16
@pytest.mark.parametrize("name", PROGRAMS)
def test_products_are_exchanged_wherever_they_are(name):
    function = PROGRAMS[name]
    w, x = arrays((256, 256), (256, 256))
    stock = jax.jit(function).lower(w, x).as_text().count("stablehlo.dot_general")
    assert products(function, w, x) == stock > 0
    exact = function(*(v.astype(jnp.float64) if jax.config.jax_enable_x64 else v.astype(jnp.float32) for v in (w, x)))
    ours, stock = jaxext.accelerate(function)(w, x), jax.jit(function)(w, x)
    for mine, theirs, true in zip(*map(jax.tree.leaves, (ours, stock, exact))):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        true = np.asarray(true, np.float64)
        norm = np.linalg.norm(np.asarray(theirs, np.float64) - true)
        # Twice stock's error; float32 results of exact products differ by the order of 256 additions.
        assert np.linalg.norm(np.asarray(mine, np.float64) - true) <= 2 * norm + 2**-20 * np.linalg.norm(true)


def test_what_stock_does_better_stays():
    w, x = arrays((256, 256), (256, 256))
    assert products(lambda w, x: x[:4] @ w, w, x) == 0  # few rows
    assert products(lambda w, x: x[:64, :64] @ w[:64, :64], w, x) == 0  # small
    assert products(lambda w, x: x.astype(jnp.float32) @ w.astype(jnp.float32), w, x) == 0
    assert products(lambda w, x: jnp.matmul(x, w, precision="highest"), w, x) == 0


@needs_bf16
def test_switched_off_it_is_stock_bit_for_bit():
    w, x = arrays((256, 256), (256, 256))
    function = lambda w, x: x @ w  # noqa: E731
    without = jaxext.accelerate(function, exclude=("matmul",))
    assert "matrix_product" not in without.lower(w, x).as_text()
    np.testing.assert_array_equal(np.asarray(without(w, x)), np.asarray(jax.jit(function)(w, x)))
    part = jaxext.accelerate(lambda w, x: x @ w + jaxext.accelerate(function, exclude=("matmul",))(w, x))
    assert part.lower(w, x).as_text().count("@jaxext_matrix_product") == 1
    jaxext.install(memory="system")
    try:
        assert "jaxext_matrix_product" in jax.jit(function).lower(w, x).as_text()
        with jaxext.disabled():
            assert "jaxext_matrix_product" not in jax.jit(function).lower(w, x).as_text()
    finally:
        jaxext.uninstall()


@needs_bf16
@pytest.mark.parametrize("name", PROGRAMS)
def test_an_inner_exclusion_holds_inside_loops_and_calls(name):
    """The same function beside it is exchanged, where only the scope around tells the two apart."""
    function, operands = PROGRAMS[name], arrays((256, 256), (256, 256))
    inner = jaxext.accelerate(function, exclude="matmul")
    assert products(lambda *xs: inner(*xs), *operands) == 0
    both = products(lambda *xs: (inner(*xs), function(*xs)), *operands)
    assert both == products(function, *operands) > 0


@needs_bf16
def test_the_report_names_line_and_loop():
    def step(w, x):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=3)[0]

    w, x = arrays((256, 256), (256, 256))
    (entry,) = jaxext.explain(step)(w, x).replaced
    assert (entry.kernel, entry.location) == ("matmul", "step/scan")
    assert entry.source.startswith("tests/") or "test_exchange.py:" in entry.source
    assert entry.shapes == ("bf16[256,256]", "bf16[256,256]")
    jaxext.accelerate(step, require=("matmul",))(w, x)


@needs_bf16
def test_over_several_devices_xla_divides_the_product():
    if len(jax.devices()) < 2:
        pytest.skip("one device")
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    rows = jax.sharding.NamedSharding(mesh, PartitionSpec("data"))
    w, x = arrays((256, 256), (256, 256))
    x = jax.device_put(x, rows)
    function = lambda w, x: x @ w  # noqa: E731
    assert products(function, w, x) == 0
    np.testing.assert_array_equal(np.asarray(jaxext.accelerate(function)(w, x)), np.asarray(jax.jit(function)(w, x)))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("data")),
                           out_specs=PartitionSpec("data"))  # fmt: skip
    assert products(mapped, w, x) == 1
    np.testing.assert_allclose(
        np.asarray(jaxext.accelerate(mapped)(w, x), np.float32),
        np.asarray(jax.jit(mapped)(w, x), np.float32), rtol=2**-7, atol=1e-6,
    )  # fmt: skip


@needs_bf16
def test_an_exchanged_function_keeps_donation_names_and_derivatives():
    w, x = arrays((256, 256), (256, 256))
    fast = jaxext.accelerate(lambda w, x: x @ w, donate_argnums=1)
    kept = np.asarray(jax.jit(lambda w, x: x @ w)(w, x), np.float32)
    np.testing.assert_allclose(np.asarray(fast(w, x + 0), np.float32), kept, rtol=2**-7, atol=2**-9)
    inner = jaxext.accelerate(dense)
    fast(w, x + 0), inner(w, x)  # traced as outermost functions before they are differentiated
    gradient = jax.grad(inner)(w, x)
    stock = jax.grad(dense)(w, x)
    error = np.linalg.norm(np.asarray(gradient - stock, np.float32))
    assert error <= 2**-7 * np.linalg.norm(np.asarray(stock, np.float32))
    hessian = jax.jvp(jax.grad(inner), (w, x), (w, x))[1]
    assert np.isfinite(np.asarray(hessian, np.float32)).all()


@needs_bf16
def test_a_function_first_seen_inside_another_is_exchanged_by_itself_too():
    w, x = arrays((256, 256), (256, 256))

    @jax.jit
    @jax.value_and_grad
    def inner(w, x):
        return dense(w, x) + jax.nn.dot_product_attention(*[x.reshape(2, 128, 4, 64)] * 3).sum()

    jaxext.install(memory="system")
    try:
        jax.jit(lambda q, w, x: jax.nn.dot_product_attention(q, q, q).sum() + inner(w, x)[0])(
            jnp.ones((1, 8, 2, 16)), w, x
        )
        assert "jaxext_matrix_product" in inner.lower(w, x).as_text()
    finally:
        jaxext.uninstall()
