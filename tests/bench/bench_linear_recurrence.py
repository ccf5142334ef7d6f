"""First-order linear recurrences by `lax.associative_scan` against stock JAX: forward, forward + backward.

    python tests/bench/bench_linear_recurrence.py [batch x steps x columns ...]

Prints milliseconds, the ratio stock / jaxext, and the share of copy bandwidth that the bytes which must move amount to
(forward: a, b and the result; backward: also a, the result, its cotangent and two gradients).
"""

import sys
from functools import partial

import interleaved
import jax
import jax.numpy as jnp
import numpy as np

import jaxext

SHAPES = ("2x1024x1024", "1x2048x4096", "8x256x512", "1x512x64", "64x128x8", "1x16x16", "4096x64x1")


def combine(left, right):
    return left[0] * right[0], right[0] * left[1] + right[1]


def recurrence(a, b):
    return jax.lax.associative_scan(combine, (a, b), axis=1)[1]


def alone(g, a, b):
    # The result depends on a reduction, as what a program scans does.
    return recurrence(a, b + jnp.sum(g[:, :1, :1], 2, keepdims=True))


def gradients(g, a, b):
    h, pull = jax.vjp(recurrence, a, b)
    return h, *pull(g)


CASES = {"forward": (alone, 3), "forward+backward": (gradients, 8)}


def main(shapes):
    copy = interleaved.copy_bandwidth()
    print(f"copy {copy / 1e9:.1f} GB/s; memory reuse: {interleaved.MEMORY or 'on'}")
    rng = np.random.default_rng(0)
    for text in shapes:
        shape = tuple(map(int, text.split("x")))
        for dtype in (jnp.float32, jnp.bfloat16):
            g, b = (jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(2))
            a = jnp.asarray(1 - 0.3 * rng.random(shape), dtype)
            for case, (f, passes) in CASES.items():
                calls = {"stock": partial(jax.jit(f), g, a, b), "jaxext": partial(jaxext.accelerate(f), g, a, b)}
                t = interleaved.medians(calls, seconds=0.7)
                print(
                    f"{text:14} {dtype.__name__:8} {case:17} {t['stock'] * 1e3:8.3f} {t['jaxext'] * 1e3:8.3f} ms "
                    f"{t['stock'] / t['jaxext']:6.2f}x  {passes * a.nbytes / t['jaxext'] / copy:4.0%} of copy",
                    flush=True,
                )


if __name__ == "__main__":
    main(sys.argv[1:] or SHAPES)
