"""Do the hooks work in this JAX? Tried on a function of three operations, traced only: no device is touched."""

from __future__ import annotations

import dataclasses
import threading

import jax
import jax.numpy as jnp

from .. import _jax_compat as compat
from .. import _settings
from .match import Match, NoMatch, Pattern
from .trace import Graph, Value

_thread = threading.local()


def running() -> bool:
    """True in the thread that runs the test: it has patterns of its own."""
    return getattr(_thread, "running", False)


def _sine(root: Value, graph: Graph) -> Match:
    if root.node is None:
        raise NoMatch("not computed")
    return Match("attention", (root,), tuple(root.node.inputs), lambda x: (x * 2.0,), "self-test")


# The sine is replaced by a product, so that a trace shows at once whether it was seen.
PATTERNS = (Pattern("attention", frozenset({"sin"}), _sine),)


def _function(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sin(jnp.sum(x, axis=0)))


def insert_tested(on_differentiate: compat.DifferentiationHook, on_jit: compat.JitHook) -> compat.HookStatus:
    """Insert the hooks, keep those that work, and say why one does not."""
    status = compat.insert_hooks(on_differentiate, on_jit)
    reasons = [status.reason] if status.reason else []
    works = {"differentiation": status.differentiation, "jit": status.jit}
    for name, problem in _try_in_thread().items():
        if works[name] and problem:
            works[name] = False
            reasons.append(problem)
    if (works["differentiation"], works["jit"]) != (status.differentiation, status.jit):
        compat.remove_hooks()
        compat.insert_hooks(on_differentiate if works["differentiation"] else None, on_jit if works["jit"] else None)
    return dataclasses.replace(status, **works, reason="; ".join(reasons))


def _try_in_thread() -> dict[str, str]:
    """What is wrong with each hook, "" where it works. A new thread is outside of every JAX transformation."""
    problems: dict[str, str] = {}

    def run() -> None:
        _thread.running = True
        with _settings.use(_settings.Settings(probe=-1)):
            problems["differentiation"] = _problem(jax.grad(_function), "jax.vjp")
            problems["jit"] = _problem(_function, "jax.jit")

    thread = threading.Thread(target=run, name="jaxext self-test")
    thread.start()
    thread.join()
    return problems


def _problem(fun, name: str) -> str:
    matrix = jax.ShapeDtypeStruct((2, 2), "float32")
    try:
        text = str(jax.jit(lambda x: fun(x)).trace(matrix).jaxpr)
    except Exception as error:  # whatever JAX's insides raise here, it must not stop the user's program
        return f"hooking {name} fails: {type(error).__name__}: {error}"
    return f"hooking {name} has no effect" if "sin" in text or "cos" in text else ""
