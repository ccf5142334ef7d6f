"""The process-wide switch: `install`, `uninstall`, `disabled`, `is_installed`."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import jax

from . import _jax_compat as compat
from . import _memory, _settings
from .rewrite import hooks


class _Installed:
    """Stands for the process-wide switch among those who rely on the hooks."""


_lock = threading.RLock()
_installed = _Installed()


def install(*, memory: str = "reuse", exclude: str | Iterable[str] = (), precision: str | None = None) -> None:
    """Every function that this process traces from now on runs on jaxext's kernels. A second call changes nothing.

    JAXEXT_DISABLE=1 makes it do nothing.

    Args:
      memory: "reuse": the process keeps and reuses XLA's large buffers, "system": memory is left alone. Where reuse
        is not possible, one line on stderr says why.
      exclude: kernels not to use.
      precision: as of `accelerate`.

    Raises:
      ValueError: an unknown kernel or precision, or another `memory`.
    """
    excluded = frozenset(_settings.checked_kernels(exclude, "install(exclude=)"))
    precision = _settings.checked_precision(precision, "install(precision=)")
    if memory not in ("reuse", "system"):
        raise ValueError(f"install: memory={memory!r}, expected 'reuse' or 'system'.")
    environment = _settings.from_environment()
    if environment is None:
        return
    settings = _settings.Settings(
        exclude=environment.exclude | excluded,
        strict=environment.strict,
        precision=precision or environment.precision,
    )
    with _lock:
        use_memory(memory)
        hooks.activate()
        _settings.set_everywhere(settings)


def use_memory(memory: str) -> None:
    """Puts `memory` in force without any kernel; where reuse is not possible, one line on stderr says why."""
    message = _memory.apply(memory)
    if message and not is_installed():
        print(f"jaxext: {message}", file=sys.stderr)


def uninstall() -> None:
    """New traces are plain JAX again, and jitted functions run the programs they had before `install`.

    Functions under `accelerate` stay accelerated; memory reuse stays as it is.
    """
    with _lock:
        _settings.set_everywhere(None)
        hooks.deactivate_unless_used(released=_installed)


def is_installed() -> bool:
    """True between `install` and `uninstall`."""
    return _settings.everywhere() is not None


@contextmanager
def disabled() -> Iterator[None]:
    """Plain JAX inside, bit for bit, for installed and accelerated functions alike; works as a decorator too."""
    with _settings.use(None):
        if compat.trace_state_clean():
            yield
        else:
            # Inside a function that is being traced, the scope tells the rewriting of the whole to leave this alone.
            with jax.named_scope(_settings.SCOPE_OFF):
                yield
