"""What jaxext buys on a GPU, beside stock XLA on the same card; prepared, and not yet run on one.

    python tests/bench/bench_gpu.py [--quick] [--count] [attention] [loss] [norm] [optimizer] [gpt] [steps]

Prints medians of interleaved turns in milliseconds, the ratio stock / jaxext, XLA's temporary bytes of both programs,
and the largest difference of the results relative to the largest value. "cuDNN" is JAX's own call of it, asked for by
name. Needs no memory setting: on a GPU there is none. All of it is meant to fit into five minutes.

--count needs no card but JAX's CUDA plugin: both programs are compiled for an H100 (gpu_program.py), and what is shown
are the bytes that their kernels move, the kernels started, and the temporary bytes.
"""

import argparse
import functools
import statistics
import sys
import time
from pathlib import Path

import gpu_program  # first: it tells JAX where no card is
import jax
import jax.numpy as jnp
import numpy as np

import jaxext
from jaxext.abtest import accelerator
from jaxext.kernels import _native_module
from jaxext.kernels._attention_cudnn import cudnn_problem

TURNS, CALLS = 7, 5


def normal(seed, *shape, dtype="bfloat16"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def attention(q, k, v):
    scores = jnp.einsum("btnh,bsnh->bnts", q, k).astype(jnp.float32) / np.sqrt(q.shape[-1])
    visible = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    shares = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf)).astype(q.dtype)
    return jnp.einsum("bnts,bsnh->btnh", shares, v)


def loss(x, weight, labels):
    logits = (x @ weight).astype(jnp.float32)
    return (jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, labels[:, None], -1)[:, 0]).mean()


def layer_norm(x, scale, bias):
    wide = x.astype(jnp.float32)
    centre = wide - wide.mean(-1, keepdims=True)
    rstd = jax.lax.rsqrt((centre**2).mean(-1, keepdims=True) + 1e-5)
    return (centre * rstd * scale + bias).astype(x.dtype)


def gpt(parameters, tokens, heads):
    """The next token's loss of a GPT written by hand, as users write it."""
    x = parameters["embedding"][tokens[:, :-1]]
    for layer in parameters["layers"]:
        y = layer_norm(x, *layer["norm1"])
        q, k, v = jnp.split(y @ layer["qkv"], 3, -1)
        shape = (*x.shape[:2], heads, -1)
        x = x + attention(q.reshape(shape), k.reshape(shape), v.reshape(shape)).reshape(x.shape) @ layer["out"]
        x = x + jax.nn.gelu(layer_norm(x, *layer["norm2"]) @ layer["up"]) @ layer["down"]
    flat = layer_norm(x, *parameters["norm"]).reshape(-1, x.shape[-1])
    return loss(flat, parameters["embedding"].T, tokens[:, 1:].reshape(-1))


def gpt_parameters(layers, width, classes):
    def norm():
        return jnp.ones(width), jnp.zeros(width)

    def layer(i):
        shapes = {"qkv": (1, 3), "out": (1, 1), "up": (1, 4), "down": (4, 1)}
        made = {name: 0.02 * normal(10 * i, a * width, b * width) for name, (a, b) in shapes.items()}
        return made | {"norm1": norm(), "norm2": norm()}

    embedding = 0.02 * normal(1, classes, width)
    return {"embedding": embedding, "layers": [layer(i) for i in range(layers)], "norm": norm()}


def gradients(fn, numbers):
    """The results and gradients of fn's first operands, for a cotangent of ones."""

    def run(*operands):
        moving, rest = operands[:numbers], operands[numbers:]
        out, pullback = jax.vjp(lambda *xs: fn(*xs, *rest), *moving)
        return out, pullback(jnp.ones_like(out))

    return run


def count(name, versions, *operands):
    """As compare, but the programs are compiled for an H100 and read, not run."""
    types = gpu_program.on_device(operands)
    programs = {label: gpu_program.compiled(fn, *types, ours=label == "jaxext") for label, fn in versions.items()}
    first = next(iter(programs.values()))
    for label, program in programs.items():
        print(
            f"{name:34} {label:8} {program.bytes / 2**30:8.2f} GiB moved  {first.bytes / program.bytes:5.2f}x  "
            f"{sum(launch.times for launch in program.launches):4d} kernels  "
            f"temporaries {program.temporaries / 2**20:9.1f} MiB, "
            f"1/{first.temporaries / max(program.temporaries, 1):.1f}",
            flush=True,
        )


def compare(name, versions, *operands):
    """One line a version of {name: function}; the first is stock."""
    compiled = {}
    for label, fn in versions.items():
        jitted = jaxext.accelerate(fn) if label == "jaxext" else jax.jit(fn)
        compiled[label] = jitted.lower(*operands).compile()
        jax.block_until_ready(compiled[label](*operands))
    times = {label: [] for label in compiled}
    for _ in range(TURNS):
        for label, run in compiled.items():
            begin = time.perf_counter()
            for _ in range(CALLS):
                last = run(*operands)
            jax.block_until_ready(last)
            times[label].append((time.perf_counter() - begin) / CALLS)
    first, *_ = compiled
    expected = jax.tree.leaves(compiled[first](*operands))
    for label, run in compiled.items():
        analysis = run.memory_analysis()
        apart = max(map(apart_by, jax.tree.leaves(run(*operands)), expected))
        median = statistics.median(times[label])
        print(
            f"{name:34} {label:8} {1e3 * median:9.3f} ms  {statistics.median(times[first]) / median:5.2f}x  "
            f"temporaries {getattr(analysis, 'temp_size_in_bytes', 0) / 2**20:9.1f} MiB  difference {apart:.1e}",
            flush=True,
        )


def apart_by(a, b):
    a, b = (jnp.asarray(x, jnp.float32) for x in (a, b))
    return float(jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), 1e-30))


def bench_attention(quick, show):
    named = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    for steps, batch in ((256, 2),) if quick else ((2048, 8), (8192, 2)):
        operands = [normal(i, batch, steps, 12, 64) for i in range(3)]
        versions = {"stock": gradients(attention, 3), "jaxext": gradients(attention, 3)}
        if show is compare and cudnn_problem() is None and jax.default_backend() != "cpu":
            versions["cuDNN"] = gradients(named, 3)
        show(f"attention, causal, B{batch} S{steps} H12 D64", versions, *operands)


def bench_loss(quick, show):
    for rows, features, classes in ((32768, 64, 256),) if quick else ((32768, 768, 50304), (16384, 2048, 128256)):
        operands = normal(0, rows, features), 0.02 * normal(1, features, classes)
        labels = jnp.asarray(np.random.default_rng(2).integers(0, classes, rows), jnp.int32)
        versions = {"stock": gradients(loss, 2), "jaxext": gradients(loss, 2)}
        show(f"linear + CE, T{rows} D{features} V{classes}", versions, *operands, labels)


def bench_norm(quick, show):
    for rows, features in ((64, 256),) if quick else ((16384, 768), (16384, 4096)):
        operands = normal(0, rows, features), *(normal(i, features, dtype="float32") for i in (1, 2))
        versions = {"stock": gradients(layer_norm, 3), "jaxext": gradients(layer_norm, 3)}
        show(f"layer norm, {rows} x {features}", versions, *operands)


def adamw(parameters, state, gradients):
    """One AdamW update in float32, a leaf at a time, as users write it."""
    count, *moments = state

    def leaf(p, m, v, g):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        step = (m / (1 - 0.9 ** (count + 1))) / (jnp.sqrt(v / (1 - 0.999 ** (count + 1))) + 1e-8)
        return p - 1e-3 * (step + 0.01 * p), m, v

    new = jax.tree.map(leaf, parameters, *moments, gradients)
    return jax.tree.transpose(jax.tree.structure(parameters), jax.tree.structure((0, 0, 0)), new), count + 1


def bench_optimizer(quick, show):
    layers, width, classes = (2, 128, 8192) if quick else (12, 768, 50304)
    parameters = jax.tree.map(lambda x: x.astype(jnp.float32), gpt_parameters(layers, width, classes))
    state = jnp.float32(0), parameters, parameters
    name = f"AdamW of a GPT {layers} x {width}"
    show(name, {"stock": adamw, "jaxext": adamw}, parameters, state, parameters)


def bench_gpt(quick, show):
    layers, width, classes, batch, steps = (2, 128, 8192, 2, 256) if quick else (12, 768, 50304, 8, 2048)
    step = gradients(functools.partial(gpt, heads=width // 64), 1)
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, classes, (batch, steps + 1)), jnp.int32)
    name, parameters = f"GPT {layers} x {width}, B{batch} S{steps}", gpt_parameters(layers, width, classes)
    show(name, {"stock": step, "jaxext": step}, parameters, tokens)


def bench_steps(quick, show):
    """Whole train steps of compat/programs: a scanned linen GPT and a Llama of 0.68 billion parameters in plain JAX."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "compat" / "programs"))
    import gpt_linen
    import llama_jax

    def gpt(options):
        # Unwrapped it would give its arguments away with the first call.
        return lambda state, batch: gpt_linen.train_step(state, batch), gpt_linen.build(options)

    def llama(options):
        step, *state = llama_jax.build(options)
        return lambda state, batch: step(*state, batch), state

    sizes = {"gpt_linen": "--layers 12 --width 768 --heads 12", "llama_jax": "--layers 16 --width 2048 --heads 32"}
    small = "--layers 2 --width 128 --heads 4"
    for steps, batch in ((256, 2),) if quick else ((2048, 4), (8192, 1)):
        for module, build in ((gpt_linen, gpt), (llama_jax, llama)):
            chosen = small if quick else sizes[module.__name__]
            text = f"{chosen} --sequence {steps} --batch {batch} --dtype bfloat16"
            options = module.parse_arguments(text.split())
            kept = []

            def make():
                step, state = build(options)  # noqa: B023
                kept.append(step)  # noqa: B023
                return state

            state = jax.eval_shape(make) if show is count else make()
            tokens = jnp.asarray(np.random.default_rng(2).integers(0, 256, (batch, steps + 1)), jnp.int32)
            name = f"{module.__name__}, B{batch} S{steps}"
            show(name, {"stock": kept[0], "jaxext": kept[0]}, state, tokens)


def main():
    parts = {
        "attention": bench_attention,
        "loss": bench_loss,
        "norm": bench_norm,
        "optimizer": bench_optimizer,
        "gpt": bench_gpt,
        "steps": bench_steps,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(parts))
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--count", action="store_true", help="compile for an H100 and count bytes; no GPU is needed")
    options = parser.parse_args()
    unknown = set(options.parts) - set(parts)
    if unknown:
        parser.error(f"unknown part {sorted(unknown)[0]!r}: expected {', '.join(parts)}")
    if options.count:
        if (problem := gpu_program.missing()) is not None:
            parser.error(f"--count: {problem}")
        print(f"compiled for {gpu_program.device().device_kind}, not run, JAX {jax.__version__}")
        print(_native_module.load_cuda()[1] or "native CUDA kernels are in this build")
        for name in options.parts or parts:
            parts[name](options.quick, count)
        return
    device = jax.devices()[0]
    print(f"{device.platform}: {device.device_kind}, JAX {jax.__version__}")
    if device.platform == "cpu":
        print("no GPU here: these figures say nothing about one", file=sys.stderr)
    else:
        rates = accelerator.peaks(0.5, device)
        print(", ".join(f"{kind} {rate / 1e12:.3g} T/s" for kind, rate in rates.items()))
        print(cudnn_problem() or "attention goes to cuDNN")
        print(_native_module.load_cuda()[1] or "native CUDA kernels are in this build")
    for name in options.parts or parts:
        parts[name](options.quick, compare)


if __name__ == "__main__":
    main()
