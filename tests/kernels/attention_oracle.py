"""Attention and its gradients in float64 NumPy, written out: what the native kernels are measured against."""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass
class Case:
    """Sizes and options of one call; the shapes of the optional operands are in `extras`."""

    leading: tuple = (2,)
    heads: tuple = (2, 2)
    lengths: tuple = (70, 70)
    sizes: tuple = (16, 16)
    layout: tuple = ("btnh",) * 4
    extras: dict = dataclasses.field(default_factory=dict)
    options: dict = dataclasses.field(default_factory=dict)
    bias_dtype: str = ""

    def shape(self, which, heads, length, size):
        order = (heads, length) if self.layout[which] == "bnth" else (length, heads)
        return (*self.leading, *order, size)

    def operands(self, dtype, seed=0):
        """(query, key, value, cotangent of the result, named optional operands)."""
        rng = np.random.default_rng(seed)
        (n, k), (t, s), (d, dv) = self.heads, self.lengths, self.sizes
        shapes = (self.shape(0, n, t, d), self.shape(1, k, s, d), self.shape(2, k, s, dv), self.shape(3, n, t, dv))
        arrays = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
        draw = {
            "bias": lambda shape: rng.standard_normal(shape).astype(self.bias_dtype or dtype),
            "mask": lambda shape: rng.random(shape) < 0.6,
            "keep": lambda shape: rng.random(shape) < 0.8,
            "query_segment_ids": lambda shape: np.sort(rng.integers(0, 3, shape)).astype(np.int32),
            "key_value_segment_ids": lambda shape: np.sort(rng.integers(0, 3, shape)).astype(np.int32),
        }
        return *arrays, {name: draw[name](shape) for name, shape in self.extras.items()}


def _wide(x, layout):
    """[batch, heads, length, size] in float64."""
    x = np.asarray(x, np.float64)
    x = x if layout == "bnth" else np.swapaxes(x, -3, -2)
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])


def _full(x, shape):
    """Broadcast to shape, leading dimensions merged."""
    return np.broadcast_to(x, shape).reshape(math.prod(shape[:-3]), *shape[-3:])


def _visible(case, named, shape):
    low, high = case.options.get("band", (None, None))
    offset = np.arange(shape[-1]) - np.arange(shape[-2])[:, None]
    visible = np.ones(shape, bool)
    if low is not None:
        visible &= offset >= low
    if high is not None:
        visible &= offset <= high
    if "mask" in named:
        visible &= named["mask"]
    if "query_segment_ids" in named:
        rows, columns = named["query_segment_ids"], named["key_value_segment_ids"]
        visible &= (rows[..., :, None] == columns[..., None, :])[..., None, :, :]
    return visible.reshape(math.prod(shape[:-3]), *shape[-3:])


def _probabilities(scores, visible, fill):
    if not scores.size:
        return scores
    hidden_value = {"uniform": np.finfo(np.float32).min, "nan": -np.inf, "zeros": -np.inf}[fill]
    scores = np.where(visible, scores, hidden_value)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = weights / weights.sum(-1, keepdims=True)
    return np.where(visible.any(-1, keepdims=True), weights, 0) if fill == "zeros" else weights


def _reduce(x, shape, full):
    """The sum of x over the dimensions in which `shape` is broadcast to `full`."""
    x = x.reshape(full)
    return x.sum(tuple(i for i, (n, m) in enumerate(zip(shape, full)) if n == 1 and m != 1), keepdims=True)


def _products(case, p, factor, ds, q, k, v, g):
    """The result and the gradients of query, key and value, as [batch, heads, length, size]."""
    scale, share = case.options.get("scale", 1.0), case.heads[0] // case.heads[1]

    def shared(x):
        return x.reshape(x.shape[0], case.heads[1], share, *x.shape[2:]).sum(2)

    return {
        "out": (p * factor) @ np.repeat(v, share, axis=1),
        "query": ds @ np.repeat(k, share, axis=1) * scale,
        "key": shared(np.swapaxes(ds, -1, -2) @ q) * scale,
        "value": shared(np.swapaxes(p * factor, -1, -2) @ g),
    }


def attention(case, q, k, v, g, named):
    """The result and the gradients of sum(out * g), in the case's layouts, and the size of what was summed for each.

    Returns ({"out", "query", "key", "value", "bias"}, {the same: largest sum of absolute values}).
    """
    o = case.options
    cap, share = o.get("soft_cap"), case.heads[0] // case.heads[1]
    q, k, v, g = (_wide(x, order) for x, order in zip((q, k, v, g), case.layout))
    full = (*case.leading, case.heads[0], *case.lengths)
    raw = q @ np.swapaxes(np.repeat(k, share, axis=1), -1, -2) * o.get("scale", 1.0)
    capped = cap * np.tanh(raw / cap) if cap else raw
    scores = capped + _full(np.asarray(named["bias"], np.float64), full) if "bias" in named else capped
    visible = _visible(case, named, full)
    p = _probabilities(scores, visible, o.get("fill") or "zeros")
    factor = _full(named["keep"], full) * o.get("keep_scale", 1.0) if "keep" in named else 1.0
    dp = g @ np.swapaxes(np.repeat(v, share, axis=1), -1, -2) * factor
    slope = 1 - (capped / cap) ** 2 if cap else 1.0
    with np.errstate(invalid="ignore"):
        ds = np.where(visible, p * (dp - (p * dp).sum(-1, keepdims=True)), 0)
        size = np.where(visible, p * (np.abs(dp) + (p * np.abs(dp)).sum(-1, keepdims=True)), 0)
        exact = _products(case, p, factor, ds * slope, q, k, v, g)
        sizes = _products(case, p, factor, size, *map(np.abs, (q, k, v, g)))
    results = {}
    for which, (name, x) in zip((3, 0, 1, 2), exact.items()):
        x = x if case.layout[which] == "bnth" else np.swapaxes(x, -3, -2)
        results[name] = x.reshape(*case.leading, *x.shape[1:])
    if "bias" in named:
        results["bias"] = _reduce(ds, named["bias"].shape, full)
        sizes["bias"] = _reduce(size, named["bias"].shape, full)
    return results, {name: np.nanmax(np.abs(x), initial=0) for name, x in sizes.items()}
