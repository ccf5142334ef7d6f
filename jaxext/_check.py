"""`accelerate(check=True)`: the first call also runs plain JAX, and the results are compared leaf by leaf."""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _jax_compat as compat
from . import _settings
from .rewrite.report import Report, collecting

# Largest relative difference of a leaf, and the relative size of one rounding, by what the kernels compute in.
_TOLERANCE = {"f32": 1e-4, "bf16": 2e-2}
_ROUNDING = {"f32": 2.0**-22, "bf16": 2.0**-8}
# A leaf may also change by so many times as much as roundings of the arguments change it in plain JAX.
_SENSITIVITY = 8.0


class CheckError(AssertionError):
    """Results differ from plain JAX by more than the tolerance."""


class Checked:
    """An accelerated function whose first call is compared with plain JAX; all else is the function's.

    A call inside another function that is being traced is not compared, nor is it the first; one that fails is not
    either.

    A leaf passes where its largest difference is at most 1e-4 (2e-2 where kernels compute in bfloat16 or float16) of
    its largest value, plus 8 times the change that perturbing the arguments by one rounding makes in plain JAX. The
    second term matters where a small difference is blown up by the step itself, as by Adam where a gradient is zero.
    """

    def __init__(self, fn: Any) -> None:
        self.__wrapped__ = fn
        self.__name__ = getattr(fn, "__name__", type(fn).__name__)
        self.__doc__ = getattr(fn, "__doc__", None)
        self._lock = threading.Lock()
        self._checked = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(leaf, compat.Tracer) for leaf in jax.tree.leaves((args, kwargs))):
            # Part of a larger trace: there are no results to compare yet.
            return self.__wrapped__(*args, **kwargs)
        with self._lock:
            first, self._checked = not self._checked, True
        if not first:
            return self.__wrapped__(*args, **kwargs)
        try:
            return _checked_call(self.__wrapped__, args, kwargs)
        except BaseException:
            self._checked = False
            raise

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __getattr__(self, name: str) -> Any:
        if name == "__wrapped__":
            raise AttributeError(name)
        return getattr(self.__wrapped__, name)


def has_nnx(arguments: Any) -> bool:
    """True where an argument is or holds a flax.nnx object, whose state changes in place."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return False
    found = jax.tree.leaves(arguments, is_leaf=lambda x: isinstance(x, nnx.Pytree))
    return any(isinstance(leaf, nnx.Pytree) for leaf in found)


def copied(arguments: Any) -> Any:
    """The arguments with buffers of their own, so that donating them or changing them in place does no harm."""
    if has_nnx(arguments):
        # One clone for all of them, so that what they share they still share.
        arguments = sys.modules["flax.nnx"].clone(arguments)
    return jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, arguments)


def _checked_call(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    report = Report()
    reference, perturbed = copied((args, kwargs)), copied((args, kwargs))
    with collecting(report):
        result = fn(*args, **kwargs)
    precision = "bf16" if _half(report) else "f32"
    with _settings.use(None):
        expected = _after(fn, reference)
        rounded = _after(fn, _perturbed(perturbed, _ROUNDING[precision]))
    state = (args, kwargs) if has_nnx((args, kwargs)) else ()
    differing = list(_differences(expected, (result, state), rounded, _TOLERANCE[precision]))
    if differing:
        raise CheckError(
            "accelerate(check=True): results differ from plain JAX in "
            + "; ".join(differing[:8])
            + (f"; and {len(differing) - 8} more leaves" if len(differing) > 8 else "")
            + ". Find the kernel with exclude=, and report it."
        )
    return result


def _after(fn: Any, arguments: Any) -> Any:
    """The result, and the flax.nnx objects as the call left them."""
    args, kwargs = arguments
    result = fn(*args, **kwargs)
    return result, (arguments if has_nnx(arguments) else ())


def _half(report: Report) -> bool:
    types_seen = (shape for entry in report.replaced for shape in (*entry.shapes, entry.dtype))
    return any(name.startswith(("bf16", "f16", "bfloat16", "float16")) for name in types_seen)


def _perturbed(arguments: Any, size: float) -> Any:
    generator = np.random.default_rng(0)

    def perturb(x: Any) -> Any:
        if not (isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)):
            return x
        noise = generator.uniform(-size, size, x.shape)
        return jax.device_put((np.asarray(x, np.float64) * (1 + noise)).astype(x.dtype), x.sharding)

    return jax.tree.map(perturb, arguments)


def _differences(expected: Any, actual: Any, rounded: Any, tolerance: float) -> Iterator[str]:
    leaves, structure = jax.tree_util.tree_flatten_with_path(expected)
    if structure != jax.tree.structure(actual):
        yield f"their structure: {jax.tree.structure(actual)} in place of {structure}"
        return
    for (path, want), got, near in zip(leaves, jax.tree.leaves(actual), jax.tree.leaves(rounded), strict=True):
        if not (isinstance(want, jax.Array) and jnp.issubdtype(want.dtype, jnp.number)):
            continue
        name = ("result" if path[0].idx == 0 else "argument") + jax.tree_util.keystr(path[1:])
        if want.shape != got.shape or want.dtype != got.dtype:
            yield f"{name} (type {got.dtype}{list(got.shape)} in place of {want.dtype}{list(want.shape)})"
            continue
        difference, allowed = _compare(want, got, near, tolerance)
        if not difference <= allowed:
            yield f"{name} (by {difference:.1e}, tolerance {allowed:.1e})"


def _compare(want: jax.Array, got: jax.Array, near: jax.Array, tolerance: float) -> tuple[float, float]:
    """Largest difference and the largest that passes; not-a-number and infinity have to be in the same places."""
    a, b, c = (np.asarray(x, np.complex128 if jnp.iscomplexobj(x) else np.float64) for x in (want, got, near))
    finite = np.isfinite(a)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(b[finite]).all():
        return float("inf"), 0.0
    if not finite.any():
        return 0.0, 0.0
    a, b, c = a[finite], b[finite], c[finite]
    scale = np.abs(a).max() if jnp.issubdtype(want.dtype, jnp.inexact) else 0.0
    sensitivity = np.abs(a - c).max()
    sensitivity = sensitivity if np.isfinite(sensitivity) else 0.0
    return float(np.abs(a - b).max()), float(tolerance * scale + _SENSITIVITY * sensitivity)
