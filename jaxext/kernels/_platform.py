"""How a platform computes an op, and for which platform a program is traced.

Lowering knows its platform. A pattern has to choose before that: it goes by the platform on which JAX would run the
program now, or by the one that somebody asks about.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax

from jaxext import _jax_compat

__all__ = ["NAMES", "Lowering", "assuming", "compute_capability", "foreseen"]

NAMES = ("cpu", "cuda", "rocm", "tpu")

# A user context is part of JAX's cache key: what was traced for one platform is not taken for another.
_assumed = jax.make_user_context(None)


@dataclasses.dataclass(frozen=True)
class Lowering:
    """What one platform runs in an op's place: plain JAX, or an FFI target.

    Attributes:
      refuses: (*avals, **params) -> None where it takes the call, else the reason (the reference runs).
      expression: (*operands, **params) -> outputs, in plain JAX; None: the FFI target.
      target: the FFI target with its prefix; "" where there is none.
      attributes: (**params) -> FFI attributes.
      aliases: operand index -> index of the output that is written over it.
      how: for reports, what runs; "" where the kernel's name says it.
    """

    refuses: Callable[..., str | None]
    expression: Callable[..., Sequence[jax.Array]] | None = None
    target: str = ""
    attributes: Callable[..., Mapping[str, Any]] = lambda **_: {}
    aliases: Mapping[int, int] = dataclasses.field(default_factory=dict)
    how: str = ""


def foreseen() -> str:
    """The platform that a program which is traced now will run on: "cpu", "cuda", "rocm", "tpu" or another's name."""
    return _assumed.value or _default()


def _default() -> str:
    """The platform that JAX runs programs on unless told otherwise; JAX is not started where that is the CPU anyway."""
    if not _jax_compat.has_started() and not any(map(importlib.util.find_spec, ("jax_plugins", "libtpu"))):
        return "cpu"
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    name = jax.default_backend() if device is None else getattr(device, "platform", device)
    if name != "gpu":
        return name
    return "cuda" if "cuda" in jax.local_devices(backend="gpu")[0].client.platform_version else "rocm"


def compute_capability() -> tuple[int, int] | None:
    """Of the CUDA device that programs run on, such as (9, 0); None where JAX has none."""
    if _default() != "cuda":
        return None
    major, _, minor = str(getattr(jax.local_devices()[0], "compute_capability", "")).partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


@contextmanager
def assuming(platform: str | None) -> Iterator[None]:
    """Programs that are traced inside are for `platform`; None: for the one JAX runs them on."""
    with _assumed(platform):
        yield
