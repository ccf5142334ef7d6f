"""Losses of a small language model whose products are rounded to eight bits, beside those of stock JAX. Not times.

The program is the one lowered for CUDA, run on the CPU: rounding is the same there, sums are in float32 too. Products
that would not pay on a card are rounded all the same, as the model is small.

    python tests/bench/bench_fp8.py [--steps 500] [--every 50]
"""

import argparse
import sysconfig
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax

import jaxext
from jaxext.kernels import _fp8, _platform

LAYERS, WIDTH, HEADS, LENGTH, BATCH, BYTES = 4, 256, 4, 128, 8, 256
FILES = ("argparse", "ast", "inspect", "subprocess", "tarfile", "typing", "turtle")


def text():
    """Python's own sources, as bytes."""
    library = Path(sysconfig.get_path("stdlib"))
    return np.frombuffer(b"".join((library / f"{name}.py").read_bytes() for name in FILES), np.uint8)


def batches(steps):
    """[BATCH, LENGTH + 1] int32 windows, the same in every run."""
    source, rng = text(), np.random.default_rng(0)
    starts = rng.integers(0, len(source) - LENGTH - 1, (steps, BATCH, 1))
    return source[starts + np.arange(LENGTH + 1)].astype(np.int32)


def parameters(seed, layers=LAYERS, width=WIDTH):
    """float32, normally distributed."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(0, 0.02, shape), jnp.float32)

    def layer():
        return {
            "qkv": normal(width, 3 * width),
            "out": normal(width, width),
            "up": normal(width, 4 * width),
            "down": normal(4 * width, width),
        }

    return {
        "bytes": normal(BYTES, width),
        "places": normal(LENGTH, width),
        "head": normal(width, BYTES),
        "layers": [layer() for _ in range(layers)],
    }


def _norm(x):
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)


def _layer(x, layer):
    q, k, v = (part.reshape(*x.shape[:2], HEADS, -1) for part in jnp.split(_norm(x) @ layer["qkv"], 3, -1))
    attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + attended.reshape(x.shape) @ layer["out"]
    return x + jax.nn.gelu(_norm(x) @ layer["up"]) @ layer["down"]


def loss(parameters, tokens, dtype):
    """Mean cross-entropy of the next byte, float32; products in `dtype`."""
    own = jax.tree.map(lambda x: x.astype(dtype), parameters)
    x = own["bytes"][tokens[:, :-1]] + own["places"]
    for layer in own["layers"]:
        x = _layer(x, layer)
    logits = (_norm(x) @ own["head"]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


OPTIMIZER = optax.adamw(1e-3)


def train_step(parameters, state, tokens, dtype="bfloat16"):
    value, gradients = jax.value_and_grad(loss)(parameters, tokens, dtype)
    updates, state = OPTIMIZER.update(gradients, state, parameters)
    return optax.apply_updates(parameters, updates), state, value


def stock(dtype="bfloat16"):
    return jax.jit(lambda *args: train_step(*args, dtype=dtype))


def in_eight_bits(*args):
    """The step in eight bits, as lowered for CUDA, ready to run on the CPU, and the report."""
    paying, _fp8.fp8_pays = _fp8.fp8_pays, lambda m, k, n: True
    try:
        with _platform.assuming("cuda"):
            step = jaxext.accelerate(lambda *xs: train_step(*xs), precision="fp8")
            report = jaxext.explain(step, platform="cuda")(*args)
            anywhere = [jax.export.DisabledSafetyCheck.platform()]
            return jax.jit(jax.export.export(step, platforms=["cuda"], disabled_checks=anywhere)(*args).call), report
    finally:
        _fp8.fp8_pays = paying


def losses(step, parameters, data):
    state, found = OPTIMIZER.init(parameters), []
    for tokens in data:
        parameters, state, value = step(parameters, state, tokens)
        found.append(float(value))
    return np.array(found)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--every", type=int, default=50)
    given = parser.parse_args()
    data, start, other = batches(given.steps), parameters(0), parameters(1)
    eight, report = in_eight_bits(start, OPTIMIZER.init(start), data[0])
    print(f"{len(report.replaced)} products in eight bits, {len(report.missed)} not")
    curves = {
        "bfloat16": losses(stock(), start, data),
        "fp8": losses(eight, start, data),
        "float32": losses(stock("float32"), start, data),
        "bfloat16, other start": losses(stock(), other, data),
        "fp8, other start": losses(eight, other, data),
    }
    print("steps", *curves, sep=" | ")
    for end in range(given.every, given.steps + 1, given.every):
        print(end, *(f"{curve[end - given.every : end].mean():.4f}" for curve in curves.values()), sep=" | ")


if __name__ == "__main__":
    main()
