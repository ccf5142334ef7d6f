"""`jax.export` and the kernels: stock exports are portable, `export` makes one that calls the kernels.

An exported program outlives the process and the machine. `jax.export.export` promises that any JAX can run it, so the
ops are lowered to their references there. Who loads the program where jaxext is installed as well can have the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export

from jaxext import _jax_compat
from jaxext.kernels import _native_module

__all__ = ["export", "leaves_kernels_out"]

# A user context is part of JAX's lowering cache key: neither kind of export gets the other's program.
_with_kernels = jax.make_user_context(False)


def leaves_kernels_out(ctx: Any) -> bool:
    """True where the lowering with this context is for a portable export."""
    return not _with_kernels.value and _jax_compat.lowers_for_export(ctx)


def export(
    fun_jit: jax.stages.Wrapped,
    *,
    platforms: Sequence[str] | None = None,
    disabled_checks: Sequence[jax.export.DisabledSafetyCheck] = (),
) -> Callable[..., jax.export.Exported]:
    """`jax.export.export` whose program calls jaxext's kernels on CPU; other platforms run plain JAX.

    The process that calls the deserialized program imports `jaxext.kernels` of the same version first. Elsewhere XLA
    answers "No FFI handler registered for jaxext_…". `jax.export.export` makes a program without kernels
    that runs under any JAX. Programs that span several devices come without kernels here too.

    Args:
      fun_jit: a function from `jaxext.accelerate`, or from `jax.jit` where jaxext is installed.
      platforms: as in `jax.export.export`.
      disabled_checks: as in `jax.export.export`, in addition to those of jaxext's own targets.

    Returns:
      A function of `fun_jit`'s arguments (arrays or `jax.ShapeDtypeStruct`) that gives the `jax.export.Exported`.
    """
    module = _native_module.load()
    own = [jax.export.DisabledSafetyCheck.custom_call(name) for name in (module.targets() if module else ())]
    exporting = jax.export.export(fun_jit, platforms=platforms, disabled_checks=[*disabled_checks, *own])

    def exported(*args: Any, **kwargs: Any) -> jax.export.Exported:
        with _with_kernels(True):
            return exporting(*args, **kwargs)

    return exported
