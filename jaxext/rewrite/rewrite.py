"""Running a plan: the traced function again, equation by equation, with the replacements in place.

No jaxpr is built by hand: a function is replayed under whatever transformation is going on, and the functions inside
scan, while, cond, checkpoint and jit are exchanged for retraced ones of the same type. Source lines, name scopes and
compute contexts are those of the equations that are replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from .. import _jax_compat as compat
from ..kernels._op import relaxed
from . import schedule
from .plan import HIGHER_ORDER, Plan, Replacement
from .trace import Call, Node, Value


def replay(plan: Plan, arguments: Sequence[Any]) -> list[Any]:
    """The results of the planned function for its flat `arguments`."""
    return _Replay(plan, arguments).run()


def retrace(plan: Plan) -> Any:
    """The planned function as a closed jaxpr of the same type as the original.

    Raises:
      NotExchangeable: it could not keep the type.
    """
    if not plan.changes():
        return plan.jaxpr

    def run(*arguments: Any) -> list[Any]:
        return replay(plan, arguments)

    original, consts = compat.open_jaxpr(plan.jaxpr)
    closed = compat.trace(run, compat.in_types(plan.jaxpr), like=plan.jaxpr)
    if len(compat.open_jaxpr(closed)[1]) > len(consts):
        # Arrays that calls inside the function had brought along: a call may have constants where a loop may not.
        closed = compat.trace(jax.jit(run), compat.in_types(plan.jaxpr), like=plan.jaxpr)
    new, _ = compat.open_jaxpr(closed)
    for old, now in zip(compat.out_types(plan.jaxpr), compat.out_types(closed), strict=True):
        if not compat.same_type(old, now):
            raise NotExchangeable(f"its result would become {compat.short_type(now)} from {compat.short_type(old)}")
    if {type(effect) for effect in new.effects} != {type(effect) for effect in original.effects}:
        raise NotExchangeable("its side effects would change")
    return closed


class NotExchangeable(Exception):
    """A function inside a higher-order operation cannot be exchanged for the rewritten one."""


class _Replay:
    def __init__(self, plan: Plan, arguments: Sequence[Any]) -> None:
        self._plan = plan
        self._roots = {root for replacement in plan.replacements for root in replacement.match.roots}
        self._env: dict[Value, Any] = dict(plan.graph.captures)
        self._env.update(zip(plan.graph.inputs, arguments, strict=True))
        self._last_use = _last_use(plan)

    def run(self) -> list[Any]:
        for number, step in enumerate(self._plan.steps):
            inputs = [self._read(value) for value in schedule.reads(step)]
            if isinstance(step, Replacement):
                outputs = _run_kernel(step, inputs)
            else:
                with compat.source_of(step.eqn):
                    outputs = self._run(step, inputs)
            for value, output in zip(schedule.writes(step), outputs, strict=True):
                if isinstance(step, Replacement) or value not in self._roots:
                    self._env[value] = output
            for value in self._last_use.get(number, ()):
                self._env.pop(value, None)
        return [self._read(value) for value in self._plan.graph.outputs]

    def _read(self, value: Value) -> Any:
        return self._env.get(value, value.const)

    def _run(self, step: Node | Call, inputs: list[Any]) -> Sequence[Any]:
        if isinstance(step, Node) and step in self._plan.nested and self._plan.changes(step):
            return _run_higher_order(self._plan, step, inputs)
        return compat.bind(step.eqn, inputs, step.eqn.params)


def _last_use(plan: Plan) -> dict[int, list[Value]]:
    """Values by the step after which nobody needs them: a replay outside jit holds no array longer than it must."""
    last: dict[Value, int] = {}
    for number, step in enumerate(plan.steps):
        for value in (*schedule.reads(step), *schedule.writes(step)):
            last[value] = number
    kept = set(plan.graph.outputs)
    by_step: dict[int, list[Value]] = {}
    for value, number in last.items():
        if value not in kept:
            by_step.setdefault(number, []).append(value)
    return by_step


def _run_kernel(replacement: Replacement, inputs: list[Any]) -> list[Any]:
    match = replacement.match
    with compat.source_of(replacement.node.eqn, scope=f"jaxext.{match.kernel}"), relaxed():
        outputs = list(match.call(*_vary_alike(inputs)))
    for root, output in zip(match.roots, outputs, strict=True):
        if output.shape != root.shape or output.dtype != root.dtype:
            raise TypeError(
                f"jaxext: the {match.kernel} kernel gave {compat.short_type(jax.typeof(output))} where "
                f"{compat.short_type(root.aval)} was replaced. This is a bug in jaxext: report it, "
                f"and switch the kernel off with JAXEXT_KERNELS=-{match.kernel}."
            )
    return [compat.with_weak_type(output, root.aval) for root, output in zip(match.roots, outputs)]


def _vary_alike(inputs: list[Any]) -> list[Any]:
    """Inside shard_map: all operands vary over the same mesh axes, as one operation expects them."""
    axes = [compat.vma(x) for x in inputs]
    union = frozenset().union(*axes)
    return [
        x if own == union else jax.lax.pcast(x, tuple(sorted(union - own)), to="varying")
        for x, own in zip(inputs, axes)
    ]


# ---------------------------------------------------------------- functions inside operations


def _run_higher_order(plan: Plan, node: Node, inputs: list[Any]) -> Sequence[Any]:
    inner = plan.nested[node]
    if node.primitive == "shard_map":
        return _run_shard_map(node, inner["jaxpr"][0], inputs)
    try:
        params = _exchanged(node, inner)
    except NotExchangeable as error:
        plan.refuse(str(error), node)
        params = node.params
    return compat.bind(node.eqn, inputs, params)


def _exchanged(node: Node, inner: dict[str, tuple[Plan, ...]]) -> dict[str, Any]:
    params = dict(node.params)
    for name in HIGHER_ORDER[node.primitive]:
        old = params[name]
        new = tuple(compat.close_like(plan.jaxpr, retrace(plan)) for plan in inner[name])
        params[name] = new if isinstance(old, tuple) else new[0]
    if params.get("policy") is not None:
        params["policy"] = _policy_for_kernels(params["policy"], inner["jaxpr"][0])
    return params


def _policy_for_kernels(policy: Callable[..., Any], plan: Plan) -> Callable[..., Any]:
    """A checkpoint policy that saves a kernel's results where the user's saves what the kernel replaced.

    Policies such as ``dots_saveable`` go by primitive and would not recognise the kernel.
    """
    saved = {
        replacement.match.kernel
        for replacement in plan.replacements
        if any(_is_saved(policy, root.node) for root in replacement.match.roots)
    }
    if not saved:
        return policy
    prefixes = tuple(f"jaxext_{kernel}" for kernel in sorted(saved))

    def with_kernels(primitive: Any, *avals: Any, **params: Any) -> Any:
        if primitive.name.startswith(prefixes):
            return True
        return policy(primitive, *avals, **params)

    return with_kernels


def _is_saved(policy: Callable[..., Any], node: Node | None) -> bool:
    if node is None:
        return False
    return compat.saves(policy(node.eqn.primitive, *(value.aval for value in node.inputs), **node.params))


def _run_shard_map(node: Node, plan: Plan, inputs: list[Any]) -> Sequence[Any]:
    params = node.params
    return jax.shard_map(
        lambda *shards: tuple(replay(plan, shards)),
        mesh=params["mesh"],
        in_specs=tuple(params["in_specs"]),
        out_specs=tuple(params["out_specs"]),
        check_vma=params["check_vma"],
        axis_names=set(params["newly_manual_axes"]),
    )(*inputs)
