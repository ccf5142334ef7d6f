"""The small program that the fidelity tests run: a layer norm, causal attention written out by hand, and their loss."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

HERE = Path(__file__).parent
KERNELS = {"attention", "layer_norm"}


def norm(x, scale):
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-6) * scale


def attend(x, qkv):
    batch, length, width = x.shape
    q, k, v = (part.reshape(batch, length, 4, width // 4) for part in jnp.split(x @ qkv, 3, axis=-1))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / jnp.sqrt(q.shape[-1]).astype(x.dtype)
    causal = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape)


def block(weights, x):
    return x + attend(norm(x, weights["scale"]), weights["qkv"])


def loss(weights, x):
    return jnp.mean(jnp.square(block(weights, x)))


def step(weights, x):
    value, gradients = jax.value_and_grad(loss)(weights, x)
    return value, jax.tree.map(lambda w, g: w - 0.1 * g, weights, gradients)


def arguments(dtype: Any = np.float32) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((64, 192)) / 8
    x = rng.standard_normal((2, 128, 64))
    return {"qkv": qkv.astype(dtype), "scale": np.ones(64, dtype)}, x.astype(dtype)


def kernels_in(lowered: Any) -> dict[str, int]:
    """How often each of jaxext's targets is called in a lowered or compiled program, or in its text."""
    text = lowered if isinstance(lowered, str) else lowered.as_text()
    calls = re.findall(r"(?:custom_call @|custom_call_target=\")(jaxext_\w+)", text)
    return {name: calls.count(name) for name in sorted(set(calls))}


def assert_close(found: Any, expected: Any, tolerance: float = 2e-5) -> None:
    """Two trees agree in structure, dtypes, and in values relative to each leaf's largest."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, stock in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert jnp.asarray(ours).dtype == jnp.asarray(stock).dtype
        ours, stock = np.asarray(ours, np.float64), np.asarray(stock, np.float64)
        scale = np.abs(stock).max(initial=1e-3)
        np.testing.assert_allclose(ours / scale, stock / scale, rtol=0, atol=tolerance)


def run(source: str, *argv: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own, this folder's modules importable, on one device."""
    variables = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(HERE), **environment}
    code = textwrap.dedent(source)
    return subprocess.run(
        [sys.executable, "-c", code, *argv], env=variables, cwd=cwd, capture_output=True, text=True, timeout=120
    )


def output(source: str, *argv: str, **options: Any) -> str:
    """Standard output of a program that must succeed."""
    result = run(source, *argv, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout
