"""Derivatives written by hand, in differentiated functions: their rules run when, and as often as, in stock JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fidelity_program import arguments, assert_close, block, kernels_in


def with_rule(forward, backward=lambda kept, cotangent: (cotangent * kept,), fun=jnp.sin, **options):
    rule = jax.custom_vjp(fun, **options)
    rule.defvjp(forward, backward)
    return rule


def ran(sides, run):
    """The result of `run(log)` on each side, and what it wrote into `log`."""
    results, logs = {}, {}
    for name, side in sides.items():
        log = []
        with side():
            results[name], logs[name] = run(log), log
    return results, logs


@pytest.mark.parametrize("jitted", [False, True])
def test_a_forward_rule_runs_at_its_call_and_once(sides, jitted):
    def run(log):
        def fun(x):
            log.append("function")
            return jnp.sin(x)

        def forward(x):
            log.append("forward rule")
            return jnp.sin(x), jnp.cos(x)

        def loss(x):
            log.append("before")
            y = with_rule(forward, fun=fun)(x)
            log.append("after")
            return y * x

        gradient = jax.grad(loss)
        return (jax.jit(gradient) if jitted else gradient)(0.5)

    results, logs = ran(sides, run)
    assert logs["stock"] == ["before", "forward rule", "after"]
    assert logs["jaxext"] == logs["stock"]
    assert results["jaxext"] == results["stock"]


def test_rules_around_kernels_leave_them_in_place(sides):
    doubled = with_rule(lambda x: (2 * x, None), lambda _, g: (2 * g,), fun=lambda x: 2 * x)

    def loss(weights, x):
        return jnp.mean(jnp.square(block(weights, doubled(block(weights, x)))))

    function = jax.jit(jax.value_and_grad(loss))
    with sides["stock"]():
        expected = function(*arguments())
    assert kernels_in(function.lower(*arguments()))["jaxext_attention_backward"] == 2
    assert_close(function(*arguments()), expected)


def test_a_rule_may_capture_what_the_differentiated_function_computed_from_data(sides):
    data = np.float32(3.0)

    def run(_):
        def loss(x):
            scale = jnp.exp(jnp.asarray(data))  # of a trace, on jaxext
            return with_rule(lambda x: (scale * x, scale), fun=lambda x: scale * x)(x) ** 2

        return jax.grad(loss)(jnp.float32(0.5))

    results, _ = ran(sides, run)
    assert results["jaxext"] == results["stock"]


def test_a_rule_that_captures_a_differentiated_value_is_the_users_error(sides):
    def loss(x):
        scale = jnp.exp(x)
        return with_rule(lambda y: (scale * y, scale), fun=lambda y: scale * y)(x)

    for side in sides.values():
        with side(), pytest.raises(Exception, match=r"unexpected tracer|closed-over value"):
            jax.grad(loss)(0.5)


@pytest.mark.parametrize("jitted", [False, True])
def test_a_rule_that_forbids_differentiation_may_be_passed_by(sides, jitted):
    def forbidden(x):
        raise NotImplementedError("no derivative")

    def run(log, of):
        counted = with_rule(forbidden, fun=lambda x: jnp.floor(x))

        def loss(x):
            return x * counted(jnp.float32(2.5) if of == "data" else x)

        return (jax.jit(jax.grad(loss)) if jitted else jax.grad(loss))(jnp.float32(1.5))

    results, _ = ran(sides, lambda log: run(log, "data"))
    assert results["jaxext"] == results["stock"] == 2
    for side in sides.values():
        with side(), pytest.raises(NotImplementedError, match="no derivative"):
            run([], "parameter")


def test_a_rule_may_look_at_values_outside_of_jit(sides):
    def forward(x):
        return (jnp.sin(x), jnp.cos(x)) if x > 0 else (x, 1.0)

    def run(_):
        return jax.grad(lambda x: with_rule(forward)(x) * x)(0.5)

    results, _ = ran(sides, run)
    assert results["jaxext"] == results["stock"]


@pytest.mark.parametrize(
    "option", ["symbolic_zeros", "nondiff_argnums", "pytrees", "forwarded residuals", "second order"]
)
def test_forms_of_rules_agree_with_stock(sides, option):
    def run(_):
        x, y = jnp.arange(3.0), jnp.arange(3.0) + 1
        if option == "symbolic_zeros":
            rule = jax.custom_vjp(lambda x, y: x * y)
            rule.defvjp(
                lambda x, y: (x.value * y.value, (x.value, y.value, y.perturbed)),
                lambda kept, g: (g * kept[1], g * kept[0] if kept[2] else None),
                symbolic_zeros=True,
            )
            return jax.grad(lambda x: rule(x, y).sum())(x)
        if option == "nondiff_argnums":
            rule = jax.custom_vjp(lambda power, x: x**power, nondiff_argnums=(0,))
            rule.defvjp(lambda power, x: (x**power, x), lambda power, x, g: (g * power * x ** (power - 1),))
            return jax.grad(lambda x: rule(3, x).sum())(x)
        if option == "pytrees":
            rule = jax.custom_vjp(lambda tree: {"sum": tree["a"] + tree["b"][0], "kept": tree["a"]})
            rule.defvjp(
                lambda tree: ({"sum": tree["a"] + tree["b"][0], "kept": tree["a"]}, tree),
                lambda tree, g: ({"a": g["sum"] * tree["b"][0] + g["kept"], "b": [g["sum"] * tree["a"]]},),
            )
            return jax.grad(lambda x, y: sum(jax.tree.leaves(rule({"a": x, "b": [y]}))).sum(), argnums=(0, 1))(x, y)
        if option == "forwarded residuals":
            rule = jax.custom_vjp(lambda x, y: jnp.sin(x) * y)
            rule.defvjp(
                lambda x, y: (jnp.sin(x) * y, (y, jnp.cos(x), x)),
                lambda kept, g: (g * kept[0] * kept[1], g * jnp.sin(kept[2])),
            )
            scale = jnp.exp(y)
            return jax.value_and_grad(lambda x, y: (rule(x, y) * scale).sum(), argnums=(0, 1))(x, y)
        rule = with_rule(lambda x: (jnp.sin(x), jnp.cos(x)))
        return jax.grad(lambda x: jax.grad(lambda x: rule(x) * x)(x) ** 2)(0.5)

    results, _ = ran(sides, run)
    for mine, theirs in zip(jax.tree.leaves(results["jaxext"]), jax.tree.leaves(results["stock"]), strict=True):
        np.testing.assert_array_equal(mine, theirs)
