"""Group norm and instance norm are found in every spelling with channels last, and agree with stock JAX."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from agreement import assert_agrees, assert_matched, assert_missed, normals, report_of
from flax import nnx
from jax import lax

B, H, W, C, G = 3, 4, 5, 24, 4


def arguments(dtype=jnp.float32):
    x, scale, bias = normals(0, (B, H, W, C), (C,), (C,))
    return (x + 0.5).astype(dtype), 1 + 0.1 * scale, 0.1 * bias


def linen(module, x, **params):
    return module.apply({"params": params}, x)


def statistics(y, axes):
    return jnp.mean(y, axes, keepdims=True), jnp.var(y, axes, keepdims=True)


def grouped_pixels(x, s, b):
    y = x.reshape(B, H * W, G, C // G)
    mean, var = statistics(y, (1, 3))
    return ((y - mean) * lax.rsqrt(var + 1e-5)).reshape(x.shape) * s + b


def affine_in_groups(x, s, b):
    y = x.reshape(B, H, W, G, -1)
    mean, var = statistics(y, (1, 2, 4))
    y = (y - mean) / jnp.sqrt(var + 1e-5) * s.reshape(G, -1) + b.reshape(1, 1, 1, G, -1)
    return y.reshape(x.shape)


def one_image_at_a_time(x, s, b):
    def one(image):
        mean, var = statistics(image.reshape(H, W, G, -1), (0, 1, 3))
        y = (image.reshape(H, W, G, -1) - mean) * jnp.power(var + 1e-5, -0.5)
        return y.reshape(image.shape) * s + b

    return jax.vmap(one)(x)


SPELLINGS = {
    "linen": lambda x, s, b: linen(nn.GroupNorm(G, epsilon=1e-5), x, scale=s, bias=b),
    "linen, group size": lambda x, s, b: linen(nn.GroupNorm(None, C // G, epsilon=1e-5), x, scale=s, bias=b),
    "linen, slow variance": lambda x, s, b: linen(
        nn.GroupNorm(G, epsilon=1e-5, use_fast_variance=False), x, scale=s, bias=b
    ),
    "linen under vmap": lambda x, s, b: jax.vmap(
        lambda y: linen(nn.GroupNorm(G, epsilon=1e-5), y[None], scale=s, bias=b)[0]
    )(x),
    "sequences": lambda x, s, b: linen(nn.GroupNorm(G, epsilon=1e-5), x.reshape(B, H * W, C), scale=s, bias=b),
    "grouped pixels": grouped_pixels,
    "affine in groups": affine_in_groups,
    "one image at a time": one_image_at_a_time,
    "in remat": lambda x, s, b: jax.checkpoint(grouped_pixels)(x, s, b),
    "in scan": lambda x, s, b: lax.scan(lambda c, _: (grouped_pixels(c, s, b), None), x, None, length=2)[0],
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_of_group_norm(name):
    detail = f"groups={G}, epsilon=1e-05, scale, bias"
    assert_matched(SPELLINGS[name], *arguments(), kernel="group_norm", detail=detail)


@pytest.mark.parametrize(
    ("module", "groups"), [(nn.InstanceNorm(), C), (nn.GroupNorm(C), C), (nn.GroupNorm(1), 1)], ids=str
)
def test_groups_of_one_channel_and_of_all(module, groups):
    detail = f"groups={groups}, epsilon=1e-06, scale, bias"
    assert_matched(lambda x, s, b: linen(module, x, scale=s, bias=b), *arguments(), kernel="group_norm", detail=detail)


def test_without_scale_and_bias():
    x, s, _ = arguments()
    bare = nn.GroupNorm(G, use_scale=False, use_bias=False)
    # Squared: a group's sum is zero, and the loss would be what cancels in it.
    assert_matched(lambda x: linen(bare, x) ** 2, x, kernel="group_norm", detail="groups=4, epsilon=1e-06")
    scaled = nn.GroupNorm(G, use_bias=False)
    detail = "groups=4, epsilon=1e-06, scale"
    assert_matched(lambda x, s: 2 * linen(scaled, x, scale=s), x, s, kernel="group_norm", detail=detail)


def test_flax_nnx_module():
    x, _, _ = arguments()
    graph, state = nnx.split(nnx.GroupNorm(C, G, rngs=nnx.Rngs(0)))
    state = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.arange(C) / C, state)
    assert_matched(lambda x: nnx.merge(graph, state)(x), x, kernel="group_norm")


def test_bfloat16_with_float32_statistics():
    def module(x, s, b):
        return linen(nn.GroupNorm(G, dtype=jnp.bfloat16), x, scale=s, bias=b)

    assert_matched(module, *arguments(jnp.bfloat16), kernel="group_norm", tolerance=2e-2)
    (entry,) = report_of(module, *arguments()).replaced
    assert entry.dtype == "bfloat16"  # a wide norm rounded once is one kernel


def test_a_norm_that_is_modulated_per_image_is_found_inside():
    x, s, b = arguments()

    def modulated(x, s, b):
        y = linen(nn.GroupNorm(G, use_scale=False, use_bias=False), x)
        return y * (1 + x[:, :1, :1] * s) + b * x[:, :1, :1]

    assert_matched(modulated, x, s, b, kernel="group_norm", detail="groups=4, epsilon=1e-06")


def other_statistics(x, s, b):
    y = x.reshape(B, H, W, G, -1)
    mean, _ = statistics(y, (1, 2, 4))
    _, var = statistics(y, (1, 4))
    return ((y - mean) * lax.rsqrt(var + 1e-5)).reshape(x.shape) * s + b


def turned_statistics(x, s, b):
    """Of rows and columns exchanged: the mean is of another image."""
    x = x.reshape(B, W, H, C)
    turned = jnp.swapaxes(x, 1, 2).reshape(B, W, H, G, -1)
    mean, var = statistics(turned[:, :2], (1, 2, 4))
    return ((x.reshape(B, W, H, G, -1) - mean) * lax.rsqrt(var + 1e-5)).reshape(x.shape) * s + b


def interleaved_groups(x, s, b):
    y = x.reshape(B, H, W, -1, G)
    mean, var = statistics(y, (1, 2, 3))
    return ((y - mean) * lax.rsqrt(var + 1e-5)).reshape(x.shape) * s + b


def batch_norm(x, s, b):
    mean, var = statistics(x, (0, 1, 2))
    return (x - mean) * lax.rsqrt(var + 1e-5) * s + b


def scale_per_row(x, s, b):
    mean, var = statistics(x.reshape(B, H, W, G, -1), (1, 2, 4))
    y = (x.reshape(B, H, W, G, -1) - mean) * lax.rsqrt(var + 1e-5)
    return y.reshape(x.shape) + b[:H, None, None]


@pytest.mark.parametrize("spelling", [other_statistics, turned_statistics, interleaved_groups, batch_norm])
def test_what_is_no_such_norm_is_left_alone(spelling):
    assert not report_of(spelling, *arguments()).kernels() & {"group_norm", "layer_norm"}
    assert_agrees(spelling, *arguments())


def test_what_is_added_along_another_axis_stays_outside():
    assert_matched(scale_per_row, *arguments(), kernel="group_norm", detail="groups=4, epsilon=1e-05")


def test_a_near_miss_names_what_broke_it():
    def shifted_deviation(x, s, b):
        mean, var = statistics(x.reshape(B, H, W, G, -1), (1, 2, 4))
        return ((x.reshape(B, H, W, G, -1) - mean) / (jnp.sqrt(var) + 1e-5)).reshape(x.shape)

    reason = "epsilon is added to the standard deviation, not to the variance"
    assert_missed(shifted_deviation, *arguments(), kernel="group_norm", reason=reason)
