"""The simulated times are those that a rank's order and what it waits for give, and no others."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxext.pipelining import schedules
from jaxext.pipelining import simulate as module
from jaxext.pipelining.action import Schedule, needs
from jaxext.pipelining.simulate import Costs, DeadlockError, Event, Timeline, global_order, simulate

DURATIONS = st.sampled_from([0.0, 0.5, 1.0, 2.0])


@st.composite
def problems(draw):
    name, chunks = draw(st.sampled_from(schedules.NAMES)), draw(st.integers(1, 4))
    free = name in ("interleaved_1f1b", "auto")
    schedule = schedules.make(
        name, draw(st.integers(1, 8)), draw(st.integers(1, 24)), num_chunks=chunks if free else None
    )
    each = st.lists(DURATIONS, min_size=schedule.num_stages, max_size=schedule.num_stages)
    sent = st.lists(st.sampled_from([0.0, 1.0, 4.0]), min_size=schedule.num_stages, max_size=schedule.num_stages)
    passes = (tuple(draw(each)) for _ in range(3))
    return schedule, Costs(*passes, draw(DURATIONS), tuple(draw(sent)), draw(st.sampled_from([0.5, 2.0, float("inf")])))


def arrivals(found, costs):
    """When what each rank sends is at the other, from the order in which it makes them alone."""
    placement, there = found.schedule.placement, {}
    for rank in range(found.schedule.num_ranks):
        free = 0.0
        for event in sorted((e for e in found.events if e.rank == rank), key=lambda e: e.end):
            kind, stage, _ = event.action.result
            target = stage + (1 if kind == "F" else -1)
            if kind != "W" and target in range(len(placement)) and placement[target] != rank:
                free = max(free, event.end) + costs.sent_bytes[min(stage, target)] / costs.bandwidth
                there[event.action.result] = free + costs.transfer
    return there


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problems())
def test_every_action_starts_as_soon_as_its_rank_is_free_and_what_it_needs_is_there(problem):
    schedule, costs = problem
    found = simulate(schedule, costs)
    times = {event.action: event for event in found.events}
    ends = {event.action.result: event.end for event in found.events}
    sent = arrivals(found, costs)
    for rank, actions in enumerate(schedule.actions):
        free = 0.0
        for action in actions:
            there = [free]
            for result in needs(action, schedule.num_stages):
                crosses = schedule.placement[result[1]] != rank
                there.append(sent[result] if crosses else ends[result])
            assert times[action].start == max(there)
            assert times[action].end == times[action].start + costs.of(action)
            free = times[action].end


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problems())
def test_the_global_order_keeps_each_ranks_order_and_all_that_an_action_needs(problem):
    schedule, costs = problem
    order = global_order(schedule, costs)
    for rank, actions in enumerate(schedule.actions):
        assert tuple(action for action in order if schedule.placement[action.stage] == rank) == actions
    done = set()
    for action in order:
        assert done.issuperset(needs(action, schedule.num_stages))
        done.add(action.result)


def test_a_transfer_delays_what_crosses_from_rank_to_rank_alone():
    costs = Costs.even(2, 1.0, 2.0, 3.0, transfer=0.25)
    one = simulate(schedules.make("gpipe", 2, 1), costs)
    assert [(e.action.kind.value, e.rank, e.start, e.end) for e in one.events] == [
        ("F", 0, 0.0, 1.0), ("F", 1, 1.25, 2.25), ("B", 1, 2.25, 7.25), ("B", 0, 7.5, 12.5),
    ]  # fmt: skip
    assert simulate(schedules.make("interleaved_1f1b", 1, 1, num_chunks=2), costs).makespan == 12


def test_bytes_take_their_time_on_the_way_there_and_back():
    costs = Costs((1.0, 1.0), (1.0, 1.0), (1.0, 1.0), transfer=0.5, sent_bytes=(300.0,), bandwidth=100.0)
    assert simulate(schedules.make("gpipe", 2, 1), costs).makespan == 6 + 2 * (0.5 + 3.0)
    assert simulate(schedules.make("auto", 2, 1, costs=costs), costs).makespan == 5 + 2 * (0.5 + 3.0)


@pytest.mark.parametrize("microbatches", [1, 2, 7])
@pytest.mark.parametrize("latency", [0.0, 0.5])
@pytest.mark.parametrize("leaving", [3.0, 5.0])
def test_messages_that_take_longer_than_passes_wait_for_each_other(microbatches, latency, leaving):
    costs = Costs((1.0, 1.0), (1.0, 1.0), (2.0, 2.0), latency, (leaving * 10,), bandwidth=10.0)
    found = simulate(schedules.make("gpipe", 2, microbatches), costs)
    # The first pass, all activations, the last rank's last pass and first backward pass, all cotangents, the last one.
    assert found.makespan == 1 + microbatches * leaving + latency + 1 + 3 + microbatches * leaving + latency + 3


def test_cotangents_wait_for_activations_that_leave_their_rank():
    costs = Costs((1.0,) * 3, (1.0,) * 3, (0.0,) * 3, sent_bytes=(1.0, 10.0), bandwidth=1.0)
    first = "F0 F1 F2 B0 B1 B2"
    text = f"x microbatches=3 placement=0,1,2\nrank 0: {first}\nrank 1: {first}\nrank 2: F0 B0 F1 B1 F2 B2"
    found = simulate(Schedule.from_text(text), costs)
    start = {(event.rank, event.action.kind, event.action.microbatch): event.start for event in found.events}
    # What rank 1 made at 3, 4 and 5 leaves it until 33. Its first cotangents are made at 26, and with rank 0 at 34.
    assert [start[2, "F", m] for m in range(3)] == [13, 23, 33]
    assert (start[1, "B", 0], start[0, "B", 0]) == (25, 34)


def test_busy_and_idle_times_are_by_rank_and_the_bubble_is_of_the_busiest():
    costs = Costs((1.0, 2.0), (1.0, 2.0), (0.0, 0.0))
    found = simulate(schedules.make("1f1b", 2, 3), costs)
    assert found.makespan == 14 and found.busy == (6.0, 12.0)
    assert found.idle == (8.0, 2.0)
    assert found.bubble == 2 and found.bubble_fraction == pytest.approx(2 / 14)
    assert found.mean_idle_fraction == pytest.approx(10 / 28)


def test_a_timeline_is_made_of_measured_times_too():
    schedule = schedules.make("1f1b", 1, 1)
    forward, backward = schedule.actions[0]
    found = Timeline.of(schedule, [Event(0, backward, 2.0, 4.0), Event(0, forward, 0.0, 1.5)])
    assert (found.makespan, found.busy, found.peak_live) == (4.0, (3.5,), (1,))
    assert [event.action for event in found.events] == [forward, backward]


def test_a_deadlock_is_an_error_with_what_each_rank_waits_for():
    text = "x microbatches=1 placement=0,1\nrank 0: B0 F0\nrank 1: F0 B0"
    with pytest.raises(DeadlockError, match="ranks 0, 1 wait for what is never done before") as found:
        simulate(Schedule.from_text(text), Costs.even(2))
    assert found.value.waiting == {0: (0, ("F", 0, 0)), 1: (0, ("F", 0, 0))}


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        (Costs.even(3), "costs.forward has 3 values, the schedule 2 stages; give one value a stage"),
        (Costs((1, 1), (1, 1), (1,)), "costs.backward_weight has 1 values"),
        (Costs((1, 1), (1, 1), (1, 1), sent_bytes=(1, 1, 1)), "costs.sent_bytes has 3 values"),
        (Costs((1, float("nan")), (1, 1), (1, 1)), r"costs.forward=\(1, nan\): expected finite numbers of at least 0"),
        (Costs((1, 1), (1, 1), (1, 1), bandwidth=0.0), r"costs.bandwidth=0.0: expected .* more than 0 bytes per unit"),
    ],
)
def test_costs_of_another_number_of_stages_are_refused(costs, message):
    with pytest.raises(ValueError, match=message):
        simulate(schedules.make("1f1b", 2, 3), costs)


def test_an_action_is_looked_at_once_more_at_most_when_what_it_waits_for_is_there(monkeypatch):
    schedule = schedules.make("zb_v", 8, 40)
    looks = Counter()
    monkeypatch.setattr(module, "needs", lambda action, count: looks.update([action]) or needs(action, count))
    simulate(schedule, Costs.even(16))
    assert len(looks) == 40 * 3 * 16 and max(looks.values()) == 2
