"""lax.top_k against stock JAX: routing of experts, sampling from a vocabulary, nearest neighbours, one long row.

    python tests/bench/bench_top_k.py

Prints milliseconds, the ratio stock / jaxext, the share of copy bandwidth at which x is read, and whether jaxext's
rule takes the shape.
"""

import interleaved
import jax
import jax.numpy as jnp
import numpy as np

from jaxext.kernels._top_k import TOP_K, top_k_gains

SHAPES = (((4096, 8), 2), ((4096, 64), 8), ((64, 32000), 50), ((1000, 10000), 10), ((1, 1000000), 100),
          ((256, 1024), 256), ((1024, 8), 2), ((512, 8), 2))  # fmt: skip


def measure(shape, k, dtype, bandwidth):
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape) * 1000).astype(dtype)
    native, stock = jax.jit(lambda x: TOP_K(x, k=k)), jax.jit(lambda x: jax.lax.top_k(x, k))
    t = interleaved.medians({"jaxext": lambda: native(x), "stock": lambda: stock(x)}, repeats=15)
    share = 2 * x.nbytes / t["jaxext"] / bandwidth  # a copy moves each byte twice
    taken = "" if top_k_gains(x, k) else "  left to stock"
    print(
        f"{'x'.join(map(str, shape)):10} k {k:3} {dtype:8} {t['stock'] * 1e3:9.3f} / {t['jaxext'] * 1e3:7.3f} ms = "
        f"{t['stock'] / t['jaxext']:6.1f}x, {share:4.0%} of copy bandwidth{taken}",
        flush=True,
    )


if __name__ == "__main__":
    bandwidth = interleaved.copy_bandwidth()
    for shape, k in SHAPES:
        for dtype in ("float32", "bfloat16", "int32"):
            measure(shape, k, dtype, bandwidth)
