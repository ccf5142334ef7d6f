"""Equinox steps: leaves that are no arrays are static and come back as they were."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import BATCH, WIDTH, normal

import jaxext


def loss_fn(model, x):
    return jnp.mean(jax.vmap(model)(x) ** 2)


def step(model, x, rate):
    loss, gradients = eqx.filter_value_and_grad(loss_fn)(model, x)
    return eqx.apply_updates(model, jax.tree.map(lambda g: -rate * g, gradients)), loss


def made(depth=3, activation=jax.nn.gelu):
    model = eqx.nn.MLP(WIDTH, WIDTH, WIDTH, depth, activation=activation, key=jax.random.key(0))
    return model, normal(1, BATCH, WIDTH), jnp.float32(0.1)


@pytest.mark.parametrize("train_step", [step, eqx.filter_jit(step)], ids=["plain", "filter_jit"])
def test_what_is_no_array_comes_back_as_it_was_and_the_next_step_is_not_compiled_anew(train_step):
    model, *rest = made()
    pipelined = jaxext.pipeline(train_step, num_stages=2, num_microbatches=4)
    first, _ = pipelined(model, *rest)
    second, loss = pipelined(first, *rest)
    assert second.activation is model.activation
    assert len(pipelined._built) == 1
    want, _ = eqx.filter_jit(step)(model, *rest)
    np.testing.assert_allclose(loss, eqx.filter_jit(step)(want, *rest)[1], rtol=1e-5)


def test_another_activation_is_another_program():
    pipelined = jaxext.pipeline(step, num_stages=2, num_microbatches=4)
    losses = [pipelined(*made(activation=f))[1] for f in (jax.nn.gelu, jnp.tanh)]
    wanted = [eqx.filter_jit(step)(*made(activation=f))[1] for f in (jax.nn.gelu, jnp.tanh)]
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)


def test_disabled_runs_the_step_by_filter_jit():
    pipelined = jaxext.pipeline(eqx.filter_jit(step), num_stages=2, num_microbatches=4)
    with jaxext.disabled():
        model, loss = pipelined(*made())
    assert model.activation is jax.nn.gelu
    np.testing.assert_array_equal(loss, eqx.filter_jit(step)(*made())[1])


@pytest.mark.parametrize(
    ("donate", "expected"), [("none", []), ("all", ["model", "rate", "x"]), ("all-except-first", ["rate", "x"])]
)
def test_what_filter_jit_donates_is_donated(donate, expected):
    pipelined = jaxext.pipeline(eqx.filter_jit(step, donate=donate), num_stages=2)
    assert sorted(pipelined._options.donated) == expected


def test_in_other_arguments_of_a_plain_step_what_is_no_array_stays_an_error():
    pipelined = jaxext.pipeline(step, num_stages=2)
    model, x, _ = made()
    with pytest.raises(TypeError, match=r"argument 'rate' holds a str, which is no array\. Name it in static_argnames"):
        pipelined(model, x, "fast")
