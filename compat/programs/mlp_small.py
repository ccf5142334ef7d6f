"""A small perceptron for tabular regression in plain JAX: what a step costs here is mostly starting it.

Run it with `python mlp_small.py --steps 10`; sizes can also come from MLP_FEATURES, MLP_WIDTH and MLP_BATCH.
"""

import argparse
import functools
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax


def forward(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return (x @ params[-1]["w"] + params[-1]["b"])[:, 0]


def make_train_step(optimizer):
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, opt_state, x, y):
        loss, grads = jax.value_and_grad(lambda params: jnp.mean((forward(params, x) - y) ** 2))(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    return train_step


def initialise(key, widths):
    keys = jax.random.split(key, len(widths) - 1)
    return [
        {"w": jax.random.normal(k, (a, b)) * (2 / a) ** 0.5, "b": jnp.zeros(b)}
        for k, a, b in zip(keys, widths, widths[1:])
    ]


def table(batch, features, seed):
    """Yield (x [batch, features], y [batch]) without end."""
    rng = np.random.default_rng(seed)
    rule = rng.normal(size=features)
    while True:
        x = rng.normal(size=(batch, features))
        yield x.astype(np.float32), (np.sin(x @ rule) + 0.1 * rng.normal(size=batch)).astype(np.float32)


def parse_arguments(argv=None):
    def setting(name, default):
        return type(default)(os.environ.get(f"MLP_{name}", default))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=setting("FEATURES", 16))
    parser.add_argument("--width", type=int, default=setting("WIDTH", 64))
    parser.add_argument("--batch", type=int, default=setting("BATCH", 32))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def build(options):
    """The train step, the parameters and the optimizer state."""
    optimizer = optax.adam(1e-3)
    params = initialise(jax.random.key(options.seed), (options.features, options.width, options.width, 1))
    return make_train_step(optimizer), params, optimizer.init(params)


def factory():
    """The train step and its arguments: parameters, optimizer state, x and y."""
    options = parse_arguments([])
    step, params, opt_state = build(options)
    x, y = next(table(options.batch, options.features, options.seed))
    return step, (params, opt_state, jnp.asarray(x), jnp.asarray(y))


def main():
    options = parse_arguments()
    train_step, params, opt_state = build(options)
    batches = table(options.batch, options.features, options.seed)
    for step in range(options.steps):
        x, y = next(batches)
        start = time.perf_counter()
        params, opt_state, loss = train_step(params, opt_state, x, y)
        loss = float(loss)
        print(f"step {step} loss {loss:.6f} ms {(time.perf_counter() - start) * 1e3:.3f}", flush=True)


if __name__ == "__main__":
    main()
