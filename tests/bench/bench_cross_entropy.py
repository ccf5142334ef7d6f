"""Cross-entropy, and linear + cross-entropy, against stock JAX: time, and temporary memory of the compiled program.

python tests/bench/bench_cross_entropy.py [cross_entropy | linear]
"""

import sys

import interleaved
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxext import kernels

CROSS_ENTROPY = ((2048, 32000), (512, 50257), (4096, 1000), (128, 10), (8, 32000), (1024, 256), (4096, 2),
                 (65536, 2), (4096, 10), (4096, 16))  # fmt: skip
LINEAR = ((2048, 512, 32000), (1024, 768, 50257), (1024, 768, 256), (4096, 256, 1000))


def stock_loss(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def stock_target_loss(logits, targets):
    return optax.softmax_cross_entropy(logits, targets)


def report(name, stock, native, args, seconds=4.0):
    f, h = (jax.jit(fn).lower(*args).compile() for fn in (stock, native))
    t = interleaved.medians({"stock": lambda: f(*args), "jaxext": lambda: h(*args)}, seconds=seconds)
    temps = [c.memory_analysis().temp_size_in_bytes / 2**20 for c in (f, h)]
    print(
        f"{name:52} {t['stock'] * 1e3:9.3f} {t['jaxext'] * 1e3:9.3f} ms {t['stock'] / t['jaxext']:5.2f}x   "
        f"temporaries {temps[0]:7.1f} {temps[1]:7.1f} MiB, 1/{temps[0] / max(temps[1], 1e-3):.1f}",
        flush=True,
    )


def cross_entropy(rng):
    for rows, classes in CROSS_ENTROPY:
        labels = jnp.asarray(rng.integers(0, classes, rows), jnp.int32)
        for dtype in (jnp.float32, jnp.bfloat16):
            logits = jnp.asarray(rng.standard_normal((rows, classes)), dtype)
            targets = jax.nn.softmax(logits * 2)
            where = f"{rows}x{classes} {dtype.__name__}"
            native = kernels.softmax_cross_entropy
            report(f"{where} labels forward", stock_loss, native, (logits, labels))
            for kind, stock, y in (("labels", stock_loss, labels), ("targets", stock_target_loss, targets)):
                f, h = (jax.value_and_grad(lambda z, y, fn=fn: fn(z, y).mean()) for fn in (stock, native))
                report(f"{where} {kind} forward+backward", f, h, (logits, y))


def linear(rng):
    for rows, features, classes in LINEAR:
        labels = jnp.asarray(rng.integers(0, classes, rows), jnp.int32)
        for dtype in (jnp.float32, jnp.bfloat16):
            x = jnp.asarray(rng.standard_normal((rows, features)), dtype)
            w = jnp.asarray(rng.standard_normal((features, classes)) * 0.04, dtype)
            mask = jnp.asarray(rng.random(rows) < 0.8, jnp.float32)
            where = f"{rows}x{features}x{classes} {dtype.__name__}"

            def stock(x, w, y):
                return stock_loss(x @ w, y)

            def native(x, w, y):
                return kernels.linear_cross_entropy(x, w, y)

            report(f"{where} forward", stock, native, (x, w, labels))
            f, h = (jax.value_and_grad(lambda x, w, y, fn=fn: fn(x, w, y).mean(), (0, 1)) for fn in (stock, native))
            report(f"{where} forward+backward", f, h, (x, w, labels))
            f = jax.value_and_grad(lambda x, w, y, m: (stock(x, w, y) * m).sum() / m.sum(), (0, 1))
            h = jax.value_and_grad(
                lambda x, w, y, m: kernels.linear_cross_entropy(x, w, y, weights=m).sum() / m.sum(), (0, 1)
            )
            report(f"{where} forward+backward, masked", f, h, (x, w, labels, mask))
            h = jax.value_and_grad(
                lambda x, w, y, m: (kernels.linear_cross_entropy(x, w, y, uniform=False) * m).sum() / m.sum(), (0, 1)
            )
            report(f"{where} forward+backward, made again", f, h, (x, w, labels, mask))


if __name__ == "__main__":
    chosen = sys.argv[1:] or ["cross_entropy", "linear"]
    for name in chosen:
        {"cross_entropy": cross_entropy, "linear": linear}[name](np.random.default_rng(0))
