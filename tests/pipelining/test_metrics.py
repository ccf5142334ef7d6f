"""What a loss returns beside itself has the value of the whole batch, also where no parts of it add up to that."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from programs import BATCH, WIDTH, dense, normal

import jaxext

X, Y = normal(0, BATCH, WIDTH), normal(1, BATCH, WIDTH)
WEIGHTS = [dense(n, WIDTH, WIDTH) for n in range(4)]
NEVER = 1e3


def rounded_to_an_integer(total, rows, params):
    return (total * 0.37).astype(jnp.int32)


def a_count_divided_as_integers(total, rows, params):
    return lax.div((rows > 0.1).sum(), jnp.int32(3))


def a_count_above_zero(total, rows, params):
    return (rows > 0).sum().astype(bool)


def sums_between_constants(total, rows, params):
    return jnp.pad(rows.sum(0), 1, constant_values=5.0)


def sums_between_zeros(total, rows, params):
    return jnp.pad(rows.sum(0), 1)


def a_parameter_behind_a_barrier_with_a_sum(total, rows, params):
    return lax.optimization_barrier((total, params[0].sum()))


def sums_behind_a_barrier(total, rows, params):
    return lax.optimization_barrier((total, rows.sum(0)))


def a_parameter_behind_a_barrier_with_rows(total, rows, params):
    return lax.optimization_barrier((rows, params[0].sum()))


def a_sum_or_a_constant(total, rows, params):
    return lax.cond(params[0][0, 0] > NEVER, lambda: total, lambda: 5.0)


def a_sum_or_zero(total, rows, params):
    return lax.cond(params[0][0, 0] > NEVER, lambda: total, lambda: 0.0)


def a_constant_minus_a_sum(total, rows, params):
    return 7.0 - total, params[0][0, 0] / total


METRICS = [
    rounded_to_an_integer,
    a_count_divided_as_integers,
    a_count_above_zero,
    sums_between_constants,
    sums_between_zeros,
    a_parameter_behind_a_barrier_with_a_sum,
    sums_behind_a_barrier,
    a_parameter_behind_a_barrier_with_rows,
    a_sum_or_a_constant,
    a_sum_or_zero,
    a_constant_minus_a_sum,
]


@pytest.mark.parametrize("metric", METRICS, ids=lambda f: f.__name__)
def test_a_metric_is_that_of_the_whole_batch(metric):
    def loss_fn(params, x, y):
        for w in params:
            x = jnp.tanh(x @ w)
        rows = jnp.square(x - y)
        return rows.sum() / BATCH, metric(rows.sum(), rows, params)

    def step(params, x, y):
        (loss, found), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params, x, y)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), loss, found

    expected = jax.jit(step)(WEIGHTS, X, Y)
    got = jaxext.pipeline(step, num_stages=2, num_microbatches=4)(WEIGHTS, X, Y)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
