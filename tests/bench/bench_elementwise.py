"""Chains of bfloat16 arithmetic, rounded after every operation (stock) and once (jaxext): forward, forward + backward.

    python tests/bench/bench_elementwise.py [rows x features ...]

Prints milliseconds, the ratio stock / jaxext, and the time of the same in float32 over jaxext's.
"""

import inspect
import sys
from functools import partial

import interleaved
import jax
import jax.numpy as jnp
import numpy as np

import jaxext

SHAPES = ("1024x2048", "4096x3072", "64x64")
CHAINS = {
    "gelu": lambda x: jax.nn.gelu(x),
    "gelu, erf": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": lambda x: jax.nn.silu(x),
    "swiglu": lambda x, y: jax.nn.silu(x) * y,
    "geglu": lambda x, y: jax.nn.gelu(x) * y,
    "sigmoid": lambda x: jax.nn.sigmoid(x),
    "x + y * 0.5 - x * y": lambda x, y: x + y * 0.5 - x * y,
    "x * y + x": lambda x, y: x * y + x,
}


def gradients(f):
    def run(g, *xs):
        result, pull = jax.vjp(f, *xs)
        return result, pull(g)

    return run


def main(shapes):
    print(f"memory reuse: {interleaved.MEMORY or 'on'}")
    rng = np.random.default_rng(0)
    for text in shapes:
        shape = tuple(map(int, text.split("x")))
        for name, chain in CHAINS.items():
            count = len(inspect.signature(chain).parameters)
            g, *xs = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for _ in range(1 + count))
            for case, f, args in (("forward", chain, xs), ("forward+backward", gradients(chain), (g, *xs))):
                wide = [x.astype(jnp.float32) for x in args]
                calls = {"stock": partial(jax.jit(f), *args), "jaxext": partial(jaxext.accelerate(f), *args)}
                t = interleaved.medians(calls | {"float32": partial(jax.jit(f), *wide)}, seconds=0.7)
                print(
                    f"{text:10} {name:20} {case:17} {t['stock'] * 1e3:7.3f} {t['jaxext'] * 1e3:7.3f} ms "
                    f"{t['stock'] / t['jaxext']:5.2f}x, float32 {t['float32'] / t['jaxext']:5.2f}x",
                    flush=True,
                )


if __name__ == "__main__":
    main(sys.argv[1:] or SHAPES)
