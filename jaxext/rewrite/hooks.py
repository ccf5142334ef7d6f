"""Where rewriting takes hold of a program: at differentiation, and where the outermost jitted function is traced.

A pattern has to be replaced before it is differentiated (afterwards forward and backward are entangled), so the
function that `jax.vjp` is given is traced once, matched, and replayed under the differentiation. What no
differentiation reaches (forward-only programs) is matched in the outermost jitted function, whose trace is replayed
only if something was found.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import FunctionType
from typing import Any

import jax

from .. import _jax_compat as compat
from .. import _settings
from .._settings import Settings
from . import plan as planning
from . import selftest
from .exchange import exchange
from .match import Pattern
from .patterns import EXCHANGES, PATTERNS
from .report import Entry, Report, check_required, collecting, is_collecting, record
from .rewrite import NotExchangeable, replay, retrace

# What JAX raises where Python looks at the value of a traced array.
CONCRETE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)

_lock = threading.RLock()
_active: compat.HookStatus | None = None
_relying: weakref.WeakSet[Any] = weakref.WeakSet()
# What `accelerate` jits carries its settings with it, and switches them on while it is traced.
_ANCHOR = "__jaxext_anchor__"


# ---------------------------------------------------------------- differentiation


_interceptor: ContextVar[Callable[..., Any] | None] = ContextVar("jaxext_interceptor", default=None)


@contextmanager
def intercepting(handler: Callable[..., Any] | None) -> Iterator[None]:
    """Inside, `jax.vjp` differentiates `handler(fun)` in place of every `fun`; None: as outside of any such scope."""
    token = _interceptor.set(handler)
    try:
        yield
    finally:
        _interceptor.reset(token)


def on_differentiate(fun: Callable[..., Any]) -> Callable[..., Any]:
    """What `jax.vjp` differentiates in place of `fun`."""
    handler = _interceptor.get()
    if handler is not None:
        return handler(fun)
    settings = _settings.current()
    if settings is None or (getattr(fun, "__module__", None) or "").startswith("jaxext.kernels"):
        # A kernel's own reference says what the kernel computes: replaced by the kernel, it would say nothing.
        return fun
    return rewritten(fun, settings, whole_step=False)


def _patterns() -> tuple[Pattern, ...]:
    return selftest.PATTERNS if selftest.running() else PATTERNS


def rewritten(fun: Callable[..., Any], settings: Settings, *, whole_step: bool) -> Callable[..., Any]:
    """`fun`, traced at each call, matched and replayed. `fun` itself runs once a call."""

    @functools.wraps(fun)
    def run(*args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten((args, kwargs))
        traced = [number for number, leaf in enumerate(leaves) if isinstance(leaf, (jax.Array, compat.Tracer))]
        if compat.runs_op_by_op() and all(compat.is_concrete(leaves[number]) for number in traced):
            # A replay would hide the operation at fault, and the user's line, from JAX's debugging modes.
            return fun(*args, **kwargs)
        output = SplitOutput()

        def flat(*arrays: Any) -> list[Any]:
            filled = list(leaves)
            for number, array in zip(traced, arrays):
                filled[number] = array
            own_args, own_kwargs = jax.tree.unflatten(tree, filled)
            return output.split(fun(*own_args, **own_kwargs))

        arrays = [leaves[number] for number in traced]
        try:
            avals = [jax.typeof(array) for array in arrays]
            closed = compat.trace(flat, avals, name=compat.user_name(fun), before_differentiation=not whole_step)
        except CONCRETE as error:
            # Python that looks at values works outside jit only; there the function is called once more.
            if not any(map(compat.is_concrete, arrays)):
                raise
            reason = f"Python control flow on array values ({_first_line(error)})"
            record(_fallback(Entry("", location=compat.user_name(fun), reason=reason)), settings.strict)
            return fun(*args, **kwargs)
        except jax.errors.UnexpectedTracerError:
            # JAX says so of traced arrays in the nondiff_argnums of a custom_vjp.
            return _as_it_is(fun, settings, args, kwargs)
        if compat.keeps_tracers(closed):
            return _as_it_is(fun, settings, args, kwargs)
        results = _apply(closed, arrays, settings, compat.user_name(fun), whole_step)
        return output.join(results)

    return run


def _as_it_is(fun: Callable[..., Any], settings: Settings, args: Any, kwargs: Any) -> Any:
    """`fun`, whose hand-written derivative works outside of a trace only, called once more."""
    reason = "a derivative rule that is given arrays by nondiff_argnums cannot be traced"
    record(_fallback(Entry("", location=compat.user_name(fun), reason=reason)), settings.strict)
    return fun(*args, **kwargs)


def _apply(closed: Any, arrays: Sequence[Any], settings: Settings, name: str, whole_step: bool) -> list[Any]:
    plan = planning.make(closed, settings, _patterns(), _mode(whole_step))
    results = replay(plan, arrays)
    record(plan.full_report(name), settings.strict)
    # A constant of the function comes back as the number that its jaxpr holds.
    return [compat.as_array(result, aval) for result, aval in zip(results, compat.out_types(closed), strict=True)]


def _mode(whole_step: bool) -> planning.Mode:
    return planning.Mode(whole_step, skip_differentiated=_active is not None and _active.differentiation)


class SplitOutput:
    """Splits a function's result into traced arrays and everything else, and puts it together again.

    Arrays that were computed outside of the trace, numbers and other objects pass through untouched.
    """

    def split(self, result: Any) -> list[Any]:
        leaves, self._tree = jax.tree.flatten(result)
        self._leaves = [None if isinstance(leaf, compat.Tracer) else (leaf,) for leaf in leaves]
        return [leaf for leaf in leaves if isinstance(leaf, compat.Tracer)]

    def join(self, arrays: Sequence[Any]) -> Any:
        rest = iter(arrays)
        leaves = [next(rest) if leaf is None else leaf[0] for leaf in self._leaves]
        return jax.tree.unflatten(self._tree, leaves)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


def _fallback(entry: Entry) -> Report:
    report = Report()
    report.fallbacks.append(entry)
    return report


# ---------------------------------------------------------------- the outermost jitted function


@dataclasses.dataclass(frozen=True)
class _Traced:
    """What is known of a jitted function's jaxpr, for as long as JAX keeps that.

    `new`: the rewritten jaxpr, None where it stays as it is. `found`: all that was found while it was traced, for JAX
    does not trace it again when a function that is traced later calls it.
    """

    new: Any
    found: Report


_traced: weakref.WeakKeyDictionary[Any, dict[Any, _Traced]] = weakref.WeakKeyDictionary()
# What was found in functions while they were traced as a part of others.
_found_inside: weakref.WeakKeyDictionary[Any, Report] = weakref.WeakKeyDictionary()
_traced_lock = threading.Lock()
# Frames from a hook up to the public function that traces.
_FRAMES = 8


def _is_shown() -> bool:
    """Whether `jax.make_jaxpr` traces: who reads a jaxpr looks for JAX's own operations, and compiles nothing."""
    codes, frame = inspect.unwrap(jax.make_jaxpr).__code__.co_consts, inspect.currentframe()
    for _ in range(_FRAMES):
        frame = None if frame is None else frame.f_back
        if frame is not None and frame.f_code in codes:
            return True
    return False


def on_jit(fun: Callable[..., Any], infer: Callable[[], Any]) -> Any:
    """What tracing a jitted function gives, rewritten where it is the outermost one."""
    settings = _settings_of(fun)
    if settings is None:
        return infer()
    outermost = compat.trace_state_clean()
    if not outermost and not is_collecting():
        return infer()
    report = Report()
    with collecting(report):
        inferred = infer()
    if not outermost:
        _record_inside(compat.jit_jaxpr(inferred), report)
        return inferred
    known = _known(inferred, settings, compat.user_name(fun), report)
    check_required(known.found, settings.require)
    return inferred if known.new is None else compat.with_jaxpr(inferred, known.new)


def _record_inside(jaxpr: Any, report: Report) -> None:
    if report:
        with _traced_lock:
            _found_inside[jaxpr] = report
        return
    with _traced_lock:
        known = next(iter(_traced.get(jaxpr, {}).values()), None)
        found = known.found if known is not None else _found_inside.get(jaxpr)
    if found is not None:
        record(found, strict=False)


def _known(inferred: Any, settings: Settings, name: str, report: Report) -> _Traced:
    jaxpr, shown = compat.jit_jaxpr(inferred), _is_shown()
    how = (compat.jit_donated(inferred), shown)
    with _traced_lock:
        known, before = _traced.get(jaxpr, {}).get(how), _found_inside.get(jaxpr)
    if known is None:
        if not report and before is not None:
            report = before  # JAX has traced it as a part of another function, and does not do so again
        known = _Traced(*_exchange(inferred, settings, name, report, shown))
        with _traced_lock:
            _traced.setdefault(jaxpr, {})[how] = known
    return known


class Relying:
    """Keeps the hooks in place while it lives."""

    def __init__(self) -> None:
        activate(relying=self)


class _Anchor:
    """Marks the function that stands for an accelerated one in its jit, and keeps the hooks in place while that lives.

    It is pickled with the function, so that cloudpickle brings an accelerated function to another process.
    """

    def __init__(self, fun: Callable[..., Any], settings: Settings) -> None:
        self.fun, self.settings = fun, settings
        activate(relying=self)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.fun, self.settings)


def _settings_of(fun: Any) -> Settings | None:
    anchor = fun.__dict__.get(_ANCHOR) if isinstance(fun, FunctionType) else None
    # functools.wraps copies the mark to functions around this one.
    if anchor is None or _settings.is_off() or getattr(fun, "__wrapped__", None) is not anchor.fun:
        return _settings.current()
    return anchor.settings.inside(_settings.current())


def accelerated(fun: Callable[..., Any], settings: Settings) -> Callable[..., Any]:
    """`fun` under `settings` in whatever jit traces it; nothing of this is left in the compiled call."""

    @functools.wraps(fun)
    def traced(*args: Any, **kwargs: Any) -> Any:
        return _run_accelerated(fun, settings, args, kwargs)

    traced.__name__ = compat.user_name(fun)
    traced.__dict__[_ANCHOR] = _Anchor(fun, settings)
    return traced


def _run_accelerated(fun: Callable[..., Any], settings: Settings, args: Any, kwargs: Any) -> Any:
    if _settings.is_off():
        return fun(*args, **kwargs)
    outer = _settings.current()
    with _settings.within(settings, outer):
        if _active is not None and not _active.jit:
            return rewritten(fun, settings.inside(outer), whole_step=True)(*args, **kwargs)
        return fun(*args, **kwargs)


def _exchange(inferred: Any, settings: Settings, name: str, before: Report, shown: bool) -> tuple[Any, Report]:
    """The jaxpr of the whole step, rewritten (None: left as it is), and all that was found in it.

    shown: its primitives stay, as nobody runs it.
    """
    jaxpr, obstacle = compat.replaceable_jaxpr(inferred)
    if jaxpr is None:
        found = Report()
        found.notes.append(f"{name} is left to stock JAX but for what it differentiates: {obstacle}")
        record(found, settings.strict)
        found.extend(before)
        return None, found
    plan = planning.make(jaxpr, settings, _patterns(), _mode(whole_step=True))
    new = None
    if plan.changes():
        try:
            new = retrace(plan)
        except NotExchangeable as error:
            plan.refuse(str(error))
    found = plan.full_report(name)
    if not shown:
        donated = compat.jit_donated(inferred)
        exchanged, more = exchange(jaxpr if new is None else new, settings, EXCHANGES, name, donated)
        new = new if exchanged is None else exchanged
        found.extend(more)
    record(found, settings.strict)
    found.extend(before)
    return new, found


# ---------------------------------------------------------------- switching the hooks on


def activate(relying: Any = None) -> compat.HookStatus:
    """Insert the hooks, once, and test that they work in this JAX; one warning where they do not.

    They stay for as long as an object that was given as `relying` lives.
    """
    global _active
    with _lock:
        if relying is not None:
            _relying.add(relying)
        if _active is None:
            _active = selftest.insert_tested(on_differentiate, on_jit)
            if _active.reason:
                warnings.warn(_ladder_warning(_active), RuntimeWarning, stacklevel=3)
        return _active


def deactivate_unless_used(released: Any = None) -> None:
    """Take the hooks out of JAX, unless somebody other than `released` relies on them."""
    global _active
    with _lock:
        if released is not None:
            _relying.discard(released)
        if not _relying:
            compat.remove_hooks()
            _active = None


def _ladder_warning(status: compat.HookStatus) -> str:
    if status.differentiation:
        lost = "only gradients, and functions under jaxext.accelerate, run on its kernels"
    elif status.jit:
        lost = "only functions that are not differentiated run on its kernels"
    else:
        lost = "everything runs on plain JAX"
    return f"jaxext does not fit JAX {jax.__version__} ({status.reason}): {lost}. Upgrade jaxext."


def status() -> compat.HookStatus:
    """Which hooks work in this JAX; they are taken out again where nobody relies on them."""
    result = activate()
    deactivate_unless_used()
    return result
