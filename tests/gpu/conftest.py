"""These tests need an NVIDIA GPU that JAX runs on: JAX_PLATFORMS=cuda,cpu pytest tests/gpu. Others are skipped."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _on_a_gpu():
    if jax.default_backend() != "gpu":
        pytest.skip(f"no GPU: JAX runs on {jax.default_backend()}")
