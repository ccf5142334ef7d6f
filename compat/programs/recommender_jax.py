"""A recommender in plain JAX (DLRM): hashed categories in one large embedding table, pairwise interactions, AdaGrad.

Clicks follow a hidden linear rule over popular (Zipf) categories. Run it with `python recommender_jax.py --steps 10`;
sizes can also come from RECOMMENDER_ROWS, RECOMMENDER_SIZE and RECOMMENDER_BATCH.
"""

import argparse
import functools
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

DENSE, CATEGORIES = 13, 26


def mlp(layers, x):
    for index, layer in enumerate(layers):
        x = x @ layer["w"] + layer["b"]
        x = jax.nn.relu(x) if index + 1 < len(layers) else x
    return x


def forward(params, dense, categories):
    bottom = jax.nn.relu(mlp(params["bottom"], dense))
    rows = params["table"][categories + jnp.arange(CATEGORIES) * (params["table"].shape[0] // CATEGORIES)]
    features = jnp.concatenate([bottom[:, None], rows], axis=1)
    products = jnp.einsum("bif,bjf->bij", features, features)
    upper = products[:, *np.triu_indices(CATEGORIES + 1, 1)]
    return mlp(params["top"], jnp.concatenate([bottom, upper], axis=-1))[:, 0]


def initialise(key, rows, size):
    def layers(key, widths):
        keys = jax.random.split(key, len(widths) - 1)
        return [
            {"w": jax.random.normal(k, (a, b)) * (2 / a) ** 0.5, "b": jnp.zeros(b)}
            for k, a, b in zip(keys, widths, widths[1:])
        ]

    table, bottom, top = jax.random.split(key, 3)
    pairs = (CATEGORIES + 1) * CATEGORIES // 2
    return {
        "table": jax.random.uniform(table, (CATEGORIES * rows, size), minval=-0.05, maxval=0.05),
        "bottom": layers(bottom, (DENSE, 256, 64, size)),
        "top": layers(top, (size + pairs, 256, 64, 1)),
    }


def make_train_step(optimizer):
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, opt_state, batch):
        def loss_fn(params):
            logits = forward(params, batch["dense"], batch["categories"])
            return optax.sigmoid_binary_cross_entropy(logits, batch["clicked"]).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return train_step


def clicks(batch, rows, seed):
    """Yield dictionaries of dense [batch, 13], categories [batch, 26] and clicked [batch] without end."""
    rng = np.random.default_rng(seed)
    rule = rng.normal(size=DENSE)
    while True:
        dense = rng.normal(size=(batch, DENSE))
        categories = rng.zipf(1.2, size=(batch, CATEGORIES)) * 2654435761 % rows
        chance = 1 / (1 + np.exp(-(dense @ rule + np.cos(categories[:, 0]) - 1)))
        yield {
            "dense": dense.astype(np.float32),
            "categories": categories.astype(np.int32),
            "clicked": (rng.random(batch) < chance).astype(np.float32),
        }


def parse_arguments(argv=None):
    def setting(name, default):
        return type(default)(os.environ.get(f"RECOMMENDER_{name}", default))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=setting("ROWS", 20_000), help="of each category's table")
    parser.add_argument("--size", type=int, default=setting("SIZE", 16))
    parser.add_argument("--batch", type=int, default=setting("BATCH", 2048))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def build(options):
    optimizer = optax.adagrad(0.02)
    params = initialise(jax.random.key(options.seed), options.rows, options.size)
    return make_train_step(optimizer), params, optimizer.init(params)


def factory():
    """The train step and its arguments: parameters, optimizer state and one batch."""
    options = parse_arguments([])
    step, params, opt_state = build(options)
    return step, (params, opt_state, jax.tree.map(jnp.asarray, next(clicks(options.batch, options.rows, options.seed))))


def main():
    options = parse_arguments()
    train_step, params, opt_state = build(options)
    batches = clicks(options.batch, options.rows, options.seed)
    for step in range(options.steps):
        batch = jax.tree.map(jnp.asarray, next(batches))
        start = time.perf_counter()
        params, opt_state, loss = train_step(params, opt_state, batch)
        loss = float(loss)
        print(f"step {step} loss {loss:.6f} ms {(time.perf_counter() - start) * 1e3:.1f}", flush=True)


if __name__ == "__main__":
    main()
