"""An op: one JAX primitive with a reference, a native lowering, and every rule a transformation asks for.

The reference (plain JAX) is the specification. From it come abstract evaluation, the lowering wherever no kernel
applies, forward-mode derivatives and the batching of what the kernel cannot batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxext import _jax_compat
from jaxext.kernels import _export, _native_module, _platform, _sharding
from jaxext.kernels._platform import Lowering

__all__ = ["ArgSpec", "Op", "Role", "derive", "native_status", "relaxed"]

native_status = _native_module.status

Role = Literal["full", "broadcast", "shared"]
"""How an operand takes part in batching: "full": its leading dimensions are the batch; "broadcast": it has the same
leading dimensions, each full or 1; "shared": it has none (a scale, a bias)."""

Reference = Callable[..., Sequence[jax.Array]]


@dataclasses.dataclass(frozen=True)
class ArgSpec:
    """One set of arguments that conformance tests and benchmarks run.

    Attributes:
      name: shown in test ids and benchmark rows.
      make: (numpy generator, dtype) -> operands, as NumPy or JAX arrays.
      params: static parameters of the op.
      dtypes: the floating dtypes to run.
    """

    name: str
    make: Callable[[np.random.Generator, Any], Sequence[Any]]
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


@contextmanager
def relaxed() -> Iterator[None]:
    """Promotion by JAX's usual rules: where a program asks for strict ones, it asks them of its own lines."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class Op:
    """A JAX primitive `jaxext_<name>`.

    Args:
      name: the op's name.
      reference: (*operands, **params) -> outputs, in plain JAX. None for a backward op, whose reference `derive` makes.
      target: the FFI target without its `jaxext_` prefix.
      core_rank: dimensions of operand 0 that are the op's own, or (**params) -> them; those before are the batch. None:
        all are, whatever the rank; a program that spans devices, and a mapped call, then run the reference.
      attributes: (**params) -> FFI attributes (NumPy scalars, strings, bools, arrays); none where not given.
      roles: (n_operands, **params) -> one Role per operand; where not given "full" for all, "shared" without a batch.
      refuses: (*avals, **params) -> None where the CPU kernel takes the call, else the reason (the reference runs).
      check: (*avals, **params) -> None; raises TypeError or ValueError that names the argument, what was expected and
        the remedy. Run when the op is traced.
      specs: what conformance tests and benchmarks run.
      needs_batch: in a program that spans devices the kernel runs only where there is a batch to keep apart; XLA
        partitions the reference, which a call whose operands are whole on every device would not be.
      aliases: operand index -> index of the output that is written over it (XLA copies an operand still needed).
    """

    def __init__(
        self,
        name: str,
        reference: Reference | None,
        *,
        target: str,
        core_rank: int | Callable[..., int] | None,
        attributes: Callable[..., Mapping[str, Any]] = lambda **_: {},
        roles: Callable[..., Sequence[Role]] | None = None,
        refuses: Callable[..., str | None],
        check: Callable[..., None] | None = None,
        specs: Sequence[ArgSpec] = (),
        needs_batch: bool = False,
        aliases: Mapping[int, int] | None = None,
    ) -> None:
        self.name, self.target, self.specs = name, f"jaxext_{target}", tuple(specs)
        own: Role = "full" if core_rank is not None else "shared"
        self.roles = roles or (lambda n_operands, **_: (own,) * n_operands)
        self.check, self.core_rank = check, core_rank
        self._needs_batch = needs_batch or core_rank is None
        self._reference = reference
        self.backward: Op | None = None
        self.outputs: tuple[int, ...] = (0,)
        self.out_avals: Callable[..., Sequence[Any]] | None = None
        self.output_roles: Callable[..., Sequence[Role]] = lambda n_outputs, **_: ("full",) * n_outputs
        self.primitive = _primitive(f"jaxext_{name}", self._abstract, self._lower)
        native = Lowering(self._native_refusal(refuses), None, self.target, attributes, dict(aliases or {}))
        self.lowerings = {"cpu": native}
        mlir.register_lowering(self.primitive, self._lower_native, platform="cpu")
        _jax_compat.lower_with_devices(self.primitive)
        ad.primitive_jvps[self.primitive] = functools.partial(_reference_jvp, self)
        batching.primitive_batchers[self.primitive] = functools.partial(_batch, self)
        _jax_compat.check_as(self.primitive, lambda **params: lambda *xs: self.reference(*xs, **params))

    def __repr__(self) -> str:
        return f"Op({self.name})"

    def __call__(self, *operands: Any, **params: Any) -> tuple[jax.Array, ...]:
        return tuple(self.primitive.bind(*operands, **params))

    def reference(self, *operands: Any, **params: Any) -> Sequence[jax.Array]:
        """The specification, in plain JAX."""
        assert self._reference is not None, f"{self.name} has no reference yet"
        with relaxed():
            return self._reference(*operands, **params)

    def on(self, platform: str, lowering: Lowering) -> None:
        """Says what `platform` runs in the reference's place."""
        self.lowerings[platform] = lowering
        mlir.register_lowering(self.primitive, functools.partial(self._lower_as, lowering), platform=platform)

    def refusal(self, *avals: Any, platform: str | None = None, **params: Any) -> str | None:
        """None where `platform` has a kernel that takes this call, else the reason why the reference runs.

        platform: None is the one that a program traced now will run on.
        """
        name = platform or _platform.foreseen()
        found = self.lowerings.get(name)
        return f"{self.name} has no kernel on {name}" if found is None else found.refuses(*avals, **params)

    def how(self) -> str:
        """What runs on the platform that a program traced now will run on; "" where the op's name says it."""
        found = self.lowerings.get(_platform.foreseen())
        return "" if found is None else found.how

    def _native_refusal(self, refuses: Callable[..., str | None]) -> Callable[..., str | None]:
        def refusal(*avals: Any, **params: Any) -> str | None:
            return native_status() or _native_module.lacks(self.target) or refuses(*avals, **params)

        return refusal

    def leading(self, aval: Any, **params: Any) -> int:
        """The number of batch dimensions, read off the first operand."""
        own = self.core_rank(**params) if callable(self.core_rank) else self.core_rank
        return 0 if own is None else len(aval.shape) - own

    def _abstract(self, *avals: Any, **params: Any) -> Sequence[Any]:
        if self.check is not None:
            self.check(*avals, **params)
        if self.out_avals is not None:
            return self.out_avals(*avals, **params)
        return _traced_avals(self, avals, tuple(sorted(params.items())))

    def _lower(self, ctx: mlir.LoweringRuleContext, *args: Any, **params: Any) -> Any:
        return mlir.lower_fun(lambda *xs: tuple(self.reference(*xs, **params)), multiple_results=True)(ctx, *args)

    def _lower_native(self, ctx: mlir.LoweringRuleContext, *args: Any, **params: Any) -> Any:
        return self._lower_as(self.lowerings["cpu"], ctx, *args, **params)

    def _lower_as(self, lowering: Lowering, ctx: mlir.LoweringRuleContext, *args: Any, **params: Any) -> Any:
        if lowering.refuses(*ctx.avals_in, **params) is not None or _export.leaves_kernels_out(ctx):
            return self._lower(ctx, *args, **params)
        if _sharding.spans_devices(ctx):
            alone = self._needs_batch and self.leading(ctx.avals_in[0], **params) == 0
            if alone or _jax_compat.lowers_for_export(ctx):  # custom partitioning calls back into this process
                return self._lower(ctx, *args, **params)
            return mlir.lower_fun(self._partitioned(ctx, params), multiple_results=True)(ctx, *args)
        if lowering.expression is not None:
            run = functools.partial(lowering.expression, **params)
            return mlir.lower_fun(lambda *xs: tuple(run(*xs)), multiple_results=True)(ctx, *args)
        call = jax.ffi.ffi_lowering(lowering.target, operand_output_aliases=dict(lowering.aliases))
        return call(ctx, *args, **lowering.attributes(**params))

    def _partitioned(self, ctx: mlir.LoweringRuleContext, params: Mapping[str, Any]) -> Callable[..., Any]:
        avals: tuple[Any, ...] = (*ctx.avals_in, *ctx.avals_out)
        return _sharding.partitioned(
            _bound(self, tuple(sorted(params.items()))),
            self.leading(ctx.avals_in[0], **params),
            tuple(self.roles(len(ctx.avals_in), **params)),
            tuple(self.output_roles(len(ctx.avals_out), **params)),
            tuple(aval.shape for aval in avals),
        )


@functools.lru_cache(maxsize=1024)
def _bound(op: Op, params: tuple[tuple[str, Any], ...]) -> Callable[..., tuple[jax.Array, ...]]:
    return lambda *xs: op(*xs, **dict(params))


def _primitive(name: str, abstract: Callable[..., Any], lower: Callable[..., Any]) -> Primitive:
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(abstract)

    @functools.lru_cache(maxsize=256)
    def compiled(params: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
        return jax.jit(lambda *xs: primitive.bind(*xs, **dict(params)))

    def run(*xs: Any, **params: Any) -> Any:
        # Under jax.disable_jit the jitted call would end here again.
        with jax.disable_jit(False):
            return compiled(tuple(sorted(params.items())))(*xs)

    primitive.def_impl(run)
    mlir.register_lowering(primitive, lower)
    return primitive


@functools.lru_cache(maxsize=4096)
def _traced_avals(op: Op, avals: tuple[Any, ...], params: tuple[tuple[str, Any], ...]) -> Sequence[Any]:
    # Not eval_shape, which is jitted: where jaxext is on, the reference would be replaced by the op itself.
    traced = _jax_compat.trace(
        lambda *xs: tuple(op.reference(*xs, **dict(params))), [jax.typeof(_struct(a)) for a in avals]
    )
    outs = _jax_compat.out_types(traced)
    roles = op.output_roles(len(outs), **dict(params))
    batch = op.leading(avals[0], **dict(params))
    return tuple(_like(avals[0], batch, role, out.shape, out.dtype) for out, role in zip(outs, roles))


def _struct(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _like(aval: Any, batch: int, role: Role, shape: tuple[int, ...], dtype: Any) -> Any:
    """An aval of another shape that varies over the same mesh axes as the op's first operand."""
    leading = 0 if role == "shared" else min(batch, len(shape))
    return aval.update(shape=shape, dtype=dtype, weak_type=False, sharding=_sharding.resized(aval, leading, len(shape)))


def _zeros_like(x: Any) -> Any:
    return ad.instantiate_zeros(x) if isinstance(x, ad.Zero) else x


def _reference_jvp(op: Op, primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> Any:
    tangents = [_zeros_like(t) for t in tangents]
    return jax.jvp(lambda *xs: list(op.reference(*xs, **params)), tuple(primals), tuple(tangents))


def _batch(op: Op, operands: Sequence[Any], dims: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    """Adds the mapped axis as one more leading dimension; maps the reference where an operand cannot take it."""
    roles = op.roles(len(operands), **params)
    mapped = [d is not None for d in dims]
    grows = params.get("wrt", ())
    sums_over_batch = any(roles[i] == "shared" for i in grows)
    if sums_over_batch or any(m and r == "shared" for m, r in zip(mapped, roles)):
        fn = jax.vmap(lambda *xs: list(op.reference(*xs, **params)), in_axes=tuple(dims))
        outs = fn(*operands)
        return outs, [0] * len(outs)
    size = next(x.shape[d] for x, d, m in zip(operands, dims, mapped) if m)
    moved = []
    for i, (x, d, m, role) in enumerate(zip(operands, dims, mapped, roles)):
        if m:
            moved.append(jax.numpy.moveaxis(x, d, 0))
        elif role == "shared":
            moved.append(x)
        else:
            extent = 1 if role == "broadcast" and i not in grows else size
            moved.append(jax.numpy.broadcast_to(x[None], (extent, *x.shape)))
    outs = op(*moved, **params)
    return outs, [0] * len(outs)


def derive(forward: Op, backward: Op, *, saved: Sequence[int], outputs: Sequence[int] = (0,)) -> Primitive:
    """Makes `forward` differentiable with `backward` as its native cotangent rule.

    Differentiating gives a linear primitive: evaluated (jvp, linearize, hessian) it is the reference's own derivative;
    transposed (grad, vjp) it calls

      backward(*operands, *(forward outputs in `saved`), *(cotangents of `outputs`), wrt=(operand indices), **params)

    which returns one gradient for each index in `wrt`, of that operand's shape and dtype. The backward's reference is
    the transpose of the forward's, so derivatives of any order follow.

    Args:
      forward: an op with a reference.
      backward: an op made with `reference=None`.
      saved: indices of forward outputs that the backward kernel reads.
      outputs: indices of forward outputs that are differentiable; the others (residuals such as a log-sum-exp) must
        not reach the user.

    Returns:
      The linear primitive, for an op whose own rule feeds it: (*operands, *saved, *tangents, which=, **params).
    """
    forward.backward, forward.outputs = backward, tuple(outputs)
    n_saved = len(saved)
    linear = _linear_primitive(forward, saved, outputs)

    def jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
        outs = forward(*primals, **params)
        which = tuple(i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero))
        moving = [tangents[i] for i in which]
        dots = linear.bind(*primals, *(outs[i] for i in saved), *moving, which=which, **params)
        full: list[Any] = [ad.Zero(jax.typeof(out).to_tangent_aval()) for out in outs]
        for i, dot in zip(outputs, dots):
            full[i] = dot
        return outs, full

    ad.primitive_jvps[forward.primitive] = jvp
    _define_backward(forward, backward, n_saved, tuple(outputs))
    return linear


def _define_backward(forward: Op, backward: Op, n_saved: int, outputs: tuple[int, ...]) -> None:
    """The backward's reference, avals and roles, all from the forward's."""
    n_cotangents = len(outputs)

    def backward_reference(*xs: Any, wrt: tuple[int, ...], **params: Any) -> Sequence[jax.Array]:
        n = len(xs) - n_saved - n_cotangents
        operands, cotangents = list(xs[:n]), xs[n + n_saved :]

        def run(*moving: Any) -> tuple[Any, ...]:
            for i, x in zip(wrt, moving):
                operands[i] = x
            outs = forward.reference(*operands, **params)
            return tuple(outs[i] for i in outputs)

        return jax.vjp(run, *(operands[i] for i in wrt))[1](tuple(cotangents))

    def backward_avals(*avals: Any, wrt: tuple[int, ...], **params: Any) -> Sequence[Any]:
        # A gradient has its operand's type, explicit sharding included.
        return tuple(avals[i].update(weak_type=False) for i in wrt)

    def output_roles(n_outputs: int, *, wrt: tuple[int, ...], **params: Any) -> Sequence[Role]:
        roles = forward.roles(max(wrt, default=0) + 1, **params)
        return tuple(roles[i] for i in wrt)

    def backward_roles(n_operands: int, *, wrt: tuple[int, ...] = (), **params: Any) -> Sequence[Role]:
        rest: tuple[Role, ...] = ("full",) * (n_saved + n_cotangents)
        return (*forward.roles(n_operands - len(rest), **params), *rest)

    backward._reference = backward_reference
    backward.out_avals = backward_avals
    backward.output_roles = output_roles
    backward.roles = backward_roles


def _linear_primitive(forward: Op, saved: Sequence[int], outputs: Sequence[int]) -> Primitive:
    n_saved = len(saved)

    def split(xs: Sequence[Any], which: tuple[int, ...]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
        n = len(xs) - n_saved - len(which)
        return xs[:n], xs[n : n + n_saved], xs[n + n_saved :]

    def reference(*xs: Any, which: tuple[int, ...], **params: Any) -> list[Any]:
        operands, _, moving = split(xs, which)

        def run(*ys: Any) -> list[Any]:
            full = list(operands)
            for i, y in zip(which, ys):
                full[i] = y
            outs = forward.reference(*full, **params)
            return [outs[i] for i in outputs]

        return jax.jvp(run, tuple(operands[i] for i in which), tuple(moving))[1]

    def abstract(*avals: Any, which: tuple[int, ...], **params: Any) -> Sequence[Any]:
        outs = forward._abstract(*split(avals, which)[0], **params)
        return tuple(outs[i] for i in outputs)

    def lower(ctx: mlir.LoweringRuleContext, *args: Any, **params: Any) -> Any:
        return mlir.lower_fun(functools.partial(reference, **params), multiple_results=True)(ctx, *args)

    def transpose(cotangents: Sequence[Any], *xs: Any, which: tuple[int, ...], **params: Any) -> Sequence[Any]:
        assert forward.backward is not None
        operands, outs, moving = split(xs, which)
        dense = [_zeros_like(c) for c in cotangents]
        # A tangent that is known, such as one of zeros, has no cotangent.
        wanted = [ad.is_undefined_primal(m) for m in moving]
        wrt = tuple(i for i, wants in zip(which, wanted) if wants)
        grads = iter(forward.backward(*operands, *outs, *dense, wrt=wrt, **params))
        return [None] * (len(operands) + len(outs)) + [next(grads) if wants else None for wants in wanted]

    def jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> Any:
        dense = tuple(_zeros_like(t) for t in tangents)
        return jax.jvp(functools.partial(reference, **params), tuple(primals), dense)

    def batch(operands: Sequence[Any], dims: Sequence[Any], **params: Any) -> tuple[Any, Any]:
        outs = jax.vmap(functools.partial(reference, **params), in_axes=tuple(dims))(*operands)
        return outs, [0] * len(outs)

    linear = _primitive(f"jaxext_{forward.name}_linear", abstract, lower)
    ad.primitive_transposes[linear] = transpose
    ad.primitive_jvps[linear] = jvp
    batching.primitive_batchers[linear] = batch
    _jax_compat.check_as(linear, lambda **params: functools.partial(reference, **params))
    return linear
