"""What jaxext costs before the first step: tracing time, and the time to call a compiled function.

    python tests/bench/bench_overhead.py

Prints medians of interleaved repeats, and their ratio; the targets are 1.3 times for tracing and +1 µs for a call.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxext
from jaxext import _settings
from jaxext.rewrite import hooks

LAYERS, WIDTH, HEADS, LENGTH, VOCABULARY = 12, 64, 4, 32, 64


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = nn.MultiHeadDotProductAttention(num_heads=HEADS)(nn.LayerNorm()(x), mask=nn.make_causal_mask(x[..., 0]))
        x = x + h
        h = nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))
        return x + h, None


class Linen(nn.Module):
    scan: bool = False

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCABULARY, WIDTH)(tokens)
        if self.scan:
            x, _ = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)()(x, None)
        else:
            for _ in range(LAYERS):
                x, _ = Block()(x)
        return nn.Dense(VOCABULARY)(nn.LayerNorm()(x))


def linen_step(scan: bool):
    model, optimizer = Linen(scan), optax.adamw(1e-3)
    tokens = jax.random.randint(jax.random.key(1), (2, LENGTH + 1), 0, VOCABULARY)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens[:, :-1])

    def loss(params, tokens):
        logits = model.apply(params, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @jax.jit
    def step(params, state, tokens):
        value, gradients = jax.value_and_grad(loss)(params, tokens)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return step, (params, jax.eval_shape(optimizer.init, params), tokens)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(LAYERS)])
        self.norm, self.head = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def nnx_step():
    model = Nnx(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    tokens = jax.random.randint(jax.random.key(1), (2, LENGTH + 1), 0, VOCABULARY)

    def loss(model, tokens):
        return optax.softmax_cross_entropy_with_integer_labels(model(tokens[:, :-1]), tokens[:, 1:]).mean()

    @nnx.jit
    def step(model, optimizer, tokens):
        value, gradients = nnx.value_and_grad(loss)(model, tokens)
        optimizer.update(model, gradients)
        return value

    return step, (model, optimizer, tokens)


def interleaved(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each side; the order alternates, so that drift meets all sides alike."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name in list(sides) if repeat % 2 else list(sides)[::-1]:
            start = time.perf_counter()
            sides[name]()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def fresh(run: Callable[[], object], settings: _settings.Settings | None) -> Callable[[], object]:
    def timed() -> object:
        jax.clear_caches()
        with _settings.use(settings):
            return run()

    return timed


def trace(step, arguments):
    return step.trace(*arguments)


def lower(step, arguments):
    return step.trace(*arguments).lower()


def measure_tracing(repeats: int = 7) -> None:
    hooks.activate(relying=hooks.activate)
    cases = {"linen, 12 layers": linen_step(False), "linen, scan": linen_step(True), "nnx, 12 layers": nnx_step()}
    for name, (step, arguments) in cases.items():
        for stage, run in (("trace", trace), ("trace + lower", lower)):
            timed = functools.partial(run, step, arguments)
            sides = {"stock": fresh(timed, None), "jaxext": fresh(timed, _settings.Settings())}
            interleaved(sides, 1)
            seconds = interleaved(sides, repeats)
            ratio = seconds["jaxext"] / seconds["stock"]
            print(f"{name:18s} {stage:14s} stock {seconds['stock'] * 1e3:6.0f} ms, jaxext {ratio:.2f} times")


def measure_dispatch(calls: int = 20000, repeats: int = 9) -> None:
    def increment(x):
        return x + 1

    x = jnp.ones(3)
    stock, jitted = jax.jit(increment), jaxext.accelerate(jax.jit(lambda x: x + 1))
    functions = {"stock": stock, "accelerate(f)": jaxext.accelerate(increment), "accelerate(jit(f))": jitted}

    def repeat(f):
        def timed():
            for _ in range(calls):
                f(x)

        return timed

    sides = {name: repeat(f) for name, f in functions.items()}
    interleaved(sides, 1)
    seconds = interleaved(sides, repeats)
    for name, total in seconds.items():
        extra = (total - seconds["stock"]) / calls * 1e6
        print(f"call of {name:20s} {total / calls * 1e6:.2f} µs ({extra:+.2f} µs)")
    jaxext.install(memory="system")
    installed = interleaved({"installed": repeat(stock)}, repeats)["installed"]
    jaxext.uninstall()
    print(f"call of stock under install  {installed / calls * 1e6:.2f} µs")


if __name__ == "__main__":
    measure_tracing()
    measure_dispatch()
