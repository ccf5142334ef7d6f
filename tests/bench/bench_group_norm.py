"""Group norm of images against stock JAX (as flax.linen writes it): forward, forward + backward, alone and before silu.

    python tests/bench/bench_group_norm.py [images x pixels x channels / groups ...]

Prints milliseconds, the ratio stock / jaxext, and the share of copy bandwidth that the bytes which must move amount to
(forward: x and the result; backward: also x again, the cotangent and dx).
"""

import sys
from functools import partial

import interleaved
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen

import jaxext

SHAPES = ("8x1024x64/8", "8x256x128/8", "8x64x128/8", "8x4096x128/32", "2x16384x64/32", "1x1024x512/32",
          "16x3136x64/64", "2x16x32/4", "1x4x16/4")  # fmt: skip


def norm(groups, dtype):
    module = linen.GroupNorm(groups, dtype=dtype)
    return lambda x, s, b: module.apply({"params": {"scale": s, "bias": b}}, x)


def alone(f):
    return lambda x, s, b, g: f(x, s, b)


def gradients(f):
    def run(x, s, b, g):
        out, pull = jax.vjp(f, x, s, b)
        return out, *pull(g)

    return run


def before_silu(f):
    return gradients(lambda x, s, b: jax.nn.silu(f(x, s, b)))


CASES = {"forward": (alone, 2), "forward+backward": (gradients, 5), "forward+backward, silu": (before_silu, 5)}


def main(shapes):
    copy = interleaved.copy_bandwidth()
    print(f"copy {copy / 1e9:.1f} GB/s; memory reuse: {interleaved.MEMORY or 'on'}")
    rng = np.random.default_rng(0)
    for text in shapes:
        sizes, groups = text.split("/")
        shape = tuple(map(int, sizes.split("x")))
        for dtype in (jnp.float32, jnp.bfloat16):
            x, g = (jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(2))
            s, b = (jnp.asarray(rng.standard_normal(shape[-1]), jnp.float32) for _ in range(2))
            for case, (wrap, passes) in CASES.items():
                f = wrap(norm(int(groups), dtype))
                stock, ours = jax.jit(f), jaxext.accelerate(f)
                calls = {k: partial(fn, x, s, b, g) for k, fn in (("stock", stock), ("jaxext", ours))}
                t = interleaved.medians(calls, seconds=0.6)
                share = passes * x.nbytes / t["jaxext"] / copy
                print(
                    f"{text:16} {dtype.__name__:8} {case:24} {t['stock'] * 1e3:8.3f} {t['jaxext'] * 1e3:8.3f} ms "
                    f"{t['stock'] / t['jaxext']:6.2f}x  {share:4.0%} of copy",
                    flush=True,
                )


if __name__ == "__main__":
    main(sys.argv[1:] or SHAPES)
