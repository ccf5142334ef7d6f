"""Depthwise convolutions and their gradients on kernels: found in every spelling, as exact as stock, or left alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exchanged import NHWC, NWC, arrays, assert_exact, bits, calls, needs_kernels, with_cotangents

import jaxext

pytestmark = needs_kernels


def depthwise(strides, padding, dilation=1, numbers=NHWC):
    def forward(x, w):
        dilations = (dilation,) * (x.ndim - 2)
        return jax.lax.conv_general_dilated(
            x, w, strides, padding, None, dilations, numbers, feature_group_count=x.shape[-1]
        )

    return forward


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("strides", "padding", "dilation", "taps"),
    [
        ((1, 1), "SAME", 1, (3, 3)),
        ((1, 1), "VALID", 1, (7, 7)),
        ((2, 2), "SAME", 1, (3, 3)),
        ((2, 3), [(2, 0), (1, 3)], 1, (5, 4)),
        ((1, 1), "SAME", 2, (3, 3)),
        ((1, 1), [(0, 0), (9, 0)], 1, (1, 10)),
        ((1, 2), [(-1, 0), (0, -2)], 1, (3, 3)),
    ],
)
def test_images(strides, padding, dilation, taps, dtype):
    forward = depthwise(strides, padding, dilation)
    x, w = arrays((3, 12, 13, 35), (*taps, 1, 35), dtype=dtype)
    (cotangent,) = arrays(forward(x, w).shape, dtype=dtype)
    run = with_cotangents(forward)
    assert calls("depthwise", run, x, w, cotangent) == 2
    assert calls("depthwise_gradient", run, x, w, cotangent) == 1
    assert_exact(run, x, w, cotangent)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sequences(dtype):
    forward = depthwise((1,), [(3, 0)], numbers=NWC)
    x, w = arrays((2, 170, 48), (4, 1, 48), dtype=dtype)
    run = with_cotangents(forward)
    assert calls("depthwise", run, x, w, x) == 2 and calls("depthwise_gradient", run, x, w, x) == 1
    assert_exact(run, x, w, x)


def test_a_layer_of_flax_and_its_report():
    layer = nn.Conv(32, (3, 3), feature_group_count=32)
    (x,) = arrays((2, 16, 16, 32))
    params = layer.init(jax.random.key(0), x)
    step = jax.value_and_grad(lambda params, x: jnp.sum(jnp.square(layer.apply(params, x))), argnums=(0, 1))
    entries = jaxext.explain(step)(params, x).replaced
    assert [(e.kernel, e.detail) for e in entries] == [("convolution", "depthwise")] * 3
    ours, stock = jaxext.accelerate(step)(params, x), jax.jit(step)(params, x)
    for mine, theirs in zip(*map(jax.tree.leaves, (ours, stock)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_the_kernels_gradient_is_the_same_in_every_run():
    forward = depthwise((1, 1), "SAME")
    x, w, cotangent = arrays((4, 20, 20, 90), (3, 3, 1, 90), (4, 20, 20, 90))
    run = jaxext.accelerate(with_cotangents(forward))
    first = bits(run(x, w, cotangent)[2])
    for _ in range(5):
        np.testing.assert_array_equal(bits(run(x, w, cotangent)[2]), first)


def test_infinities_and_nans_stay_in_their_channel_and_reach():
    x, w = arrays((1, 9, 9, 20), (3, 3, 1, 20))
    x = x.at[0, 4, 4, 3].set(jnp.inf).at[0, 0, 0, 17].set(jnp.nan)
    forward = depthwise((1, 1), "SAME")
    ours, stock = jaxext.accelerate(forward)(x, w), jax.jit(forward)(x, w)
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(stock))
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(stock))


@pytest.mark.parametrize(
    ("x", "w", "groups", "numbers", "dtype"),
    [
        ((2, 12, 12, 32), (3, 3, 1, 64), 32, NHWC, "float32"),
        ((2, 12, 12, 32), (3, 3, 2, 32), 16, NHWC, "float32"),
        ((2, 32, 12, 12), (32, 1, 3, 3), 32, ("NCHW", "OIHW", "NCHW"), "float32"),
        ((2, 12, 12, 32), (3, 3, 1, 32), 32, NHWC, "float16"),
        ((1, 3, 3, 8), (3, 3, 1, 8), 8, NHWC, "float32"),
        ((2, 6, 6, 6, 16), (3, 3, 3, 1, 16), 16, ("NDHWC", "DHWIO", "NDHWC"), "float32"),
    ],
    ids=["two kernels a channel", "groups of two", "channels first", "float16", "a small one", "three dimensions"],
)
def test_others_stay_with_stock(x, w, groups, numbers, dtype):
    function = lambda x, w: jax.lax.conv_general_dilated(  # noqa: E731
        x, w, (1,) * (x.ndim - 2), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )
    run = lambda x, w: jax.vjp(function, x, w)[1](function(x, w))  # noqa: E731
    assert not jaxext.explain(run)(*arrays(x, w, dtype=dtype)).to_dict()["replaced"]
