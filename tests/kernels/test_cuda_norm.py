"""The norms' CUDA kernels without a card: their sources run on the host, and what is lowered for CUDA calls them.

No test here says that they run on a card, nor how fast; tests/gpu does.
"""

import ctypes

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated import buffers, calls, filled, library, pretend_built

from jaxext.kernels import _native_module, _norm_cuda, layer_norm, layer_norm_refusal
from jaxext.kernels._norm import ADD_LAYER_NORM, ADD_RMS_NORM, LAYER_NORM, RMS_NORM
from jaxext.kernels._platform import assuming


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    loaded = library("norm", tmp_path_factory.mktemp("emulated"))
    loaded.chunks.restype, loaded.chunks.argtypes = ctypes.c_int64, [ctypes.c_int64]
    return loaded


class Call:
    """One call's operands, and what the references make of them."""

    def __init__(self, centred, residual, parameters, shape, dtype, scale_dtype, out_dtype=None):
        rng = np.random.default_rng(0)
        self.centred, self.shape = centred, shape
        self.x, self.grad_sum = ((rng.standard_normal(shape) + 0.5).astype(dtype) for _ in range(2))
        self.residual = rng.standard_normal(shape).astype(dtype) if residual else None
        self.scale, self.bias = ((1 + 0.2 * rng.standard_normal(shape[-1])).astype(scale_dtype) for _ in range(2))
        self.scale = self.scale if parameters else None
        self.bias = self.bias if parameters and centred else None
        self.grad = rng.standard_normal(shape).astype(out_dtype or dtype)
        names = {"residual": self.residual, "scale": self.scale, "bias": self.bias}
        self.extras = tuple(name for name, value in names.items() if value is not None)
        self.operands = [self.x, *(value for value in names.values() if value is not None)]
        self.params = {"epsilon": 1e-5, "scale_offset": 0.0 if centred else 1.0, "out_dtype": out_dtype}
        plain, added = (LAYER_NORM, ADD_LAYER_NORM) if centred else (RMS_NORM, ADD_RMS_NORM)
        self.op = added if residual else plain

    def forward(self, library):
        total = filled(self.shape, self.x.dtype) if self.residual is not None else None
        out = filled(self.shape, self.grad.dtype)
        mean = filled(self.shape[0], np.float32) if self.centred else None
        rstd = filled(self.shape[0], np.float32)
        given = buffers([self.x, self.residual, self.scale, self.bias, out, total, mean, rstd])
        offset = ctypes.c_float(self.params["scale_offset"])
        sizes = (ctypes.c_int64(n) for n in self.shape)
        library.forward(ctypes.c_bool(self.centred), *given, *sizes, ctypes.c_float(1e-5), offset)
        return [a for a in (out, total, mean, rstd) if a is not None]

    def reference(self, *operands):
        return self.op.reference(*operands, extras=self.extras, **self.params)

    def backward(self, library, x, mean, rstd):
        wanted = [filled(self.shape, self.x.dtype)]
        wanted += [None if p is None else filled(p.shape, p.dtype) for p in (self.scale, self.bias)]
        partials = filled((library.chunks(self.shape[0]), 2, self.shape[1]), np.float32)
        grad_sum = self.grad_sum if self.residual is not None else None
        given = buffers([x, self.grad, grad_sum, self.scale, mean, rstd, *wanted, partials])
        sizes = (ctypes.c_int64(n) for n in self.shape)
        library.backward(ctypes.c_bool(self.centred), *given, *sizes, ctypes.c_float(self.params["scale_offset"]))
        return [a for a in wanted if a is not None]

    def gradients(self, *operands):
        """Of the normalised sum, whose operands are the sum and the parameters."""
        added = self.residual is not None

        def run(x, *parameters):
            zeros = (jnp.zeros_like(x),) if added else ()
            return self.reference(x, *zeros, *parameters)[: 1 + added]

        cotangents = (self.grad, self.grad_sum)[: 1 + added]
        outs, pullback = jax.vjp(run, *operands)
        return pullback(tuple(jnp.asarray(c, o.dtype) for c, o in zip(cotangents, outs)))


CALLS = {
    "rows": (True, False, True, (5, 96), "float32", "float32"),
    "rms": (False, False, True, (5, 96), "float32", "float32"),
    "bare": (True, False, False, (3, 40), "float32", "float32"),
    "odd": (True, True, True, (4, 37), "bfloat16", "float32"),
    "half": (True, True, True, (3, 768), "bfloat16", "bfloat16"),
    "rms half": (False, True, True, (3, 264), "bfloat16", "bfloat16"),
    "several packs a thread": (True, False, True, (2, 2304), "float32", "bfloat16"),
    "wide result": (True, False, True, (2, 64), "bfloat16", "float32", "float32"),
    "several rows a block": (False, False, True, (1030, 8), "float32", "float32"),
}


def compare(found, plain, exact):
    for f, p, e in zip(found, plain, exact, strict=True):
        f, p, e = (np.asarray(a, np.float64) for a in (f, p, e))
        eps = float(jnp.finfo(plain[0].dtype).eps)
        assert np.abs(f - e).max() <= 2 * np.abs(p - e).max() + 4 * eps * np.abs(e).max()


@pytest.mark.parametrize("name", CALLS)
def test_the_kernels_arithmetic_is_as_exact_as_the_reference(emulated, name):
    call = Call(*CALLS[name])
    found = call.forward(emulated)
    plain = jax.jit(call.reference)(*call.operands)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in call.operands]
        exact = jax.jit(call.reference)(*wide)
    compare(found, plain, exact)

    added = call.residual is not None
    x = found[1] if added else call.x
    mean, rstd = (found[-2] if call.centred else None), found[-1]
    parameters = [p for p in (call.scale, call.bias) if p is not None]
    gradients = call.backward(emulated, x, mean, rstd)
    expected = jax.jit(call.gradients)(x, *parameters)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in (x, *parameters)]
        exact = jax.jit(call.gradients)(*wide)
    compare(gradients, expected, exact)


def test_sums_over_rows_are_the_same_each_time(emulated):
    call = Call(*CALLS["several rows a block"])
    found = call.forward(emulated)
    first, second = (call.backward(emulated, call.x, None, found[-1])[1] for _ in range(2))
    assert np.array_equal(first, second)


def test_chunks_are_those_that_python_makes_room_for(emulated):
    assert [emulated.chunks(rows) for rows in (0, 1, 7, 512, 10**6)] == [1, 1, 7, 512, _norm_cuda._MOST_CHUNKS]


# ---------------------------------------------------------------- what is lowered


@pytest.fixture
def built(monkeypatch):
    names = [f"jaxext_{kind}{part}" for kind in ("layer_norm", "rms_norm") for part in ("", "_backward")]
    pretend_built(monkeypatch, *names)


def loss(x, scale, bias):
    return layer_norm(x, scale, bias).sum()


OPERANDS = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((600, 256), (256,), (256,))]


def test_a_build_without_cuda_says_how_to_get_it(monkeypatch):
    missing = "the CUDA kernels are not in this build (pip install . --config-settings=cmake.define.JAXEXT_CUDA=ON)"
    monkeypatch.setattr(_native_module, "load_cuda", lambda: (None, missing))
    with assuming("cuda"):
        assert layer_norm_refusal(*OPERANDS) == missing
    assert calls(jax.jit(jax.grad(loss)), *OPERANDS)[0] == []


def test_forward_and_backward_call_the_kernels(built):
    assert calls(jax.jit(loss), *OPERANDS)[0] == ["jaxext_layer_norm"]
    names, text = calls(jax.jit(jax.grad(loss, (0, 1, 2))), *OPERANDS)
    assert names == ["jaxext_layer_norm", "jaxext_layer_norm_backward"]
    assert "tensor<512x2x256xf32>" in text  # the scratch of sums over rows
    _, text = calls(jax.jit(jax.grad(loss)), *OPERANDS)
    assert "tensor<0x2x256xf32>" in text


def test_rows_that_shared_memory_does_not_hold_are_refused(built):
    with assuming("cuda"):
        reason = layer_norm_refusal(*(jax.ShapeDtypeStruct(s, "float32") for s in ((4, 6400), (6400,))))
    assert reason == "rows of 6400 features; the gradient's kernel takes at most 6128"
