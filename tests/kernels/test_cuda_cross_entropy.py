"""The cross-entropy's CUDA kernels without a card: run on the host, and called by what is lowered for CUDA.

No test here says that they run on a card, nor how fast; tests/gpu does.
"""

import ctypes

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated import BF16, buffers, calls, filled, library, pretend_built

from jaxext.kernels import (
    _native_module,
    linear_cross_entropy,
    softmax_cross_entropy,
    softmax_cross_entropy_refusal,
)
from jaxext.kernels._cross_entropy import LABELS, LABELS_BACKWARD, LABELS_WITH_GRADIENT
from jaxext.kernels._platform import assuming


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return library("cross_entropy", tmp_path_factory.mktemp("emulated"))


def run(loaded, logits, labels, loss, normalizer, grad, dlogits, params):
    flat = buffers([logits, labels, loss, normalizer, grad, dlogits])
    sizes = (ctypes.c_int64(n) for n in logits.shape)
    loaded.run(*flat, *sizes, ctypes.c_float(params["label_smoothing"]), params["out_of_range"] == "zero")


def flattened(operands):
    logits, labels = (np.ascontiguousarray(x) for x in operands)
    return logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)


def agree(found, plain, exact, dtype):
    """Error at most twice the reference's, and NaN and infinities where the reference has them."""
    found, plain, exact = (np.asarray(a, np.float64) for a in (found, plain, exact))
    np.testing.assert_array_equal(np.isnan(found), np.isnan(exact))
    sound = np.isfinite(exact)
    eps, size = float(jnp.finfo(dtype).eps), np.abs(exact[sound]).max(initial=1)
    assert (
        np.abs(found - exact)[sound].max(initial=0) <= 2 * np.abs(plain - exact)[sound].max(initial=0) + 4 * eps * size
    )


def exactly(fn, *operands):
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a, np.float64) if np.asarray(a).dtype.kind == "f" or a.dtype == BF16 else a)
                for a in operands]  # fmt: skip
        return [np.asarray(x) for x in jax.jit(fn)(*wide)]


SPECS = [spec for spec in LABELS.specs if spec.name not in ("no_rows",)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_losses_and_gradients_are_as_exact_as_the_reference(emulated, spec, dtype):
    logits, labels = flattened(spec.make(np.random.default_rng(0), dtype))
    params = {**spec.params}
    grad = np.random.default_rng(1).standard_normal(labels.shape).astype(params["out_dtype"] or dtype)
    loss, kept = filled(labels.shape, grad.dtype), filled((*labels.shape, 2), np.float32)
    run(emulated, logits, labels, loss, kept, None, None, params)
    plain = jax.jit(lambda *xs: LABELS.reference(*xs, **params))(logits, labels)
    exact = exactly(lambda *xs: LABELS.reference(*xs, **{**params, "out_dtype": None}), logits, labels)
    agree(loss, plain[0], exact[0], loss.dtype)
    agree(kept, plain[1], exact[1], np.float32)

    dlogits = filled(logits.shape, logits.dtype)
    run(emulated, logits, labels, None, kept, grad, dlogits, params)
    backward = lambda *xs: LABELS_BACKWARD.reference(*xs, wrt=(0,), **params)  # noqa: E731
    plain_gradient = jax.jit(backward)(logits, labels, kept, grad)[0]
    wide = {**params, "out_dtype": None}
    exact_gradient = exactly(lambda *xs: LABELS_BACKWARD.reference(*xs, wrt=(0,), **wide), logits, labels, kept, grad)[
        0
    ]
    agree(dlogits, plain_gradient, exact_gradient, dtype)

    for kind in ("float32", "bfloat16"):
        together = filled(labels.shape, grad.dtype), filled(kept.shape, np.float32), filled(logits.shape, kind)
        run(emulated, logits, labels, *together[:2], grad, together[2], params)
        assert np.array_equal(*(np.asarray(a, np.float32) for a in (together[0], loss)), equal_nan=True)
        np.testing.assert_array_equal(together[1], kept)
        agree(together[2], plain_gradient, exact_gradient, jnp.promote_types(dtype, kind) if kind == dtype else BF16)

    inplace = logits.copy()
    run(emulated, inplace, labels, None, kept, grad, inplace, params)
    assert np.array_equal(*(np.asarray(a, np.float32) for a in (inplace, dlogits)), equal_nan=True)


@pytest.mark.parametrize("extreme", [-np.inf, np.inf, np.nan])
def test_what_is_no_finite_logit_shows_where_the_reference_shows_it(emulated, extreme):
    logits = np.random.default_rng(0).standard_normal((3, 700)).astype(np.float32)
    logits[0, 5], logits[1, :], labels = extreme, extreme, np.array([5, 6, 7], np.int32)
    params = {"label_smoothing": 0.0, "out_of_range": "nan", "out_dtype": None}
    loss, kept = filled((3,), np.float32), filled((3, 2), np.float32)
    run(emulated, logits, labels, loss, kept, None, None, params)
    expected, _ = LABELS.reference(logits, labels, **params)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


@pytest.mark.parametrize("size", [3e38, -3e38])
def test_logits_of_any_size_keep_the_sum_below_them(emulated, size):
    logits, labels = np.full((1, 700), size, np.float32), np.array([5], np.int32)
    loss, kept = filled((1,), np.float32), filled((1, 2), np.float32)
    params = {"label_smoothing": 0.0, "out_of_range": "nan"}
    run(emulated, logits, labels, loss, kept, None, None, params)
    np.testing.assert_allclose(loss, np.log(700), rtol=1e-6)


def test_rows_that_begin_anywhere_are_read_whole(emulated):
    # 1 + 16 bytes of every phase: heads, packs and tails of rows of odd length.
    params = {"label_smoothing": 0.1, "out_of_range": "nan", "out_dtype": None}
    for classes in (513, 514, 515, 517):
        logits = np.random.default_rng(0).standard_normal((9, classes)).astype(BF16)
        labels = np.arange(9, dtype=np.int32)
        loss, kept = filled((9,), np.float32), filled((9, 2), np.float32)
        grad, dlogits = np.ones(9, np.float32), filled(logits.shape, np.float32)
        run(emulated, logits, labels, loss, kept, grad, dlogits, params)
        np.testing.assert_allclose(loss, LABELS.reference(logits, labels, **params | {"out_dtype": "float32"})[0], 1e-5)
        assert np.abs(dlogits.sum(-1)).max() < 1e-5


def test_the_reference_of_both_at_once_is_that_of_each():
    spec = LABELS.specs[0]
    logits, labels = spec.make(np.random.default_rng(0), "float32")
    grad = jnp.asarray(np.random.default_rng(1).standard_normal(labels.shape), jnp.float32)
    both = LABELS_WITH_GRADIENT.reference(logits, labels, grad, gradient_dtype="float32", **spec.params)
    loss, kept = LABELS.reference(logits, labels, **spec.params)
    (gradient,) = LABELS_BACKWARD.reference(logits, labels, kept, grad, wrt=(0,), **spec.params)
    for found, expected in zip(both, (loss, kept, gradient), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- what is lowered


@pytest.fixture
def built(monkeypatch):
    pretend_built(monkeypatch, *(f"jaxext_cross_entropy{part}" for part in ("", "_backward", "_with_gradient")))


def called(fn, *operands):
    return calls(jax.jit(fn), *operands)[0]


def of_logits(logits, labels):
    return softmax_cross_entropy(logits, labels).sum()


def of_rows(x, weight, labels):
    return linear_cross_entropy(x, weight, labels).mean()


LOGITS = jax.ShapeDtypeStruct((64, 1000), "bfloat16"), jax.ShapeDtypeStruct((64,), "int32")
ROWS = tuple(
    jax.ShapeDtypeStruct(*one) for one in (((600, 32), "bfloat16"), ((32, 1000), "bfloat16"), ((600,), "int32"))
)


def test_a_build_without_cuda_keeps_the_gradient_element_by_element(monkeypatch):
    missing = "the CUDA kernels are not in this build (pip install . --config-settings=cmake.define.JAXEXT_CUDA=ON)"
    monkeypatch.setattr(_native_module, "load_cuda", lambda: (None, missing))
    with assuming("cuda"):
        assert softmax_cross_entropy_refusal(*LOGITS) == missing
    _, text = calls(jax.jit(jax.grad(of_rows, (0, 1))), *ROWS)
    assert "jaxext_" not in text
    assert "scatter" not in text


def test_forward_and_backward_call_the_kernels(built):
    assert called(of_logits, *LOGITS) == ["jaxext_cross_entropy"]
    assert called(jax.grad(of_logits), *LOGITS) == ["jaxext_cross_entropy", "jaxext_cross_entropy_backward"]


def test_the_linear_layer_takes_losses_and_gradients_in_one_reading(built):
    assert called(of_rows, *ROWS) == ["jaxext_cross_entropy"]
    # The backward's own is for cotangents that turn out uneven.
    names = set(called(jax.grad(of_rows, (0, 1)), *ROWS))
    assert names == {"jaxext_cross_entropy_with_gradient", "jaxext_cross_entropy_backward"}


def test_few_classes_stay_with_xla(built):
    few = jax.ShapeDtypeStruct((64, 10), "float32"), LOGITS[1]
    with assuming("cuda"):
        assert softmax_cross_entropy_refusal(*few) == "10 classes are fewer than 512; XLA's own fusions are as good"
    assert called(of_logits, *few) == []
