"""Convolutions over all channels, and their gradients, on kernels: found in every spelling, as exact as stock."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exchanged import NHWC, NWC, arrays, assert_exact, bits, calls, details, needs_kernels, with_cotangents

import jaxext

pytestmark = needs_kernels


def dense(strides, padding, dilation=1, base=1, numbers=NHWC):
    def forward(x, w):
        apart, dilations = (base,) * (x.ndim - 2), (dilation,) * (x.ndim - 2)
        return jax.lax.conv_general_dilated(x, w, strides, padding, apart, dilations, numbers)

    return forward


def assert_taken(forward, x, w, dtype):
    (cotangent,) = arrays(forward(x, w).shape, dtype=dtype)
    run = with_cotangents(forward)
    assert calls("dense_convolution", run, x, w, cotangent) == 2
    assert calls("dense_convolution_gradient", run, x, w, cotangent) == 1
    assert_exact(run, x, w, cotangent)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("strides", "padding", "dilation", "base", "taps"),
    [
        ((1, 1), "SAME", 1, 1, (3, 3)),
        ((1, 1), "VALID", 1, 1, (7, 7)),
        ((2, 2), "SAME", 1, 1, (3, 3)),
        ((2, 3), [(2, 0), (1, 3)], 1, 1, (5, 4)),
        ((1, 1), "SAME", 2, 1, (3, 3)),
        ((1, 1), [(0, 0), (9, 0)], 1, 1, (1, 10)),
        ((1, 2), [(-1, 0), (0, -2)], 1, 1, (3, 3)),
        ((1, 1), [(2, 2), (2, 1)], 1, 2, (4, 4)),
        ((2, 1), [(3, 2), (2, 1)], 1, 3, (4, 5)),
        ((1, 1), "SAME", 1, 1, (1, 1)),
    ],
)
def test_images(strides, padding, dilation, base, taps, dtype):
    x, w = arrays((3, 12, 13, 35), (*taps, 35, 19), dtype=dtype)
    assert_taken(dense(strides, padding, dilation, base), x, w, dtype)


@pytest.mark.parametrize(("images", "size", "channels"), [(1, 9, 600), (12, 2, 200), (2, 2, 200), (40, 1, 130)])
def test_many_channels_and_small_images(images, size, channels):
    x, w = arrays((images, size, size, channels), (3, 3, channels, 140))
    assert_taken(dense((1, 1), "SAME"), x, w, "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sequences(dtype):
    x, w = arrays((2, 170, 48), (4, 48, 33), dtype=dtype)
    assert_taken(dense((1,), [(3, 0)], numbers=NWC), x, w, dtype)


def test_a_transposed_layer_of_flax_and_its_report():
    layer = nn.ConvTranspose(32, (4, 4), strides=(2, 2))
    (x,) = arrays((2, 16, 16, 24))
    params = layer.init(jax.random.key(0), x)
    step = jax.value_and_grad(lambda params, x: jnp.sum(jnp.square(layer.apply(params, x))), argnums=(0, 1))
    assert details("convolution", step, params, x) == ["channels last"] * 3
    ours, stock = jaxext.accelerate(step)(params, x), jax.jit(step)(params, x)
    for mine, theirs in zip(*map(jax.tree.leaves, (ours, stock)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("kernel", ["HWIO", "HWOI", "OIHW", "IHOW"])
def test_a_kernel_in_any_order(kernel):
    sizes = {"H": 3, "W": 5, "I": 20, "O": 12}
    x, w = arrays((2, 12, 12, 20), tuple(sizes[d] for d in kernel))
    assert_taken(dense((1, 1), "SAME", numbers=("NHWC", kernel, "NHWC")), x, w, "float32")


def test_mapped_checkpointed_and_in_a_scan():
    x, w = arrays((3, 2, 12, 12, 20), (3, 3, 20, 20))

    def step(w, x):
        y, _ = jax.lax.scan(lambda y, _: (jnp.tanh(dense((1, 1), "SAME")(y, w)), None), x, None, length=2)
        return jnp.sum(y**2)

    gradient = jax.vmap(jax.grad(jax.checkpoint(step)), in_axes=(None, 0))
    assert_exact(gradient, w, x)


def test_gradients_are_the_same_in_every_run():
    x, w, cotangent = arrays((4, 20, 20, 90), (3, 3, 90, 30), (4, 20, 20, 30))
    run = jaxext.accelerate(with_cotangents(dense((1, 1), "SAME")))
    first = [bits(y) for y in run(x, w, cotangent)]
    for _ in range(5):
        for again, before in zip(run(x, w, cotangent), first, strict=True):
            np.testing.assert_array_equal(bits(again), before)


def test_infinities_and_nans_stay_in_their_reach():
    x, w = arrays((1, 9, 9, 20), (3, 3, 20, 20))
    x = x.at[0, 4, 4, 3].set(jnp.inf).at[0, 0, 0, 17].set(jnp.nan)
    ours, stock = (f(dense((1, 1), "SAME"))(x, w) for f in (jaxext.accelerate, jax.jit))
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(stock))
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(stock))


@pytest.mark.parametrize(
    ("x", "w", "groups", "numbers", "dtype"),
    [
        ((2, 12, 12, 32), (3, 3, 16, 32), 2, NHWC, "float32"),
        ((2, 32, 12, 12), (32, 32, 3, 3), 1, ("NCHW", "OIHW", "NCHW"), "float32"),
        ((2, 12, 12, 32), (3, 3, 32, 32), 1, NHWC, "float16"),
        ((1, 3, 3, 4), (3, 3, 4, 8), 1, NHWC, "float32"),
        ((1, 70, 1, 32), (65, 1, 32, 32), 1, NHWC, "float32"),
        ((2, 6, 6, 6, 16), (3, 3, 3, 16, 16), 1, ("NDHWC", "DHWIO", "NDHWC"), "float32"),
    ],
    ids=["groups", "channels first", "float16", "a small one", "many taps", "three dimensions"],
)
def test_others_stay_with_stock(x, w, groups, numbers, dtype):
    function = lambda x, w: jax.lax.conv_general_dilated(  # noqa: E731
        x, w, (1,) * (x.ndim - 2), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )
    assert "channels last" not in details("convolution", function, *arrays(x, w, dtype=dtype))
