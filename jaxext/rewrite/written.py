"""An operation written another way where that is faster: on one CPU device, or on GPUs. Elsewhere it stays what it was.

What XLA computes slowly on a CPU it may compute well on another platform, and a dimension that is spread over devices
does not always survive being written otherwise. Both are known only when the program is lowered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import DropVar, Primitive, Var, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from .. import _jax_compat as compat
from ..kernels import _sharding

CALLS = ("jit", "pjit")
PARAMETER = "written"  # holds the function that runs on one CPU device; "original" the one that runs elsewhere

_written = Primitive("jaxext_written")
_written.multiple_results = True


def equation(
    equations: Sequence[Any],
    operands: Sequence[Any],
    run: Callable[..., Any],
    name: str,
    results: Sequence[Any] | None = None,
    platform: str = "cpu",
) -> Any:
    """An equation in the place of `equations`, which read `operands` and of which only `results` are read.

    results: None for those of the last equation. On `platform`, "cpu" (one device) or "cuda", it calls jitted
    `run(*operands)`, known as `name`.
    """

    def named(*arrays: Any) -> Any:
        return run(*arrays)

    named.__name__ = named.__qualname__ = name
    types, end = [var.aval for var in operands], equations[-1]
    made = list(end.outvars if results is None else results)
    params = _traced(jax.jit(named), lambda *xs: evaluate(equations, operands, xs, made), types)
    params["platform"] = platform
    return end.replace(primitive=_written, invars=list(operands), outvars=made, params=params)


def body(call: Any) -> Sequence[Any] | None:
    """The equations of a call that can stand in its place: they make each of its results, and no two are one."""
    inner, consts = compat.open_jaxpr(call.params["jaxpr"])
    made = [var for each in inner.eqns for var in each.outvars]
    results = {var for var in inner.outvars if not is_literal(var)}
    return None if consts or len(results) < len(inner.outvars) or not results.issubset(made) else inner.eqns


def inlined(eqn: Any, opens: Callable[[Any], bool]) -> list[Any]:
    """The equations of a call, of calls in it too, where `opens(call)`; else the equation itself."""
    if eqn.primitive.name not in CALLS or not opens(eqn):
        return [eqn]
    inner, _ = compat.open_jaxpr(eqn.params["jaxpr"])
    results = {own: var for own, var in zip(inner.outvars, eqn.outvars) if not isinstance(var, DropVar)}
    named = dict(zip(inner.invars, eqn.invars)) | results
    equations = []
    for each in inner.eqns:
        for var in each.outvars:
            named.setdefault(var, Var(var.aval))
        read = [var if is_literal(var) else named[var] for var in each.invars]
        made = [named[var] for var in each.outvars]
        equations += inlined(each.replace(invars=read, outvars=made, source_info=eqn.source_info), opens)
    return equations


def is_literal(var: Any) -> bool:
    """Whether an operand of an equation is a number that the equation holds."""
    return hasattr(var, "val")


def _bind(eqn: Any, inputs: list[Any]) -> list[Any]:
    return compat.bind(eqn, inputs, eqn.params)


def evaluate(
    equations: Sequence[Any],
    operands: Sequence[Any],
    arrays: Sequence[Any],
    results: Sequence[Any],
    bind: Callable[[Any, list[Any]], list[Any]] = _bind,
) -> list[Any]:
    """The variables `results` of equations whose `operands` are `arrays`, each equation run by `bind`."""
    known = dict(zip(operands, arrays, strict=True))
    for eqn in equations:
        with compat.source_of(eqn):
            outputs = bind(eqn, [var.val if is_literal(var) else known[var] for var in eqn.invars])
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [known[var] for var in results]


def call(run: Callable[..., Any], original: Callable[..., Any], *operands: Any, platform: str = "cpu") -> list[Any]:
    """The results of `run(*operands)` on `platform`, elsewhere and where differentiated those of `original`."""
    params = _traced(jax.jit(run), original, [jax.typeof(x) for x in operands])
    return _written.bind(*operands, **params, platform=platform)


def _traced(run: Callable[..., Any], original: Callable[..., Any], types: Sequence[Any]) -> dict[str, Any]:
    # Under disable_jit there would be no call.
    with jax.disable_jit(False):
        written, original = (compat.trace(lambda *xs, f=f: jax.tree.leaves(f(*xs)), types) for f in (run, original))
    return {PARAMETER: written, "original": original}


@_written.def_impl
def _run(*operands: Any, **params: Any) -> Any:
    with jax.disable_jit(False):
        return jax.jit(lambda *xs: _written.bind(*xs, **params))(*operands)


@_written.def_abstract_eval
def _types(*_: Any, original: Any, **__: Any) -> Any:
    return compat.out_types(original)


def _lower(ctx: mlir.LoweringRuleContext, *operands: Any, original: Any, **_: Any) -> Any:
    return mlir.lower_fun(jaxpr_as_fun(original), multiple_results=True)(ctx, *operands)


def _lower_for_cpu(ctx: mlir.LoweringRuleContext, *operands: Any, written: Any, original: Any, platform: str) -> Any:
    chosen = written if platform == "cpu" and not _sharding.spans_devices(ctx) else original
    return mlir.lower_fun(jaxpr_as_fun(chosen), multiple_results=True)(ctx, *operands)


def _lower_for_cuda(ctx: mlir.LoweringRuleContext, *operands: Any, written: Any, original: Any, platform: str) -> Any:
    chosen = written if platform == "cuda" else original
    return mlir.lower_fun(jaxpr_as_fun(chosen), multiple_results=True)(ctx, *operands)


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, original: Any, **_: Any) -> Any:
    return jax.jvp(jaxpr_as_fun(original), tuple(primals), tuple(ad.instantiate_zeros(t) for t in tangents))


def _batch(operands: Sequence[Any], dims: Sequence[Any], *, written: Any, original: Any, platform: str) -> Any:
    run, otherwise = (jax.vmap(jaxpr_as_fun(jaxpr), in_axes=tuple(dims)) for jaxpr in (written, original))
    results = call(run, otherwise, *operands, platform=platform)
    return results, [0] * len(results)


ad.primitive_jvps[_written] = _jvp
batching.primitive_batchers[_written] = _batch
compat.check_as(_written, lambda *, original, **_: jaxpr_as_fun(original))
mlir.register_lowering(_written, _lower)
mlir.register_lowering(_written, _lower_for_cpu, platform="cpu")
mlir.register_lowering(_written, _lower_for_cuda, platform="cuda")
compat.lower_with_devices(_written)
