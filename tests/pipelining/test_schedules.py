"""Every schedule is complete, free of deadlock, and as short and as lean as its source says.

p ranks, m microbatches, v stages on a rank. Durations are of a whole rank's share of the model: where a rank has v
stages, each takes 1/v of them, and counts 1/v in memory.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxext.pipelining import schedules
from jaxext.pipelining.action import Schedule
from jaxext.pipelining.passes import lower
from jaxext.pipelining.simulate import Costs, simulate
from jaxext.pipelining.validate import validate

RANKS, MICROBATCHES, CHUNKS = st.integers(1, 16), st.integers(1, 64), st.integers(1, 4)
# Of a forward pass, cotangents, weight gradients.
COSTS = [(1.0, 1.0, 1.0), (1.0, 1.5, 0.75), (2.0, 1.0, 0.5)]


def simulated(name, ranks, microbatches, costs=(1.0, 1.0, 1.0), chunks=None):
    schedule = schedules.make(name, ranks, microbatches, num_chunks=chunks)
    share = schedule.num_stages // ranks
    return simulate(schedule, Costs.even(schedule.num_stages, *(cost / share for cost in costs)))


def of_a_rank(timeline):
    """Peak of live activations, in those of a whole rank's share of the model."""
    return [peak * timeline.schedule.num_ranks / timeline.schedule.num_stages for peak in timeline.peak_live]


@pytest.mark.parametrize("name", schedules.NAMES)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(ranks=RANKS, microbatches=MICROBATCHES, chunks=CHUNKS)
def test_a_schedule_is_valid_and_lowers_and_reads_back_from_its_texts(name, ranks, microbatches, chunks):
    free = name in ("interleaved_1f1b", "auto")
    schedule = schedules.make(name, ranks, microbatches, num_chunks=chunks if free else None)
    validate(schedule)
    assert (schedule.name, schedule.num_ranks, schedule.num_microbatches) == (name, ranks, microbatches)
    lowered = lower(schedule)
    assert Schedule.from_text(lowered.to_text()) == lowered
    assert Schedule.from_csv(lowered.to_csv()) == lowered


@pytest.mark.parametrize("costs", COSTS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(ranks=RANKS, microbatches=MICROBATCHES)
def test_bubble_and_memory_of_1f1b_and_gpipe_are_the_closed_forms(costs, ranks, microbatches):
    one, all_forward = (simulated(name, ranks, microbatches, costs) for name in ("1f1b", "gpipe"))
    assert one.bubble == all_forward.bubble == pytest.approx((ranks - 1) * sum(costs))
    assert one.peak_live == tuple(min(microbatches, ranks - rank) for rank in range(ranks))
    assert all_forward.peak_live == (microbatches,) * ranks


@pytest.mark.parametrize("costs", COSTS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(ranks=RANKS, microbatches=MICROBATCHES, chunks=CHUNKS)
def test_the_bubble_of_interleaved_1f1b_is_that_of_1f1b_by_the_number_of_chunks(costs, ranks, microbatches, chunks):
    found = simulated("interleaved_1f1b", ranks, microbatches, costs, chunks)
    # With fewer microbatches than ranks, every round of them ends in a wait.
    waits = (chunks - 1) * max(0, ranks - microbatches)
    assert found.bubble == pytest.approx((ranks - 1 + waits) * sum(costs) / chunks)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(ranks=RANKS, microbatches=MICROBATCHES, chunks=CHUNKS)
def test_the_memory_of_interleaved_1f1b_is_the_way_there_and_back_and_a_group_for_each_earlier_stage(
    ranks, microbatches, chunks
):
    group = -(-microbatches // max(1, microbatches // ranks))
    expected = [
        min(microbatches * chunks, (1 if chunks == 1 else 2) * (ranks - rank - 1) + (chunks - 1) * group + 1)
        for rank in range(ranks)
    ]
    assert simulated("interleaved_1f1b", ranks, microbatches, chunks=chunks).peak_live == tuple(expected)


@pytest.mark.parametrize("costs", [*COSTS, (1.0, 1.0, 2.0), (0.5, 1.0, 1.0)])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(ranks=RANKS, data=st.data())
def test_with_a_microbatch_for_each_rank_zb_h1_has_its_closed_form(costs, ranks, data):
    forward, cotangents, weights = costs
    found = simulated("zb_h1", ranks, data.draw(st.integers(ranks, 64)), costs)
    assert found.bubble == pytest.approx((ranks - 1) * max(forward, cotangents, forward + cotangents - weights))
    if weights <= min(forward, cotangents):
        assert found.bubble == pytest.approx((ranks - 1) * (sum(costs) - 2 * weights))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(ranks=RANKS, microbatches=MICROBATCHES)
def test_no_rank_of_zb_h1_keeps_more_than_the_first_of_1f1b(ranks, microbatches):
    limit = max(simulated("1f1b", ranks, microbatches).peak_live)
    assert max(simulated("zb_h1", ranks, microbatches).peak_live) <= limit


@settings(max_examples=12, deadline=None, derandomize=True)
@given(ranks=RANKS, data=st.data())
def test_zb_v_is_as_short_as_the_last_ranks_late_begin_allows(ranks, data):
    rounds = data.draw(st.integers(1, 64 // ranks))
    found = simulated("zb_v", ranks, rounds * ranks, (2.0, 2.0, 2.0))
    assert found.makespan == 6 * rounds * ranks + ranks - 1
    odd = simulated("zb_v", ranks, data.draw(st.integers(2 * ranks, 64)), (2.0, 2.0, 2.0))
    assert ranks - 1 <= odd.bubble <= ranks - 1 + 4


@settings(max_examples=20, deadline=None, derandomize=True)
@given(ranks=RANKS, microbatches=MICROBATCHES)
def test_no_rank_of_zb_v_keeps_more_than_the_first_of_1f1b(ranks, microbatches):
    limit = max(simulated("1f1b", ranks, microbatches).peak_live)
    assert max(of_a_rank(simulated("zb_v", ranks, microbatches))) <= limit


@pytest.mark.parametrize("costs", COSTS)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(ranks=RANKS, data=st.data())
def test_with_two_microbatches_for_each_rank_dualpipe_v_keeps_within_its_closed_form(costs, ranks, data):
    forward, cotangents, weights = (cost / 2 for cost in costs)
    backward = cotangents + weights
    found = simulated("dualpipe_v", ranks, data.draw(st.integers(2 * ranks, 64)), costs)
    assert found.bubble <= (ranks - 1) * (forward + backward + backward - 3 * weights) + 1e-9
    if forward == cotangents == weights:
        assert found.bubble == pytest.approx((ranks - 1) * forward)
    assert max(of_a_rank(found)) <= ranks + 1 / 2


FIXED = {1: ("gpipe", "1f1b", "zb_h1"), 2: ("interleaved_1f1b", "zb_v", "dualpipe_v"), 3: ("interleaved_1f1b",)}


@st.composite
def problems(draw):
    """Ranks, microbatches, chunks, uneven costs, limits of memory."""
    ranks, microbatches, chunks = draw(st.integers(1, 8)), draw(st.integers(1, 24)), draw(st.integers(1, 3))
    each = st.lists(st.floats(0, 4), min_size=ranks * chunks, max_size=ranks * chunks)
    sent = st.lists(st.floats(0, 4), min_size=ranks * chunks, max_size=ranks * chunks)
    link = draw(st.sampled_from([0.0, 0.3])), draw(st.just(()) | sent.map(tuple)), draw(st.sampled_from([1.0, 4.0]))
    costs = Costs(*(tuple(draw(each)) for _ in range(3)), *link)
    limits = st.lists(st.integers(chunks, 3 * ranks * chunks), min_size=ranks, max_size=ranks)
    return ranks, microbatches, chunks, costs, draw(st.none() | limits)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(problems())
def test_auto_keeps_its_limit_and_is_never_slower_than_a_known_schedule_that_does(problem):
    ranks, microbatches, chunks, costs, limits = problem
    schedule = schedules.make("auto", ranks, microbatches, num_chunks=chunks, costs=costs, max_live=limits)
    limits = limits or [ranks * chunks] * ranks
    validate(schedule, limits)
    for name in FIXED[chunks]:
        known = simulate(schedules.make(name, ranks, microbatches, num_chunks=chunks), costs)
        if all(peak <= limit for peak, limit in zip(known.peak_live, limits, strict=True)):
            assert simulate(schedule, costs).makespan <= known.makespan * (1 + 1e-9)


def test_auto_gets_below_every_known_schedule_where_costs_are_uneven():
    costs = Costs((1.0, 1.2, 0.8, 1.5) * 2, (1.0, 1.6, 0.7, 1.5) * 2, (0.6, 1.1, 0.9, 0.8) * 2, transfer=0.3)
    made = simulate(schedules.make("auto", 4, 9, num_chunks=2, costs=costs, max_live=[16] * 4), costs)
    known = (simulate(schedules.make(name, 4, 9, num_chunks=2), costs).makespan for name in FIXED[2])
    assert made.makespan < 0.95 * min(known)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("2f2b", {}, "schedule '2f2b': expected one of gpipe, 1f1b, interleaved_1f1b, zb_h1, zb_v, dualpipe_v, auto"),
        ("1f1b", {"num_ranks": 0}, "num_ranks=0: expected at least 1"),
        ("1f1b", {"num_microbatches": 0}, "num_microbatches=0: expected at least 1"),
        ("interleaved_1f1b", {"num_chunks": 0}, "num_chunks=0: expected at least 1"),
        ("zb_v", {"num_chunks": 1}, "num_chunks=1: zb_v has 2 on each rank. Leave it out, or take interleaved_1f1b"),
        ("gpipe", {"num_chunks": 2}, "num_chunks=2: gpipe has 1 on each rank"),
        ("auto", {"max_live": [4, 4]}, r"max_live=\[4, 4\]: expected one limit for each of 4 ranks"),
        (
            "auto",
            {"max_live": [4] * 4, "num_chunks": 5},
            "at least the 5 that one microbatch needs.* Raise it",
        ),
        ("auto", {"costs": Costs.even(3)}, "costs.forward has 3 values, the schedule 4 stages; give one value a stage"),
    ],
)
def test_an_argument_that_makes_no_schedule_is_an_error_that_says_what_would(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        schedules.make(name, **{"num_ranks": 4, "num_microbatches": 8} | arguments)
