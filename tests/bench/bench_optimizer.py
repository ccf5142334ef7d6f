"""Optimizer updates of a transformer's leaves, in place, against the machine's copy bandwidth.

    python tests/bench/bench_optimizer.py

Bytes: every array of gradients, parameters and state that the update reads or writes, once. Memory reuse on both sides.
"""

import functools

import interleaved
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxext

WIDTH, LAYERS, VOCABULARY = 768, 6, 8192


def parameters():
    """29 matrices, 24 vectors and the embedding of a small GPT: 49 million numbers."""
    sides = [(WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)]
    shapes = [*sides, *[(side[1],) for side in sides]] * LAYERS + [(VOCABULARY, WIDTH)]
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) * 0.02 for shape in shapes]


def matrices(tree):
    return [leaf.ndim > 1 for leaf in tree]


SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 100, 1000)
OPTIMIZERS = {
    "adamw": optax.adamw(1e-3),
    "clip, adamw, schedule": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(SCHEDULE)),
    "adamw, masked decay": optax.adamw(1e-3, mask=matrices),
    "lion": optax.lion(1e-4),
    "sgd, momentum": optax.sgd(0.1, momentum=0.9),
    "rmsprop": optax.rmsprop(1e-3),
    "adamw every 4 steps": optax.MultiSteps(optax.adamw(1e-3), 4),
}


def size(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def update(params, state, gradients, optimizer):
    changes, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, changes), state


def runs(optimizer, params, gradients):
    """{"stock", "jaxext"}: an update of each, on state of its own, which is donated."""
    sides = {}
    for side, wrap in (("stock", lambda f: f), ("jaxext", jaxext.accelerate)):
        own = jax.tree.map(jnp.copy, params)
        box = [(own, optimizer.init(own))]
        jitted = wrap(jax.jit(functools.partial(update, optimizer=optimizer), donate_argnums=(0, 1)))

        def call(jitted=jitted, box=box):
            box[0] = jitted(*box[0], gradients)
            return box[0]

        sides[side] = call
    return sides


def main():
    params = parameters()
    gradients = [leaf * 0.1 for leaf in params]
    for name, optimizer in OPTIMIZERS.items():
        nbytes = 2 * size(params) + size(gradients) + 2 * size(optimizer.init(params))
        if "clip" in name:
            nbytes += size(gradients)  # read once more, for their norm
        seconds = interleaved.medians(runs(optimizer, params, gradients), repeats=40, seconds=4.0)
        copy = interleaved.copy_bandwidth()
        shares = ", ".join(f"{side} {nbytes / s / copy:.0%}" for side, s in seconds.items())
        print(f"{name}: {nbytes / 2**20:.0f} MiB; of copy bandwidth: {shares}", flush=True)


if __name__ == "__main__":
    main()
