"""Memory reuse: the process keeps XLA's large buffers for the next step instead of returning them to the kernel.

glibc maps every large allocation afresh and unmaps it when it is freed, so each step pays one page fault for every
4 KiB that it touches. jaxext leads jaxlib's own requests of 64 KiB and more to a pool of blocks that stay mapped
(native/memory/): on huge pages where the kernel gives them, bounded by what the program needed of late. No other
library, and no smaller request, is touched.
"""

import ctypes
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

CHOICES = ("reuse", "system")

_in_force = "system"
_note = ""


@dataclasses.dataclass(frozen=True)
class MemoryState:
    """What the process does with freed memory.

    Attributes:
      memory: "reuse" or "system".
      note: why reuse is off, "" where there is nothing to say.
      huge_pages: the kernel's transparent huge pages: "always", "madvise", "never", "" where there are none.
      resident: bytes of memory in use by the process.
      live, kept: bytes of the pool's blocks in use, and of those that are free and kept for reuse.
    """

    memory: str
    note: str
    huge_pages: str
    resident: int
    live: int
    kept: int

    def __str__(self) -> str:
        return f"memory={self.memory}: {self.note}" if self.note else f"memory={self.memory}"


def _native() -> Any:
    """The compiled module; importing it takes jaxlib's library with it, whose calls are to be led to the pool."""
    from jaxext.kernels import _native_module

    return _native_module.load()


def impossible() -> str:
    """Why this machine has no memory reuse, else ""."""
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        return "memory reuse needs Linux with glibc; the system's own behaviour is kept"
    if _native() is None:
        return "memory reuse needs jaxext's native module, which is not built; the system's own behaviour is kept"
    return ""


def apply(memory: str) -> str:
    """Puts `memory` in force for the process, from now on; "" or one line that says why it has no effect.

    Args:
      memory: "reuse": freed buffers are kept and reused, which costs resident memory. "system": as without jaxext.

    Raises:
      ValueError: another value.
    """
    global _in_force, _note
    if memory not in CHOICES:
        raise ValueError(f"memory must be 'reuse' or 'system', not {memory!r}.")
    if memory == "system":
        if _in_force == "reuse":
            _native().stop_pool()
        _in_force, _note = "system", ""
    elif _in_force == "system":
        _note = impossible() or _start()
        _in_force = "system" if _note else "reuse"
    return _note


def _start() -> str:
    problem = _native().start_pool()
    return f"no memory reuse: {problem}; the system's own behaviour is kept" if problem else ""


def release_memory() -> int:
    """Gives the memory that is free inside the process back to the system.

    Returns:
      Bytes by which the process's resident memory fell; 0 where none was kept.
    """
    if _counts() is None:
        return 0
    before = _resident()
    _native().release_pool()
    return max(0, before - _resident())


def _counts() -> dict[str, int] | None:
    """None where the pool was never started, or cannot be."""
    if "jaxext._native" not in sys.modules:
        return None
    return _native().pool_counts()


def _resident() -> int:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def _huge_pages() -> str:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists():
        return ""
    return setting.read_text().partition("[")[2].partition("]")[0]


def state() -> MemoryState:
    """What is in force now."""
    counts = _counts() or {"live": 0, "kept": 0}
    return MemoryState(_in_force, _note, _huge_pages(), _resident(), counts["live"], counts["kept"])
