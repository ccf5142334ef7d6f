"""A train step as a graph in which the differentiated loss is one operation.

The step is traced, not run. The function that it hands to `jax.vjp` (through `jax.grad`, `jax.value_and_grad`,
`nnx.value_and_grad`, …) is traced on its own and stands in the step as one `jaxext_loss` operation, whose results are
those of the loss followed by the gradients. What comes before it prepares arguments, what comes after it is the update.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core as jex_core

from .. import _jax_compat as compat
from .. import _settings
from ..rewrite import hooks, trace
from ..rewrite.trace import Graph, Node, Value
from .places import Place
from .refusal import Refusal
from .spread import localised
from .stage import is_float

_LOSS = jex_core.Primitive("jaxext_loss")
_LOSS.multiple_results = True
# JAX's caches must not answer with a trace that was made outside of a capture.
_probes = itertools.count(1 << 32)


@dataclasses.dataclass(frozen=True)
class Loss:
    """The differentiated function of a step.

    Attributes:
      graph: inputs: the arrays that it is differentiated in; outputs: the loss, then aux.
      closed_over: values of the graph that are arrays of the step around it.
      name: the user's name of it.
    """

    graph: Graph
    closed_over: tuple[Value, ...]
    name: str

    @property
    def operands(self) -> list[Value]:
        return [*self.graph.inputs, *self.closed_over]

    @property
    def gradients(self) -> list[Value]:
        """The inputs that have a gradient: those of a floating or complex type."""
        return [value for value in self.graph.inputs if is_float(value)]


@dataclasses.dataclass(frozen=True)
class Captured:
    """A traced step: its graph, the loss, and the node that stands for it: operands as `loss.operands`, results the
    loss's outputs, then its gradients."""

    graph: Graph
    loss: Loss
    node: Node


def capture(step: Callable[..., Sequence[Any]], avals: Sequence[Any], name: str, place: Place) -> Captured:
    """Trace `step`, a function of flat arrays of these types, to run on places like this one.

    Raises:
      Refusal: nothing is differentiated, more than one function is, or it is differentiated inside a loop.
    """
    losses: list[Loss] = []
    settings = _settings.Settings(exclude=frozenset(_settings.KERNELS), probe=next(_probes))
    token = hooks.Relying()
    status = hooks.status()
    if not status.differentiation:
        raise Refusal(f"this JAX cannot be hooked at differentiation ({status.reason})", "Upgrade jaxext.")
    try:
        with _settings.use(settings), hooks.intercepting(functools.partial(_stand_in, losses, place)), place.tracing():
            closed = localised(compat.trace(step, avals, name=name), place)
    finally:
        del token
        hooks.deactivate_unless_used()
    graph = trace.build(closed)
    nodes = [node for node in graph.nodes if node.eqn.primitive is _LOSS]
    return Captured(graph, nodes[0].params["loss"], nodes[0]) if _is_one(losses, nodes) else _refuse(losses, nodes)


def _is_one(losses: list[Loss], nodes: list[Node]) -> bool:
    return len(losses) == len(nodes) == 1


def _refuse(losses: list[Loss], nodes: list[Node]) -> Captured:
    if not losses:
        raise Refusal(
            "the step differentiates nothing (no jax.grad, jax.value_and_grad or jax.vjp was reached)",
            "Give the whole train step, loss and update, to jaxext.pipeline.",
        )
    names = ", ".join(dict.fromkeys(loss.name for loss in losses))
    if len(losses) > 1:
        raise Refusal(
            f"the step differentiates {len(losses)} functions ({names}); one can be pipelined",
            "Put the losses into one function, or pipeline one step for each.",
        )
    assert not nodes
    raise Refusal(
        f"{names} is differentiated inside a loop, a branch or another transformation of the step",
        "Accumulation over microbatches is what the pipeline does itself: differentiate once in the step.",
    )


# ---------------------------------------------------------------- the operation that stands for the loss


def _stand_in(losses: list[Loss], place: Place, fun: Callable[..., Any]) -> Callable[..., Any]:
    """What `jax.vjp` differentiates in place of the loss `fun`."""

    @functools.wraps(fun)
    def run(*primals: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten((primals, kwargs))
        output = hooks.SplitOutput()

        def flat(*arrays: Any) -> list[Any]:
            own_args, own_kwargs = jax.tree.unflatten(tree, arrays)
            return output.split(fun(*own_args, **own_kwargs))

        with hooks.intercepting(None):
            closed = compat.trace(flat, [jax.typeof(leaf) for leaf in leaves], name=compat.user_name(fun))
        if compat.keeps_tracers(closed):
            raise Refusal(
                f"{compat.user_name(fun)} has a derivative rule that is given arrays by nondiff_argnums",
                "Give the rule these arrays as ordinary arguments.",
            )
        graph = trace.build(localised(closed, place))
        arrays = {value: array for value, array in graph.captures.items() if value.const is None}
        loss = Loss(graph, tuple(arrays), compat.user_name(fun))
        losses.append(loss)
        return output.join(_differentiable(loss)(leaves, list(arrays.values())))

    return run


def _differentiable(loss: Loss) -> Callable[..., list[Any]]:
    """The loss as an operation whose derivative is the gradient that it gives along with its results."""

    count = len(loss.graph.outputs)

    @jax.custom_vjp
    def call(primals: list[Any], closed_over: list[Any]) -> list[Any]:
        return _LOSS.bind(*primals, *closed_over, loss=loss)[:count]

    def forward(primals: list[Any], closed_over: list[Any]) -> tuple[list[Any], Any]:
        primals, closed_over = [x.value for x in primals], [x.value for x in closed_over]
        results = _LOSS.bind(*primals, *closed_over, loss=loss)
        return results[:count], results[count:]

    def backward(gradients: list[Any], cotangents: list[Any]) -> tuple[list[Any], None]:
        if any(isinstance(ct, jax.Array) for ct in cotangents[1:]):
            raise Refusal(
                f"{loss.name} is differentiated in more than its first result",
                "Return one scalar loss, and everything else as aux (has_aux=True).",
            )
        found = dict(zip(loss.gradients, gradients, strict=True))
        # The loss may be wider than a parameter; a gradient never is.
        scaled = {value: (cotangents[0] * gradient).astype(value.dtype) for value, gradient in found.items()}
        return [scaled.get(value) for value in loss.graph.inputs], None

    call.defvjp(forward, backward, symbolic_zeros=True)
    return call


@_LOSS.def_abstract_eval
def _types(*_: Any, loss: Loss) -> list[Any]:
    gradients = [compat.array_type(value.shape, value.dtype) for value in loss.gradients]
    return [*(value.aval for value in loss.graph.outputs), *gradients]
