"""First-order recurrences by `associative_scan` are found, however they are combined, and agree with stock JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agrees, assert_matched, report_of
from jax import lax

from jaxext.kernels._linear_recurrence import LINEAR_RECURRENCE

B, T, D = 2, 37, 12


def arguments(shape=(B, T, D), dtype=jnp.float32):
    rng = np.random.default_rng(0)
    a = jnp.asarray(1 - 0.5 * rng.random(shape), dtype)
    return a, jnp.asarray(rng.standard_normal(shape), dtype)


def scan(combine, a, b, axis=1, **options):
    return lax.associative_scan(combine, (a, b), axis=axis, **options)


COMBINATIONS = {
    "right times left": lambda l, r: (r[0] * l[0], r[0] * l[1] + r[1]),
    "left times right": lambda l, r: (l[0] * r[0], l[1] * r[0] + r[1]),
    "sum turned": lambda l, r: (l[0] * r[0], r[1] + r[0] * l[1]),
    "all turned": lambda l, r: (r[0] * l[0], r[1] + l[1] * r[0]),
    "jnp": lambda l, r: (jnp.multiply(l[0], r[0]), jnp.add(jnp.multiply(r[0], l[1]), r[1])),
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_combinations_however_written(name):
    combine = COMBINATIONS[name]
    assert_matched(lambda a, b: scan(combine, a, b)[1], *arguments(), kernel="linear_recurrence", detail=f"{T} steps")


def first(l, r):
    return r[0] * l[0], r[0] * l[1] + r[1]


WAYS = {
    "steps first": lambda a, b: scan(first, jnp.swapaxes(a, 0, 1), jnp.swapaxes(b, 0, 1), axis=0)[1],
    "backwards": lambda a, b: scan(first, a, b, reverse=True)[1],
    "vmap": jax.vmap(lambda a, b: scan(first, a, b, axis=0)[1]),
    "coefficients computed": lambda a, b: scan(first, jnp.exp(-a), a * b)[1],
    "jitted": jax.jit(lambda a, b: scan(first, a, b)[1]),
    "remat": jax.checkpoint(lambda a, b: scan(first, a, b)[1]),
    "scan": lambda a, b: lax.scan(lambda c, _: (scan(first, a, c)[1], None), b, None, length=2)[0],
}


@pytest.mark.parametrize("name", WAYS)
def test_ways_to_call_it(name):
    assert_matched(WAYS[name], *arguments(), kernel="linear_recurrence")


@pytest.mark.parametrize("steps", [8, 9, 15, 16, 17, 31, 64, 100])
def test_any_number_of_steps(steps):
    args = arguments((1, steps, 16))
    assert_matched(lambda a, b: scan(first, a, b)[1], *args, kernel="linear_recurrence", detail=f"{steps} steps")


def test_a_selective_state_space_layer():
    """As Mamba's: states of [batch, steps, channels, states], contracted with what reads them."""

    def layer(x, decay, reads):
        step = jax.nn.softplus(x)[..., None]
        states = scan(first, jnp.exp(-step * decay), step * reads[:, :, None] * x[..., None])[1]
        return jnp.einsum("btdn,btn->btd", states, reads)

    rng = np.random.default_rng(1)
    x, decay, reads = (jnp.asarray(rng.random(shape), jnp.float32) for shape in ((2, 40, 8), (8, 4), (2, 40, 4)))
    assert_matched(layer, x, decay, reads, kernel="linear_recurrence", detail="40 steps")


def test_bfloat16():
    args = arguments(dtype=jnp.bfloat16)
    # Stock rounds at every level of its tree: log2(T) roundings of numbers up to 1 / (1 - a).
    assert_matched(lambda a, b: scan(first, a, b)[1], *args, kernel="linear_recurrence", tolerance=4e-2)


OTHERS = {
    "running sum": lambda a, b: lax.associative_scan(jnp.add, a, axis=1) * b,
    "running maximum of pairs": lambda a, b: scan(lambda l, r: (l[0] * r[0], jnp.maximum(l[1], r[1])), a, b)[1],
    "difference": lambda a, b: scan(lambda l, r: (l[0] * r[0], r[0] * l[1] - r[1]), a, b)[1],
    "left factor": lambda a, b: scan(lambda l, r: (l[0] * r[0], l[0] * l[1] + r[1]), a, b)[1],
    "interleaved halves": lambda a, b: (
        lax.pad(a, 0.0, ((0, 0, 0), (0, 1, 1), (0, 0, 0))) + lax.pad(b, 0.0, ((0, 0, 0), (1, 0, 1), (0, 0, 0)))
    ),
    "products alone": lambda a, b: scan(first, a, b)[0],
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_such_recurrence_is_left_alone(name):
    assert "linear_recurrence" not in report_of(OTHERS[name], *arguments()).kernels()
    assert_agrees(OTHERS[name], *arguments())


def test_both_results_used_agree():
    assert_agrees(lambda a, b: scan(first, a, b), *arguments())


def test_the_first_step_s_factor_stands_before_nothing():
    a, b = arguments()
    (with_it,), (without,) = LINEAR_RECURRENCE(a.at[:, 0].set(jnp.inf), b), LINEAR_RECURRENCE(a, b)
    np.testing.assert_array_equal(with_it, without)
