"""The compiled modules, for CPU and CUDA, or the reasons why there is none: the one place that imports them."""

from __future__ import annotations

import functools
import importlib
import math
from types import ModuleType
from typing import Any

__all__ = ["CUDA_HOW", "cuda_lacks", "cuda_rows_refusal", "lacks", "load", "load_cuda", "register", "status"]

_NO_CUDA = "the CUDA kernels are not in this build (pip install . --config-settings=cmake.define.JAXEXT_CUDA=ON)"

CUDA_HOW = "native CUDA kernel, not yet measured on a card"


@functools.cache
def _import() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module("jaxext._native")
    except ImportError as error:
        return None, f"the native module is not built ({error}); reinstall jaxext where a C++20 compiler is found"
    return module, module.isa_problem()


def load() -> ModuleType | None:
    """The compiled module, or None where it was not built."""
    return _import()[0]


def status() -> str:
    """'' where native kernels run, else the reason why every op runs its reference."""
    module, problem = _import()
    if module is None or problem:
        return problem
    return register()


@functools.cache
def lacks(target: str) -> str | None:
    """None where the compiled module has the FFI target, else what to do about it."""
    module = load()
    if module is not None and target in module.targets():
        return None
    return f"the native module has no target {target}; it is older than the Python files: reinstall jaxext"


@functools.cache
def register() -> str:
    """Registers every FFI target with XLA, once; '' or the reason why it could not."""
    module, problem = _import()
    return problem if module is None or problem else _register(module, "cpu")


@functools.cache
def load_cuda() -> tuple[ModuleType | None, str]:
    """The compiled module for CUDA, its targets registered, and '' or the reason why there is none."""
    try:
        module = importlib.import_module("jaxext._native_cuda")
    except ImportError as error:
        return None, _NO_CUDA if isinstance(error, ModuleNotFoundError) else f"the CUDA kernels do not load: {error}"
    problem = _register(module, "CUDA")
    return (None, problem) if problem else (module, "")


def cuda_lacks(target: str) -> str | None:
    """None where the CUDA kernels have the FFI target, else what to do about it."""
    module, problem = load_cuda()
    if module is None:
        return problem
    return None if target in module.targets() else f"the CUDA kernels have no target {target}: reinstall jaxext"


def cuda_rows_refusal(x: Any) -> str | None:
    """Why a kernel with a block for each row of x: [..., row] does not take it, else None."""
    return "the kernel takes fewer than 2^31 rows" if math.prod(x.shape[:-1]) >= 2**31 else None


def _register(module: ModuleType, platform: str) -> str:
    import jax

    for name, capsule in module.targets().items():
        try:
            jax.ffi.register_ffi_target(name, capsule, platform=platform)
        except Exception as error:  # XLA raises types of its own; the reason is kept and reported
            return f"XLA refused the FFI target {name}: {error}"
    return ""
