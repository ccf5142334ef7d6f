"""Tolerances: what must pass, what must fail, and how a failure reads."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxext.abtest import parity

F32, BF16 = parity.TOLERANCES["float32"], parity.TOLERANCES["bfloat16"]


def losses(count=25, factor=1.0):
    return [factor * value for value in np.linspace(5, 3, count).tolist()]


def test_equal_losses_agree():
    found = parity.judge(losses(), losses(), [], F32)
    assert found.agrees
    assert found.worst_loss == 0


@pytest.mark.parametrize(("rule", "passing", "failing"), [(F32, 9e-5, 2e-4), (BF16, 9e-3, 2e-2)])
def test_losses_are_held_to_the_tolerance_of_their_dtype(rule, passing, failing):
    assert parity.judge(losses(), losses(factor=1 + passing), [], rule).losses_agree
    found = parity.judge(losses(), losses(factor=1 + failing), [], rule)
    assert not found.losses_agree
    assert found.failures[0].startswith("loss at step 1: stock 5, jaxext 5.")
    assert "above the tolerance" in found.failures[0]


def test_nan_on_one_side_only_disagrees():
    broken = [*losses()[:4], float("nan"), *losses()[5:]]
    assert "loss at step 5" in parity.judge(losses(), broken, [], F32).failures[0]
    assert parity.judge(broken, broken, [], F32).agrees


def test_after_twenty_steps_the_curve_counts_not_the_step():
    reference = losses(60)
    wobble = [*reference[:20], *(value * (1 + 2e-3 * (-1) ** i) for i, value in enumerate(reference[20:]))]
    assert parity.judge(reference, wobble, [], F32).agrees
    apart = [*reference[:20], *(value * 1.1 for value in reference[20:])]
    assert "loss curve: mean of the last ten losses" in parity.judge(reference, apart, [], F32).failures[0]


def compare(reference, candidate, probe, start, rule=F32):
    """One leaf `w`; the probe began where the reference did."""
    sides = ({"w": reference}, {"w": candidate}, {"w": probe})
    (leaf,) = parity.compare_leaves(1, sides, ({"w": start}, {"w": start}), rule)
    return leaf


def test_a_leaf_within_rounding_agrees_and_a_wrong_update_does_not():
    rng = np.random.default_rng(0)
    start = rng.normal(size=1000).astype(np.float32)
    update = rng.normal(size=1000).astype(np.float32)
    probe = start + update * np.float32(1 + 1e-6)
    assert compare(start + update, start + update * np.float32(1 + 1e-5), probe, start).fraction < 0.1
    assert compare(start + update, start + update * np.float32(1.01), probe, start).fraction > 5


def test_a_leaf_moved_by_rounding_alone_is_judged_by_the_probe():
    rng = np.random.default_rng(0)
    start = np.zeros(64, np.float32)
    signs = [rng.choice([-1e-3, 1e-3], size=64).astype(np.float32) for _ in range(3)]
    assert compare(*signs, start).fraction < 1
    assert compare(signs[0], signs[1] * 1000, signs[2], start).fraction > 1


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.bool_])
def test_integers_must_be_exact_where_the_probe_is(dtype):
    value = np.array([1, 0, 1], dtype)
    other = np.array([1, 1, 1], dtype)
    assert compare(value, value, value, value).fraction == 0
    assert compare(value, other, value, value).fraction == float("inf")
    assert compare(value, other, other, value).fraction < 1


def test_bfloat16_leaves_compare():
    value = jnp.linspace(0, 1, 64, dtype=jnp.bfloat16)
    start = jnp.zeros(64, jnp.bfloat16)
    assert compare(value, value * jnp.bfloat16(1.01), value, start, BF16).fraction < 1
    assert compare(value, value * jnp.bfloat16(1.5), value, start, BF16).fraction > 1


def test_nan_in_a_leaf_disagrees_unless_stock_has_it_too():
    value = np.array([1.0, np.nan], np.float32)
    start = np.zeros(2, np.float32)
    assert compare(value, value, value, start).fraction == 0
    assert compare(np.ones(2, np.float32), value, np.ones(2, np.float32), start).fraction == float("inf")


def test_a_missing_leaf_and_another_shape_disagree():
    one = np.ones(3, np.float32)
    found = parity.compare_leaves(1, ({"w": one}, {}, {"w": one}), ({}, {}), F32)
    assert found[0].fraction == float("inf")
    assert compare(one, np.ones(4, np.float32), one, one).fraction == float("inf")


def test_a_failure_names_the_leaf_its_error_and_its_bound():
    leaves = [parity.LeafError("params['w']", 2, 1.0, 0.5, 3.0), parity.LeafError("params['b']", 1, 0.1, 0.5, 3.0)]
    found = parity.judge([], [], leaves, F32)
    assert found.failures == [
        "leaf params['w'] after step 2: error 1.00e+00 above its bound 5.00e-01 (stock changed it by 3.00e+00; norms)"
    ]
    assert found.losses_agree
    assert not found.agrees


def test_the_coarsest_dtype_decides():
    assert parity.tolerance_for(("bfloat16", "float32")) is BF16
    assert parity.tolerance_for(("float32",)) is F32
    assert parity.tolerance_for(()) is F32


def test_the_probe_is_disturbed_by_one_roundoff_and_zeros_and_integers_stay():
    disturb = parity.disturber(F32, seed=0)
    value = np.ones(1000, np.float32)
    assert 0 < np.abs(disturb(value) - 1).max() <= 2 * F32.eps
    assert np.array_equal(disturb(np.zeros(3, np.float32)), np.zeros(3))
    assert np.array_equal(disturb(np.arange(3)), np.arange(3))


def test_second_moments_of_rounding_do_not_underflow():
    rng = np.random.default_rng(0)
    moments = [(rng.normal(size=64) ** 2 * 1e-25).astype(np.float32) for _ in range(3)]
    assert compare(*moments, np.zeros(64, np.float32)).fraction < 1


def test_a_few_turned_elements_of_a_sign_like_update_agree_and_many_do_not():
    rng = np.random.default_rng(0)
    start = rng.normal(size=128).astype(np.float32)
    signs = rng.choice([-1, 1], size=128).astype(np.float32)
    turned = {count: np.where(np.arange(128) < count, -signs, signs) for count in (2, 16)}
    after = {count: start + np.float32(3e-5) * turned[count] for count in turned}
    reference = start + np.float32(3e-5) * signs
    assert compare(reference, after[2], reference, start, BF16).fraction < 1
    assert compare(reference, after[16], reference, start, BF16).fraction > 1
    uneven = np.linspace(0.1, 3, 128).astype(np.float32)
    assert compare(uneven, np.where(np.arange(128) < 2, -uneven, uneven), uneven, 0 * uneven, BF16).fraction < 1
    assert compare(uneven, np.where(np.arange(128) > 125, -uneven, uneven), uneven, 0 * uneven, BF16).fraction > 1
