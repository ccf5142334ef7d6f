"""The sweep over Flax architectures: its quickest ones agree with stock JAX, with every layer on a kernel."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

SWEEP = pathlib.Path(__file__).parents[2] / "compat" / "sweep.py"
FLAX_MODELS = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason='transformers 4.49 is not installed; pip install "transformers==4.49.*" to sweep its Flax architectures',
)


def sweep(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SWEEP), *options], capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("name", ["flax.linen", pytest.param("BERT", marks=FLAX_MODELS)])
def test_an_architecture_agrees_with_every_layer_on_a_kernel(name, tmp_path):
    result = sweep("--only", name, "--json", str(tmp_path / "sweep.json"))
    assert result.returncode == 0, result.stdout + result.stderr
    (found,) = json.loads((tmp_path / "sweep.json").read_text())
    assert found["architecture"] == name and found["agree"]
    assert found["kernels"]["attention"] == [2, 2]
    assert all(count == expected for count, expected in found["kernels"].values())


def test_an_unknown_architecture_names_the_known_ones():
    result = sweep("--only", "GPT-5")
    assert result.returncode == 1
    assert "sweep: --only 'GPT-5' is not one of flax.linen, flax.nnx, GPT-2" in result.stderr
