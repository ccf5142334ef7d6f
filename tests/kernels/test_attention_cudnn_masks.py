"""Attention on CUDA under the masks that programs write: what cuDNN is handed for each, and that results are stock's.

Whole programs as they are on CUDA, with the calls emulated on the CPU.
"""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cudnn_emulated import as_on_cuda, emulated, found  # noqa: F401

import jaxext
from jaxext.kernels import _platform

B, T, N, H = 3, 64, 2, 16
places = jnp.arange(T)
CAUSAL = places <= places[:, None]
LENGTHS = np.array([T, 5, 0], np.int32)
TOKENS = np.where(np.arange(T) % 7, np.arange(B)[:, None], 0).astype(np.int32)
LENGTHS_CALL, BIAS_CALL = "Softmax", "ScaleBiasSoftmax"


def by_hand(mask, fill=-1e9, added=False):
    """An attention whose scores are `fill` where mask(x) is False."""

    def attend(q, k, v, x):
        scores = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.promote_types(q.dtype, "float32")) / 4
        visible = mask(x)
        scores = scores + jnp.where(visible, 0.0, fill) if added else jnp.where(visible, scores, fill)
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores).astype(v.dtype), v)

    return attend


def library(**options):
    return lambda q, k, v, x: jax.nn.dot_product_attention(
        q, k, v, **options, **({"key_value_seq_lengths": x} if x.ndim == 1 else {"mask": x[:, None, None] > 0})
    )


def inside(lengths):
    return places < lengths[:, None]


def of_keys(lengths):
    return inside(lengths)[:, None, None]


def decoder(lengths):
    return nn.combine_masks(nn.make_attention_mask(inside(lengths), inside(lengths)), nn.make_causal_mask(TOKENS))


def linen(mask):
    return lambda q, k, v, x: nn.dot_product_attention(q, k, v, mask=mask(x))


def in_scan(mask):
    def attend(q, k, v, x):
        given = mask(x)
        step = by_hand(lambda m: m > 0)
        return jax.lax.scan(lambda carry, _: (step(carry, k, v, given), None), q, None, length=2)[0]

    return attend


def in_checkpoint(mask):
    return lambda q, k, v, x: jax.checkpoint(by_hand(lambda m: m > 0))(q, k, v, mask(x))


def same_segment(ids):
    return ids[:, None, :, None] == ids[:, None, None, :]


AS_LENGTHS = {
    "library": library(),
    "library, both": lambda q, k, v, x: library(query_seq_lengths=x)(q, k, v, x),
    "library, both, causal": lambda q, k, v, x: library(query_seq_lengths=x, is_causal=True)(q, k, v, x),
    "where": by_hand(of_keys),
    "where, infinite": by_hand(of_keys, -jnp.inf),
    "added": by_hand(of_keys, added=True),
    "not, turned": by_hand(lambda x: ~(x[:, None] <= places)[:, None, None]),
    "with causal": by_hand(lambda x: of_keys(x) & CAUSAL),
    "linen": linen(lambda x: nn.make_attention_mask(inside(x), inside(x))),
    "linen, decoder": linen(decoder),
    "scan": in_scan(of_keys),
    "scan, decoder": in_scan(decoder),
    "checkpoint, decoder": in_checkpoint(decoder),
}
AS_BIAS = {
    "tokens": by_hand(lambda x: (x != 0)[:, None, None]),
    "tokens, causal": by_hand(lambda x: (x != 0)[:, None, None] & CAUSAL),
    "library's mask": library(),
    "segments, causal": by_hand(lambda x: same_segment(x) & CAUSAL),
    "scan, tokens": in_scan(lambda x: (x != 0)[:, None, None]),
    "lengths in a window": lambda q, k, v, x: library(is_causal=True, local_window_size=(9, 0))(q, k, v, x[:, 1]),
}


def gradients(attend, weights):
    """Result and gradients under a loss that weighs the rows."""

    def run(*operands):
        out, pullback = jax.vjp(lambda *xs: attend(*xs, operands[3]), *operands[:3])
        return out, *pullback(weights.astype(out.dtype))

    return run


def operands(name, dtype="bfloat16"):
    rng = np.random.default_rng(0)
    x = LENGTHS if name in AS_LENGTHS else TOKENS
    return [*(rng.standard_normal((B, T, N, H)).astype(dtype) for _ in range(3)), x]


@pytest.mark.parametrize("name", [*AS_LENGTHS, *AS_BIAS])
def test_what_cudnn_is_handed(found, name):  # noqa: F811
    attend, given = (AS_LENGTHS | AS_BIAS)[name], operands(name)
    report = jaxext.explain(attend, platform="cuda")(*given)
    (entry,) = report.replaced
    assert entry.kernel == "attention"
    assert ("lengths" in entry.detail) == (name in AS_LENGTHS or name == "lengths in a window")
    with _platform.assuming("cuda"):
        ours = jaxext.accelerate(gradients(attend, np.ones((B, T, N, H))))
        text = jax.jit(ours).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    calls = set(re.findall(r"__cudnn\$fmha(\w+)", text))
    expected = LENGTHS_CALL if name in AS_LENGTHS else BIAS_CALL
    assert calls == {expected, f"{expected}Backward"}
    # A band stays a band beside them.
    causal = any(word in name for word in ("causal", "decoder", "window"))
    kinds = ("PADDING", "PADDING_CAUSAL") if name in AS_LENGTHS else ("NO_MASK", "CAUSAL")
    assert set(re.findall(r"mask_type\\22: \\22([A-Z_]+)", text)) == {kinds[causal]}


@pytest.mark.parametrize("name", [n for n in (*AS_LENGTHS, *AS_BIAS) if n not in ("where, infinite", "scan")])
def test_results_and_gradients_are_as_exact_as_stock(as_on_cuda, name):  # noqa: F811
    attend, given = (AS_LENGTHS | AS_BIAS)[name], operands(name)
    step = gradients(attend, np.random.default_rng(1).standard_normal((B, T, N, H)))
    ours = jaxext.accelerate(step)(*given)
    stock = jax.jit(step)(*given)
    with jax.enable_x64(True):
        exact = jax.jit(step)(*(np.asarray(x, np.float64) for x in given[:3]), given[3])
    for o, s, e in zip(ours, stock, exact, strict=True):
        assert (o.shape, o.dtype) == (s.shape, s.dtype)
        o, s, e = (np.asarray(x, np.float64) for x in (o, s, e))
        assert np.abs(o - e).max() <= 2 * np.abs(s - e).max() + 4 * float(jnp.finfo("bfloat16").eps) * np.abs(e).max()
