"""Matrix products against stock JAX: bfloat16, all three of a dense layer, few float32 rows in a loop, and batches.

    python tests/bench/bench_dot.py [MxKxN ...]

Prints milliseconds, the ratio stock / jaxext, the share of the measured bfloat16 multiply-add peak, and whether
jaxext's rule takes the product; with small ones, where the rule begins. Loops: microseconds a step.
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
STEPS = ((16, 256, 1024), (16, 256, 768), (8, 256, 1024), (12, 256, 1024), (32, 256, 1024), (48, 256, 1024),
         (64, 256, 1024), (32, 512, 1536), (16, 512, 2048), (33, 256, 512), (16, 1024, 4096), (4, 256, 1024),
         (16, 128, 512), (16, 64, 256))  # fmt: skip
SMALL = ((2048, 27, 16, 27), (2048, 27, 27, 16), (4096, 4, 4, 4), (4096, 8, 8, 8), (1000, 13, 21, 5), (1024, 8, 64, 8),
         (4096, 16, 16, 16), (256, 32, 32, 32), (256, 64, 64, 64), (16, 33, 33, 33), (512, 64, 16, 64),
         (512, 16, 128, 16), (64, 128, 64, 64), (64, 128, 128, 64), (8, 64, 64, 64), (8, 20, 20, 20), (64, 10, 10, 10),
         (64, 128, 4, 64), (512, 12, 64, 64), (512, 4, 64, 64), (64, 128, 64, 4), (1024, 16, 64, 1))  # fmt: skip
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


def measure_steps(m, k, n, turned, steps=64):
    """A product of m rows in each step of a loop, as in a recurrent network and its gradient."""
    rng = np.random.default_rng(0)
    x, w = (
        jnp.asarray(rng.standard_normal(s) / 30, jnp.float32) for s in ((steps, m, k), (n, k) if turned else (k, n))
    )
    numbers = (((1,), (int(turned),)), ((), ()))

    def loop(product):
        def run(x, w):
            step = lambda out, x: (jnp.tanh(product(x + out[0, 0], w)), None)  # noqa: E731
            return jax.lax.scan(step, jnp.zeros((m, n)), x)[0]

        return jax.jit(run)

    native = loop(lambda x, w: DOT(x, w, dimension_numbers=numbers, preferred_element_type="float32")[0])
    stock = loop(lambda x, w: jax.lax.dot_general(x, w, numbers))
    t = interleaved.medians({"jaxext": lambda: native(x, w), "stock": lambda: stock(x, w)}, seconds=1)
    each = {name: seconds / steps * 1e6 for name, seconds in t.items()}
    taken = "" if dot_gains(x[0], w, numbers) else "  left to stock"
    print(
        f"{m}x{k}x{n} {'a b' + chr(39) if turned else 'a b':5} float32, each of {steps} steps "
        f"{each['stock']:6.1f} / {each['jaxext']:6.1f} us = {each['stock'] / each['jaxext']:5.2f}x{taken}",
        flush=True,
    )


def measure_small(batch, m, k, n, name, contract):
    rng = np.random.default_rng(0)
    shapes = ((k, m) if contract[0] == (0,) else (m, k), (n, k) if contract[1] == (1,) else (k, n))
    a, b = (jnp.asarray(rng.standard_normal((batch, *shape)), jnp.float32) for shape in shapes)
    numbers = (tuple((axis + 1,) for (axis,) in contract), ((0,), (0,)))
    native = jax.jit(lambda a, b: DOT(a, b, dimension_numbers=numbers, preferred_element_type="float32"))
    stock = jax.jit(lambda a, b: jax.lax.dot_general(a, b, numbers))
    t = interleaved.medians({"jaxext": lambda: native(a, b), "stock": lambda: stock(a, b)}, repeats=200, seconds=0.3)
    taken = "" if dot_gains(a, b, numbers) else "  left to stock"
    print(
        f"{batch} of {m}x{k}x{n} {name:5} float32 {t['stock'] * 1e6:8.1f} / {t['jaxext'] * 1e6:8.1f} us = "
        f"{t['stock'] / t['jaxext']:5.2f}x, {2 * batch * m * k * n / t['jaxext'] / 1e9:4.0f} GFLOP/s{taken}",
        flush=True,
    )


if __name__ == "__main__":
    if not sys.argv[1:]:
        for m, k, n in STEPS:
            measure_steps(m, k, n, False)
            measure_steps(m, n, k, True)
        for batch, m, k, n in SMALL:
            for way, contract in WAYS.items():
                measure_small(batch, m, k, n, way, contract)
    for shape in [tuple(map(int, text.split("x"))) for text in sys.argv[1:]] or SHAPES:
        for way, contract in WAYS.items():
            measure(*shape, way, contract)
