"""Donated buffers, and profiles that name what ran."""

import warnings

import jax
import numpy as np
from fidelity_program import arguments, assert_close, block, kernels_in, step

import jaxext


def test_donated_buffers_are_taken_as_stock_takes_them(sides):
    outcomes = []
    for side in sides.values():
        weights, x = jax.device_put(arguments())
        with side():
            result = jax.jit(step, donate_argnums=0)(weights, x)
        outcomes.append((jax.tree.map(lambda leaf: leaf.is_deleted(), (weights, x)), result))
    assert outcomes[0][0] == outcomes[1][0]
    assert outcomes[1][0][0]["qkv"] and not outcomes[1][0][1]
    assert_close(outcomes[1][1], outcomes[0][1])


def test_the_warning_of_unusable_donations_is_stocks(sides):
    def shrunk(weights, x):
        return block(weights, x)[:, :1]

    texts = []
    for side in sides.values():
        with side(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            lowered = jax.jit(shrunk, donate_argnums=(0, 1)).lower(*jax.device_put(arguments()))
            lowered.compile()
        texts.append([(str(warning.message), warning.category, warning.filename) for warning in caught])
    assert kernels_in(lowered)
    assert texts[0] and texts[0] == texts[1]
    assert "donated" in texts[0][0][0]


def test_a_deleted_buffer_is_the_same_error(sides):
    errors = []
    for side in sides.values():
        weights, x = jax.device_put(arguments())
        function = jaxext.accelerate(step, donate_argnums=0)
        with side():
            function(weights, x)
            try:
                function(weights, x)
            except (RuntimeError, ValueError) as error:
                errors.append((type(error), str(error)))
    assert len(errors) == 2 and errors[0] == errors[1]


def test_a_profile_names_the_kernels_in_the_users_scopes(installed, tmp_path):
    def named(weights, x):
        with jax.named_scope("encoder"):
            return block(weights, x)

    function = jax.jit(named)
    text = function.lower(*arguments()).compile().as_text()
    assert kernels_in(text)
    assert "encoder/jaxext.layer_norm" in text.replace("encoder/jit(norm)/", "encoder/")
    jax.block_until_ready(function(*arguments()))
    with jax.profiler.trace(str(tmp_path)):
        jax.block_until_ready(function(*arguments()))
    (profile,) = tmp_path.rglob("*.xplane.pb")
    raw = profile.read_bytes()
    for name in (b"jaxext_layer_norm", b"jaxext_attention_forward"):
        assert name in raw, sorted({part for part in raw.split(b"\0") if b"jaxext" in part})[:20]


def test_results_do_not_share_memory_with_arguments(installed):
    weights, x = arguments()
    before = x.copy()
    first = np.asarray(jax.jit(block)(weights, x))
    jax.jit(block)(weights, x + 1)
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(first, jax.jit(block)(weights, x))
