"""cuDNN's attention as JAX calls it, in plain JAX: what the CUDA lowering makes of an op runs on the CPU with it.

Stands for the two custom calls only, by what JAX documents of them: `statistics` are natural logarithms of sums of
exponentials, [B, N, T]; a causal mask is aligned at the first query; a window of w is the query's key and the w - 1
before it; keys behind a sequence's length are hidden. A row without a key is NaN here. The gradients are taken from the
statistics and the result that are given, so that wrong ones show.
"""

import jax
import jax._src.cudnn.fused_attention_stablehlo as cudnn
import jax.numpy as jnp
import pytest
from jax.interpreters import mlir

from jaxext.kernels import _attention_cudnn, _platform
from jaxext.kernels._attention import ATTENTION, ATTENTION_BACKWARD

CAUSAL = (cudnn.MaskType.CAUSAL, cudnn.MaskType.PADDING_CAUSAL)


@pytest.fixture
def found(monkeypatch):
    """JAX finds cuDNN 9.13, so that its attention lowers for CUDA."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91300)
    _attention_cudnn._jax_refuses.cache_clear()
    yield
    _attention_cudnn._jax_refuses.cache_clear()


@pytest.fixture
def emulated(found):
    """The two custom calls run on the CPU too."""
    for primitive, run in (
        (cudnn._dot_product_attention_fwd_p, _forward),
        (cudnn._dot_product_attention_bwd_p, _backward),
    ):
        mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=True), platform="cpu")


@pytest.fixture
def as_on_cuda(emulated, monkeypatch):
    """Attention in programs that run here is what it is on CUDA, with the emulation."""
    for op in (ATTENTION, ATTENTION_BACKWARD):
        monkeypatch.setitem(op.lowerings, "cpu", op.lowerings["cuda"])
    with _platform.assuming("cuda"):
        yield


def _scores(q, k, bias, lengths, scale, mask_type, window, has_bias):
    """[B, N, T, S] in float32, hidden ones -inf; heads of keys repeated."""
    q, k = q.astype(jnp.float32), jnp.repeat(k.astype(jnp.float32), q.shape[2] // k.shape[2], axis=2)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * scale
    if has_bias:
        scores = scores + bias.astype(jnp.float32)
    offset = jnp.arange(k.shape[1]) - jnp.arange(q.shape[1])[:, None]
    visible = jnp.ones(offset.shape, bool)
    if mask_type in CAUSAL:
        visible = offset <= 0
    if window:
        visible &= offset > -window
    if cudnn.has_padding(mask_type):
        visible = visible & (jnp.arange(k.shape[1]) < lengths[:, None, None, None])
    return jnp.where(visible, scores, -jnp.inf)


def _forward(
    q, k, v, bias, _, lengths, *__, scale, variadic_args, mask_type, sliding_window_length, is_training, **___
):
    scores = _scores(q, k, bias, lengths, scale, mask_type, sliding_window_length, variadic_args[0])
    v = jnp.repeat(v.astype(jnp.float32), q.shape[2] // v.shape[2], axis=2)
    out = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v).astype(q.dtype)
    return [out, jax.nn.logsumexp(scores, -1)] if is_training else [out]


def _backward(q, k, v, bias, _, lengths, *rest, scale, variadic_args, mask_type, sliding_window_length, **__):
    statistics, out, cotangent = rest[-3:]
    scores = _scores(q, k, bias, lengths, scale, mask_type, sliding_window_length, variadic_args[0])
    share = jnp.exp(scores - statistics[..., None])
    up, groups = cotangent.astype(jnp.float32), q.shape[2] // k.shape[2]
    wide_k, wide_v = (jnp.repeat(x.astype(jnp.float32), groups, axis=2) for x in (k, v))
    product = jnp.sum(up * out.astype(jnp.float32), -1).swapaxes(1, 2)
    dscores = share * (jnp.einsum("btnh,bsnh->bnts", up, wide_v) - product[..., None])

    def of_group(x):
        return x.reshape(*x.shape[:2], k.shape[2], groups, x.shape[-1]).sum(3)

    gradients = [
        (jnp.einsum("bnts,bsnh->btnh", dscores, wide_k) * scale).astype(q.dtype),
        of_group(jnp.einsum("bnts,btnh->bsnh", dscores, q.astype(jnp.float32)) * scale).astype(k.dtype),
        of_group(jnp.einsum("bnts,btnh->bsnh", share, up)).astype(v.dtype),
    ]
    if variadic_args[1]:
        shared = [i for i, size in enumerate(bias.shape) if size == 1]
        gradients.append(dscores.sum(shared, keepdims=True).astype(bias.dtype))
    return gradients
