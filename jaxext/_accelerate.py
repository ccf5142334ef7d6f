"""`jaxext.accelerate`: `jax.jit` whose function runs on jaxext's kernels."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

import jax

from . import _jax_compat as compat
from . import _settings
from ._check import Checked
from ._settings import Settings
from .rewrite import hooks

_CACHE = "__jaxext_traced__"


def accelerate(
    fn: Callable[..., Any] | None = None,
    *,
    require: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    check: bool = False,
    precision: str | None = None,
    **jit_options: Any,
) -> Any:
    """`jax.jit`, with the patterns that jaxext has kernels for replaced, under differentiation too.

    Use it as `jax.jit`, bare or with options, on a function, a method, a `functools.partial` or any callable, or on
    a function that is jitted already (`jax.jit`, `flax.nnx.jit`). The result has `.lower()`, `.trace()`,
    `.eval_shape()` and `.clear_cache()`. Where nothing matches, it is plain JAX.

    Args:
      fn: the function; None gives a decorator.
      require: kernels that must be used: `attention`, `layer_norm`, `rms_norm`, `group_norm`,
        `softmax_cross_entropy`, `linear_cross_entropy`.
      exclude: kernels not to use.
      check: the first call also runs plain JAX, on copies of the arguments, and compares the results and the state of
        flax.nnx objects: float32 to 1e-4 of a leaf's largest value, half precision to 2e-2.
      precision: "fp8": large bfloat16 products without batch dimensions, those of the derivative too, multiply in eight
        bits on GPUs of compute capability 8.9 or later (`jaxext.kernels._fp8`). None: as the program says.
      jit_options: options of `jax.jit`; not for a function that is jitted already.

    Raises:
      ValueError: an unknown kernel name or precision; `check` with precision="fp8".
      TypeError: `fn` is not callable, or options for a function that is jitted already.
      RequirementError: on the call that traces, where a required kernel was missed, with the reasons.
      FallbackError: on the call that traces, under JAXEXT_STRICT=1, where something fell back to stock JAX.
      CheckError: `check`, where results differ, with the names of the leaves.
    """
    if fn is None:
        return functools.partial(
            accelerate, require=require, exclude=exclude, check=check, precision=precision, **jit_options
        )
    if not callable(fn):
        raise TypeError(f"accelerate: fn is {fn!r}, expected a callable. Decorate a function, as with jax.jit.")
    settings = _checked_settings(require, exclude, check, precision)
    jitted = isinstance(fn, jax.stages.Wrapped)
    if jitted and jit_options:
        raise TypeError(
            f"accelerate: {sorted(jit_options)[0]} is given for a function that is jitted already. "
            "Give it to the inner jit."
        )
    if settings is None:
        return fn if jitted else jax.jit(fn, **jit_options)
    accelerated = _jitted(fn, settings) if jitted else jax.jit(_traced(fn, settings), **jit_options)
    return Checked(accelerated) if check else accelerated


def _checked_settings(
    require: str | Iterable[str], exclude: str | Iterable[str], check: bool, precision: str | None
) -> Settings | None:
    """The arguments of `accelerate` and the environment together; None where that switches jaxext off."""
    environment = _settings.from_environment()
    required = _settings.checked_kernels(require, "accelerate(require=)")
    excluded = frozenset(_settings.checked_kernels(exclude, "accelerate(exclude=)"))
    precision = _settings.checked_precision(precision, "accelerate(precision=)")
    both = excluded.intersection(required)
    if both:
        raise ValueError(f"accelerate: {sorted(both)[0]!r} is both in require and in exclude. Drop one of them.")
    if environment is None:
        return None
    precision = precision or environment.precision
    if check and precision is not None:
        raise ValueError(
            "accelerate: check=True holds results to 2e-2, which products in eight bits do not reach. "
            'Drop check or precision="fp8", and compare losses instead.'
        )
    return Settings(environment.exclude | excluded, required, environment.strict, precision=precision)


def _jitted(fn: Any, settings: Settings) -> Any:
    """A jitted function, accelerated: jitted alike, so that a call costs no more, or else called under the settings."""
    inner = compat.jitted_function(fn)
    return Accelerated(fn, settings) if inner is None else compat.jit_like(fn, _traced(inner, settings))


def _traced(fn: Callable[..., Any], settings: Settings) -> Callable[..., Any]:
    """The function that is jitted for `fn`: one and the same each time, as JAX's caches go by it."""
    known = getattr(fn, "__dict__", {}).get(_CACHE, {})
    found = known.get(settings)
    if found is not None and found.__wrapped__ is fn:
        return found
    traced = hooks.accelerated(fn, settings)
    traced.__dict__.pop(_CACHE, None)
    if isinstance(fn, (types.FunctionType, functools.partial)):
        fn.__dict__[_CACHE] = {**known, settings: traced}  # type: ignore[attr-defined]
    return traced


class Accelerated:
    """A function that is jitted already, called and traced under jaxext's settings; all else is the function's."""

    def __init__(self, fn: Any, settings: Settings) -> None:
        functools.update_wrapper(self, fn)
        self._fn = fn
        self._settings = settings
        hooks.activate(relying=self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _settings.is_unset():  # the hot path
            with _settings.entering(self._settings):
                return self._fn(*args, **kwargs)
        with self._scope():
            return self._fn(*args, **kwargs)

    def _scope(self) -> Any:
        if _settings.is_off():
            return _settings.use(None)
        outer = _settings.current()
        return _settings.entering(self._settings) if outer is None else _settings.within(self._settings, outer)

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        with self._scope():
            return self._fn.trace(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        with self._scope():
            return self._fn.lower(*args, **kwargs)

    def eval_shape(self, *args: Any, **kwargs: Any) -> Any:
        with self._scope():
            return self._fn.eval_shape(*args, **kwargs)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __getattr__(self, name: str) -> Any:
        if name == "_fn":
            raise AttributeError(name)
        return getattr(self._fn, name)

    def __repr__(self) -> str:
        return f"<accelerated {self._fn!r}>"
