"""Particle Metropolis-Hastings for a stochastic volatility model: a bootstrap filter a step, in plain JAX.

A step proposes parameters, runs the filter (systematic resampling, medians of the particles) over the whole series
and accepts or rejects. The loss is the accepted negative log-likelihood. Run it with
`python particle_filter.py --steps 10`; sizes can also come from PARTICLE_PARTICLES and PARTICLE_TIMES.
"""

import argparse
import functools
import os
import time

import jax
import jax.numpy as jnp
import numpy as np


def resample(key, weights):
    """Systematic resampling: places [particles] of the survivors."""
    count = weights.shape[0]
    points = (jnp.arange(count) + jax.random.uniform(key)) / count
    edges = jnp.cumsum(weights)
    return jnp.searchsorted(edges / edges[-1], points).clip(0, count - 1)


def likelihood(key, theta, series, particles):
    """Log-likelihood of `series` [times] under (persistence, noise, scale), and medians of the volatility [times]."""
    persistence, noise, scale = jnp.tanh(theta[0]), jnp.exp(theta[1]), jnp.exp(theta[2])

    def step(carry, y):
        x, key = carry
        key, move, choose = jax.random.split(key, 3)
        x = persistence * x + noise * jax.random.normal(move, x.shape)
        spread = scale * jnp.exp(x / 2)
        logs = -0.5 * jnp.square(y / spread) - jnp.log(spread) - 0.5 * jnp.log(2 * jnp.pi)
        total = jax.nn.logsumexp(logs)
        x = x[resample(choose, jnp.exp(logs - total))]
        return (x, key), (total - jnp.log(particles), jnp.sort(x)[particles // 2])

    start, run = jax.random.split(key)
    x = noise / jnp.sqrt(1 - persistence**2) * jax.random.normal(start, (particles,))
    _, (logs, medians) = jax.lax.scan(step, (x, run), series)
    return logs.sum(), medians


def make_step(particles):
    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, series):
        key, propose, run, accept = jax.random.split(state["key"], 4)
        theta = state["theta"] + 0.05 * jax.random.normal(propose, state["theta"].shape)
        logs, medians = likelihood(run, theta, series, particles)
        better = jnp.log(jax.random.uniform(accept)) < logs - state["logs"]
        state = {
            "key": key,
            "theta": jnp.where(better, theta, state["theta"]),
            "logs": jnp.where(better, logs, state["logs"]),
            "medians": jnp.where(better, medians, state["medians"]),
        }
        return state, -state["logs"]

    return step


def returns(times, seed):
    """A series [times] drawn from the model."""
    rng = np.random.default_rng(seed)
    x, found = 0.0, []
    for _ in range(times):
        x = 0.95 * x + 0.3 * rng.normal()
        found.append(np.exp(x / 2) * rng.normal())
    return jnp.asarray(found, jnp.float32)


def parse_arguments(argv=None):
    def setting(name, default):
        return type(default)(os.environ.get(f"PARTICLE_{name}", default))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--particles", type=int, default=setting("PARTICLES", 100_000))
    parser.add_argument("--times", type=int, default=setting("TIMES", 20))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def build(options):
    """The step, its state, and the series."""
    state = {
        "key": jax.random.key(options.seed),
        "theta": jnp.asarray([1.5, -1.0, 0.0]),
        "logs": jnp.float32(-jnp.inf),
        "medians": jnp.zeros(options.times),
    }
    return make_step(options.particles), state, returns(options.times, options.seed)


def factory():
    """The step and its arguments: the state and the series."""
    step, *args = build(parse_arguments([]))
    return step, tuple(args)


def main():
    options = parse_arguments()
    run, state, series = build(options)
    for step in range(options.steps):
        start = time.perf_counter()
        state, loss = run(state, series)
        loss = float(loss)
        print(f"step {step} loss {loss:.6f} ms {(time.perf_counter() - start) * 1e3:.1f}", flush=True)


if __name__ == "__main__":
    main()
