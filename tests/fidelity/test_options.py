"""JAX's options mean under jaxext what they mean in stock JAX."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fidelity_program import arguments, assert_close, attend, kernels_in, loss, norm, step

CLEAN = {
    "jax_numpy_dtype_promotion": "strict",
    "jax_default_matmul_precision": "highest",
    "jax_threefry_partitionable": False,
    "jax_default_prng_impl": "rbg",
    "jax_traceback_filtering": "off",
    "jax_use_simplified_jaxpr_constants": True,
    "jax_remove_size_one_mesh_axis_from_type": True,
    "jax_default_device": None,
}


@pytest.fixture
def option():
    changed = []

    def on(name, value):
        if not hasattr(jax.config, name):
            pytest.skip(f"this JAX has no {name}")
        changed.append((name, getattr(jax.config, name)))
        jax.config.update(name, value)

    yield on
    for name, value in changed:
        jax.config.update(name, value)


@pytest.mark.parametrize("name", CLEAN)
def test_an_option_that_changes_no_result_changes_none(sides, option, name):
    option(name, CLEAN[name])
    with sides["stock"]():
        expected = jax.jit(step)(*arguments())
    assert kernels_in(jax.jit(step).lower(*arguments()))
    assert_close(jax.jit(step)(*arguments()), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_double_precision(sides, option, dtype):
    option("jax_enable_x64", True)
    data = arguments(dtype)
    with sides["stock"]():
        expected = jax.jit(step)(*data)
    assert expected[0].dtype == dtype
    assert bool(kernels_in(jax.jit(step).lower(*data))) == (dtype == np.float32)
    assert_close(jax.jit(step)(*data), expected, tolerance=2e-5 if dtype == np.float32 else 1e-12)


def ranked(weights, x):
    return attend(norm(x, weights["scale"][None, None]), weights["qkv"])


def test_rank_promotion_raises_where_stock_raises_and_nowhere_else(sides, option):
    option("jax_numpy_rank_promotion", "raise")
    errors = []
    for side in sides.values():
        with side(), pytest.raises(ValueError, match="rank_promotion") as error:
            jax.jit(step)(*arguments())
        errors.append(str(error.value))
    assert errors[0] == errors[1]

    def strict(weights, x):
        scale = jnp.broadcast_to(weights["scale"], x.shape)
        scores_mask = jnp.tril(jnp.ones((1, 1, 128, 128), bool))
        normed = norm(x, scale)
        q = normed.reshape(2, 128, 4, 16)
        return jnp.mean(jax.nn.dot_product_attention(q, q, q, mask=scores_mask) ** 2)

    function = jax.jit(jax.grad(strict))
    with sides["stock"]():
        expected = function(*arguments())
    assert kernels_in(function.lower(*arguments()))
    assert_close(function(*arguments()), expected)


def test_strict_dtypes_raise_where_stock_raises(sides, option):
    option("jax_numpy_dtype_promotion", "strict")
    weights, x = arguments()
    errors = []
    for side in sides.values():
        with side(), pytest.raises(jax.dtypes.TypePromotionError) as error:
            jax.jit(step)(weights, jnp.asarray(x, jnp.bfloat16))
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_no_rank_or_dtype_of_jaxexts_own_is_promoted(sides, option):
    """The program is clean, so nothing that jaxext adds to it may raise either."""
    option("jax_numpy_rank_promotion", "raise")
    option("jax_numpy_dtype_promotion", "strict")
    from jaxext import kernels

    q = jnp.ones((2, 128, 4, 16), jnp.bfloat16)
    logits, labels = jnp.ones((2, 8, 1000)), jnp.zeros((2, 8), jnp.int32)
    scale, x, table = jnp.ones(64), jnp.ones((2, 8, 64)), jnp.ones((64, 1000))

    def everything(q, logits, x, table):
        out = kernels.attention(q, q, q, is_causal=True).astype(jnp.float32).sum()
        out += kernels.softmax_cross_entropy(logits, labels).sum()
        out += kernels.linear_cross_entropy(x, table, labels).sum()
        return out + kernels.layer_norm(x, scale, scale).sum() + kernels.rms_norm(x, scale).sum()

    assert np.isfinite(everything(q, logits, x, table))
    assert kernels_in(jax.jit(jax.grad(everything, argnums=(0, 1, 2, 3))).lower(q, logits, x, table))


def test_nothing_moves_between_host_and_device(installed):
    data = jax.device_put(arguments())
    function = jax.jit(step)
    function(*data)
    with jax.transfer_guard("disallow"):
        assert kernels_in(function.lower(*data))
        jax.block_until_ready(function(*data))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_programs_under_strict_types(sides, option, dtype):
    data = jax.tree.map(lambda leaf: leaf.astype(dtype), arguments())
    option("jax_numpy_dtype_promotion", "strict")
    with sides["stock"]():
        expected = jax.jit(step)(*data)
    assert bool(kernels_in(jax.jit(step).lower(*data))) == (dtype == jnp.bfloat16)
    assert_close(jax.jit(step)(*data), expected, tolerance=2e-2)


def test_compilations_are_logged_as_stock_logs_them(sides, option, caplog):
    option("jax_log_compiles", True)
    logged = []
    for side in sides.values():

        def stepped(weights, x):
            return jax.value_and_grad(loss)(weights, x)

        caplog.clear()
        with side(), caplog.at_level(logging.WARNING):
            jax.jit(stepped).lower(*arguments()).compile()
        lines = [record.getMessage() for record in caplog.records]
        logged.append([line for line in lines if "stepped" in line])
    starts = [[line.split(" for ")[0].split(" in ")[0].split(" with ")[0] for line in lines] for lines in logged]
    assert starts[0] == starts[1]
    assert starts[0]


def test_no_program_is_compiled_that_stock_does_not_compile(sides, caplog, option):
    option("jax_log_compiles", True)
    data = jax.device_put(arguments())
    names = []
    for side in sides.values():
        jax.clear_caches()
        caplog.clear()
        with side(), caplog.at_level(logging.WARNING):
            jax.jit(step)(*data)
        lines = [record.getMessage() for record in caplog.records]
        names.append([line.split(" with ")[0] for line in lines if line.startswith("Compiling")])
    assert names[0] == names[1]
