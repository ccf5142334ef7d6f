"""Proximal policy optimisation in flax.linen: cart-pole written in JAX, rollouts and update in one jitted step.

Run it with `python ppo_linen.py --steps 10`; sizes can also come from PPO_ENVS, PPO_LENGTH, PPO_EPOCHS and
PPO_MINIBATCHES.
"""

import argparse
import os
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

DISCOUNT, TRACE, CLIP = 0.99, 0.95, 0.2


class ActorCritic(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = nn.tanh(nn.Dense(64)(nn.tanh(nn.Dense(64)(x))))
        return nn.Dense(2)(hidden), nn.Dense(1)(hidden)[..., 0]


def physics(state, action):
    """One step of cart-pole (Barto, Sutton and Anderson, 1983); the next state, and whether it fell."""
    x, speed, angle, turning = state
    force = jnp.where(action == 1, 10.0, -10.0)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    push = (force + 0.05 * turning**2 * sin) / 1.1
    turn = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    pull = push - 0.05 * turn * cos / 1.1
    state = jnp.stack([x + 0.02 * speed, speed + 0.02 * pull, angle + 0.02 * turning, turning + 0.02 * turn])
    return state, (jnp.abs(state[0]) > 2.4) | (jnp.abs(state[2]) > 0.21)


def rollout(state, envs, key, length):
    """Play `length` steps in every environment; the environments after it, and what was seen, [length, envs, ...]."""

    def step(carry, _):
        envs, key = carry
        key, act, restart = jax.random.split(key, 3)
        logits, value = state.apply_fn(state.params, envs)
        action = jax.random.categorical(act, logits)
        chance = jnp.take_along_axis(jax.nn.log_softmax(logits), action[:, None], axis=-1)[:, 0]
        after, fell = jax.vmap(physics)(envs, action)
        fresh = jax.random.uniform(restart, envs.shape, minval=-0.05, maxval=0.05)
        seen = {"x": envs, "action": action, "chance": chance, "value": value, "fell": fell}
        return (jnp.where(fell[:, None], fresh, after), key), seen

    (envs, key), seen = jax.lax.scan(step, (envs, key), None, length=length)
    return envs, key, seen


def advantages(seen, last):
    """Generalised advantage estimates; a reward of 1 for every step."""

    def back(carry, now):
        advantage, following = carry
        alive = 1.0 - now["fell"]
        error = 1.0 + DISCOUNT * following * alive - now["value"]
        advantage = error + DISCOUNT * TRACE * alive * advantage
        return (advantage, now["value"]), advantage

    return jax.lax.scan(back, (jnp.zeros_like(last), last), seen, reverse=True)[1]


def loss_fn(params, apply_fn, batch):
    logits, value = apply_fn(params, batch["x"])
    chances = jax.nn.log_softmax(logits)
    chance = jnp.take_along_axis(chances, batch["action"][:, None], axis=-1)[:, 0]
    gain = (batch["advantage"] - batch["advantage"].mean()) / (batch["advantage"].std() + 1e-8)
    ratio = jnp.exp(chance - batch["chance"])
    actor = -jnp.minimum(ratio * gain, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * gain).mean()
    critic = 0.5 * jnp.square(value - batch["advantage"] - batch["value"]).mean()
    entropy = -jnp.sum(jnp.exp(chances) * chances, axis=-1).mean()
    return actor + 0.5 * critic - 0.01 * entropy


def make_train_step(options):
    def minibatch(state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(state.params, state.apply_fn, batch)
        return state.apply_gradients(grads=grads), loss

    @jax.jit
    def train_step(state, envs, key):
        envs, key, seen = rollout(state, envs, key, options.length)
        seen["advantage"] = advantages(seen, state.apply_fn(state.params, envs)[1])
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), seen)

        def epoch(carry, _):
            state, key = carry
            key, shuffle = jax.random.split(key)
            order = jax.random.permutation(shuffle, options.envs * options.length)
            batches = jax.tree.map(lambda x: x[order].reshape(options.minibatches, -1, *x.shape[1:]), flat)
            state, losses = jax.lax.scan(minibatch, state, batches)
            return (state, key), losses

        (state, key), losses = jax.lax.scan(epoch, (state, key), None, length=options.epochs)
        return state, envs, key, losses.mean()

    return train_step


def parse_arguments(argv=None):
    def setting(name, default):
        return type(default)(os.environ.get(f"PPO_{name}", default))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=int, default=setting("ENVS", 256))
    parser.add_argument("--length", type=int, default=setting("LENGTH", 64))
    parser.add_argument("--epochs", type=int, default=setting("EPOCHS", 4))
    parser.add_argument("--minibatches", type=int, default=setting("MINIBATCHES", 4))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def build(options):
    """The train step; the train state, environments [envs, 4] and the key of chance."""
    init, start, key = jax.random.split(jax.random.key(options.seed), 3)
    model = ActorCritic()
    params = model.init(init, jnp.zeros((1, 4)))
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(3e-4))
    state = train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    envs = jax.random.uniform(start, (options.envs, 4), minval=-0.05, maxval=0.05)
    return make_train_step(options), state, envs, key


def factory():
    """The train step and its arguments: the train state, environments and key."""
    step, *args = build(parse_arguments([]))
    return step, tuple(args)


def main():
    options = parse_arguments()
    train_step, state, envs, key = build(options)
    for step in range(options.steps):
        start = time.perf_counter()
        state, envs, key, loss = train_step(state, envs, key)
        loss = float(loss)
        print(f"step {step} loss {loss:.6f} ms {(time.perf_counter() - start) * 1e3:.1f}", flush=True)


if __name__ == "__main__":
    main()
