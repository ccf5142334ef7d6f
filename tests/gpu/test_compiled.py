"""What XLA:GPU makes of programs for an H100, without one: the right calls are in them, and they move and keep less.

Nothing is run, so nothing here says how fast it is; test_gpu.py runs on a card.
"""

import functools
import math

import bench_gpu
import flax.linen as nn
import gpu_program
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxext.kernels import _native_module
from jaxext.kernels._attention_cudnn import cudnn_problem
from jaxext.kernels._platform import assuming

pytestmark = pytest.mark.skipif(gpu_program.missing() is not None, reason=str(gpu_program.missing()))
needs_kernels = pytest.mark.skipif(_native_module.load_cuda()[0] is None, reason=_native_module.load_cuda()[1])

B, S, N, D = 2, 1024, 8, 64
FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"


@pytest.fixture(scope="module")
def cudnn():
    with assuming("cuda"):
        problem = cudnn_problem()
    if problem is not None:
        pytest.skip(problem)


def both(fn, *operands):
    """Stock JAX's program and jaxext's."""
    return [gpu_program.compiled(fn, *operands, ours=ours) for ours in (False, True)]


def heads(*sizes):
    return [gpu_program.array((B, S, n, D)) for n in sizes]


def grouped(q, k, v):
    spread = [jnp.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v)]
    return bench_gpu.attention(q, *spread)


def window(q, k, v):
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(D)
    distance = jnp.arange(S)[:, None] - jnp.arange(S)
    visible = (distance >= 0) & (distance < 200)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(visible, scores, -1e9)), v)


def of_linen(q, k, v):
    mask = nn.make_causal_mask(jnp.ones((B, S)))
    return nn.dot_product_attention(q, k, v, mask=mask)


SPELLINGS = {
    "einsum, causal": (bench_gpu.attention, (N, N, N)),
    "einsum, window": (window, (N, N, N)),
    "einsum, grouped queries": (grouped, (N, 2, 2)),
    "linen, causal": (of_linen, (N, N, N)),
    "jax.nn": (functools.partial(jax.nn.dot_product_attention, is_causal=True), (N, 2, 2)),
    "every key": (lambda q, k, v: nn.dot_product_attention(q, k, v), (N, N, N)),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_attention_is_cudnns_and_no_scores_are_kept(name, cudnn):
    fn, sizes = SPELLINGS[name]
    stock, ours = both(bench_gpu.gradients(fn, 3), *heads(*sizes))
    assert ours.calls(FORWARD) == ours.calls(BACKWARD) == 1
    assert ours.temporaries < B * N * S * S * 2 <= stock.temporaries
    assert ours.bytes < stock.bytes / 5


@pytest.mark.parametrize("spelling", ["float32 losses", "optax on bfloat16", "masked"])
def test_losses_need_an_eighth_of_the_memory_and_move_less(spelling):
    def masked(x, weight, labels):
        losses = optax.softmax_cross_entropy_with_integer_labels((x @ weight).astype(jnp.float32), labels)
        return jnp.mean(losses, where=labels > 10)

    def plain(x, weight, labels):
        return optax.softmax_cross_entropy_with_integer_labels(x @ weight, labels).mean()

    fn = {"float32 losses": bench_gpu.loss, "optax on bfloat16": plain, "masked": masked}[spelling]
    operands = gpu_program.array((32768, 768)), gpu_program.array((768, 50304)), gpu_program.array((32768,), "int32")
    stock, ours = both(bench_gpu.gradients(fn, 2), *operands)
    assert ours.temporaries <= stock.temporaries / 8
    assert ours.bytes < stock.bytes


@needs_kernels
def test_losses_and_gradients_are_one_reading_of_the_logits():
    operands = gpu_program.array((32768, 768)), gpu_program.array((768, 50304)), gpu_program.array((32768,), "int32")
    stock, ours = both(bench_gpu.gradients(bench_gpu.loss, 2), *operands)
    assert ours.calls("jaxext_cross_entropy_with_gradient") == 8
    assert ours.bytes < stock.bytes / 1.5


@needs_kernels
@pytest.mark.parametrize("features", [768, 4096])
def test_norms_move_three_fifths_of_the_bytes(features):
    operands = gpu_program.array((16384, features)), *[gpu_program.array((features,), "float32")] * 2
    stock, ours = both(bench_gpu.gradients(bench_gpu.layer_norm, 3), *operands)
    assert (ours.calls("jaxext_layer_norm"), ours.calls("jaxext_layer_norm_backward")) == (1, 1)
    assert ours.bytes < 0.65 * stock.bytes


@needs_kernels
def test_the_gradient_of_an_embedding_moves_no_more_and_is_added_up_in_float32():
    def gradient(table, tokens, cotangent):
        return jax.vjp(lambda table: table[tokens], table)[1](cotangent)[0]

    operands = gpu_program.array((50304, 768)), gpu_program.array((8, 2048), "int32"), gpu_program.array((8, 2048, 768))
    stock, ours = both(gradient, *operands)
    assert ours.calls("jaxext_scatter_rows") == 1
    assert "scatter(" not in ours.text
    assert ours.temporaries < 16 * 2**20
    # The count takes a call's operands whole; of the table only the rows that are named are touched.
    assert ours.bytes - 2 * 2 * 50304 * 768 < stock.bytes


def test_a_gpt_written_by_hand_is_exchanged_whole(cudnn):
    layers = 2
    parameters = gpu_program.on_device(jax.eval_shape(lambda: bench_gpu.gpt_parameters(layers, 768, 50304)))
    step = bench_gpu.gradients(functools.partial(bench_gpu.gpt, heads=12), 1)
    stock, ours = both(step, parameters, gpu_program.array((4, 2049), "int32"))
    assert ours.calls(FORWARD) == ours.calls(BACKWARD) == layers
    if _native_module.load_cuda()[0] is not None:
        assert ours.calls("jaxext_layer_norm") == ours.calls("jaxext_layer_norm_backward") == 2 * layers + 1
    assert ours.bytes < stock.bytes / 2
    assert ours.temporaries < stock.temporaries


@pytest.mark.parametrize("triton", [True, False], ids=["Triton", "cuBLASLt"])
def test_products_in_eight_bits_stay_in_eight_bits(triton):
    """Forward, and both gradients of each of two layers but the first input's."""

    def loss(weights, x):
        for weight in weights:
            x = jax.nn.gelu(x @ weight)
        return x.astype(jnp.float32).sum()

    operands = [gpu_program.array((8192, 8192))] * 2, gpu_program.array((8192, 8192))
    options = {"xla_gpu_enable_triton_gemm": triton}
    program = gpu_program.compiled(jax.grad(loss), *operands, ours=True, options=options, precision="fp8")
    products = program.operands("dot")
    if triton:
        assert len(products) == 5 and all(kind.startswith("f8") for both in products for kind in both)
    else:
        assert not products
        assert program.calls("__cublas$lt$matmul$f8") == 5


# ---------------------------------------------------------------- what XLA leaves nothing of


def test_xla_updates_parameters_in_the_fewest_bytes_already():
    """So there is no optimizer kernel for GPUs: AdamW reads four arrays and writes three, whatever computes it."""
    parameters = {f"layer {i}": gpu_program.array((1024, 4096), "float32") for i in range(8)}
    state = gpu_program.array((), "float32"), parameters, parameters
    program = gpu_program.compiled(bench_gpu.adamw, parameters, state, parameters, ours=False)
    least = 7 * sum(4 * math.prod(x.shape) for x in parameters.values())
    assert least <= program.bytes < 1.01 * least


def test_xla_rotates_positions_in_the_fewest_bytes_already():
    """So there is no kernel for rotary embeddings: what is read is written once."""

    def rotate(x, cos, sin):
        first, second = jnp.split(x.astype(jnp.float32), 2, -1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)

    x, angles = gpu_program.array((8, 2048, 12, 64)), gpu_program.array((2048, 1, 32), "float32")
    program = gpu_program.compiled(rotate, x, angles, angles, ours=False)
    least = 2 * 2 * math.prod(x.shape)
    assert least <= program.bytes < 1.03 * least


# ---------------------------------------------------------------- the counting itself


def test_what_is_counted_is_what_a_program_touches():
    def total(fn, *operands):
        return gpu_program.compiled(fn, *operands, ours=False).bytes

    x = gpu_program.array((1024, 1024), "float32")
    assert total(lambda x: x + 1, x) == 2 * 4 * 2**20
    assert total(lambda x: x[:2] * 2, x) == 2 * 4 * 2 * 1024
    index = gpu_program.array((16,), "int32")
    assert total(lambda x, i: x[i] + 1, x, index) == 2 * 4 * 16 * 1024 + np.dtype("int32").itemsize * 16
    turns = total(lambda x: jax.lax.fori_loop(0, 7, lambda i, x: jnp.sin(x) @ x, x), x)
    once = total(lambda x: jnp.sin(x) @ x, x)
    assert 7 * once <= turns
