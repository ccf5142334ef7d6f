"""JAX's debugging modes find the same thing at the same place."""

import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fidelity_program import HERE, arguments, assert_close, kernels_in, loss, step
from jax.experimental import checkify

import jaxext
from jaxext import kernels


@pytest.fixture
def mode(monkeypatch):
    """Switches an option of JAX on, until the test ends."""
    changed = []

    def on(name, value=True):
        changed.append((name, getattr(jax.config, name)))
        jax.config.update(name, value)

    yield on
    for name, value in changed:
        jax.config.update(name, value)


def raised(call):
    """Type and text of the error of `call`, and the lines of the tests' files that were running."""
    with pytest.raises(FloatingPointError) as error:
        call()
    frames = traceback.extract_tb(error.value.__traceback__)
    lines = [(frame.name, frame.lineno) for frame in frames if frame.filename == str(HERE / "fidelity_program.py")]
    return str(error.value), lines


def divided(weights, x):
    value, gradients = jax.value_and_grad(loss)(weights, x)
    return value / (x.sum() * 0), gradients


CASES = {"nan": (step, np.nan, "jax_debug_nans"), "inf": (divided, 1.0, "jax_debug_infs")}


@pytest.mark.parametrize("jitted", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_the_error_and_its_place_are_stocks(sides, mode, case, jitted):
    function, value, option = CASES[case]
    weights, x = arguments()
    x[0, 0, 0] = value
    assert kernels_in(jax.jit(function).lower(weights, x))
    mode(option)
    errors = []
    for side in sides.values():
        # JAX keeps the traceback of the first call of jnp.mean and the like, whoever made it.
        jax.clear_caches()
        with side():
            errors.append(raised(lambda: (jax.jit(function) if jitted else function)(weights, x)))
    assert errors[0] == errors[1]
    assert case in errors[0][0]


@pytest.mark.parametrize("option", ["jax_debug_nans", "jax_debug_infs", "jax_check_tracer_leaks", "jax_enable_checks"])
def test_healthy_programs_run_on_kernels_in_every_mode(sides, mode, option):
    mode(option)
    with sides["stock"]():
        expected = jax.jit(step)(*arguments())
    assert kernels_in(jax.jit(step).lower(*arguments()))
    assert_close(jax.jit(step)(*arguments()), expected)
    assert_close(step(*arguments()), expected)


@pytest.mark.parametrize("form", ["install", "accelerate"])
def test_without_jit_the_program_runs_operation_by_operation(form, request):
    seen = []

    def spoken(weights, x):
        result = loss(weights, x)
        seen.append(float(jax.lax.stop_gradient(result)))
        return result

    if form == "install":
        request.getfixturevalue("installed")
    function = (jaxext.accelerate if form == "accelerate" else jax.jit)(lambda w, x: jax.value_and_grad(spoken)(w, x))
    with jax.disable_jit():
        found = function(*arguments())
        attended = kernels.layer_norm(arguments()[1])
    with jaxext.disabled():
        expected = jax.jit(jax.value_and_grad(loss))(*arguments())
    assert_close(found, expected)
    assert len(seen) == 1
    np.testing.assert_allclose(seen, expected[0], rtol=1e-5)
    np.testing.assert_allclose(np.mean(attended), 0, atol=1e-6)


def test_a_leaked_tracer_is_found(sides, mode):
    mode("jax_check_tracer_leaks")
    for side in sides.values():
        leaked = []

        def leaking(weights, x):
            leaked.append(x * 2)  # noqa: B023
            return loss(weights, x)

        with side(), pytest.raises(Exception, match="Leaked"):
            jax.jit(jax.grad(leaking))(*arguments())


def test_checkify_finds_what_it_finds_in_stock(sides):
    def checked(weights, x):
        checkify.check(jnp.all(jnp.abs(x) < 3), "an input of size {size}", size=jnp.abs(x).max())
        return step(weights, x)

    weights, x = arguments()
    bad = np.where(np.arange(64) == 3, np.nan, x).astype(x.dtype)
    for errors, data in ((checkify.user_checks, x), (checkify.float_checks, bad), (checkify.all_checks, x)):
        messages = []
        for side in sides.values():
            with side():
                error, _ = jax.jit(checkify.checkify(checked, errors=errors))(weights, data)
                messages.append(error.get())
        assert messages[0] is not None
        assert messages[1].splitlines() == messages[0].splitlines()


def test_checkify_of_a_healthy_program_keeps_the_kernels_and_finds_nothing(installed):
    function = jax.jit(checkify.checkify(step, errors=checkify.user_checks))
    assert kernels_in(function.lower(*arguments()))
    error, found = function(*arguments())
    assert error.get() is None
    with jaxext.disabled():
        assert_close(found, jax.jit(step)(*arguments()))
