"""`jaxext.explain`: what would be replaced in a function, found by tracing it."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from typing import Any

import jax

from . import _jax_compat as compat
from . import _memory, _settings
from ._check import copied, has_nnx
from .kernels import _platform
from .rewrite import hooks
from .rewrite.report import Report, collecting

_probes = itertools.count(1)


def explain(fn: Callable[..., Any], *, platform: str | None = None) -> Callable[..., Report]:
    """A function of `fn`'s arguments that says what jaxext replaces in `fn`, what it nearly would, and what falls back.

    `fn` is traced, not run: no step is taken, nothing is donated, and the state of flax.nnx objects is left as it was.
    Plain functions, jitted and accelerated ones and steps over flax.nnx objects will do; arguments that are not arrays
    are passed as they are. Only a plain function whose Python looks at array values cannot be traced: it is run once,
    on copies, and a note in the report says so.

    Args:
      fn: the function.
      platform: "cpu", "cuda", "rocm" or "tpu": what would be replaced there, as far as this machine can tell (without
        cuDNN there is none for attention). None: the platform that JAX runs `fn` on here.

    Raises:
      TypeError: `fn` is not callable.
      ValueError: an unknown platform.
      whatever `fn` raises while it is traced.
    """
    if not callable(fn):
        raise TypeError(f"explain: fn is {fn!r}, expected a callable. Call it as jaxext.explain(step)(*args).")

    if platform is not None and platform not in _platform.NAMES:
        names = ", ".join(map(repr, _platform.NAMES))
        raise ValueError(f"explain: platform is {platform!r}, expected one of {names}, or None for JAX's default.")

    @functools.wraps(fn)
    def explained(*args: Any, **kwargs: Any) -> Report:
        environment = _settings.from_environment()
        report = Report()
        if environment is None:
            report.notes.append("JAXEXT_DISABLE=1: everything runs on plain JAX")
            return report
        settings = _settings.Settings(probe=next(_probes)).inside(environment).inside(_settings.current())
        token = _Token()
        status = hooks.activate(relying=token)
        with collecting(report), _settings.use(settings), _platform.assuming(platform):
            report.notes += _about(_platform.foreseen())
            _trace(fn, args, kwargs, report)
        if status.reason:
            report.notes.append(status.reason)
        report.notes.append(str(_memory.state()))
        del token
        hooks.deactivate_unless_used()
        return report

    return explained


def _about(platform: str) -> list[str]:
    return [] if platform == "cpu" else [f"for platform {platform}: where it has no kernel, XLA's own code stays"]


class _Token:
    """Keeps the hooks in place while it lives."""


def _trace(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], report: Report) -> None:
    if isinstance(fn, jax.stages.Wrapped):
        # flax.nnx traces on a copy of its objects only here.
        trace = getattr(fn, "eval_shape", fn.trace) if has_nnx((args, kwargs)) else fn.trace
        trace(*args, **kwargs)
        return
    try:
        _trace_plain(fn, args, kwargs)
    except hooks.CONCRETE:
        report.notes.append("its Python looks at array values, so it was run once, on copies of the arguments")
        copied_args, copied_kwargs = copied((args, kwargs))
        fn(*copied_args, **copied_kwargs)


def _trace_plain(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not has_nnx((args, kwargs)):
        leaves, tree = jax.tree.flatten((args, kwargs))
        arrays = [number for number, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]

        @functools.wraps(fn)
        def over_arrays(*values: Any) -> Any:
            filled = list(leaves)
            for number, value in zip(arrays, values):
                filled[number] = value
            own_args, own_kwargs = jax.tree.unflatten(tree, filled)
            return _only_arrays(fn(*own_args, **own_kwargs))

        del over_arrays.__wrapped__  # the signature is that of the arrays alone
        jax.jit(over_arrays).trace(*(leaves[number] for number in arrays))
        return
    nnx = sys.modules["flax.nnx"]
    traced = [number for number, arg in enumerate(args) if _is_traceable(arg)]

    @functools.wraps(fn)
    def over_objects(*values: Any) -> Any:
        filled = list(args)
        for number, value in zip(traced, values):
            filled[number] = value
        return _only_arrays(fn(*filled, **kwargs))

    del over_objects.__wrapped__
    nnx.jit(over_objects).eval_shape(*(args[number] for number in traced))


def _only_arrays(result: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(result) if isinstance(leaf, (jax.Array, compat.Tracer))]


def _is_traceable(arg: Any) -> bool:
    return has_nnx(arg) or all(hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in jax.tree.leaves(arg))
