"""Updates of tables by the rows that were looked up, against passes over the whole table.

    python tests/bench/bench_touched_rows.py

Sides: memory reuse on both, the tables donated ("in place") or not; numbers of rows evenly or as in Zipf's law (1.2).
"""

import functools
import itertools

import interleaved
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxext
from jaxext.kernels._indexed_rows import updates_gain

SHAPES = [
    (520_000, 16, 53_248),
    (100_000, 16, 50_000),
    (100_000, 16, 25_000),
    (100_000, 16, 12_500),
    (20_000, 16, 5000),
]
SHAPES += [(50_000, 128, 25_000), (50_000, 128, 12_500), (32_000, 768, 4096), (4096, 64, 1024), (4096, 16, 1024)]


def step(x, state, rows, updates, optimizer):
    gradient = jnp.zeros_like(x).at[rows].add(updates)
    changes, state = optimizer.update(gradient, state, x)
    return optax.apply_updates(x, changes), state


def runs(name, optimizer, held, width, n, popular, donated):
    """{"stock", "jaxext"}: a step of each, on state of its own where that is donated."""
    rng = np.random.default_rng(0)
    chosen = rng.zipf(1.2, n) * 2654435761 % held if popular else rng.integers(0, held, n)
    rows, updates = jnp.asarray(chosen, jnp.int32), jnp.asarray(rng.standard_normal((n, width)), jnp.float32)
    run = functools.partial(step, optimizer=optimizer)
    sides = {}
    for side, wrap in (("stock", lambda f: f), ("jaxext", jaxext.accelerate)):
        x = jnp.ones((held, width), jnp.float32)
        box = [(x, optimizer.init(x))]
        jitted = wrap(jax.jit(run, donate_argnums=(0, 1) if donated else ()))

        def call(jitted=jitted, box=box):
            result = jitted(*box[0], rows, updates)
            if donated:
                box[0] = result
            return result

        sides[side] = call
    return sides


def main():
    optimizers = {"adagrad": optax.adagrad(0.02), "sgd": optax.sgd(0.1)}
    for shape, popular, (name, optimizer), donated in itertools.product(
        SHAPES, (True, False), optimizers.items(), (True, False)
    ):
        seconds = interleaved.medians(runs(name, optimizer, *shape, popular, donated), repeats=25, seconds=0.8)
        held, width, n = shape
        table, rows = (jax.ShapeDtypeStruct((k, width), jnp.float32) for k in (held, n))
        gains = updates_gain(table, rows, tables=2 if name == "adagrad" else 1, copied=not donated)
        left = "" if gains else "  left"
        ways = "Zipf" if popular else "even", "in place" if donated else "copied"
        print(f"{n} of {held}x{width} {name} {' '.join(ways)}: {seconds['stock'] / seconds['jaxext']:.2f}x", end=" ")
        print(f"({seconds['stock'] * 1e6:.0f} / {seconds['jaxext'] * 1e6:.0f} us){left}", flush=True)


if __name__ == "__main__":
    main()
