"""Messages over edges, products before the gathers against products after them; all else is jaxext's on both sides.

    python tests/bench/bench_gathered_product.py

Prints milliseconds of values and gradients, and the ratio, by nodes, edges, features of a node and of a message.
"""

import interleaved
import jax
import jax.numpy as jnp
import numpy as np

import jaxext
from jaxext.rewrite.patterns import gathered_product


def measure(nodes, edges, k, n, sides=2):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((nodes, k), (sides * k, n)))
    ids = [jnp.asarray(rng.integers(0, nodes, edges)) for _ in range(sides)]

    def step(x, w, *ids):
        def loss(x, w):
            return jnp.sum(jax.nn.relu(jnp.concatenate([x[i] for i in ids], axis=-1) @ w) ** 2)

        return jax.value_and_grad(loss, argnums=(0, 1))(x, w)

    before, after = jaxext.accelerate(step), jaxext.accelerate(step, exclude=("matmul",))
    t = interleaved.medians({"before": lambda: before(x, w, *ids), "after": lambda: after(x, w, *ids)}, repeats=9)
    times = f"{t['after'] * 1e3:8.2f} / {t['before'] * 1e3:8.2f} ms = {t['after'] / t['before']:5.2f}x"
    print(f"{nodes:6} nodes {edges:7} edges {sides} x {k:4} -> {n:4}  {times}", flush=True)


if __name__ == "__main__":
    # Beyond the rules as well, to see where they should end.
    gathered_product.LEAST_REPEATS = gathered_product.LEAST_COLUMNS = gathered_product.LEAST_FLOPS = 1
    gathered_product.MOST_WIDENING = 1 << 20
    for nodes, edges in ((10_000, 100_000), (10_000, 30_000), (10_000, 20_000), (10_000, 15_000), (1000, 100_000)):
        measure(nodes, edges, 64, 64)
    for nodes, edges in ((100, 1000), (200, 2000), (500, 4000)):
        measure(nodes, edges, 16, 16)
        measure(nodes, edges, 64, 64)
    for k, n in ((16, 16), (16, 32), (16, 64), (32, 64), (64, 128), (64, 256), (256, 256), (256, 512), (256, 1024)):
        measure(5000, 50_000, k, n)
    measure(256, 4096, 256, 1024, sides=1)
    measure(32_000, 64_000, 256, 256, sides=1)
