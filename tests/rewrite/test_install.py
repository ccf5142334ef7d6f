"""The process-wide switch: on, off and on again, threads, and an import that changes nothing."""

import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import pytest
import toy_attention as toy
from jax import grad as early_grad
from toy_attention import attend

import jaxext
from jaxext import _jax_compat as compat
from jaxext import _settings
from jaxext.rewrite import hooks

X = jnp.ones((3, 4))


@pytest.fixture(autouse=True)
def _toy(monkeypatch):
    toy.use(monkeypatch)
    yield
    jaxext.uninstall()


@jax.jit
def step(x):
    return early_grad(lambda x: attend(x, x, x).sum())(x)


def program() -> str:
    return str(step.trace(X).jaxpr)


def install():
    jaxext.install(memory="system")


def test_on_off_and_on_again_take_no_stale_program():
    plain = program()
    for _ in range(2):
        install()
        assert jaxext.is_installed()
        assert program() != plain
        jaxext.uninstall()
        assert not jaxext.is_installed()
        assert program() == plain


def test_a_compiled_function_is_rewritten_too():
    step(X)
    assert not toy.calls
    install()
    step(X)
    assert len(toy.calls) == 1
    step(X)
    assert len(toy.calls) == 1


def test_installing_twice_is_installing_once():
    install()
    first = compat.insert_hooks(None, None)
    install()
    assert compat.insert_hooks(None, None) is first
    jaxext.uninstall()
    jaxext.uninstall()
    assert not jaxext.is_installed()


def test_excluded_kernels_are_not_used():
    jaxext.install(memory="system", exclude="attention")
    step(X)
    assert not toy.calls


def test_disabled_gives_plain_jax_bit_for_bit():
    plain, text = step(X), program()
    install()
    with jaxext.disabled():
        assert program() == text
        assert (step(X) == plain).all()
    assert program() != text

    @jaxext.disabled()
    def decorated():
        return program()

    assert decorated() == text


def test_disabled_inside_a_function_that_is_traced():
    def forward(x):
        with jaxext.disabled():
            plain = attend(x, x, x)
        return plain + attend(x, x, 2 * x)

    install()
    jax.jit(forward).trace(X)
    assert len(toy.calls) == 1
    toy.calls.clear()
    jax.jit(jax.grad(lambda x: forward(x).sum())).trace(X)
    assert len(toy.calls) == 1


def test_other_threads_are_installed_for_and_disabled_is_of_one_thread():
    install()
    texts = {}

    def run(name):
        texts[name] = program()

    with jaxext.disabled():
        plain = program()
        thread = threading.Thread(target=run, args=("thread",))
        thread.start()
        thread.join()
    assert texts["thread"] != plain


def test_many_threads_install_and_trace_at_once():
    errors = []

    def run(number):
        try:
            for _ in range(3):
                install()
                x = jnp.ones((number + 1, 4))
                with jaxext.disabled():
                    plain = step(x)
                assert jnp.allclose(plain, step(x), atol=1e-5)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and jaxext.is_installed()


def test_disable_in_the_environment_makes_install_do_nothing(monkeypatch):
    monkeypatch.setenv("JAXEXT_DISABLE", "1")
    install()
    assert not jaxext.is_installed()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"precision": "fp4"},
            "install(precision=): unknown precision 'fp4', expected 'fp8' (matrix products in eight bits on GPUs) "
            "or None. "
            "Leave it out to multiply as the program says.",
        ),
        ({"memory": "swap"}, "install: memory='swap', expected 'reuse' or 'system'."),
        (
            {"exclude": "sorting"},
            "install(exclude=): unknown kernel 'sorting'. The kernels are attention, layer_norm, rms_norm, group_norm, "
            "linear_recurrence, softmax_cross_entropy, linear_cross_entropy, matmul, top_k, sort, argmax, cumsum, "
            "gather, scatter, random_bits, convolution, max_pool, recurrence, elementwise.",
        ),
    ],
)
def test_wrong_options_are_clear_errors(options, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011  (the whole text is asserted)
        jaxext.install(**options)
    assert str(raised.value) == message
    assert not jaxext.is_installed()


FRESH = """
import jax
from jax._src import pjit, xla_bridge
before = jax.vjp.__closure__[0].cell_contents, pjit._infer_params
import jaxext, jaxext._install, jaxext._accelerate, jaxext._explain
hooked = lambda: (jax.vjp.__closure__[0].cell_contents, pjit._infer_params)
assert hooked() == before, "importing must not change JAX"
jaxext.install(memory="system")
now = hooked()
assert now[0] is not before[0] and now[1] is not before[1], "install hooks both places"
assert not xla_bridge._backends, "install must not start a device"
jaxext.uninstall()
assert hooked() == before, "uninstall takes the hooks out"
f = jaxext.accelerate(lambda x: x + 1)
assert hooked()[0] is not before[0]
jaxext.install(memory="system"); jaxext.uninstall()
assert hooked()[0] is not before[0], "an accelerated function keeps its hooks"
"""


def test_import_changes_nothing_and_hooks_come_and_go():
    result = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


def reactivated(monkeypatch, **broken):
    """The hooks inserted anew in a JAX in which `broken` names of the compatibility module behave otherwise."""
    monkeypatch.setattr(hooks, "_active", None)
    compat.remove_hooks()
    for name, value in broken.items():
        monkeypatch.setattr(compat, name, value)
    return hooks.activate()


@pytest.fixture
def _hooks_back(monkeypatch):
    yield
    monkeypatch.undo()
    compat.remove_hooks()
    hooks._active = None
    hooks.activate()


@pytest.mark.usefixtures("_hooks_back")
def test_a_jax_without_the_differentiation_hook_still_rewrites_forward_programs(monkeypatch):
    version = jax.__version__
    expected = (
        rf"jaxext does not fit JAX {version} \(jax.vjp has no closure cell to hook\): only functions that are not "
        r"differentiated run on its kernels. Upgrade jaxext."
    )
    with pytest.warns(RuntimeWarning, match=expected):
        status = reactivated(monkeypatch, _closure_cell=lambda *_: None)
    assert (status.differentiation, status.jit) == (False, True)
    with _settings.use(_settings.Settings()):
        jax.jit(attend)(X, X, X)
        assert len(toy.calls) == 1
        step(X)


@pytest.mark.usefixtures("_hooks_back")
def test_a_jax_without_the_jit_hook_still_rewrites_gradients_and_accelerated_functions(monkeypatch):
    with pytest.warns(RuntimeWarning, match="only gradients, and functions under jaxext.accelerate, run on its"):
        status = reactivated(monkeypatch, _hook_jit=lambda _: "jax has no _infer_params to hook")
    assert (status.differentiation, status.jit) == (True, False)
    with _settings.use(_settings.Settings()):
        step(X)
    assert len(toy.calls) == 1
    toy.calls.clear()
    result = jaxext.accelerate(attend)(X, X, X)
    assert len(toy.calls) == 1
    assert jnp.allclose(result, attend(X, X, X), atol=1e-6)


@pytest.mark.usefixtures("_hooks_back")
def test_a_jax_in_which_both_hooks_misbehave_is_left_plain_with_one_warning(monkeypatch):
    def fails(*_):
        raise RuntimeError("moved")

    plain = program()
    with pytest.warns(RuntimeWarning, match="everything runs on plain JAX") as caught:
        status = reactivated(monkeypatch, trace=fails, jit_jaxpr=fails)
    assert len(caught) == 1
    assert (status.differentiation, status.jit) == (False, False)
    with _settings.use(_settings.Settings()):
        assert program() == plain
    assert not toy.calls
