"""CUDA sources on the host, a block's threads as fibers (native/cuda/emulated.h): arithmetic without a card."""

import ctypes
import re
import shutil
import subprocess
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxext.kernels import _native_module

ROOT = Path(__file__).resolve().parents[2]
BF16 = jnp.dtype("bfloat16")


def library(name, folder):
    """tests/kernels/cuda_<name>_emulated.cc, which includes the kernel's source and gives it a C face."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    built = folder / f"{name}.so"
    options = ["-std=c++20", "-O2", "-shared", "-fPIC", "-DJAXEXT_EMULATED", f"-I{ROOT / 'native'}"]
    source = Path(__file__).with_name(f"cuda_{name}_emulated.cc")
    subprocess.run([compiler, *options, str(source), "-o", str(built)], check=True, timeout=120)
    return ctypes.CDLL(str(built))


def buffers(arrays):
    """Pointers, null for None, and whether each is bf16."""
    data = [None if a is None else a.ctypes.data for a in arrays]
    flags = [int(a is not None and a.dtype == BF16) for a in arrays]
    return (ctypes.c_void_p * len(data))(*data), (ctypes.c_int * len(flags))(*flags)


def filled(shape, dtype):
    """What a kernel leaves out shows as NaN."""
    return np.full(shape, np.nan, dtype)


def pretend_built(monkeypatch, *targets):
    """A build with these FFI targets for CUDA, as far as lowering can tell."""
    module = types.SimpleNamespace(targets=lambda: dict.fromkeys(targets))
    monkeypatch.setattr(_native_module, "load_cuda", lambda: (module, ""))


def calls(jitted, *operands):
    """The FFI targets that a program calls as it is lowered for CUDA, in order, and its text."""
    text = jitted.trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    return re.findall(r"custom_call @(jaxext_\w+)", text), text
