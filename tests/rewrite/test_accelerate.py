"""`accelerate` stands in for `jax.jit`: the same options and methods on every kind of callable."""

import functools
import traceback
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_attention as toy
from flax import nnx
from toy_attention import attend

import jaxext
from jaxext._check import CheckError
from jaxext.rewrite.report import FallbackError, RequirementError

X = jax.random.normal(jax.random.key(0), (3, 4))


@pytest.fixture(autouse=True)
def _toy(monkeypatch):
    toy.use(monkeypatch)


def scaled(x, factor=1.0):
    return attend(x, x, factor * x)


class Model:
    def __init__(self, factor):
        self.factor = factor

    def forward(self, x):
        return scaled(x, self.factor)

    @functools.partial(jaxext.accelerate, static_argnums=0)
    def decorated(self, x):
        return scaled(x, self.factor)

    @jaxext.accelerate
    @functools.partial(jax.jit, static_argnums=0)
    def decorated_jitted(self, x):
        return scaled(x, self.factor)

    def __call__(self, x):
        return scaled(x, self.factor)


CALLABLES = {
    "function": lambda: jaxext.accelerate(scaled),
    "with parentheses": lambda: jaxext.accelerate()(scaled),
    "lambda": lambda: jaxext.accelerate(lambda x: scaled(x)),
    "jitted": lambda: jaxext.accelerate(jax.jit(scaled)),
    "nnx.jit": lambda: jaxext.accelerate(nnx.jit(scaled)),
    "accelerated": lambda: jaxext.accelerate(jaxext.accelerate(scaled)),
    "partial": lambda: jaxext.accelerate(functools.partial(scaled, factor=1.0)),
    "bound method": lambda: jaxext.accelerate(Model(1.0).forward),
    "callable object": lambda: jaxext.accelerate(Model(1.0)),
    "decorated method": lambda: Model(1.0).decorated,
    "decorated jitted method": lambda: Model(1.0).decorated_jitted,
    "checked": lambda: jaxext.accelerate(scaled, check=True),
}


@pytest.mark.parametrize("kind", CALLABLES)
def test_every_kind_of_callable_is_accelerated(kind):
    accelerated = CALLABLES[kind]()
    np.testing.assert_allclose(accelerated(X), scaled(X), atol=1e-6)
    assert toy.calls
    traced = len(toy.calls)
    accelerated(X)
    assert len(toy.calls) == traced, "the second call takes the compiled program"


@pytest.mark.parametrize("kind", ["function", "jitted", "nnx.jit", "checked"])
def test_the_methods_of_a_jitted_function_are_there(kind):
    accelerated = CALLABLES[kind]()
    assert accelerated.eval_shape(X).shape == X.shape
    assert accelerated.lower(X).compile() is not None
    assert accelerated.trace(X) is not None
    assert toy.calls
    assert accelerated.__name__ == "scaled"
    if kind != "nnx.jit":
        accelerated.clear_cache()


def test_options_are_those_of_jit():
    @jaxext.accelerate(static_argnames=("mode",), donate_argnums=(0,), keep_unused=True)
    def step(x, unused, *, mode):
        assert mode == "train"
        return attend(x, x, x)

    x = X + 0
    step(x, 1.0, mode="train")
    assert x.is_deleted() and toy.calls
    with pytest.raises(TypeError, match="unexpected keyword argument 'statik'"):
        jaxext.accelerate(scaled, statik=1)


def test_a_compiled_call_is_jax_own():
    assert type(jaxext.accelerate(scaled)) is type(jax.jit(scaled))


def test_accelerating_a_function_again_takes_the_compiled_program():
    for _ in range(3):
        jaxext.accelerate(scaled)(X)
    assert len(toy.calls) == 1


def test_a_function_is_not_kept_alive():
    def local(x):
        return scaled(x)

    jaxext.accelerate(local)
    reference = weakref.ref(local)
    del local
    import gc

    gc.collect()
    assert reference() is None


def test_names_and_signature_are_the_functions():
    accelerated = jaxext.accelerate(scaled)
    assert accelerated.__name__ == "scaled" and accelerated.__wrapped__ is not None
    assert jax.tree.map(lambda x: x.shape, jax.eval_shape(accelerated, x=X, factor=2.0)) == X.shape


def test_excluded_kernels_are_not_used_and_inner_exclusions_hold_inside_others():
    jaxext.accelerate(scaled, exclude="attention")(X)
    assert not toy.calls
    inner = jaxext.accelerate(lambda x: scaled(x), exclude=("attention",))
    jaxext.accelerate(lambda x: inner(x) + scaled(x, 2.0))(X)
    assert len(toy.calls) == 1


AROUND = {
    "scan": lambda f: lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=2)[0],
    "while": lambda f: lambda x: jax.lax.while_loop(lambda c: c.sum() < 0, f, x),
    "cond": lambda f: lambda x: jax.lax.cond(x.sum() > 0, f, jnp.sin, x),
    "checkpoint": jax.checkpoint,
    "jit": jax.jit,
    "scan in jit": lambda f: jax.jit(AROUND["scan"](f)),
    "vmap of scan": lambda f: lambda x: jax.vmap(AROUND["scan"](f))(x[None])[0],
}


@pytest.mark.parametrize("around", AROUND)
def test_inner_exclusions_hold_inside_loops_and_calls(around):
    """The same loop, with and without the exclusion, in one program."""
    loop = AROUND[around](scaled)
    inner = jaxext.accelerate(loop, exclude="attention")
    expected = loop(X)
    np.testing.assert_allclose(jaxext.accelerate(lambda x: inner(x))(X), expected, atol=1e-5)
    assert not toy.calls
    np.testing.assert_allclose(jaxext.accelerate(lambda x: inner(x) + loop(x))(X), 2 * expected, atol=1e-5)
    assert toy.calls


def test_inner_exclusions_hold_inside_loops_that_are_differentiated():
    inner = jaxext.accelerate(AROUND["scan"](scaled), exclude="attention")
    jaxext.accelerate(jax.grad(lambda x: inner(x).sum()))(X)
    assert not toy.calls


def test_disabled_is_plain_jax_for_accelerated_functions():
    plain = str(jax.jit(scaled).trace(X).jaxpr)
    for kind in ("function", "jitted"):
        with jaxext.disabled():
            assert str(CALLABLES[kind]().trace(X).jaxpr) == plain
    assert not toy.calls


def test_disable_in_the_environment_leaves_jit(monkeypatch):
    monkeypatch.setenv("JAXEXT_DISABLE", "1")
    jaxext.accelerate(scaled)(X)
    jitted = jax.jit(scaled)
    assert jaxext.accelerate(jitted) is jitted
    assert not toy.calls


def test_require_raises_with_the_near_miss():
    @jaxext.accelerate(require="attention")
    def forward(x):
        s = jnp.sin(jnp.einsum("...qd,...kd->...qk", x, x))
        return jax.nn.softmax(s, axis=-1) @ x

    for _ in range(2):
        with pytest.raises(RequirementError) as raised:
            forward(X)
        lines = str(raised.value).splitlines()
        assert lines[0] == "accelerate(require=('attention',)): attention was not replaced:"
        assert "in forward at " in lines[1] and "test_accelerate.py" in lines[1]
        assert lines[1].endswith("(forward): sin between the scores and the softmax")
        assert lines[2] == (
            "Rewrite the operation that is named, call jaxext.kernels directly, or drop it from require."
        )


def test_require_is_met_by_what_is_differentiated_in_a_function_jitted_before():
    inner = jax.jit(jax.grad(lambda x: scaled(x).sum()))
    for _ in range(2):
        jaxext.accelerate(lambda x: inner(x) * 2, require=("attention",))(X)


def test_require_without_anything_like_it():
    with pytest.raises(RequirementError, match="rms_norm was not replaced:\n  nothing in the function looks like it"):
        jaxext.accelerate(lambda x: x + 1, require="rms_norm")(X)


def test_a_refused_pattern_is_stock_jax_and_strict_makes_it_an_error(monkeypatch):
    half = X.astype(jnp.float16)
    plain = jax.jit(scaled)(half)
    assert (jaxext.accelerate(scaled)(half) == plain).all()
    assert not toy.calls
    monkeypatch.setenv("JAXEXT_STRICT", "1")
    with pytest.raises(FallbackError) as raised:
        jaxext.accelerate(lambda x: scaled(x))(half)
    assert str(raised.value).startswith("JAXEXT_STRICT: attention toy f16[3,4], f16[3,4], f16[3,4] in ")
    assert "float16 is left to stock JAX. Unset JAXEXT_STRICT to let it run on stock JAX" in str(raised.value)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: jaxext.accelerate(3), TypeError, "accelerate: fn is 3, expected a callable. Decorate a function,"),
        (lambda: jaxext.accelerate(scaled, require="x"), ValueError, "accelerate(require=): unknown kernel 'x'. The"),
        (lambda: jaxext.accelerate(scaled, exclude=("y",)), ValueError, "accelerate(exclude=): unknown kernel 'y'. "),
        (
            lambda: jaxext.accelerate(scaled, precision="bf16"),
            ValueError,
            "accelerate(precision=): unknown precision 'bf16', expected 'fp8' (matrix products in eight bits on GPUs) "
            "or "
            "None. Leave it out to multiply as the program says.",
        ),
        (
            lambda: jaxext.accelerate(scaled, precision="fp8", check=True),
            ValueError,
            "accelerate: check=True holds results to 2e-2, which products in eight bits do not reach. "
            'Drop check or precision="fp8", and compare losses instead.',
        ),
        (
            lambda: jaxext.accelerate(scaled, exclude="attention", require="attention"),
            ValueError,
            "accelerate: 'attention' is both in require and in exclude. Drop one of them.",
        ),
        (
            lambda: jaxext.accelerate(jax.jit(scaled), donate_argnums=0),
            TypeError,
            "accelerate: donate_argnums is given for a function that is jitted already. Give it to the inner jit.",
        ),
    ],
)
def test_wrong_arguments_are_clear_errors(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value).startswith(message)


def test_the_users_errors_come_through_with_the_users_frames():
    @jaxext.accelerate
    def wrong(x):
        return attend(x, x[:, :2], x)

    with pytest.raises((TypeError, ValueError)) as raised:
        wrong(X)
    files = {frame.filename for frame in traceback.extract_tb(raised.value.__traceback__)}
    assert not any("/jaxext/" in name and "/tests/" not in name for name in files)


# ---------------------------------------------------------------- check=True


def broken_kernel(monkeypatch, error):
    def kernel(q, k, v):
        (out,) = toy.kernel(q, k, v)
        return (out + error,)

    pattern = toy.PATTERN.__class__("attention", toy.PATTERN.roots, lambda root, graph: _with(root, graph, kernel))
    monkeypatch.setattr("jaxext.rewrite.hooks.PATTERNS", (pattern,))


def _with(root, graph, kernel):
    import dataclasses

    return dataclasses.replace(toy.PATTERN.match(root, graph), call=kernel)


def test_check_names_the_leaves_that_differ(monkeypatch):
    broken_kernel(monkeypatch, 0.01)

    @jaxext.accelerate(check=True)
    def forward(x):
        return {"out": attend(x, x, x), "fine": x * 2}

    with pytest.raises(CheckError) as raised:
        forward(X)
    text = str(raised.value)
    assert text.startswith(
        "accelerate(check=True): results differ from plain JAX in result['out'] (by 1.0e-02, toleranc"
    )
    assert "fine" not in text and text.endswith("Find the kernel with exclude=, and report it.")


def test_check_with_donated_arguments_and_a_sensitive_step():
    optimizer = optax.adam(1e-2)

    @jaxext.accelerate(check=True, donate_argnums=(0, 1))
    def step(params, state, x):
        def loss(p):
            q, k, v = (x @ p[name]["w"] + p[name]["b"] for name in "qkv")
            return jnp.mean(attend(q, k, v) ** 2)

        gradients = jax.grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    def init(i):
        return {"w": jax.random.normal(jax.random.key(i), (4, 4)), "b": jnp.full((4,), 0.1)}

    params = {name: init(i) for i, name in enumerate("qkv")}
    state = optimizer.init(params)
    for _ in range(2):
        old = params
        params, state = step(params, state, X)
        assert jax.tree.leaves(old)[0].is_deleted()


@pytest.mark.parametrize("error", [0.0, 0.01])
def test_check_compares_the_state_of_nnx_objects(monkeypatch, error):
    broken_kernel(monkeypatch, error)
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    @nnx.jit
    def step(model, x):
        model.bias[...] += attend(x, x, x).sum(0)

    checked = jaxext.accelerate(step, check=True)
    if error:
        with pytest.raises(CheckError, match=r"argument\[0\]\[0\].*bias"):
            checked(model, X)
    else:
        checked(model, X)
    np.testing.assert_allclose(model.bias[...], attend(X, X, X).sum(0) + 3 * error, atol=1e-5)
