"""Everything that touches JAX's private parts or differs between its versions; no other file does.

Supported: JAX 0.10.2 and later. Two places of JAX are hooked, only once somebody asks for it:

- the function in the closure of ``jax.vjp``: every reverse-mode entry point ends there, and a name bound early
  (``from jax import vjp``) still reaches it;
- ``_infer_params``, where a jitted function is traced.

`insert_hooks` probes both and reports what works, so that a JAX whose insides moved degrades instead of breaking.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import CellType, FunctionType
from typing import Any

import jax
from jax.extend import core as jex_core

try:
    from jax._src import (
        api_util,
        checkify,
        config,
        core,
        custom_derivatives,
        dispatch,
        distributed,
        pjit,
        source_info_util,
        traceback_util,
        xla_bridge,
    )
    from jax._src import linear_util as lu
    from jax._src.array import ArrayImpl
    from jax._src.interpreters import ad
    from jax._src.interpreters import partial_eval as pe
    from jax._src.lax import lax
    from jax._src.lib import xla_client as xc  # pyright: ignore[reportPrivateImportUsage]
    from jax._src.named_sharding import UnspecifiedValue
    from jax._src.random import prng
    from jax._src.state.types import AbstractRef
except ImportError as error:
    raise ImportError(
        f"jaxext does not know JAX {jax.__version__}: {error}. It needs JAX 0.10.2 or later; "
        "upgrade jaxext or install a JAX that it supports."
    ) from error

Literal = jex_core.Literal
_EMPTY_CELL = CellType()
_REUSE = xc.ArrayCopySemantics.REUSE_INPUT
Tracer = core.Tracer
has_started = xla_bridge.backends_are_initialized  # True once JAX has looked for devices
_INSTALLED = re.compile(r"[/\\](site|dist)-packages[/\\]|^<")
_JAX_FOLDER = os.path.dirname(os.path.abspath(jax.__file__)) + os.sep
OLDEST_JAX = (0, 10, 2)

# ---------------------------------------------------------------- jaxprs


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """The equations and the constants of a jaxpr, closed or open.

    JAX 0.11 made ClosedJaxpr and Jaxpr one class; before it, an open jaxpr has no constants.
    """
    if hasattr(jaxpr, "consts"):
        return jaxpr.jaxpr, jaxpr.consts
    return jaxpr, ()


def close_like(jaxpr: Any, closed: Any) -> Any:
    """`closed` in the form, open or closed, that `jaxpr` has."""
    return closed if hasattr(jaxpr, "consts") else closed.jaxpr


def with_equations(jaxpr: Any, equations: Sequence[Any]) -> Any:
    """`jaxpr`, open or closed, with other equations between the same arguments and results."""
    if isinstance(jaxpr, jex_core.Jaxpr):  # pyright: ignore[reportPrivateImportUsage]
        return jaxpr.replace(eqns=list(equations))
    return jaxpr.replace(jaxpr=jaxpr.jaxpr.replace(eqns=list(equations)))


def is_jaxpr(x: Any) -> bool:
    return isinstance(x, (jex_core.Jaxpr, jex_core.ClosedJaxpr))  # pyright: ignore[reportPrivateImportUsage]


def lower_with_devices(primitive: Any) -> None:
    """Asks JAX to tell the lowering of `primitive` which devices the program spans."""
    dispatch.prim_requires_devices_during_lowering.add(primitive)


def lowers_for_export(ctx: Any) -> bool:
    """True where the lowering with this context is for `jax.export`."""
    return ctx.module_context.lowering_parameters.for_export


def runs_op_by_op() -> bool:
    """True where JAX is asked to run the operations of the program one by one and to look at each."""
    return config.disable_jit.value or config.debug_nans.value or config.debug_infs.value


def forbidden_values() -> dict[str, Callable[[Any], Any]]:
    """What no result may hold, by name: NaN under `jax_debug_nans`, infinity under `jax_debug_infs`."""
    chosen = (("NaN", config.debug_nans, jax.numpy.isnan), ("infinity", config.debug_infs, jax.numpy.isinf))
    return {name: test for name, option, test in chosen if option.value}


def check_as(primitive: Any, reference: Callable[..., Callable[..., Sequence[Any]]]) -> None:
    """`jax.experimental.checkify` looks for NaN and the like inside `reference(**params)` instead of `primitive`."""

    # JAX 0.12 put a context before the error.
    first = 1 if hasattr(checkify, "CheckifyContext") else 0
    check_jaxpr: Any = checkify.checkify_jaxpr

    def rule(*given: Any, **params: Any) -> Any:
        context, (error, enabled, *args) = given[:first], given[first:]
        if enabled <= checkify.user_checks:
            return error, primitive.bind(*args, **params)
        closed = trace(reference(**params), [jax.typeof(x) for x in args])
        return check_jaxpr(*context, closed, enabled, error, *args)

    checkify.error_checks[primitive] = rule


def is_plain_call(eqn: Any) -> bool:
    """True for a call of a jitted function that says nothing but "call": no sharding, layout or compiler option."""
    params = eqn.params
    if eqn.primitive.name not in ("jit", "pjit"):
        return eqn.primitive.name in ("closed_call", "core_call")
    return (
        not params.get("compiler_options_kvs")
        and not any(params.get("donated_invars", ()))
        and all(isinstance(s, UnspecifiedValue) for s in (*params["in_shardings"], *params["out_shardings"]))
        and all(layout is None for layout in (*params["in_layouts"], *params["out_layouts"]))
    )


def called_jaxpr(eqn: Any) -> Any:
    """The function that a call equation calls."""
    return eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]


def differentiates_its_body(eqn: Any) -> bool:
    """True for a custom_jvp call of JAX's own, whose rule is the derivative of what it computes; a user's may be any.

    Rules given by `defjvps` are not counted: JAX wraps a user's and its own in the same function.
    """
    body, _ = open_jaxpr(eqn.params["call_jaxpr"])
    rule = getattr(eqn.params["jvp_jaxpr_fun"], "debug_info", None)
    if body.debug_info is None or rule is None or "custom_derivatives.py" in rule.func_src_info:
        return False
    return all(_JAX_FOLDER in info.func_src_info for info in (body.debug_info, rule))


def keeps_tracers(jaxpr: Any) -> bool:
    """True where a derivative rule in `jaxpr` holds values of its trace (array arguments in `nondiff_argnums`).

    Such a function cannot be differentiated from its jaxpr: the rule would meet tracers of a trace that has ended.
    """
    rules = (eqn.params.get("jvp_jaxpr_fun") for eqn in open_jaxpr(jaxpr)[0].eqns)
    return any(_holds_tracer(rule, 8) for rule in rules if rule is not None)


def _holds_tracer(x: Any, depth: int) -> bool:
    if isinstance(x, Tracer) or depth == 0:
        return isinstance(x, Tracer)
    match x:
        case lu.WrappedFun():
            parts = [x.f, *(argument for _, arguments in x.transforms for argument in arguments)]
        case functools.partial():
            parts = [x.func, *x.args, *x.keywords.values()]
        case tuple() | list():
            parts = list(x)
        case FunctionType():
            parts = [cell.cell_contents for cell in x.__closure__ or () if cell != _EMPTY_CELL]
        case _:
            parts = [x.val] if hasattr(x, "val") else []
    return any(_holds_tracer(part, depth - 1) for part in parts)


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """How many constants and how many carried values a scan has."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    # JAX 0.11 replaced the counts by a tree of (constants, carry, slices).
    constants, carry, _ = params["ft_in"].unpack()
    return len(constants), len(carry)


def recorded(tracer: Any) -> tuple[Any, int] | None:
    """The equation, and which of its results, that a value in a function being traced comes from, None for inputs.

    The equation has the attributes of a jaxpr's; `in_tracers` are its operands.
    """
    parent = tracer.parent if isinstance(tracer, pe.DynamicJaxprTracer) else None
    places = [] if parent is None else [i for i, var in enumerate(parent.outvars) if var is tracer.val]
    return (parent, places[0]) if places else None


def lowered(x: Any) -> Any:
    """The array, or the enclosing function's tracer, that a tracer stands for; else itself."""
    return core.full_lower(x)


def is_ref(x: Any) -> bool:
    """True for a mutable array (`jax.new_ref`)."""
    return isinstance(jax.typeof(x), AbstractRef)


def short_type(aval: Any) -> str:
    """An array type as in a jaxpr: ``f32[8,128]``."""
    return aval.str_short(short_dtypes=True) if hasattr(aval, "str_short") else str(aval)


def array_type(shape: Sequence[int], dtype: Any) -> Any:
    """The abstract value of an array."""
    return core.ShapedArray(tuple(shape), dtype)


def same_type(a: Any, b: Any) -> bool:
    """True where two abstract values agree in everything but weak typing."""
    return core.typecompat(a, b) and getattr(a, "weak_type", None) == getattr(b, "weak_type", None)


def vma(x: Any) -> frozenset[str]:
    """The mesh axes of the enclosing shard_map over which `x` varies."""
    return getattr(jax.typeof(x), "vma", frozenset())


def explicit_sharding(aval: Any) -> tuple[Any, ...]:
    """The mesh axes in an array's type, by dimension (explicit sharding); () where there are none."""
    spec = tuple(getattr(getattr(aval, "sharding", None), "spec", ()))
    return spec if any(axis is not None for axis in spec) else ()


def is_partitionable_threefry(keys: Any) -> bool:
    """True for typed keys of JAX's default generator in its default form, where no check of key reuse looks on."""
    name = getattr(getattr(keys.dtype, "_impl", None), "name", "")
    return name == "threefry2x32" and config.threefry_partitionable.value and not config.debug_key_reuse.value


def threefry_bits(words: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    """Stock's bits [..., *shape] of width `bit_width` for the keys of which `words` are: uint32[..., 2]."""
    keys = jax.random.wrap_key_data(words, impl="threefry2x32")
    with config.threefry_partitionable(True):
        return prng.random_bits(keys, bit_width, shape)


def key_words(eqn: Any) -> Any:
    """The equation that takes the words, uint32[..., 2], out of the keys that `eqn` has as its operand."""
    aval, _ = prng.random_unwrap_p.abstract_eval(eqn.invars[0].aval)
    return eqn.replace(primitive=prng.random_unwrap_p, params={}, outvars=[core.Var(aval)])


def with_weak_type(x: Any, aval: Any) -> Any:
    """`x` as weakly typed as `aval`: the types of a loop's carry must agree in this too."""
    if getattr(jax.typeof(x), "weak_type", False) == getattr(aval, "weak_type", False):
        return x
    return lax._convert_element_type(x, aval.dtype, weak_type=aval.weak_type)


def as_array(x: Any, aval: Any) -> Any:
    """`x`, which may be a number of a jaxpr, as an array or tracer of type `aval`."""
    if isinstance(x, (jax.Array, Tracer)):
        return x
    return with_weak_type(jax.numpy.asarray(x, aval.dtype), aval)


def saves(decision: Any) -> bool:
    """True where a checkpoint policy's answer is to keep the value, in memory or offloaded."""
    return decision is True or isinstance(decision, (pe.SaveableType, pe.Offloadable))


def bind(eqn: Any, inputs: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    """Run the primitive of `eqn` on `inputs`."""
    primitive = eqn.primitive
    result = primitive.bind(*inputs, **primitive.get_bind_params(params))
    return list(result) if primitive.multiple_results else [result]


@contextmanager
def source_of(eqn: Any, scope: str | None = None) -> Iterator[None]:
    """Operations bound inside belong to the user's line, name scopes and compute context of `eqn`."""
    stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    if scope is not None:
        stack = stack.extend(scope)
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=stack), eqn.ctx.manager:
        yield


def name_scopes(eqn: Any) -> str:
    """The name scopes of an equation, as in ``encoder/block``, relative to its jaxpr."""
    return str(eqn.source_info.name_stack)


def is_differentiated(eqn: Any) -> bool:
    """True for an equation that JAX's differentiation made or went over."""
    return any(
        isinstance(part, source_info_util.Transform) and part.name in ("jvp", "transpose")
        for part in eqn.source_info.name_stack.stack
    )


def user_line(eqn: Any) -> str:
    """Where the user wrote an equation: ``train.py:12 (loss)``, "" where JAX kept no traceback.

    A line of an installed library is given only where no other is on the stack.
    """
    frames = list(source_info_util.user_frames(eqn.source_info.traceback))
    if not frames:
        return ""
    frame = next((frame for frame in frames if not _INSTALLED.search(frame.file_name)), frames[0])
    path = frame.file_name
    here = os.getcwd() + os.sep
    return f"{path.removeprefix(here)}:{frame.start_line} ({frame.function_name.rsplit('.', 1)[-1]})"


def user_name(fun: Any) -> str:
    """The user's name of a function, under partial applications and the wrappers of JAX and flax."""
    for _ in range(8):
        inner = next(filter(callable, (getattr(fun, name, None) for name in ("__wrapped__", "func", "f", "fun"))), None)
        if inner is None and (getattr(fun, "__module__", None) or "").startswith("jax._src"):
            cells = zip(fun.__code__.co_freevars, fun.__closure__ or ())
            inner = next((cell.cell_contents for name, cell in cells if name in ("f", "fun")), None)
        if inner is None:
            break
        fun = inner
    return getattr(fun, "__name__", type(fun).__name__)


def trace(
    fun: Callable[..., Sequence[Any]],
    avals: Sequence[Any],
    like: Any = None,
    name: str = "jaxext",
    before_differentiation: bool = False,
) -> Any:
    """The jaxpr of a function of flat arguments, types taken exactly (weak types, varying axes, mutable arrays).

    `like`: a jaxpr whose argument names and source the result carries, for JAX's error messages.
    `before_differentiation`: forward rules written by hand run now, in place of what they differentiate.
    """
    if like is None:
        debug_info = api_util.debug_info(name, fun, tuple(avals), {})
    else:
        debug_info = open_jaxpr(like)[0].debug_info

    def traced(*args: Any) -> Any:
        if before_differentiation:
            core.trace_ctx.trace.__class__ = _BeforeDifferentiation
        return fun(*args)

    jaxpr, _, consts = pe.trace_to_jaxpr_dynamic(lu.wrap_init(traced, debug_info=debug_info), list(avals))
    return jex_core.ClosedJaxpr(jaxpr, consts)  # pyright: ignore[reportPrivateImportUsage]


class _BeforeDifferentiation(pe.DynamicJaxprTrace):
    """As JAX where it differentiates, it runs the rule of a `custom_vjp`, and what it does in Python, at its call."""

    __slots__ = ()

    def process_custom_vjp_call(self, prim: Any, fun: Any, fwd: Any, bwd: Any, tracers: Any, /, **params: Any) -> Any:
        # Which tangents are zero, and what becomes of a mutable array, is not known before differentiation.
        plain = not params["symbolic_zeros"] and not any(isinstance(core.typeof(x), AbstractRef) for x in tracers)
        if plain and (traced := _forward_rule(fwd, tracers)):
            rule, captured = traced
            out_tree, res_tree, forwarded = params["out_trees"]()
            residuals = forwarded.count(None)
            shifted = [place if place is None else place + len(captured) for place in forwarded]
            params["out_trees"] = functools.partial(tuple, (out_tree, res_tree, shifted))

            def with_residuals(*pairs: Any) -> list[Any]:
                if any(pairs[1 : 2 * len(captured) : 2]):
                    raise ad.CustomVJPException()
                return core.eval_jaxpr(rule, (), *pairs[::2])

            fwd = lu.wrap_init(with_residuals, debug_info=rule.debug_info)
            fun = lu.wrap_init(lambda *xs: core.eval_jaxpr(rule, (), *xs)[residuals:], debug_info=rule.debug_info)
            bwd = custom_derivatives._handle_consts_in_bwd(bwd, [core.typeof(x) for x in captured])
            tracers = (*captured, *tracers)
        return super().process_custom_vjp_call(prim, fun, fwd, bwd, tracers, **params)


def _forward_rule(fwd: Any, operands: Sequence[Any]) -> tuple[Any, Sequence[Any]] | None:
    """The traced rule and what it captures, its first operands; None where it raises, for JAX may never call it."""
    info = fwd.debug_info.with_unknown_names()
    rule = lu.wrap_init(lambda *xs: fwd.call_wrapped(*(y for x in xs for y in (x, True))), debug_info=info)
    try:
        jaxpr, _, captured = pe.trace_to_jaxpr_dynamic(rule, [core.typeof(x) for x in operands])
    except jax.errors.JAXTypeError:  # it looks at values: so does the function that is traced
        raise
    except Exception:
        return None
    return pe.convert_constvars_jaxpr(jaxpr), captured


def in_types(jaxpr: Any) -> list[Any]:
    return [var.aval for var in open_jaxpr(jaxpr)[0].invars]


def out_types(jaxpr: Any) -> list[Any]:
    return [var.aval for var in open_jaxpr(jaxpr)[0].outvars]


def is_concrete(x: Any) -> bool:
    """True where the value of an array, traced or not, can be looked at."""
    return core.is_concrete(x)


def copied(arrays: list[Any], shardings: list[Any]) -> list[Any]:
    """Arrays with the same parts on other devices, as many: `jax.device_put` for those who know that it is so."""
    if all(type(array) is ArrayImpl and not array.is_deleted() for array in arrays):
        devices = [sharding._internal_device_list for sharding in shardings]
        return xc.batched_copy_array_to_devices_with_sharding(arrays, devices, shardings, [_REUSE] * len(arrays))
    return jax.device_put(arrays, shardings)  # typed random keys; and the error for what was donated


def jitted_function(jitted: Any) -> Callable[..., Any] | None:
    """The function inside what `jax.jit` returned, None where this JAX does not say, or for another kind of jit."""
    known = hasattr(jitted, "_jit_info") and hasattr(pjit, "_cpp_pjit")
    return getattr(jitted, "_fun", None) if known else None


def jit_options(jitted: Any) -> dict[str, Any]:
    """The static and donated arguments of what `jax.jit` returned, as its options, and the leaves of its shardings."""
    info = getattr(jitted, "_jit_info", None)
    names = "static_argnums static_argnames donate_argnums donate_argnames in_shardings_leaves out_shardings_leaves"
    return {name: value for name in names.split() if (value := getattr(info, name, ()))}


def jit_like(jitted: Any, fun: Callable[..., Any]) -> Any:
    """`fun` under all options of `jitted`, of which `jitted_function` has to be known."""
    return pjit._cpp_pjit(fun, jitted._jit_info)


def trace_state_clean() -> bool:
    """True outside of every JAX transformation."""
    return core.trace_state_clean()


def distributed_store() -> tuple[Any, str]:
    """The key-value store of JAX's distributed runtime and its coordinator's address.

    Raises:
      RuntimeError: `jax.distributed.initialize` was not called.
    """
    state = distributed.global_state
    if state.client is None or state.coordinator_address is None:
        raise RuntimeError("JAX's distributed runtime is not running. Call jax.distributed.initialize() first.")
    return state.client, state.coordinator_address


# ---------------------------------------------------------------- hooks

DifferentiationHook = Callable[[Callable[..., Any]], Callable[..., Any]]
JitHook = Callable[[Callable[..., Any], Callable[[], Any]], Any]


@dataclasses.dataclass(frozen=True)
class HookStatus:
    """Which hooks work in this JAX; `reason` says why one does not."""

    differentiation: bool
    jit: bool
    reason: str = ""


_lock = threading.RLock()
_removers: list[Callable[[], None]] = []
_status: HookStatus | None = None


def _closure_cell(wrapper: Any, name: str, depth: int = 4) -> Any:
    """The cell that holds the undecorated function `name` somewhere under an API wrapper."""
    for cell in getattr(wrapper, "__closure__", None) or ():
        try:
            content = cell.cell_contents
        except ValueError:  # an empty cell
            continue
        if not isinstance(content, FunctionType):
            continue
        if content.__name__ == name and not hasattr(content, "__wrapped__"):
            return cell
        found = _closure_cell(content, name, depth - 1) if depth else None
        if found is not None:
            return found
    return None


def _hook_differentiation(on_differentiate: DifferentiationHook) -> str:
    cell = _closure_cell(jax.vjp, "vjp")
    if cell is None:
        return "jax.vjp has no closure cell to hook"
    original = cell.cell_contents

    @functools.wraps(original)
    def vjp(fun: Callable[..., Any], *primals: Any, **options: Any) -> Any:
        return original(on_differentiate(fun) if callable(fun) else fun, *primals, **options)

    def remove() -> None:
        cell.cell_contents = original

    cell.cell_contents = vjp
    _removers.append(remove)
    return ""


def _hook_jit(on_jit: JitHook) -> str:
    original = getattr(pjit, "_infer_params", None)
    if not isinstance(original, FunctionType):
        return "jax has no _infer_params to hook"

    @functools.wraps(original)
    def _infer_params(fun: Callable[..., Any], info: Any, args: Any, kwargs: Any) -> Any:
        return on_jit(fun, lambda: original(fun, info, args, kwargs))

    def remove() -> None:
        pjit._infer_params = original

    pjit._infer_params = _infer_params
    _removers.append(remove)
    return ""


def insert_hooks(on_differentiate: DifferentiationHook | None, on_jit: JitHook | None) -> HookStatus:
    """Hook `jax.vjp` and the tracing of jitted functions; a second call changes nothing.

    `on_differentiate(fun)` returns the function to differentiate in place of `fun`. `on_jit(fun, infer)` returns what
    `infer()` does, or the same with another jaxpr (`with_jaxpr`). None leaves that place alone.
    """
    global _status
    with _lock:
        if _status is None:
            differentiation = "not asked for" if on_differentiate is None else _hook_differentiation(on_differentiate)
            jit = "not asked for" if on_jit is None else _hook_jit(on_jit)
            _hide_own_frames()
            reason = "; ".join(dict.fromkeys(filter(None, (differentiation, jit))))
            _status = HookStatus(not differentiation, not jit, reason)
        return _status


def remove_hooks() -> None:
    """Take the hooks out again; without hooks nothing changes."""
    global _status
    with _lock:
        while _removers:
            _removers.pop()()
        _status = None


@functools.cache
def _hide_own_frames() -> None:
    """A user's traceback and an equation's source line skip jaxext's frames as they skip JAX's."""
    folder = os.path.dirname(os.path.abspath(__file__)) + os.sep
    source_info_util.register_exclusion(folder)
    traceback_util.register_exclusion(folder)


def jit_jaxpr(inferred: Any) -> Any:
    """The jaxpr of what `infer()` of the jit hook returned."""
    return inferred[0].params["jaxpr"]


def jit_donated(inferred: Any) -> tuple[bool, ...]:
    """Which operands of that jaxpr are donated."""
    return inferred[0].params["donated_invars"]


def replaceable_jaxpr(inferred: Any) -> tuple[Any, str]:
    """The jaxpr of what `infer()` returned, low-level, or None and the reason why it cannot be replaced."""
    if inferred[0].consts:
        return None, "it closes over arrays of a function that is being traced"
    try:
        low = low_level(jit_jaxpr(inferred))
    except Exception as error:  # from a user's primitive; JAX raises it again if it comes to compile the function
        return None, f"one of its high-level operations cannot be lowered ({type(error).__name__}: {error})"
    return low, "" if low is not None else "an argument or a result of it is of a high-level type"


def low_level(jaxpr: Any) -> Any:
    """`jaxpr` without high-level operations, as JAX compiles it; None where an argument or a result is high-level.

    From JAX 0.12 on `jnp.searchsorted` and `jnp.nonzero` are such operations.
    """
    if not open_jaxpr(jaxpr)[0].is_high:
        return jaxpr
    return None if any(x.is_high for x in (*in_types(jaxpr), *out_types(jaxpr))) else pe.lower_jaxpr2(jaxpr)


def with_jaxpr(inferred: Any, jaxpr: Any) -> Any:
    """`inferred` with another jaxpr of the same type."""
    params, arguments = inferred
    return params._replace(params=dict(params.params, jaxpr=jaxpr)), arguments
