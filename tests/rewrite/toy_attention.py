"""A small attention pattern with a stand-in for a kernel, so that the rewriting is tested without any real kernel.

It matches `softmax(q @ k.T [* c]) @ v` of any leading dimensions and computes it with a different formula.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxext.rewrite import hooks
from jaxext.rewrite.match import Match, NoMatch, Pattern
from jaxext.rewrite.trace import Graph, Value

calls: list[tuple[int, ...]] = []
"""Shapes of the queries of each replacement that was traced."""


def kernel(q, k, v):
    """exp(s - logsumexp(s)) @ v: the same to rounding, another program."""
    calls.append(q.shape)
    s = jnp.einsum("...qd,...kd->...qk", q, k, preferred_element_type=jnp.float32).astype(jnp.float32)
    p = jnp.exp(s - jax.nn.logsumexp(s, axis=-1, keepdims=True))
    return (jnp.einsum("...qk,...kd->...qd", p, v.astype(jnp.float32)).astype(v.dtype),)


def _seen_through(value: Value) -> Value:
    while value.inner is not None:
        value = value.inner
    if value.node is not None and value.node.primitive in ("pvary", "pcast"):
        return _seen_through(value.node.inputs[0])
    return value


def _node(value: Value, primitive: str):
    node = _seen_through(value).node
    if node is None or node.primitive != primitive:
        raise NoMatch(f"no {primitive}")
    return node


def _match(root: Value, graph: Graph) -> Match:
    out = _node(root, "dot_general")
    weights = _node(_node(out.inputs[0], "div").inputs[0], "exp")
    scores = _node(weights.inputs[0], "sub").inputs[0]
    if scores.node is None or scores.node.primitive != "dot_general":
        found = "nothing" if scores.node is None else scores.node.primitive
        raise NoMatch(f"{found} between the scores and the softmax", near=True)
    q, k = scores.node.inputs
    ((lhs,), (rhs,)), _ = scores.node.params["dimension_numbers"]
    if lhs != len(q.shape) - 1 or rhs != len(k.shape) - 1:
        raise NoMatch("scores contract another dimension", near=True)
    refusal = "float16 is left to stock JAX" if root.dtype == jnp.float16 else None
    return Match("attention", (root,), (q, k, out.inputs[1]), kernel, "toy", refusal)


PATTERN = Pattern("attention", frozenset({"dot_general"}), _match)


def attend(q, k, v):
    s = jnp.einsum("...qd,...kd->...qk", q, k)
    return jnp.einsum("...qk,...kd->...qd", jax.nn.softmax(s, axis=-1), v)


def use(monkeypatch):
    """The toy pattern alone, and a fresh list of calls."""
    monkeypatch.setattr(hooks, "PATTERNS", (PATTERN,))
    hooks.activate(relying=attend)
    jax.clear_caches()
    calls.clear()
