"""A train step of one recurrent layer with the products outside of the loop, against stock JAX; both with memory reuse.

    python tests/bench/bench_recurrence.py

Prints milliseconds and the ratio stock / jaxext by cell, width and batch (the rows of each step's product).
"""

import flax.linen as nn
import interleaved
import jax
import jax.numpy as jnp
import numpy as np

import jaxext
from jaxext.rewrite.patterns import recurrence

STEPS = 64


def measure(cell, width, batch, dtype="float32"):
    model = nn.RNN(cell(width, dtype=jnp.dtype(dtype)))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((batch, STEPS, width)), dtype)
    params = jax.jit(model.init)(jax.random.key(0), x)

    def step(params, x):
        return jax.value_and_grad(lambda params, x: jnp.sum(model.apply(params, x) ** 2), argnums=(0, 1))(params, x)

    stock, ours = jax.jit(step), jaxext.accelerate(step)
    t = interleaved.medians({"jaxext": lambda: ours(params, x), "stock": lambda: stock(params, x)}, repeats=9)
    times = f"{t['stock'] * 1e3:9.3f} / {t['jaxext'] * 1e3:8.3f} ms = {t['stock'] / t['jaxext']:6.2f}x"
    print(f"{cell.__name__:18} width {width:5} batch {batch:4} {dtype:9} {times}", flush=True)


if __name__ == "__main__":
    recurrence.MOST_ROWS = 1 << 20  # beyond the rule as well, to see where it should end
    for cell in (nn.OptimizedLSTMCell, nn.LSTMCell, nn.GRUCell, nn.SimpleCell):
        measure(cell, 256, 16)
    for width, batch in (
        (16, 1),
        (16, 16),
        (64, 16),
        (128, 64),
        (256, 1),
        (256, 64),
        (256, 128),
        (256, 256),
        (512, 32),
        (1024, 16),
    ):
        measure(nn.OptimizedLSTMCell, width, batch)
    measure(nn.OptimizedLSTMCell, 256, 16, "bfloat16")
