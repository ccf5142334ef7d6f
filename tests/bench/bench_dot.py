"""bfloat16 matrix products against stock JAX: all three of a dense layer, and small ones, where the rule begins.

    python tests/bench/bench_dot.py [MxKxN ...]

Prints milliseconds, the ratio stock / jaxext, the share of the measured bfloat16 multiply-add peak, and whether
jaxext's rule takes the product.
"""

import os
import sys

import interleaved
import jax
import jax.numpy as jnp
import numpy as np

from jaxext import _native
from jaxext.kernels._dot import DOT, dot_gains

SHAPES = ((1024, 1024, 1024), (1024, 768, 3072), (1024, 3072, 768), (512, 768, 768), (256, 256, 256), (128, 128, 128),
          (64, 768, 768), (16, 768, 768), (4, 768, 768), (2048, 64, 2048), (8192, 768, 32))  # fmt: skip
WAYS = {"a b": ((1,), (0,)), "a' b": ((0,), (0,)), "a b'": ((1,), (1,))}


def measure(m, k, n, name, contract):
    rng = np.random.default_rng(0)
    shapes = ((k, m) if contract[0] == (0,) else (m, k), (n, k) if contract[1] == (1,) else (k, n))
    a, b = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes)
    numbers = (contract, ((), ()))
    native = jax.jit(lambda a, b: DOT(a, b, dimension_numbers=numbers, preferred_element_type="bfloat16"))
    stock = jax.jit(lambda a, b: jax.lax.dot_general(a, b, numbers))
    peaks = []
    runs = {
        "peak": lambda: peaks.append(_native.measure_peak("bf16", os.cpu_count() or 1, 0.02)),
        "jaxext": lambda: native(a, b),
        "stock": lambda: stock(a, b),
    }
    t = interleaved.medians(runs, repeats=25)
    share = 2 * m * k * n / t["jaxext"] / max(peaks)
    taken = "" if dot_gains(a, b, numbers) else "  left to stock"
    print(
        f"{m}x{k}x{n} {name:5} {t['stock'] * 1e3:8.3f} / {t['jaxext'] * 1e3:7.3f} ms = "
        f"{t['stock'] / t['jaxext']:5.2f}x, {share:4.0%} of peak{taken}",
        flush=True,
    )


if __name__ == "__main__":
    for shape in [tuple(map(int, text.split("x"))) for text in sys.argv[1:]] or SHAPES:
        for way, contract in WAYS.items():
            measure(*shape, way, contract)
