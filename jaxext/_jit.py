"""`jaxext.jit`: `jax.jit` of `import jaxext as jax`, accelerated."""

import functools
import inspect
from typing import Any

import jax

from jaxext._accelerate import accelerate

_OPTIONS = frozenset(inspect.signature(jax.jit).parameters) - {"fun"}


@functools.wraps(jax.jit)
def jit(*args: Any, **options: Any) -> Any:
    # What jax.jit would refuse goes to jax.jit, so that the error is its own.
    if len(args) > 1 or not options.keys() <= _OPTIONS or not all(map(callable, args)):
        return jax.jit(*args, **options)
    return accelerate(*args, **options)


jit.__module__ = "jaxext"
