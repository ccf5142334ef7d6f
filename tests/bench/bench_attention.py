"""Attention against stock JAX (and torch's scaled_dot_product_attention where torch is installed).

    python tests/bench/bench_attention.py [name ...]

Prints milliseconds, the ratio stock / jaxext, the share of the measured multiply-add peak (counting only the pairs of
query and key that attend: 4 D flops a pair forward, 14 D forward + backward) and the largest error against float64,
beside stock's. Peak, stock and jaxext are measured turn by turn.
"""

import dataclasses
import importlib.util
import os
import sys
import time

import interleaved
import jax
import jax.numpy as jnp
import numpy as np

from jaxext import _native, kernels


@dataclasses.dataclass(frozen=True)
class Shape:
    batch: int
    length: int
    heads: int
    depth: int
    kv_heads: int = 0
    causal: bool = True
    window: int = 0
    segments: int = 0
    masked: bool = False
    bias: bool = False

    def pairs(self):
        """How many (query, key) attend."""
        offset = np.arange(self.length) - np.arange(self.length)[:, None]
        visible = np.ones(offset.shape, bool)
        if self.causal:
            visible &= offset <= 0
        if self.window:
            visible &= offset >= -self.window
        if self.segments:
            ids = self.segment_ids()[0]
            visible &= ids[:, None] == ids
        return int(visible.sum()) * self.batch * self.heads

    def segment_ids(self):
        return np.broadcast_to(np.arange(self.length) * self.segments // self.length, (self.batch, self.length))


SHAPES = {
    "S4096": Shape(1, 4096, 8, 64),
    "S1024": Shape(1, 1024, 12, 64),
    "S2048": Shape(1, 2048, 8, 64),
    "S512": Shape(4, 512, 12, 64),
    "S128": Shape(16, 128, 12, 64),
    "S64": Shape(16, 64, 4, 32),
    "D32": Shape(1, 2048, 8, 32),
    "D80": Shape(1, 2048, 8, 80),
    "D128": Shape(1, 2048, 4, 128),
    "D256": Shape(1, 2048, 2, 256),
    "GQA": Shape(1, 2048, 8, 64, kv_heads=2),
    "window": Shape(1, 2048, 8, 64, window=512),
    "segments": Shape(1, 2048, 8, 64, segments=4),
    "mask": Shape(1, 2048, 8, 64, masked=True),
    "bias": Shape(1, 2048, 8, 64, bias=True),
    "full": Shape(1, 2048, 8, 64, causal=False),
    "one head": Shape(1, 4096, 1, 64),
}


def operands(shape, dtype):
    rng = np.random.default_rng(0)
    n, t, d = shape.heads, shape.length, shape.depth
    q, k, v, g = (
        jnp.asarray(rng.standard_normal((shape.batch, t, heads, d)), dtype)
        for heads in (n, shape.kv_heads or n, shape.kv_heads or n, n)
    )
    options, stock = {"is_causal": shape.causal}, {"is_causal": shape.causal}
    if shape.window:
        options["local_window_size"] = stock["local_window_size"] = (shape.window, t)
    if shape.segments:
        ids = jnp.asarray(shape.segment_ids(), jnp.int32)
        options |= {"query_segment_ids": ids, "key_value_segment_ids": ids}
        stock["mask"] = ids[:, None, :, None] == ids[:, None, None, :]
    if shape.masked:
        # Hidden at random: every block is mixed, none can be skipped.
        options["mask"] = stock["mask"] = jnp.asarray(rng.random((1, 1, t, t)) < 0.97)
    if shape.bias:
        options["bias"] = stock["bias"] = jnp.asarray(rng.standard_normal((1, n, t, t)), dtype)
    return (q, k, v), g, options, stock


def both_ways(attend):
    def run(g, *xs):
        out, pull = jax.vjp(attend, *xs)
        return out, *pull(g)

    return run


def largest_errors(found, exact):
    return [float(np.abs(np.asarray(x, np.float64) - e).max() / np.abs(e).max()) for x, e in zip(found, exact)]


def exact_head(xs, g, stock):
    """Result and gradients of the first kv head's share in float64, plain JAX."""
    share = xs[0].shape[2] // xs[1].shape[2]
    part = [np.asarray(x[:1, :, :n], np.float64) for x, n in zip((*xs, g), (share, 1, 1, share))]
    options = {name: (x[:1, :share] if name == "bias" else x) for name, x in stock.items()}
    with jax.enable_x64(True):
        scale = xs[0].shape[-1] ** -0.5

        def attend(q, k, v):
            logits = jnp.einsum("btnd,bskd->bnts", q, k) * scale + jnp.asarray(options.get("bias", 0.0), np.float64)
            t = logits.shape[-1]
            offset = np.arange(t) - np.arange(t)[:, None]
            visible = (offset <= 0) if options["is_causal"] else np.ones((t, t), bool)
            if "local_window_size" in options:
                visible &= offset >= -options["local_window_size"][0]
            if "mask" in options:
                visible = visible & np.asarray(options["mask"])
            return jnp.einsum("bnts,bskd->btnd", jax.nn.softmax(jnp.where(visible, logits, -1e30)), v)

        return [np.asarray(x) for x in jax.jit(both_ways(attend))(*(jnp.asarray(x) for x in (part[3], *part[:3])))]


def errors(shape, xs, g, stock, results):
    """Largest relative errors over the first kv head, of each function's (out, dq, dk, dv)."""
    share = shape.heads // (shape.kv_heads or shape.heads)
    exact = exact_head(xs, g, stock)
    cut = [[x[:1, :, :n] for x, n in zip(r, (share, share, 1, 1))] for r in results]
    return [largest_errors(found, exact) for found in cut]


def torch_functions(xs, g, shape):
    if importlib.util.find_spec("torch") is None or shape.segments or shape.masked or shape.bias or shape.window:
        return {}
    import torch  # pyright: ignore[reportMissingImports]

    to = {"float32": torch.float32, "bfloat16": torch.bfloat16}[str(xs[0].dtype)]
    arrays = [torch.tensor(np.asarray(x.swapaxes(1, 2), np.float32)).to(to).contiguous() for x in (*xs, g)]
    attend = torch.nn.functional.scaled_dot_product_attention
    share = shape.heads // (shape.kv_heads or shape.heads)

    def forward():
        with torch.no_grad():
            return attend(*arrays[:3], is_causal=shape.causal, enable_gqa=share > 1).numel()

    def gradients():
        leaves = [x.detach().requires_grad_() for x in arrays[:3]]
        attend(*leaves, is_causal=shape.causal, enable_gqa=share > 1).backward(arrays[3])
        return leaves[0].grad.numel()

    return {"torch": forward, "torch both": gradients}


def quiet_peak(kind):
    """FLOP/s of all cores, once the threads of what ran before have stopped waiting for work."""
    time.sleep(0.05)
    return _native.measure_peak(kind, os.cpu_count() or 1, 0.05)


def measure(name, shape, dtype, seconds=4.0):
    xs, g, options, stock = operands(shape, dtype)
    native_fn = jax.jit(lambda q, k, v: kernels.attention(q, k, v, **options))
    stock_fn = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, **stock))
    native_both, stock_both = jax.jit(both_ways(native_fn)), jax.jit(both_ways(stock_fn))
    kind = "bf16" if dtype == "bfloat16" and _native.active_isa() == "v4bf16" else "f32"
    peaks = []
    runs = {
        "peak": lambda: peaks.append(quiet_peak(kind)),
        "jaxext": lambda: native_fn(*xs),
        "stock": lambda: stock_fn(*xs),
        "jaxext both": lambda: native_both(g, *xs),
        "stock both": lambda: stock_both(g, *xs),
    } | torch_functions(xs, g, shape)
    t = interleaved.medians(runs, seconds=seconds)
    peak, pairs = max(peaks), shape.pairs()
    line = f"{name:9} {dtype:8}"
    for suffix, flops in (("", 4), (" both", 14)):
        mine, theirs = t["jaxext" + suffix], t["stock" + suffix]
        share = flops * shape.depth * pairs / mine / peak
        line += f" | {theirs * 1e3:8.2f} / {mine * 1e3:7.2f} ms = {theirs / mine:5.1f}x, {share:4.0%}"
        if "torch" + suffix in t:
            line += f", torch {t['torch' + suffix] / mine:4.1f}x"
    mine, theirs = errors(shape, xs, g, stock, (native_both(g, *xs), stock_both(g, *xs)))
    print(line + " | error " + " ".join(f"{a:.1e}/{b:.1e}" for a, b in zip(mine, theirs)), flush=True)


if __name__ == "__main__":
    print("stock / jaxext milliseconds = ratio, share of peak: forward | forward + backward | errors out dq dk dv")
    for chosen in sys.argv[1:] or SHAPES:
        for dtype in ("float32", "bfloat16"):
            measure(chosen, SHAPES[chosen], dtype)
