"""Memory reuse: the process keeps XLA's large buffers for the next step instead of returning them to the kernel.

glibc maps every large allocation afresh and unmaps it when it is freed, so each step pays one page fault for every
4 KiB that it touches. Three settings (mallopt(3)) put large buffers on the heap, keep the heap, and make all threads
share it. They hold for the whole process, and for a thread only when set before its first allocation.
"""

import ctypes
import dataclasses
import functools
import os
import sys
from pathlib import Path

CHOICES = ("reuse", "system")

# glibc's malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
_REUSE = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_ARENA_MAX, 1))
# Where glibc's self-adjusting thresholds arrive in a program with large buffers; they no longer adjust once set.
_SYSTEM = ((_MMAP_MAX, 65536), (_MMAP_THRESHOLD, 32 << 20), (_TRIM_THRESHOLD, 64 << 20), (_ARENA_MAX, 0))

_LATE = (
    "memory reuse came too late to take full effect: JAX's CPU threads were already running. "
    "Call jaxext.install() before the first computation, or start the program with `jaxext run`."
)
_in_force = "system"
_note = ""
_threads_share_heap = False


@dataclasses.dataclass(frozen=True)
class MemoryState:
    """What the process does with freed memory.

    Attributes:
      memory: "reuse" or "system".
      allocator: name and version, as in "glibc 2.36".
      note: why reuse is off or weaker than it could be, "" where there is nothing to say.
      huge_pages: the kernel's transparent huge pages: "always", "madvise", "never", "" where there are none.
      huge_pages_tunable: glibc was started with glibc.malloc.hugetlb=1 or 2, so that the heap asks for them.
      resident: bytes of memory in use by the process; kept: bytes of it that are free and kept for reuse.
    """

    memory: str
    allocator: str
    note: str
    huge_pages: str
    huge_pages_tunable: bool
    resident: int
    kept: int

    def __str__(self) -> str:
        line = f"memory={self.memory} ({self.allocator})"
        return f"{line}: {self.note}" if self.note else line


@functools.cache
def _libc() -> tuple[ctypes.CDLL | None, str, str]:
    """The C library where it can be tuned, its name, and else the reason why it cannot."""
    if sys.platform != "linux":
        return None, sys.platform, "memory reuse needs Linux with glibc; the system's own behaviour is kept"
    process = ctypes.CDLL(None)
    if not hasattr(process, "gnu_get_libc_version"):
        return None, "not glibc", "memory reuse needs glibc; the system's own behaviour is kept"
    process.gnu_get_libc_version.restype = ctypes.c_char_p
    name = f"glibc {process.gnu_get_libc_version().decode()}"
    address = [ctypes.cast(library.malloc, ctypes.c_void_p).value for library in (process, ctypes.CDLL("libc.so.6"))]
    if address[0] != address[1]:
        preloaded = os.environ.get("LD_PRELOAD", "another library")
        return None, f"malloc of {preloaded}", f"malloc comes from {preloaded}, which memory reuse does not tune"
    return process, name, ""


def _jax_threads_run() -> bool:
    if "jax" not in sys.modules:
        return False
    from jaxext._jax_compat import backends_started

    return backends_started()


def _set(options: tuple[tuple[int, int], ...]) -> str:
    libc = _libc()[0]
    assert libc is not None
    refused = [option for option, value in options if not libc.mallopt(option, value)]
    return f"glibc refused mallopt option {refused[0]}; memory reuse is partial" if refused else ""


def apply(memory: str) -> str:
    """Puts `memory` in force for the process; "" or one line that says why it has no or less effect.

    Args:
      memory: "reuse": freed buffers are kept and reused, which costs resident memory. "system": as without jaxext.

    Raises:
      ValueError: another value.
    """
    global _in_force, _note, _threads_share_heap
    if memory not in CHOICES:
        raise ValueError(f"memory must be 'reuse' or 'system', not {memory!r}.")
    if memory == _in_force:
        return _note
    if _libc()[0] is None:
        _note = _libc()[2] if memory == "reuse" else ""
        return _note
    if memory == "system":
        _note = _set(_SYSTEM)
    else:
        # A thread keeps the heap of its first allocation, also when reuse was switched off and on since.
        _threads_share_heap = _threads_share_heap or not _jax_threads_run()
        _note = _set(_REUSE) or ("" if _threads_share_heap else _LATE)
    _in_force = memory
    return _note


def release_memory() -> int:
    """Gives the memory that is free inside the process back to the system.

    Returns:
      Bytes by which the process's resident memory fell; 0 where the allocator has no such call.
    """
    libc, _, _ = _libc()
    if libc is None:
        return 0
    before = _resident()
    libc.malloc_trim(ctypes.c_size_t(0))
    return max(0, before - _resident())


class _Mallinfo2(ctypes.Structure):
    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names)


def _kept() -> int:
    libc, _, _ = _libc()
    if libc is None or not hasattr(libc, "mallinfo2"):  # glibc before 2.33
        return 0
    libc.mallinfo2.restype = _Mallinfo2
    return libc.mallinfo2().fordblks


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
    _, name, reason = _libc()
    tunables = os.environ.get("GLIBC_TUNABLES", "").split(":")
    return MemoryState(
        memory=_in_force,
        allocator=name,
        note=_note or reason,
        huge_pages=_huge_pages(),
        huge_pages_tunable=any(t in tunables for t in ("glibc.malloc.hugetlb=1", "glibc.malloc.hugetlb=2")),
        resident=_resident(),
        kept=_kept(),
    )
