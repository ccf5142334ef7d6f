"""Graph, plan and replay on small functions, with patterns of one or two operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxext import _jax_compat as compat
from jaxext._settings import Settings
from jaxext.rewrite import plan as planning
from jaxext.rewrite import trace
from jaxext.rewrite.match import Match, NoMatch, Pattern
from jaxext.rewrite.rewrite import replay, retrace

X = jnp.linspace(0.1, 1.0, 6).reshape(2, 3)
FORWARD = planning.Mode(whole_step=True, skip_differentiated=True)
BEFORE_DIFFERENTIATION = planning.Mode(whole_step=False, skip_differentiated=True)


def tangent_like():
    """sin(x) * y becomes a 'kernel' of x and y."""

    def match(root, graph):
        sine, other = root.node.inputs
        if sine.node is None or sine.node.primitive != "sin":
            raise NoMatch("no sin")
        return Match("attention", (root,), (*sine.node.inputs, other), lambda x, y: (jnp.sin(x) * y + 100.0,), "")

    return Pattern("attention", frozenset({"mul"}), match)


def planned(function, *args, patterns=None, mode=BEFORE_DIFFERENTIATION, settings=None):
    closed = jax.make_jaxpr(function)(*args)
    return planning.make(closed, settings or Settings(), patterns or (tangent_like(),), mode)


def primitives(jaxpr):
    names = []
    for eqn in compat.open_jaxpr(jaxpr)[0].eqns:
        names.append(eqn.primitive.name)
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple) else (value,):
                if compat.is_jaxpr(inner):
                    names += primitives(inner)
    return names


# ---------------------------------------------------------------- graph


def test_calls_are_flattened_and_constants_are_known():
    table = np.arange(3.0, dtype=np.float32)
    graph = trace.build(jax.make_jaxpr(lambda x: jnp.where(x > 0, x + table, 2.0))(X))
    assert [node.primitive for node in graph.nodes][-1] == "select_n"
    add = next(node for node in graph.nodes if node.primitive == "add")
    assert graph.escapes(graph.outputs[0]) and not graph.escapes(add.outputs[0])
    constants = [value.const for node in graph.nodes for value in node.inputs if value.const is not None]
    assert any(np.array_equal(constant, table) for constant in constants)
    assert [node.position for node in graph.nodes] == list(range(len(graph.nodes)))


def test_users_are_nodes_in_program_order_each_once():
    graph = trace.build(jax.make_jaxpr(lambda x: jnp.sin(x * x) + jnp.cos(x))(X))
    assert [node.primitive for node in graph.users(graph.inputs[0])] == ["mul", "cos"]
    assert graph.users(graph.outputs[0]) == []


def test_custom_jvp_of_jax_is_one_node_that_can_be_looked_into():
    with jax.softmax_custom_jvp(True):
        graph = trace.build(jax.make_jaxpr(jax.nn.softmax)(X))
    (node,) = graph.nodes
    assert node.primitive == "custom_jvp_call"
    inner = graph.outputs[0].inner
    assert inner is not None and inner.node.primitive == "div" and inner.node.position == -1


def test_custom_jvp_of_a_user_is_opaque():
    negated = jax.custom_jvp(lambda x: x * 1.0)
    negated.defjvp(lambda primals, tangents: (negated(*primals), -tangents[0]))
    by_parts = jax.custom_jvp(lambda x: x * 1.0)
    by_parts.defjvps(lambda tangent, out, x: -tangent)
    for function in (negated, by_parts):
        graph = trace.build(jax.make_jaxpr(function)(X))
        assert graph.outputs[0].node.primitive == "custom_jvp_call" and graph.outputs[0].inner is None


def test_inputs_of_functions_inside_operations_know_where_they_come_from():
    def function(x, table):
        scanned = jax.lax.scan(lambda c, row: (c + row * table, None), x[0], x)[0]
        return jax.checkpoint(lambda a, b: a * b)(scanned, table)

    plan = planned(function, X, X[0])
    found = {node.primitive: plans["jaxpr"][0].graph.inputs for node, plans in plan.nested.items()}
    table = plan.graph.inputs[1]
    assert [value.origin is table for value in found["scan"]] == [True, False, False]
    assert [value.origin for value in found["scan"][1:]] == [None, None]
    assert found["remat2"][1].origin is table


# ---------------------------------------------------------------- plan and replay


def test_the_root_is_replaced_and_what_is_dead_is_not_run():
    plan = planned(lambda x: jnp.sin(x) * x, X)
    assert [type(step).__name__ for step in plan.steps] == ["Replacement"]
    np.testing.assert_allclose(replay(plan, [X])[0], np.sin(X) * X + 100.0, rtol=1e-6)


def test_what_is_used_elsewhere_is_computed_too():
    function = lambda x: (jnp.sin(x) * x, jnp.sin(x) + 1)  # noqa: E731
    shared = lambda x: (lambda s: (s * x, s + 1))(jnp.sin(x))  # noqa: E731
    for f in (function, shared):
        out, other = replay(planned(f, X), [X])
        np.testing.assert_allclose(out, np.sin(X) * X + 100.0, rtol=1e-6)
        np.testing.assert_allclose(other, np.sin(X) + 1, rtol=1e-6)


def test_a_forward_program_is_left_alone_where_nothing_would_be_saved():
    def shared(x):
        column = x.sum(0)
        sine = jnp.sin(column)
        return sine * column, sine + 1

    plan = planned(shared, X, mode=FORWARD)
    assert not plan.changes() and len(plan.report.missed) == 1


def test_what_follows_no_reduction_costs_a_whole_step_no_attempts():
    tried = []

    def match(root, graph):
        tried.append(root.node.primitive)
        raise NoMatch("never")

    pattern = Pattern("attention", frozenset({"mul", "exp"}), match)
    planned(lambda x: (x * x, jnp.exp(x.sum(0))), X, patterns=(pattern,), mode=FORWARD)
    assert tried == ["exp"]


@pytest.mark.parametrize("mode", [FORWARD, BEFORE_DIFFERENTIATION])
def test_what_jax_has_differentiated_is_left_alone(mode):
    assert not planned(jax.grad(lambda x: (jnp.sin(x) * x).sum()), X, mode=mode).changes()


def test_calls_without_a_replacement_stay_calls():
    @jax.jit
    def untouched(x):
        return jnp.cos(x) + 1

    @jax.jit
    def touched(x):
        return jnp.sin(x) * x

    plan = planned(lambda x: touched(untouched(x)), X)
    assert [type(step).__name__ for step in plan.steps] == ["Call", "Replacement"]
    np.testing.assert_allclose(replay(plan, [X])[0], np.sin(np.cos(X) + 1) * (np.cos(X) + 1) + 100, rtol=1e-6)


def test_a_call_is_opened_where_a_match_takes_a_value_inside_it():
    inner = jax.jit(lambda x: (lambda y: (jnp.sin(y), jnp.cos(y)))(x + 1))
    plan = planned(lambda x: inner(x)[0] * x + inner(x)[1], X)
    expected = np.sin(X + 1) * X + 100 + np.cos(X + 1)
    np.testing.assert_allclose(replay(plan, [X])[0], expected, rtol=1e-6)


def two_roots():
    """(x + r, sin(x + r) * scale) from one kernel of x, r and scale."""

    def match(root, graph):
        sine, scale = root.node.inputs
        if sine.node is None or sine.node.primitive != "sin":
            raise NoMatch("no sin")
        total = sine.node.inputs[0]
        if total.node is None or total.node.primitive != "add":
            raise NoMatch("no residual")

        def call(x, r, scale):
            return x + r + 10.0, jnp.sin(x + r) * scale + 100.0

        return Match("attention", (total, root), (*total.node.inputs, scale), call, "")

    return Pattern("attention", frozenset({"mul"}), match)


def test_a_match_with_two_roots_runs_ahead_of_both_and_after_its_inputs():
    def function(x, r, w):
        total = x + r
        early = total * 2
        scale = jnp.exp(w)  # an input of the match that is computed after its first root
        return early, jnp.sin(total) * scale

    plan = planned(function, X, 2 * X, X, patterns=(two_roots(),))
    early, out = replay(plan, [X, 2 * X, X])
    np.testing.assert_allclose(early, (3 * X + 10) * 2, rtol=1e-6)
    np.testing.assert_allclose(out, np.sin(3 * X) * np.exp(X) + 100, rtol=1e-5)


def test_a_match_whose_input_depends_on_its_root_is_dropped():
    def function(x, r):
        total = x + r
        return jnp.sin(total) * jnp.exp(total)

    plan = planned(function, X, X, patterns=(two_roots(),))
    assert not plan.changes()
    np.testing.assert_allclose(replay(plan, [X, X])[0], np.sin(2 * X) * np.exp(2 * X), rtol=1e-6)


def test_of_two_matches_that_would_wait_for_each_other_one_is_dropped():
    def function(x, r, y, z):
        first, second = x + r, y + z
        return jnp.sin(first) * jnp.exp(second), jnp.sin(second) * jnp.exp(first)

    plan = planned(function, X, X, X, 2 * X, patterns=(two_roots(),))
    assert len(plan.replacements) == len(plan.report.missed) == 1
    one, other = replay(plan, [X, X, X, 2 * X])
    np.testing.assert_allclose(one, np.sin(2 * X) * np.exp(3 * X) + 100, rtol=1e-5)
    np.testing.assert_allclose(other, np.sin(3 * X) * np.exp(2 * X + 10), rtol=1e-5)


def test_a_larger_pattern_takes_what_a_smaller_one_is_part_of():
    sine = Pattern(
        "rms_norm",
        frozenset({"sin"}),
        lambda root, graph: Match("rms_norm", (root,), tuple(root.node.inputs), lambda x: (x,), ""),
    )
    plan = planned(lambda x: jnp.sin(x) * x + jnp.sin(2 * x), X, patterns=(tangent_like(), sine))
    assert sorted(entry.kernel for entry in plan.report.replaced) == ["attention", "rms_norm"]


def test_excluded_kernels_are_not_matched():
    plan = planned(lambda x: jnp.sin(x) * x, X, settings=Settings(exclude=frozenset({"attention"})))
    assert not plan.changes()


def test_inputs_inside_a_custom_derivative_cannot_be_taken():
    def match(root, graph):
        inner = root.node.inputs[0].inner
        if inner is None:
            raise NoMatch("not a call")
        return Match("attention", (root,), tuple(inner.node.inputs[:1]), lambda x: (x,), "")

    with jax.softmax_custom_jvp(True):
        plan = planned(
            lambda x: jnp.sin(jax.nn.softmax(x)), X, patterns=(Pattern("attention", frozenset({"sin"}), match),)
        )
    assert not plan.changes()
    assert plan.report.missed[0].reason == "an input exists only inside a function with a custom derivative"


def wrong_type():
    pattern = tangent_like()

    def match(root, graph):
        found = pattern.match(root, graph)
        return Match("attention", found.roots, found.inputs, lambda x, y: (x[0],), "")

    return Pattern("attention", pattern.roots, match)


def test_a_kernel_that_gives_another_shape_is_named():
    plan = planned(lambda x: jnp.sin(x) * x, X, patterns=(wrong_type(),))
    with pytest.raises(TypeError) as raised:
        replay(plan, [X])
    assert str(raised.value) == (
        "jaxext: the attention kernel gave f32[3] where f32[2,3] was replaced. This is a bug in jaxext: report it, "
        "and switch the kernel off with JAXEXT_KERNELS=-attention."
    )


# ---------------------------------------------------------------- functions inside operations


def inside(kind):
    body = lambda x: jnp.sin(x) * x  # noqa: E731
    return {
        "scan": lambda x: jax.lax.scan(lambda c, _: (body(c), c), x, None, length=2),
        "scan, reversed and unrolled": lambda x: jax.lax.scan(
            lambda c, r: (c + 1, body(r)), 0, x, reverse=True, unroll=2
        ),
        "while": lambda x: jax.lax.while_loop(lambda c: (body(c) < 0).any(), lambda c: body(c) - 1, x),
        "cond": lambda x: jax.lax.cond(x[0, 0] > 0, body, lambda x: x, x),
        "checkpoint": lambda x: jax.checkpoint(body)(x),
        "jit with an option": lambda x: jax.jit(body, donate_argnums=0)(x),
        "scan of checkpoint": lambda x: jax.lax.scan(lambda c, _: (jax.checkpoint(body)(c), None), x, None, length=2),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "scan",
        "scan, reversed and unrolled",
        "while",
        "cond",
        "checkpoint",
        "jit with an option",
        "scan of checkpoint",
    ],
)
def test_functions_inside_operations_are_exchanged_for_ones_of_the_same_type(kind):
    function = inside(kind)
    plan = planned(function, X)
    closed = jax.make_jaxpr(function)(X)
    new = retrace(plan)
    for old, now in zip(compat.out_types(closed), compat.out_types(new), strict=True):
        assert compat.same_type(old, now)
    constants = [
        eqn for eqn in compat.open_jaxpr(new)[0].eqns if any("100.0" in str(value) for value in eqn.params.values())
    ]
    assert constants, "the kernel is inside"
    assert not plan.refused


def test_constants_of_calls_inside_a_loop_stay_with_a_call():
    table = np.arange(3.0, dtype=np.float32)
    add = jax.jit(lambda x: jnp.sin(x + table) * x)
    function = lambda x: jax.lax.scan(lambda c, _: (add(c), None), x, None, length=2)[0]  # noqa: E731
    plan = planned(function, X)
    once = np.sin(X + table) * X + 100
    np.testing.assert_allclose(replay(plan, [X])[0], np.sin(once + table) * once + 100, rtol=1e-5)
    assert not plan.refused


def test_weakly_typed_carries_keep_their_type():
    def function(x):
        return jax.lax.scan(lambda c, _: (jnp.sin(c) * c, None), 0.5, x)[0]

    value = 0.5
    for _ in range(len(X)):
        value = np.sin(value) * value + 100.0
    (result,) = replay(planned(function, X), [X])
    np.testing.assert_allclose(result, value, rtol=1e-4)
    assert result.weak_type


def test_checkpoint_policies_save_the_kernel_where_they_saved_what_it_replaced():
    from jaxext.rewrite.rewrite import _policy_for_kernels

    def match(root, graph):
        return Match("attention", (root,), tuple(root.node.inputs), lambda x, y: (x @ y,), "")

    pattern = Pattern("attention", frozenset({"dot_general"}), match)
    plan = planned(lambda x: x @ x.T, X, patterns=(pattern,))

    class Kernel:
        name = "jaxext_attention_fwd"

    class Other:
        name = "jaxext_rms_norm_fwd"

    saveable = _policy_for_kernels(jax.checkpoint_policies.dots_saveable, plan)
    assert saveable(Kernel) is True and saveable(jax.lax.dot_general_p) and not saveable(jax.lax.sin_p)
    assert not saveable(Other)
    nothing = jax.checkpoint_policies.nothing_saveable
    assert _policy_for_kernels(nothing, plan) is nothing
