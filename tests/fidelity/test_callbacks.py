"""Callbacks inside accelerated functions: as often, in the order and with the values of stock JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fidelity_program import arguments, assert_close, attend, block, kernels_in, norm
from jax.experimental import io_callback

import jaxext


def chatty(weights, x):
    """Prints and calls back before, between and after the kernels, in forward code that is differentiated."""

    def loss(weights):
        jax.debug.print("before {}", x[0, 0, 0], ordered=True)
        normed = norm(x, weights["scale"])
        jax.debug.print("normed {:.3f}", normed.sum() + 1, ordered=True)
        mixed = attend(normed, weights["qkv"])
        jax.debug.callback(lambda value: print(f"mixed {value:.3f}"), jnp.abs(mixed).mean(), ordered=True)
        shape = jax.ShapeDtypeStruct((), x.dtype)
        told = io_callback(lambda value: np.float32(value * 2), shape, jax.lax.stop_gradient(mixed.sum()), ordered=True)
        return jnp.mean(jnp.square(mixed + x)) + 0 * told

    value, gradients = jax.value_and_grad(loss)(weights)
    jax.debug.print("after {:.4f}", value, ordered=True)
    return value, gradients


@pytest.mark.parametrize("jitted", [True, False])
def test_output_and_its_order_are_stocks(sides, capfd, jitted):
    function = jax.jit(chatty) if jitted else chatty
    assert kernels_in(jax.jit(chatty).lower(*arguments()))
    printed, results = {}, {}
    for name, side in sides.items():
        capfd.readouterr()
        with side():
            results[name] = jax.block_until_ready(function(*arguments()))
            jax.effects_barrier()
        printed[name] = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed["stock"]] == ["before", "normed", "mixed", "after"]
    assert printed["jaxext"] == printed["stock"]
    assert_close(results["jaxext"], results["stock"])


def test_pure_callbacks_between_kernels(sides):
    @jax.custom_vjp
    def doubled(x):
        return jax.pure_callback(lambda x: np.asarray(x) * 2, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    doubled.defvjp(lambda x: (doubled(x), None), lambda _, g: (2 * g,))

    def loss(weights, x):
        return jnp.mean(jnp.square(block(weights, doubled(block(weights, x)))))

    function = jax.jit(jax.value_and_grad(loss))
    with sides["stock"]():
        expected = function(*arguments())
    assert kernels_in(function.lower(*arguments()))["jaxext_attention_backward"] == 2
    assert_close(function(*arguments()), expected)


def test_an_error_in_a_callback_arrives(sides):
    def failing(value):
        raise RuntimeError("the callback failed")

    def step(weights, x):
        jax.debug.callback(failing, x.sum())
        return block(weights, x)

    for side in sides.values():
        with side(), pytest.raises(jax.errors.JaxRuntimeError, match="the callback failed"):
            jax.block_until_ready((jax.jit(step)(*arguments()), jax.effects_barrier()))


def test_callbacks_in_a_loop_over_blocks_come_in_order(sides, capfd):
    def stacked(weights, x):
        def body(x, number):
            x = block(weights, x)
            jax.debug.print("block {} {:.2f}", number, jnp.abs(x).mean(), ordered=True)
            return x, None

        return jax.lax.scan(body, x, jnp.arange(3))[0]

    printed = {}
    for name, side in sides.items():
        capfd.readouterr()
        with side():
            jax.block_until_ready(jaxext.accelerate(stacked)(*arguments()))
            jax.effects_barrier()
        printed[name] = capfd.readouterr().out
    assert kernels_in(jaxext.accelerate(stacked).lower(*arguments()))
    assert printed["jaxext"] == printed["stock"]
    assert printed["stock"].count("block") == 3
