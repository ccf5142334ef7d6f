"""layer_norm and rms_norm: the public functions, and what conformance does not know of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxext.kernels import layer_norm, layer_norm_refusal, rms_norm, rms_norm_refusal
from jaxext.kernels._op import native_status

needs_native = pytest.mark.skipif(bool(native_status()), reason="no native kernels here: " + native_status())


def rows(*shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) + 0.3, dtype)


def exact_layer_norm(x, scale, bias, epsilon):
    x = np.asarray(x, np.float64)
    centre = x - x.mean(-1, keepdims=True)
    return centre / np.sqrt((centre**2).mean(-1, keepdims=True) + epsilon) * np.asarray(scale) + np.asarray(bias)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_layer_norm_is_flax_layer_norm(dtype):
    from flax import linen

    x, scale, bias = rows(3, 8, 96, dtype=dtype), rows(96, seed=1), rows(96, seed=2)
    module = linen.LayerNorm(epsilon=1e-5, dtype=dtype)
    stock = module.apply({"params": {"scale": scale, "bias": bias}}, x)
    ours = layer_norm(x, scale, bias, epsilon=1e-5)
    assert ours.dtype == stock.dtype
    tolerance = 8 * float(jnp.finfo(dtype).eps) * float(jnp.abs(stock).max())
    np.testing.assert_allclose(np.float64(ours), np.float64(stock), rtol=0, atol=tolerance)


def test_rms_norm_is_flax_rms_norm_and_gemma_adds_one_to_the_scale():
    from flax import linen

    x, scale = rows(5, 64), rows(64, seed=1)
    stock = linen.RMSNorm(epsilon=1e-6).apply({"params": {"scale": scale}}, x)
    np.testing.assert_allclose(rms_norm(x, scale), stock, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(rms_norm(x, scale - 1, scale_offset=1.0), stock, rtol=4e-6, atol=4e-6)


def test_a_large_mean_costs_no_precision():
    x = rows(16, 512) + 1000.0
    exact = exact_layer_norm(x, 1.0, 0.0, 1e-6)
    np.testing.assert_allclose(layer_norm(x), exact, rtol=0, atol=2000 * float(jnp.finfo("float32").eps) * 4)


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
def test_a_residual_is_added_first_and_returned(norm):
    x, residual, scale = rows(2, 9, 40), rows(2, 9, 40, seed=1), rows(40, seed=2)
    out, total = norm(x, scale, residual=residual)
    np.testing.assert_array_equal(total, x + residual)
    np.testing.assert_array_equal(out, norm(x + residual, scale))


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
def test_gradients_flow_through_both_results_of_a_residual_norm(norm):
    x, residual, scale = rows(2, 9, 40), rows(2, 9, 40, seed=1), rows(40, seed=2)

    def fused(x, residual, scale):
        out, total = norm(x, scale, residual=residual)
        return jnp.sum(jnp.sin(out)) + jnp.sum(total**2)

    def apart(x, residual, scale):
        total = x + residual
        return jnp.sum(jnp.sin(norm(total, scale))) + jnp.sum(total**2)

    ours, stock = (jax.grad(f, (0, 1, 2))(x, residual, scale) for f in (fused, apart))
    for a, b in zip(ours, stock):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@needs_native
def test_the_residual_backward_keeps_the_sum_and_neither_summand():
    x, residual, scale = rows(4, 33), rows(4, 33, seed=1), rows(33, seed=2)
    out, pull = jax.vjp(lambda x, r: layer_norm(x, scale, residual=r), x, residual)
    kept = [leaf for leaf in jax.tree.leaves(pull) if getattr(leaf, "shape", None) == x.shape]
    assert len(kept) == 1
    np.testing.assert_array_equal(kept[0], out[1])


@needs_native
@pytest.mark.parametrize("wrt", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_only_the_wanted_gradients_are_made_in_one_call(wrt):
    x, scale, bias = rows(6, 50), rows(50, seed=1), rows(50, seed=2)
    loss = lambda *a: jnp.sum(jnp.cos(layer_norm(*a)))  # noqa: E731
    lowered = jax.jit(jax.grad(loss, wrt)).lower(x, scale, bias).as_text()
    assert lowered.count("@jaxext_layer_norm_backward(") == 1
    every = jax.grad(loss, (0, 1, 2))(x, scale, bias)
    for i, grad in zip(wrt, jax.grad(loss, wrt)(x, scale, bias)):
        np.testing.assert_array_equal(grad, every[i])


@needs_native
def test_sums_over_rows_do_not_depend_on_how_they_were_scheduled():
    x, scale = rows(3000, 64), rows(64, seed=1)
    grad = jax.jit(jax.grad(lambda s: jnp.sum(jnp.sin(layer_norm(x, s)))))
    first = grad(scale)
    for _ in range(5):
        np.testing.assert_array_equal(grad(scale), first)


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
def test_nan_and_infinity_stay_in_their_row(norm):
    x = rows(4, 20).at[1, 3].set(jnp.nan).at[2, 7].set(jnp.inf)
    out = np.asarray(norm(x))
    assert np.isnan(out[1]).all() and not np.isfinite(out[2]).all()
    assert np.isfinite(out[[0, 3]]).all()


def test_out_dtype_rounds_once():
    x = rows(7, 30, dtype="bfloat16")
    assert layer_norm(x, out_dtype=jnp.float32).dtype == jnp.float32
    np.testing.assert_array_equal(layer_norm(x), layer_norm(x, out_dtype=jnp.float32).astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: layer_norm(1.0), ValueError, "argument 'x' must have a last axis of size >= 1, got shape ()"),
        (lambda: layer_norm(jnp.ones((3, 0))), ValueError, "argument 'x' must have a last axis"),
        (lambda: layer_norm(jnp.ones((3, 4), int)), TypeError, "argument 'x' must be floating point, got int32; cast"),
        (
            lambda: layer_norm(jnp.ones((3, 4)), jnp.ones(5)),
            ValueError,
            "argument 'scale' must have shape (4,) to fit x of shape (3, 4), got (5,); broadcast or reshape it first",
        ),
        (lambda: layer_norm(jnp.ones((3, 4)), None, jnp.ones((1, 4))), ValueError, "'bias' must have shape (4,)"),
        (lambda: rms_norm(jnp.ones((3, 4)), residual=jnp.ones(4)), ValueError, "'residual' must have shape (3, 4)"),
        (lambda: rms_norm(jnp.ones((3, 4)), jnp.ones(4, int)), TypeError, "argument 'scale' must be floating point"),
    ],
)
def test_bad_arguments_are_named(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value)


@needs_native
def test_refusals_name_the_dtype():
    half, full = jax.ShapeDtypeStruct((4, 8), jnp.float16), jax.ShapeDtypeStruct((4, 8), jnp.float32)
    assert layer_norm_refusal(full) is None and rms_norm_refusal(full, residual=full) is None
    assert layer_norm_refusal(half) == "'x' is float16; the kernel takes float32 and bfloat16"
    assert rms_norm_refusal(full, out_dtype="float16") == "out_dtype is float16; the kernel gives float32 and bfloat16"
    assert "jaxext_layer_norm(" not in jax.jit(layer_norm).lower(jnp.ones((4, 8), jnp.float16)).as_text()
