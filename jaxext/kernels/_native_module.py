"""The compiled module, or the reason why there is none: the one place that imports it."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

__all__ = ["lacks", "load", "register", "status"]


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
    import jax

    module, problem = _import()
    if module is None or problem:
        return problem
    for name, capsule in module.targets().items():
        try:
            jax.ffi.register_ffi_target(name, capsule, platform="cpu")
        except Exception as error:  # XLA raises types of its own; the reason is kept and reported
            return f"XLA refused the FFI target {name}: {error}"
    return ""
