"""The environment is read with clear errors, and the switch is part of JAX's jit cache key."""

import threading

import jax
import jax.numpy as jnp
import pytest

from jaxext import _settings
from jaxext._settings import Settings, from_environment


def test_without_variables_everything_is_on():
    assert from_environment({}) == Settings()


@pytest.mark.parametrize("value", ["1", "true", "YES", " on "])
def test_disable_switches_everything_off(value):
    assert from_environment({"JAXEXT_DISABLE": value}) is None


@pytest.mark.parametrize("value", ["0", "", "false", "no", "off"])
def test_disable_may_be_switched_off_explicitly(value):
    assert from_environment({"JAXEXT_DISABLE": value}) == Settings()


def test_kernels_are_switched_off_by_name():
    settings = from_environment({"JAXEXT_KERNELS": "-attention, -layer_norm,"})
    assert settings == Settings(exclude=frozenset({"attention", "layer_norm"}))


def test_precision():
    assert from_environment({"JAXEXT_PRECISION": " fp8 "}) == Settings(precision="fp8")
    assert from_environment({"JAXEXT_PRECISION": ""}) == Settings()


def test_a_precision_holds_inside_too():
    eight = Settings(precision="fp8")
    assert eight != Settings() and Settings().inside(eight) == eight and eight.inside(Settings()) == eight


def test_strict():
    assert from_environment({"JAXEXT_STRICT": "1"}) == Settings(strict=True)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"JAXEXT_KERNELS": "-atention"},
            "JAXEXT_KERNELS: unknown kernel 'atention'. The kernels are attention, layer_norm, rms_norm, group_norm, "
            "linear_recurrence, softmax_cross_entropy, linear_cross_entropy, matmul, top_k, sort, argmax, cumsum, "
            "gather, scatter, random_bits, convolution, max_pool, recurrence, elementwise.",
        ),
        (
            {"JAXEXT_KERNELS": "attention"},
            "JAXEXT_KERNELS: 'attention' does not start with '-'. List the kernels to switch off, as in "
            "JAXEXT_KERNELS=-attention,-layer_norm; all others are on.",
        ),
        (
            {"JAXEXT_DISABLE": "maybe"},
            "JAXEXT_DISABLE='maybe': expected 1 or 0. Unset it to use the default, 0.",
        ),
        (
            {"JAXEXT_PRECISION": "fp4"},
            "JAXEXT_PRECISION: unknown precision 'fp4', expected 'fp8' (matrix products in eight bits on GPUs) "
            "or None. "
            "Leave it out to multiply as the program says.",
        ),
        ({"JAXEXT_STRICT": "2"}, "JAXEXT_STRICT='2': expected 1 or 0. Unset it to use the default, 0."),
        # A wrong name is an error even where jaxext is off: it would surprise later.
        (
            {"JAXEXT_DISABLE": "1", "JAXEXT_KERNELS": "-x"},
            "JAXEXT_KERNELS: unknown kernel 'x'. The kernels are attention, layer_norm, rms_norm, group_norm, "
            "linear_recurrence, softmax_cross_entropy, linear_cross_entropy, matmul, top_k, sort, argmax, cumsum, "
            "gather, scatter, random_bits, convolution, max_pool, recurrence, elementwise.",
        ),
    ],
)
def test_unreadable_variables_are_clear_errors(variables, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011  (the whole text is asserted)
        from_environment(variables)
    assert str(raised.value) == message


def test_equal_settings_are_one_cache_key():
    a, b = Settings(exclude=frozenset({"attention"})), Settings(exclude=frozenset({"attention"}))
    assert a == b and hash(a) == hash(b) and a != Settings()


def test_each_setting_has_its_own_trace_and_finds_it_again():
    traces = []

    @jax.jit
    def f(x):
        traces.append(_settings.current())
        return x + 1

    x = jnp.ones(2)
    without = Settings(exclude=frozenset({"attention"}))
    for _ in range(2):
        f(x)
        for settings in (Settings(), without, None):
            with _settings.use(settings):
                f(x)
    assert traces == [None, Settings(), without, None]


def test_use_is_of_one_thread():
    seen = []
    with _settings.use(Settings()):
        thread = threading.Thread(target=lambda: seen.append(_settings.current()))
        thread.start()
        thread.join()
        assert _settings.current() == Settings()
    assert seen == [None] and _settings.current() is None


def test_off_is_off_and_is_left_again():
    with _settings.use(Settings()):
        with _settings.use(None):
            assert _settings.current() is None and _settings.is_off()
        assert _settings.current() == Settings() and not _settings.is_off()
    assert not _settings.is_off()


def test_settings_inside_others_leave_out_what_either_leaves_out():
    inner = Settings(exclude=frozenset({"attention"}), require=("rms_norm",))
    outer = Settings(exclude=frozenset({"layer_norm"}), strict=True)
    merged = inner.inside(outer)
    assert merged == Settings(frozenset({"attention", "layer_norm"}), ("rms_norm",), strict=True)
    assert inner.inside(None) is inner


def test_a_probe_enforces_nothing():
    probed = Settings(require=("attention",), strict=True).inside(Settings(probe=3))
    assert probed == Settings(probe=3)
