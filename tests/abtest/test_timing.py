"""Paired ratios and the order of measurements."""

import itertools

import numpy as np
import pytest

from jaxext.abtest.timing import measure_rounds, orders, paired_ratio, ratio_over_runs


def test_ratio_of_equal_pairs_is_exact():
    ratio = paired_ratio([4.0, 8.0, 2.0], [2.0, 4.0, 1.0], seed=0)
    assert ratio.value == 2.0
    assert ratio.interval == (2.0, 2.0)
    assert str(ratio) == "2.00x [2.00, 2.00]"


def test_pairing_cancels_drift_that_both_sides_share():
    drift = np.linspace(1, 3, 30)
    ratio = paired_ratio(list(1.5 * drift), list(drift), seed=0)
    assert ratio.interval == pytest.approx((1.5, 1.5))


def test_interval_covers_the_true_ratio_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        noise = rng.lognormal(0, 0.2, size=(2, 20))
        low, high = paired_ratio(list(2 * noise[0]), list(noise[1]), seed=trial).interval
        covered += low <= 2 <= high
    # 95% of 200 with four standard errors (sqrt(200 * 0.05 * 0.95) = 3.1) of room, and a little for the percentiles.
    assert covered >= 175


def test_interval_tells_what_differs_from_process_to_process():
    """Five processes a side, each slow or fast as a whole, and 60 steps in each that hardly differ."""
    rng = np.random.default_rng(0)
    covered = {"runs": 0, "pairs": 0}
    for trial in range(100):
        runs = [tuple(list(rng.lognormal(0, 0.3) * rng.lognormal(0, 0.02, 60)) for _ in range(2)) for _ in range(5)]
        pooled = paired_ratio(*(list(itertools.chain(*side)) for side in zip(*runs, strict=True)), seed=trial)
        for name, ratio in (("runs", ratio_over_runs(runs, seed=trial)), ("pairs", pooled)):
            covered[name] += ratio.interval[0] <= 1 <= ratio.interval[1]
            assert (ratio.value, ratio.pairs) == (pooled.value, 300)
    # The range of five independent ratios holds their median with probability 1 - 2**-4, a percentile range of medians
    # somewhat less often; four standard errors (3) of room. As if all 300 pairs were independent, hardly ever.
    assert covered["runs"] >= 80 and covered["pairs"] <= 40


def test_runs_of_unequal_length_weigh_the_same_in_the_interval():
    low, high = ratio_over_runs([([2.0], [1.0]), ([3.0] * 50, [1.0] * 50)], seed=0).interval
    assert (low, high) == (2.0, 3.0)


def test_two_pairs_have_no_interval():
    assert paired_ratio([1.0, 2.0], [1.0, 1.0], seed=0).interval is None


@pytest.mark.parametrize(("left", "right"), [([], []), ([1.0], [1.0, 2.0])])
def test_unequal_or_empty_lists_are_refused(left, right):
    with pytest.raises(ValueError, match="expected as many of each, at least one"):
        paired_ratio(left, right, seed=0)


def test_no_run_is_refused():
    with pytest.raises(ValueError, match=r"^runs is empty: expected the measurements of at least one run\.$"):
        ratio_over_runs([], seed=0)


def test_orders_are_random_fair_and_repeatable():
    rounds = list(itertools.islice(orders(["a", "b"], seed=1), 200))
    assert all(sorted(order) == ["a", "b"] for order in rounds)
    first = sum(order[0] == "a" for order in rounds)
    assert 70 <= first <= 130  # 100 with four standard deviations (7.1)
    assert rounds == list(itertools.islice(orders(["a", "b"], seed=1), 200))


@pytest.mark.parametrize(("rounds", "least", "expected"), [(5, 3, 3), (2, 3, 2), (0, 3, 0)])
def test_time_runs_out_between_rounds_only(rounds, least, expected):
    calls = []
    seconds = measure_rounds(
        ["a", "b"],
        lambda side: calls.append(side) or 1.0,
        rounds=rounds,
        seed=0,
        out_of_time=lambda: True,
        least=least,
    )
    assert {side: len(found) for side, found in seconds.items()} == {"a": expected, "b": expected}
    assert len(calls) == 2 * expected
