"""Squared distances between all rows of x and of y, and what is done with them, against stock; both with memory reuse.

    python tests/bench/bench_distances.py

Prints milliseconds and the ratio stock / jaxext by rows of x, rows of y and what is contracted.
"""

import interleaved
import jax
import jax.numpy as jnp
import numpy as np

import jaxext
from jaxext.rewrite.patterns import distances


def squared(x, y):
    return jnp.sum(x * x, axis=1)[:, None] - 2 * x @ y.T + jnp.sum(y * y, axis=1)


def measure(name, function, m, n, k):
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.standard_normal((rows, k)), jnp.float32) for rows in (m, n))
    stock, ours = jax.jit(lambda x, y: function(x, y)), jaxext.accelerate(lambda x, y: function(x, y))
    t = interleaved.medians({"jaxext": lambda: ours(x, y), "stock": lambda: stock(x, y)}, repeats=15, seconds=2)
    times = f"{t['stock'] * 1e3:8.3f} / {t['jaxext'] * 1e3:8.3f} ms = {t['stock'] / t['jaxext']:5.2f}x"
    print(f"{name:16} {m:6} x {n:6}, {k:4} contracted  {times}", flush=True)


if __name__ == "__main__":
    distances.MOST_CONTRACTED, distances.LEAST_RESULTS = 1 << 20, 0  # beyond the rules as well
    for m, n, k in (
        (1000, 20_000, 64),
        (20_000, 256, 64),
        (20_000, 256, 16),
        (1000, 1000, 3),
        (1000, 1000, 16),
        (1000, 1000, 64),
        (1000, 1000, 128),
        (1000, 1000, 256),
        (4096, 4096, 64),
        (4096, 4096, 128),
        (100, 100, 8),
        (300, 20, 8),
        (10_000, 10, 16),
    ):
        measure("distances", squared, m, n, k)
    measure("Gaussian kernel", lambda x, y: jnp.exp(-0.1 * squared(x, y)), 2000, 2000, 16)
    measure("negated", lambda x, y: -squared(x, y), 2000, 2000, 16)
