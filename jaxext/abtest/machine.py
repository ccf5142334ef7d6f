"""The machine and the settings a measurement was made under, and what this machine can do at best."""

from __future__ import annotations

import os
import platform
import resource
from pathlib import Path
from typing import Any

from jaxext import _memory
from jaxext.abtest import accelerator
from jaxext.kernels import _native_module

# What must be equal on both sides for a comparison of kernels to be fair.
_VARIABLES = ("XLA_FLAGS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION", "OMP_NUM_THREADS", "GLIBC_TUNABLES")


def _first_line(path: str, prefix: str = "") -> str | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line for line in lines if line.startswith(prefix)), None)


def cpu_name() -> str:
    line = _first_line("/proc/cpuinfo", "model name")
    return line.split(":", 1)[1].strip() if line else platform.processor() or platform.machine()


def threads() -> int:
    """CPUs this process may run on, which is how many threads XLA starts."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def facts() -> dict[str, Any]:
    """Settings in force in this process, as strings and numbers for the report."""
    import jax
    import jaxlib.version

    native, memory = _native_module.load(), _memory.state()
    found: dict[str, Any] = {
        "cpu": cpu_name(),
        "threads": threads(),
        "instruction set": native.active_isa() if native else "none (native module absent)",
        "jax": f"{jax.__version__} / jaxlib {jaxlib.version.__version__}",
        "python": platform.python_version(),
        "device": str(jax.devices()[0].device_kind),
        "memory": memory.memory,
        "huge pages": memory.huge_pages,
    }
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        found["platform"] = device.platform
        found |= {f"device memory, {name}": _gib(n) for name, n in accelerator.memory(device).items()}
    found.update({name: os.environ[name] for name in _VARIABLES if os.environ.get(name)})
    return found


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def load_average() -> float | None:
    """Runnable processes over the last minute: above `threads()` the machine was busy and figures are noisy."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return None


def peaks(seconds: float) -> dict[str, float]:
    """Measured peak of the default device: FLOP/s for "f32" and "bf16", bytes/s for "copy".

    Empty where that is a CPU and there is no native code.
    """
    import jax

    if jax.default_backend() != "cpu":
        return accelerator.peaks(seconds)
    native = _native_module.load()
    if native is None:
        return {}
    return {kind: float(native.measure_peak(kind, threads(), seconds)) for kind in ("f32", "bf16", "copy")}


def peak_rss() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def set_memory(behaviour: str) -> str:
    """Make this process reuse XLA's large buffers ("reuse") or not ("system"); "" or why it could not."""
    return _memory.apply(behaviour)


def memory() -> str:
    """The memory behaviour in force in this process."""
    return _memory.state().memory
