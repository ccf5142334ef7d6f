"""On a card (JAX_PLATFORMS=cuda,cpu pytest tests/gpu): what is called there, and that it is right.

Each is held to twice stock's error against float64 computed on the CPU. No machine with a card has run these yet.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxext
from jaxext.kernels import _native_module, layer_norm, rms_norm, softmax_cross_entropy
from jaxext.kernels._attention import ATTENTION, _bind


@pytest.fixture(autouse=True)
def _on_a_gpu():
    if jax.default_backend() != "gpu":
        pytest.skip(f"no GPU: JAX runs on {jax.default_backend()}")


def normal(seed, *shape, dtype="bfloat16"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def attend(q, k, v, low=None, causal=True):
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    offset = jnp.arange(k.shape[1]) - jnp.arange(q.shape[1])[:, None]
    visible = jnp.ones(offset.shape, bool) if not causal else offset <= 0
    if low is not None:
        visible &= offset >= low
    shares = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))
    return jnp.einsum("bnts,bsnh->btnh", shares.astype(v.dtype), v)


def classify(x, weight, labels):
    logits = x @ weight
    return (jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, labels[:, None], -1)[:, 0]).mean()


def normalise(x, scale, bias):
    centre = x - x.mean(-1, keepdims=True)
    return centre * jax.lax.rsqrt((centre**2).mean(-1, keepdims=True) + 1e-6) * scale + bias


def root_mean_square(x, scale):
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def with_gradients(fn, count):
    def run(*operands):
        out, pullback = jax.vjp(lambda *xs: fn(*xs, *operands[count:]), *operands[:count])
        return out, *pullback(jnp.ones_like(out))

    return run


def hold(ours, stock, count, *operands):
    """`ours`, which gives results and gradients, is at most twice as far from float64 as `stock`."""
    found, plain = ours(*operands), jax.jit(with_gradients(stock, count))(*operands)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = [jnp.asarray(np.asarray(x, np.float64)) if i < count else jnp.asarray(x) for i, x in enumerate(operands)]
        exact = jax.jit(with_gradients(stock, count))(*wide)
    for f, p, e in zip(found, plain, exact, strict=True):
        f, p, e = (np.asarray(x, np.float64) for x in (f, p, e))
        floor = 4 * float(jnp.finfo(operands[0].dtype).eps) * np.abs(e).max()
        assert np.abs(f - e).max() <= 2 * np.abs(p - e).max() + floor


def cudnn_or_skip(*operands):
    given, params = _bind(*operands, band=(None, 0))
    reason = ATTENTION.refusal(*given, **params)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("steps", [256, 255])
@pytest.mark.parametrize("options", [{}, {"low": -100}, {"causal": False}], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_attention_is_cudnns_and_as_exact_as_stock(dtype, options, steps):
    operands = [normal(i, 2, steps, 4, 64, dtype=dtype) for i in range(3)]
    cudnn_or_skip(*operands)

    def stock(*xs):
        return attend(*xs, **options)

    ours = jaxext.accelerate(with_gradients(stock, 3))
    text = ours.lower(*operands).as_text()
    assert text.count("@__cudnn$fmhaSoftmax(") == text.count("@__cudnn$fmhaSoftmaxBackward(") == 1
    hold(ours, stock, 3, *operands)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_losses_without_logits(dtype):
    operands = normal(0, 32768, 64, dtype=dtype), (0.1 * normal(1, 64, 1024, dtype="float32")).astype(dtype)
    labels = np.random.default_rng(2).integers(0, 1024, 32768).astype(np.int32)
    step = with_gradients(classify, 2)
    ours, stock = jaxext.accelerate(step), jax.jit(with_gradients(classify, 2))
    assert "linear_cross_entropy" in jaxext.explain(step)(*operands, labels).kernels()
    hold(ours, classify, 2, *operands, labels)
    programs = [fn.lower(*operands, labels).compile() for fn in (ours, stock)]
    sizes = [program.memory_analysis().temp_size_in_bytes for program in programs]
    assert sizes[0] <= sizes[1] / 8


@pytest.mark.parametrize("classes", [512, 50257])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_native_losses(dtype, classes):
    module, problem = _native_module.load_cuda()
    if module is None:
        pytest.skip(problem)
    logits = 3 * normal(0, 300, classes, dtype="float32").astype(dtype)
    labels = np.random.default_rng(2).integers(0, classes, 300).astype(np.int32)
    ours = jax.jit(with_gradients(softmax_cross_entropy, 1))
    hold(ours, optax.softmax_cross_entropy_with_integer_labels, 1, logits, labels)
    text = ours.lower(logits, labels).as_text()
    assert text.count("@jaxext_cross_entropy(") == text.count("@jaxext_cross_entropy_backward(") == 1


@pytest.mark.parametrize("shape", [(100, 768), (3, 37), (2000, 4096)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_native_norms(dtype, shape):
    module, problem = _native_module.load_cuda()
    if module is None:
        pytest.skip(problem)
    x = normal(0, *shape, dtype=dtype)
    scale, bias = (normal(i, shape[-1], dtype=dtype) for i in (1, 2))
    ours = jax.jit(with_gradients(layer_norm, 3))
    hold(ours, normalise, 3, x, scale, bias)
    hold(jax.jit(with_gradients(rms_norm, 2)), root_mean_square, 2, x, scale)
    assert ours.lower(x, scale, bias).as_text().count("custom_call @jaxext_layer_norm") == 2


def test_native_sums_of_rows():
    module, problem = _native_module.load_cuda()
    if module is None:
        pytest.skip(problem)
    rng = np.random.default_rng(0)
    # One row is named 5000 times: more than bfloat16 can count.
    tokens = np.concatenate([np.full(5000, 7), rng.integers(0, 3000, 3000)]).astype(np.int32)
    table, weight = normal(0, 3000, 1024), normal(1, 8000, 1024)
    gradient = jaxext.accelerate(jax.grad(lambda table: (table[tokens] * weight).astype(jnp.float32).sum()))
    assert "@jaxext_scatter_rows(" in gradient.lower(table).as_text()
    exact = np.zeros(table.shape)
    np.add.at(exact, tokens, weight.astype(np.float64))
    found = np.asarray(gradient(table), np.float64)
    assert np.abs(found - exact).max() <= 2.0**-8 * np.abs(exact).max()
