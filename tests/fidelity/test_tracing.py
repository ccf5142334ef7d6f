"""Transformations that look at a program rather than run it, and those that run it in pieces."""

import jax
import jax.numpy as jnp
import pytest
from fidelity_program import arguments, assert_close, attend, block, kernels_in, loss, norm, step
from jax.ad_checkpoint import checkpoint_name

import jaxext

POLICIES = jax.checkpoint_policies


def primitives(function):
    """The names of jaxext's operations in the traced function."""
    return {name for name in str(jax.make_jaxpr(function)(*arguments())).split() if name.startswith("jaxext_")}


def test_make_jaxpr_shows_the_kernels_and_runs_as_the_function_does(sides):
    with sides["stock"]():
        plain = str(jax.make_jaxpr(step)(*arguments()))
        expected = step(*arguments())
    assert "jaxext_" not in plain
    for function in (step, jax.jit(step), jaxext.accelerate(step)):
        assert any("attention" in name for name in primitives(function))
    closed, shapes = jax.make_jaxpr(step, return_shape=True)(*arguments())
    leaves = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *jax.tree.leaves(arguments()))
    assert_close(jax.tree.unflatten(jax.tree.structure(shapes), leaves), expected)


def test_make_jaxpr_of_a_plain_function_shows_it_as_stock_does(sides):
    def plain(weights, x):
        return jnp.sin(x @ weights["qkv"])

    for function in (plain, jax.jit(plain)):
        texts = []
        for side in sides.values():
            with side():
                texts.append(str(jax.make_jaxpr(function)(*arguments())))
        assert texts[0] == texts[1]


def test_make_jaxpr_shows_jaxs_own_primitives_where_the_compiled_function_has_others(sides):
    def primitive(x):
        return jnp.sort(x, -1), jax.lax.top_k(x, 3), jax.nn.gelu(x.astype(jnp.bfloat16)).astype(jnp.float32)

    _, x = arguments()
    texts = []
    for side in sides.values():
        with side():
            texts.append(str(jax.make_jaxpr(primitive)(x)))
    assert texts[0] == texts[1]
    # Seen first or last, it is compiled with the kernels.
    compiled = jax.jit(primitive).lower(x).as_text()
    assert "jaxext_sort" in compiled and "jaxext_top_k" in compiled
    assert str(jax.make_jaxpr(primitive)(x)) == texts[0]


def test_eval_shape_gives_stocks_types(sides):
    weights, x = arguments()
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (weights, x))
    found = []
    for side in sides.values():
        with side():
            found.append([jax.eval_shape(step, *shapes), jax.jit(step).eval_shape(*shapes)])
    assert found[0] == found[1]


def linearized(weights, x):
    value, push = jax.linearize(lambda x: block(weights, x), x)
    return value, push(jnp.ones_like(x))


def pulled(weights, x):
    value, pull, aux = jax.vjp(
        lambda w: (block(w, x), {"normed": norm(x, w["scale"]), "rows": 3}), weights, has_aux=True
    )
    return value, pull(jnp.ones_like(value)), aux


def twice(weights, x):
    def along(scale):
        return loss({**weights, "scale": weights["scale"] * scale}, x)

    return jax.hessian(along)(1.0), jax.jvp(jax.grad(along), (1.0,), (1.0,)), jax.grad(jax.grad(along))(1.0)


def mapped(weights, x):
    per_row = jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0))
    return per_row(weights, x[:, None])


def with_own_rule(weights, x):
    """A neighbour with a batching rule of its own."""

    @jax.custom_batching.custom_vmap
    def twice(x):
        return 2 * x

    @twice.def_vmap
    def rule(size, batched, x):
        return 3 * x, batched[0]

    return jax.vmap(lambda x: twice(block(weights, x[None]))[0])(x)


def sequential(weights, x):
    @jax.custom_batching.sequential_vmap
    def one(x):
        return block(weights, x[None])[0]

    return jax.vmap(one)(x)


@pytest.mark.parametrize(
    "function", [linearized, pulled, twice, mapped, with_own_rule, sequential], ids=lambda f: f.__name__
)
def test_transformations_agree_with_stock(sides, function):
    with sides["stock"]():
        expected = jax.jit(function)(*arguments())
    if function not in (linearized, sequential):  # neither a derivative of forward mode nor a user's rule is entered
        assert kernels_in(jax.jit(function).lower(*arguments()))
    assert_close(jax.jit(function)(*arguments()), expected, tolerance=5e-5)


def test_what_is_no_array_passes_through_a_derivative_untouched(installed):
    weights, x = arguments()
    (_, aux), _ = jax.value_and_grad(lambda w: (loss(w, x), {"rows": 3, "x": x}), has_aux=True)(weights)
    assert type(aux["rows"]) is int
    assert aux["x"] is x


# ---------------------------------------------------------------- checkpoint


def named(weights, x):
    normed = checkpoint_name(norm(x, weights["scale"]), "normed")
    return checkpoint_name(x + attend(normed, weights["qkv"]), "block")


CASES = {
    "none": None,
    "everything": POLICIES.everything_saveable,
    "nothing": POLICIES.nothing_saveable,
    "dots": POLICIES.dots_saveable,
    "dots without batch": POLICIES.dots_with_no_batch_dims_saveable,
    "names": POLICIES.save_only_these_names("normed"),
    "all but names": POLICIES.save_anything_except_these_names("normed"),
    "any names but": POLICIES.save_any_names_but_these("normed"),
    "both": POLICIES.save_from_both_policies(
        POLICIES.dots_with_no_batch_dims_saveable, POLICIES.save_only_these_names("block")
    ),
}


def residuals(policy):
    def remembered(weights, x):
        hidden = jax.checkpoint(named, policy=policy)(weights, x)
        return jnp.mean(jnp.square(jax.checkpoint(named, policy=policy)(weights, hidden)))

    return remembered


@pytest.mark.parametrize("policy", CASES)
def test_checkpoint_policies_keep_what_they_keep_in_stock_or_less(sides, policy):
    function = residuals(CASES[policy])
    kept = {}
    for name, side in sides.items():
        with side():
            pull = jax.eval_shape(lambda *args: jax.vjp(function, *args)[1], *arguments())
            kept[name] = [leaf.size for leaf in jax.tree.leaves(pull)]
    assert sum(kept["jaxext"]) <= sum(kept["stock"])
    if policy in ("none", "nothing", "names", "any names but"):
        assert sorted(kept["jaxext"]) == sorted(kept["stock"])


@pytest.mark.parametrize("policy", ["none", "dots", "names"])
def test_checkpointed_gradients_run_on_kernels_and_agree(sides, policy):
    function = jax.jit(jax.value_and_grad(residuals(CASES[policy])))
    with sides["stock"]():
        expected = function(*arguments())
    forward, backward = (
        kernels_in(function.lower(*arguments()))[f"jaxext_attention_{way}ward"] for way in ("for", "back")
    )
    assert backward == 2
    assert forward == (4 if policy != "dots" else 2)
    assert_close(function(*arguments()), expected)
