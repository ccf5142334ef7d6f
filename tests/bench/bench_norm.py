"""Layer norm and RMS norm against stock JAX: forward, forward + backward, alone and between neighbours XLA could fuse.

    python tests/bench/bench_norm.py [rows x features ...]

Prints milliseconds, the ratio stock / jaxext and the share of the machine's copy bandwidth that the bytes which must
move (forward: x and the result; backward: also the cotangent and dx) amount to.
"""

import sys
from functools import partial

import interleaved
import jax
import jax.numpy as jnp
import numpy as np

from jaxext import kernels

SHAPES = ((8192, 1024), (1024, 768), (2048, 768), (256, 256), (32, 64), (4096, 64), (65536, 16))


def stock_norm(x, scale, bias):
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, -1, keepdims=True)
    centre = wide - mean
    rstd = jax.lax.rsqrt(jnp.mean(jnp.square(centre), -1, keepdims=True) + 1e-6)
    return (centre * rstd * scale + bias).astype(x.dtype)


def stock_rms(x, scale, bias):
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + 1e-6) * scale).astype(x.dtype)


NORMS = {
    "layer_norm": (stock_norm, lambda x, s, b: kernels.layer_norm(x, s, b)),
    "rms_norm": (stock_rms, lambda x, s, b: kernels.rms_norm(x, s)),
}


def alone(norm):
    return lambda x, r, s, b, g: norm(x, s, b)


def between(norm):
    def run(x, r, s, b, g):
        total = x + r
        return jax.nn.gelu(norm(total, s, b)), total

    return run


def gradients(norm):
    def run(x, r, s, b, g):
        out, pull = jax.vjp(norm, x, s, b)
        return out, *pull(g)

    return run


def gradients_between(norm):
    def block(x, r, s, b):
        total = x + r
        return total + jax.nn.gelu(norm(total, s, b))

    def run(x, r, s, b, g):
        out, pull = jax.vjp(block, x, r, s, b)
        return out, *pull(g)

    return run


CASES = {
    "forward": (alone, 2),
    "forward, add before, gelu after": (between, 4),
    "forward+backward": (gradients, 5),
    "forward+backward, add and gelu": (gradients_between, 8),
}


def main(shapes):
    copy = interleaved.copy_bandwidth()
    print(f"copy {copy / 1e9:.1f} GB/s; memory reuse: {interleaved.MEMORY or 'on'}")
    rng = np.random.default_rng(0)
    for rows, features in shapes:
        for dtype in (jnp.float32, jnp.bfloat16):
            x, r, g = (jnp.asarray(rng.standard_normal((rows, features)), dtype) for _ in range(3))
            s, b = (jnp.asarray(rng.standard_normal(features), jnp.float32) for _ in range(2))
            for name, (stock, native) in NORMS.items():
                for case, (wrap, passes) in CASES.items():
                    f, h = jax.jit(wrap(stock)), jax.jit(wrap(native))
                    t = interleaved.medians({k: partial(fn, x, r, s, b, g) for k, fn in (("stock", f), ("jaxext", h))})
                    share = passes * x.nbytes / t["jaxext"] / copy
                    print(
                        f"{rows}x{features} {dtype.__name__:8} {name:10} {case:32} {t['stock'] * 1e3:8.3f} "
                        f"{t['jaxext'] * 1e3:8.3f} ms  {t['stock'] / t['jaxext']:5.2f}x  {share:4.0%} of copy",
                        flush=True,
                    )


if __name__ == "__main__":
    main([tuple(map(int, a.split("x"))) for a in sys.argv[1:]] or SHAPES)
