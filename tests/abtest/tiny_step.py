"""A tiny train step in plain JAX and optax."""

import jax
import jax.numpy as jnp
import optax

OPTIMIZER = optax.adamw(1e-3)


def loss_fn(params, x, y):
    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    return jnp.mean((hidden @ params["w2"] - y) ** 2)


def train_step(params, opt_state, x, y):
    loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
    updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


def make_args(seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "w1": jax.random.normal(keys[0], (16, 24)) * 0.2,
        "b1": jnp.zeros(24),
        "w2": jax.random.normal(keys[1], (24, 4)) * 0.2,
    }
    x, y = jax.random.normal(keys[2], (8, 16)), jax.random.normal(keys[3], (8, 4))
    return params, OPTIMIZER.init(params), x, y
