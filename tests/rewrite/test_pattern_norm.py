"""Layer norm and RMS norm are found in every spelling, and agree with stock JAX."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agrees, assert_matched, assert_missed, normals, report_of
from flax import nnx
from jax import lax

import jaxext

B, T, F = 2, 6, 32


def arguments(dtype=jnp.float32):
    x, scale, bias = normals(0, (B, T, F), (F,), (F,))
    return (x + 0.5).astype(dtype), 1 + 0.1 * scale, 0.1 * bias


def mean(x, **options):
    return jnp.mean(x, -1, keepdims=True, **options)


def var(x, **options):
    return jnp.var(x, -1, keepdims=True, **options)


def linen(module, x, **params):
    return module.apply({"params": params}, x)


LAYER_NORMS = {
    "mean and var": lambda x, s, b: (x - mean(x)) / jnp.sqrt(var(x) + 1e-5) * s + b,
    "scale first": lambda x, s, b: s * ((x - mean(x)) * lax.rsqrt(mean(jnp.square(x - mean(x))) + 1e-5)) + b,
    "fast variance": lambda x, s, b: (x - mean(x)) * lax.rsqrt(mean(x * x) - mean(x) ** 2 + 1e-5) * s + b,
    "standardize": lambda x, s, b: jax.nn.standardize(x, epsilon=1e-5) * s + b,
    "power": lambda x, s, b: (x - mean(x)) * jnp.power(var(x) + 1e-5, -0.5) * s + b,
    "inverse kept": lambda x, s, b: (lambda inverse: inverse * (x - mean(x)) + b)(s * lax.rsqrt(var(x) + 1e-5)),
    "one vector at a time": lambda x, s, b: jax.vmap(
        jax.vmap(lambda y: (y - y.mean()) * lax.rsqrt(y.var() + 1e-5) * s + b)
    )(x),
    "linen": lambda x, s, b: linen(nn.LayerNorm(epsilon=1e-5), x, scale=s, bias=b),
    "linen, slow variance": lambda x, s, b: linen(
        nn.LayerNorm(epsilon=1e-5, use_fast_variance=False), x, scale=s, bias=b
    ),
    "linen under vmap": lambda x, s, b: jax.vmap(lambda y: linen(nn.LayerNorm(epsilon=1e-5), y, scale=s, bias=b))(x),
    "in remat": lambda x, s, b: jax.checkpoint(lambda x: (x - mean(x)) / jnp.sqrt(var(x) + 1e-5) * s + b)(x),
    "in scan": lambda x, s, b: lax.scan(
        lambda c, _: (linen(nn.LayerNorm(epsilon=1e-5), c, scale=s, bias=b), None), x, None, length=2
    )[0],
}
RMS_NORMS = {
    "mean of squares": lambda x, s, b: x * lax.rsqrt(mean(x**2) + 1e-5) * s,
    "quotient": lambda x, s, b: s * (x / jnp.sqrt(mean(jnp.square(x)) + 1e-5)),
    "power": lambda x, s, b: x * jnp.power(mean(x**2) + 1e-5, -0.5) * s,
    "sum over n": lambda x, s, b: x / jnp.sqrt((x * x).sum(-1, keepdims=True) / F + 1e-5) * s,
    "einsum": lambda x, s, b: x * lax.rsqrt(jnp.einsum("...d,...d->...", x, x)[..., None] / F + 1e-5) * s,
    "gemma": lambda x, s, b: x * lax.rsqrt(mean(x**2) + 1e-5) * (1 + s),
    "linen": lambda x, s, b: linen(nn.RMSNorm(epsilon=1e-5), x, scale=s),
    "rows flattened": lambda x, s, b: (lambda y: y * lax.rsqrt(mean(y**2) + 1e-5) * s)(x.reshape(-1, F)),
}


@pytest.mark.parametrize("name", LAYER_NORMS)
def test_spellings_of_layer_norm(name):
    assert_matched(LAYER_NORMS[name], *arguments(), kernel="layer_norm", detail="epsilon=1e-05, scale, bias")


@pytest.mark.parametrize("name", RMS_NORMS)
def test_spellings_of_rms_norm(name):
    assert_matched(RMS_NORMS[name], *arguments(), kernel="rms_norm", detail="epsilon=1e-05, scale")


def test_without_scale_and_bias():
    x, _, _ = arguments()
    assert_matched(lambda x: (x - mean(x)) / jnp.sqrt(var(x) + 1e-5), x, kernel="layer_norm", detail="epsilon=1e-05")
    assert_matched(lambda x: x * lax.rsqrt(mean(x * x) + 1e-5), x, kernel="rms_norm", detail="epsilon=1e-05")


def test_flax_nnx_modules():
    x, _, _ = arguments()
    for module, kernel in ((nnx.LayerNorm, "layer_norm"), (nnx.RMSNorm, "rms_norm")):
        graph, state = nnx.split(module(F, rngs=nnx.Rngs(0)))
        state = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.arange(F) / F, state)
        assert_matched(lambda x, graph=graph, state=state: nnx.merge(graph, state)(x), x, kernel=kernel)


def test_a_scale_that_is_read_from_a_variable_inside_the_program():
    x, s, _ = arguments()
    scale = nnx.Param(s, hijax=True)

    def loss(x, scale):
        return jnp.sum(((x - mean(x)) * lax.rsqrt(var(x) + 1e-5) * scale.get_value()) ** 3)

    step = jax.jit(lambda x, scale: jax.grad(loss)(x, scale))
    report = jaxext.explain(step)(x, scale)
    assert (len(report.replaced), report.fallbacks) == (1, []), report
    with jaxext.disabled():
        expected = step(x, scale)
    np.testing.assert_allclose(jaxext.accelerate(step)(x, scale), expected, atol=2e-5 * np.abs(expected).max())


def test_numbers_fold_into_scale_and_epsilon():
    x, s, b = arguments()
    spellings = {
        "unit length times root": lambda x, s, b: x / jnp.linalg.norm(x, axis=-1, keepdims=True) * F**0.5 * s,
        "twice": lambda x, s, b: 2 * x * lax.rsqrt(mean(x**2) + 1e-5) * s,
    }
    for spelling in spellings.values():
        assert_matched(spelling, x, s, b, kernel="rms_norm")

    def unbiased(x, s, b):
        return (x - mean(x)) / jnp.sqrt(var(x, ddof=1) + 1e-5) * s + b

    assert_matched(unbiased, x, s, b, kernel="layer_norm")


@pytest.mark.parametrize("kernel", ["layer_norm", "rms_norm"])
def test_bfloat16_with_float32_statistics(kernel):
    x, s, b = arguments(jnp.bfloat16)

    def cast_before_scale(x, s, b):
        wide = x.astype(jnp.float32)
        wide = wide - mean(wide) if kernel == "layer_norm" else wide
        normed = wide * lax.rsqrt(mean(wide * wide) + 1e-5)
        return normed.astype(jnp.bfloat16) * s.astype(jnp.bfloat16)

    def module(x, s, b):
        if kernel == "layer_norm":
            return linen(nn.LayerNorm(dtype=jnp.bfloat16), x, scale=s, bias=b)
        return linen(nn.RMSNorm(dtype=jnp.bfloat16), x, scale=s)

    for spelling in (cast_before_scale, module):
        assert_matched(spelling, x, s, b, kernel=kernel, tolerance=2e-2)


def test_a_wide_norm_rounded_once_is_one_kernel():
    x, s, b = arguments()
    report = report_of(lambda x, s, b: linen(nn.LayerNorm(dtype=jnp.bfloat16), x, scale=s, bias=b), x, s, b)
    (entry,) = report.replaced
    assert entry.dtype == "bfloat16"


def test_the_residual_sum_goes_with_the_norm():
    x, s, b = arguments()
    (r,) = normals(3, (B, T, F))

    def used_elsewhere(x, r, s, b):
        h = x + r
        return h + jnp.tanh(linen(nn.LayerNorm(), h, scale=s, bias=b))

    def used_once(x, r, s, b):
        return linen(nn.RMSNorm(), x + r, scale=s)

    assert_matched(used_elsewhere, x, r, s, b, kernel="layer_norm", detail="epsilon=1e-06, scale, bias, residual")
    assert_matched(used_once, x, r, s, b, kernel="rms_norm", detail="epsilon=1e-06, scale, residual")


def test_a_norm_that_is_modulated_per_row_is_found_inside():
    x, s, b = arguments()
    assert_matched(
        lambda x, s, b: (x - mean(x)) * lax.rsqrt(var(x) + 1e-6) * (1 + x[:, :1] * s) + b * x[:, :1],
        x,
        s,
        b,
        kernel="layer_norm",
        detail="epsilon=1e-06",
    )


def test_a_product_used_elsewhere_keeps_its_own_norm():
    x, s, b = arguments()

    def both(x, s, b):
        normed = x * lax.rsqrt(mean(x * x) + 1e-5)
        return normed, normed * s

    assert_matched(both, x, s, b, kernel="rms_norm", detail="epsilon=1e-05")


@pytest.mark.parametrize(
    ("spelling", "reason"),
    [
        (
            lambda x, s, b: (x - mean(x)) / (x.std(-1, keepdims=True) + 1e-5) * s + b,
            "epsilon is added to the standard deviation, not to the variance",
        ),
    ],
)
def test_a_near_miss_names_what_broke_it(spelling, reason):
    assert_missed(spelling, *arguments(), kernel="layer_norm", reason=reason)


@pytest.mark.parametrize(
    "spelling",
    [
        lambda x, s, b: linen(nn.GroupNorm(4), x, scale=s, bias=b),
        lambda x, s, b: x * lax.rsqrt(jnp.mean(x**2, 1, keepdims=True) + 1e-5) * s,
        lambda x, s, b: (x - mean(x)) * lax.rsqrt(mean(x**2) + 1e-5) * s,
        lambda x, s, b: x * s + b,
    ],
    ids=["group norm", "another axis", "other statistics", "no norm"],
)
def test_what_is_no_such_norm_is_left_alone(spelling):
    report = report_of(spelling, *arguments())
    assert not report.kernels() & {"layer_norm", "rms_norm"}
    assert_agrees(spelling, *arguments())


def test_constant_rows_agree_where_the_variance_vanishes():
    x = jnp.asarray(np.full((3, F), 2.5, np.float32))
    assert_matched(lambda x: (x - mean(x)) / jnp.sqrt(var(x) + 1e-5), x, kernel="layer_norm")
