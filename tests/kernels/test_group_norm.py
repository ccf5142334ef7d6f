"""group_norm: the public function, and what conformance does not know of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxext.kernels import group_norm, group_norm_refusal
from jaxext.kernels._op import native_status

needs_native = pytest.mark.skipif(bool(native_status()), reason="no native kernels here: " + native_status())


def images(*shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) + 0.3, dtype)


def exact_group_norm(x, groups, epsilon=1e-6):
    x = np.asarray(x, np.float64)
    y = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    centre = y - y.mean((1, 3), keepdims=True)
    return (centre / np.sqrt((centre**2).mean((1, 3), keepdims=True) + epsilon)).reshape(x.shape)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_group_norm_is_flax_group_norm(dtype):
    from flax import linen

    x, scale, bias = images(2, 7, 9, 40, dtype=dtype), images(40, seed=1), images(40, seed=2)
    module = linen.GroupNorm(5, epsilon=1e-5, dtype=dtype)
    stock = module.apply({"params": {"scale": scale, "bias": bias}}, x)
    ours = group_norm(x, scale, bias, groups=5, epsilon=1e-5)
    assert ours.dtype == stock.dtype
    tolerance = 8 * float(jnp.finfo(dtype).eps) * float(jnp.abs(stock).max())
    np.testing.assert_allclose(np.float64(ours), np.float64(stock), rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", [(2, 300, 64), (1, 9000, 16), (5, 3, 40)])
@pytest.mark.parametrize("groups", [1, 8])
def test_a_large_mean_costs_no_precision(shape, groups):
    x = images(*shape) + 1000.0
    # The inputs' own rounding, and a mean's: each 1000 * eps beside a deviation of 1.
    tolerance = 2000 * float(jnp.finfo("float32").eps) * 4
    np.testing.assert_allclose(group_norm(x, groups=groups), exact_group_norm(x, groups), rtol=0, atol=tolerance)


def test_a_constant_image_gives_nothing_but_its_mean_s_rounding():
    x = jnp.full((2, 75, 24), 1.3)
    bound = 2 * 1.3 * float(jnp.finfo("float32").eps) / np.sqrt(1e-6)
    assert np.abs(group_norm(x, groups=4)).max() <= bound


def test_a_first_image_that_is_constant_disturbs_no_other():
    x = images(3, 80, 32).at[0].set(7.0)
    np.testing.assert_allclose(group_norm(x, groups=4), exact_group_norm(x, 4), rtol=0, atol=2e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_results_do_not_depend_on_how_many_images_share_the_threads(count):
    x = images(8, 900, 64)
    scale, cotangent = images(64, seed=1), images(8, 900, 64, seed=2)

    def run(x, cotangent):
        out, pull = jax.vjp(lambda x: group_norm(x, scale, groups=8), x)
        return out, *pull(cotangent)

    for all_images, some in zip(jax.jit(run)(x, cotangent), jax.jit(run)(x[:count], cotangent[:count])):
        np.testing.assert_array_equal(all_images[:count], some)


@needs_native
def test_only_wanted_gradients_are_computed():
    x, scale, bias = images(2, 30, 32), images(32, seed=1), images(32, seed=2)

    def loss(x, scale, bias):
        return jnp.sum(jnp.sin(group_norm(x, scale, bias, groups=4)))

    for which in ((0,), (1,), (2,), (0, 2), (1, 2)):
        text = jax.jit(jax.grad(loss, which)).lower(x, scale, bias).as_text()
        (call,) = (line for line in text.splitlines() if "@jaxext_group_norm_backward(" in line)
        for name, index in (("x", 0), ("scale", 1), ("bias", 2)):
            assert f"wants_d{name} = {'true' if index in which else 'false'}" in call
        found = jax.jit(jax.grad(loss, which))(x, scale, bias)
        every = jax.grad(loss, (0, 1, 2))(x, scale, bias)
        for index, gradient in zip(which, found):
            np.testing.assert_array_equal(gradient, every[index])


def test_refusals_name_the_operand():
    f32, bf16 = jax.ShapeDtypeStruct((2, 5, 5, 16), jnp.float32), jax.ShapeDtypeStruct((16,), jnp.bfloat16)
    assert group_norm_refusal(f32, bf16, bf16) is None or native_status()
    half = jax.ShapeDtypeStruct((2, 5, 5, 16), jnp.float16)
    small = jax.ShapeDtypeStruct((2, 5, 5, 4), jnp.float32)
    if not native_status():
        assert group_norm_refusal(half) == "'x' is float16; the kernel takes float32 and bfloat16"
        assert group_norm_refusal(small) == "4 channels are fewer than a register holds"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda: group_norm(images(5), groups=1), ValueError, "argument 'x' must be [batch, ..., channels]"),
        (
            lambda: group_norm(images(2, 3, 10), groups=4),
            ValueError,
            "'groups' must divide the 10 channels of x, got 4",
        ),
        (
            lambda: group_norm(images(2, 3, 10), groups=0),
            ValueError,
            "'groups' must divide the 10 channels of x, got 0",
        ),
        (
            lambda: group_norm(images(2, 3, 8), images(4), groups=2),
            ValueError,
            "argument 'scale' must have shape (8,) to fit x of shape (2, 3, 8), got (4,)",
        ),
        (
            lambda: group_norm(jnp.ones((2, 3, 8), int), groups=2),
            TypeError,
            "argument 'x' must be floating point, got int32; cast it with astype(...)",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error) as raised:
        arguments()
    assert message in str(raised.value)
