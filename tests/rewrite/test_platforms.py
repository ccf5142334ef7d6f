"""What is replaced depends on the platform a program is for: foreseen when it is traced, known when it is lowered.

No GPU is needed: programs are lowered for CUDA here, and what is plain JAX in them then runs on the CPU.
"""

import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxext
from jaxext.kernels import OPS, _platform, linear_cross_entropy, linear_cross_entropy_refusal
from jaxext.kernels._cross_entropy import LABELS, LABELS_BACKWARD, _label_gradient
from jaxext.kernels._native_module import load_cuda
from jaxext.kernels._norm import LAYER_NORM

ROWS, FEATURES, CLASSES = 8192, 48, 8192


def norm(x):
    centre = x - x.mean(-1, keepdims=True)
    return centre * jax.lax.rsqrt((centre**2).mean(-1, keepdims=True) + 1e-6)


def classified(x, weight, labels):
    return optax.softmax_cross_entropy_with_integer_labels(x @ weight, labels).mean()


def types(dtype="bfloat16", rows=ROWS, classes=CLASSES):
    shapes = ((rows, FEATURES), dtype), ((FEATURES, classes), dtype), ((rows,), "int32")
    return [jax.ShapeDtypeStruct(*one) for one in shapes]


def text(fn, *operands, platform="cuda"):
    return jax.jit(fn).trace(*operands).lower(lowering_platforms=(platform,)).as_text()


def exported_for(platform, fn):
    """What `fn` is lowered to for `platform`, ready to run on the CPU."""
    anywhere = [jax.export.DisabledSafetyCheck.platform()]
    return jax.export.export(jax.jit(fn), platforms=[platform], disabled_checks=anywhere)


def test_the_default_is_the_platform_that_jax_runs_on():
    assert _platform.foreseen() == "cpu"
    with _platform.assuming("cuda"):
        assert _platform.foreseen() == "cuda"
    with jax.default_device(jax.devices("cpu")[0]):
        assert _platform.foreseen() == "cpu"


def test_a_platform_without_a_kernel_keeps_the_users_code():
    x = jnp.ones((64, 256))
    assert jaxext.explain(norm)(x).kernels() == {"layer_norm"}
    report = jaxext.explain(norm, platform="tpu")(x)
    assert not report.replaced
    assert [entry.reason for entry in report.fallbacks] == ["layer_norm has no kernel on tpu"]
    assert report.notes[0] == "for platform tpu: where it has no kernel, XLA's own code stays"


def test_the_platform_asked_about_does_not_stay():
    x = jnp.ones((64, 256))
    jaxext.explain(norm, platform="tpu")(x)
    assert jaxext.explain(norm)(x).kernels() == {"layer_norm"}
    assert "jaxext_layer_norm" in jaxext.accelerate(norm).lower(x).as_text()


def test_single_primitives_are_exchanged_on_the_cpu_only():
    def products(a, b):
        return jnp.sort(jnp.cumsum(jnp.einsum("btf,btg->fg", a, b), axis=0), axis=-1)

    a, b = jnp.ones((4, 64, 96)), jnp.ones((4, 64, 512))
    assert jaxext.explain(products)(a, b).replaced
    assert not jaxext.explain(products, platform="cuda")(a, b).replaced


WRITTEN = {
    "elementwise": (lambda x: jax.nn.gelu(x) * x, (((512, 512), "bfloat16"),)),
    "products of gathered rows": (
        lambda table, ids, w: jnp.tanh(table[ids] @ w).sum(),
        (((1000, 64), "float32"), ((50000,), "int32"), ((64, 64), "float32")),
    ),
    "squared distances": (
        lambda x, y: jnp.argmin((x * x).sum(1)[:, None] - 2 * x @ y.T + (y * y).sum(1), 1),
        (((4000, 16), "float32"), ((2000, 16), "float32")),
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_otherwise_for_a_cpu_is_left_on_other_platforms(name):
    fn, shapes = WRITTEN[name]
    operands = [jax.ShapeDtypeStruct(*one) for one in shapes]
    assert jaxext.explain(jax.jit(fn))(*operands).kernels() & {"elementwise", "matmul"}
    assert not jaxext.explain(jax.jit(fn), platform="cuda")(*operands).replaced


def test_an_unknown_platform_is_named():
    with pytest.raises(ValueError, match=re.escape("explain: platform is 'gpu', expected one of 'cpu', 'cuda'")):
        jaxext.explain(norm, platform="gpu")


@pytest.mark.parametrize("op", OPS, ids=repr)
def test_every_op_lowers_for_cuda_without_cpu_kernels(op):
    spec = op.specs[0]
    operands = spec.make(np.random.default_rng(0), spec.dtypes[0])
    called = re.findall(r"custom_call @(jaxext_\w+)", text(lambda *xs: op(*xs, **spec.params), *operands))
    assert not called or load_cuda()[0] is not None


def test_lowering_goes_by_its_own_platform():
    spec = LAYER_NORM.specs[0]
    operands = spec.make(np.random.default_rng(0), "float32")
    with _platform.assuming("cuda"):
        assert "jaxext_layer_norm" in text(lambda *xs: LAYER_NORM(*xs, **spec.params), *operands, platform="cpu")


# ---------------------------------------------------------------- linear + cross-entropy


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_cross_entropy_is_worth_it_by_its_rows_or_where_memory_counts(dtype):
    few = "32767 rows are fewer than 32768; whole logits, which are small, are as fast"
    with _platform.assuming("cuda"):
        assert linear_cross_entropy_refusal(*types(dtype, rows=1 << 15)) is None
        assert linear_cross_entropy_refusal(*types(dtype, rows=32767)) == few
        assert linear_cross_entropy_refusal(*types(dtype, rows=8192, classes=1 << 17)) is None


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_array_in_the_program_is_as_large_as_the_logits(platform, dtype):
    def gradients(*operands):
        return jax.value_and_grad(lambda x, w, y: linear_cross_entropy(x, w, y).mean(), (0, 1))(*operands)

    def sizes(program):
        shapes = re.findall(r"tensor<((?:\d+x)+)\w+>", program)
        return {np.prod([int(n) for n in shape.split("x")[:-1]]) for shape in shapes}

    stock = jax.value_and_grad(classified, (0, 1))
    assert max(sizes(text(stock, *types(dtype), platform=platform))) == ROWS * CLASSES
    ours = text(gradients, *types(dtype), platform=platform)
    assert max(sizes(ours)) == -(-ROWS // 12) * CLASSES
    assert "custom_call" not in ours and "scatter" not in ours


def test_temporaries_are_an_eighth_of_stocks():
    def temporary(fn):
        exported = exported_for("cuda", fn)(*types("float32"))
        return jax.jit(exported.call).lower(*types("float32")).compile().memory_analysis().temp_size_in_bytes

    def ours(x, w, y):
        return jax.value_and_grad(lambda *p: linear_cross_entropy(*p, y).mean(), (0, 1))(x, w)

    def stock(x, w, y):
        return jax.value_and_grad(lambda *p: classified(*p, y), (0, 1))(x, w)

    assert temporary(ours) <= temporary(stock) / 8


def exactly(x, weight, bias, labels, share):
    """The sum of `share` times the losses, and its gradients, in float64."""
    logits = x @ weight + bias
    logits -= logits.max(-1, keepdims=True)
    normalizer = np.log(np.exp(logits).sum(-1, keepdims=True))
    hit = np.arange(logits.shape[-1]) == labels[:, None]
    losses = normalizer[:, 0] - logits[hit]
    slope = (np.exp(logits - normalizer) - hit) * np.broadcast_to(share, losses.shape)[:, None]
    return (losses * share).sum(), slope @ weight.T, x.T @ slope, slope.sum(0)


@pytest.mark.parametrize("reduction", ["mean", "weighted"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_lowered_for_cuda_is_as_exact_as_stock(dtype, reduction):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((700, 24))
    weight, bias = 0.3 * rng.standard_normal((24, 300)), rng.standard_normal(300)
    labels, share = rng.integers(0, 300, 700).astype(np.int32), rng.random(700)

    def total(losses):
        return (losses.mean() if reduction == "mean" else (losses * share).sum()).astype(jnp.float32)

    def ours(x, weight, bias):
        return total(linear_cross_entropy(x, weight, labels, bias, out_dtype="float32"))

    def stock(x, weight, bias):
        logits = jnp.matmul(x, weight, preferred_element_type=jnp.promote_types(x.dtype, "float32")) + bias
        return total(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    given = [jnp.asarray(a, dtype) for a in (x, weight, bias)]
    found = exported_for("cuda", jax.value_and_grad(ours, (0, 1, 2)))(*given).call(*given)
    plain = jax.jit(jax.value_and_grad(stock, (0, 1, 2)))(*given)
    exact = exactly(*(np.asarray(a, np.float64) for a in given), labels, share if reduction == "weighted" else 1 / 700)
    for o, p, e in zip(jax.tree.leaves(found), jax.tree.leaves(plain), exact, strict=True):
        o, p = np.asarray(o, np.float64), np.asarray(p, np.float64)
        floor = 4 * float(jnp.finfo(dtype if o.ndim else "float32").eps) * np.abs(e).max()
        assert np.abs(o - e).max() <= 2 * np.abs(p - e).max() + floor


@pytest.mark.parametrize("spec", LABELS.specs, ids=lambda spec: spec.name)
def test_the_fused_gradient_is_the_references(spec):
    logits, labels = map(jnp.asarray, spec.make(np.random.default_rng(0), "float32"))
    losses, kept = jax.jit(lambda *xs: LABELS.reference(*xs, **spec.params))(logits, labels)
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(losses.shape), losses.dtype)
    operands = logits, labels, kept, cotangent
    (ours,) = jax.jit(lambda *xs: _label_gradient(*xs, wrt=(0,), **spec.params))(*operands)
    (expected,) = jax.jit(lambda *xs: LABELS_BACKWARD.reference(*xs, wrt=(0,), **spec.params))(*operands)
    assert ours.dtype == expected.dtype
    np.testing.assert_allclose(ours, expected, rtol=0, atol=8 * 2**-23 * np.abs(cotangent).max(initial=1))
