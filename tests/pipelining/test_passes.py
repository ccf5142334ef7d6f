"""Passes keep the computations and add moves that never block and deletes after the last use."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxext.pipelining import schedules
from jaxext.pipelining.action import COMPUTE, RECEIVES, SENDS, Kind, counterpart
from jaxext.pipelining.passes import add_communication, add_deletes, lower, order_communication
from jaxext.pipelining.simulate import Costs, simulate
from jaxext.pipelining.validate import ScheduleError, validate

NAMES = st.sampled_from(schedules.NAMES)


def computations(schedule):
    return tuple(tuple(a for a in actions if a.kind in COMPUTE) for actions in schedule.actions)


def test_a_send_follows_what_it_sends_and_a_receive_precedes_what_needs_it():
    added = add_communication(schedules.make("1f1b", 3, 2))
    assert [" ".join(line.split()) for line in added.to_text().splitlines()[1:]] == [
        "rank 0: F0 F0→1 F1 F1→1 B0←1 B0 B1←1 B1",
        "rank 1: F0←0 F0 F0→2 F1←0 F1 F1→2 B0←2 B0 B0→0 B1←2 B1 B1→0",
        "rank 2: F0←1 F0 B0 B0→1 F1←1 F1 B1 B1→1",
    ]


def test_stages_on_the_same_rank_exchange_nothing():
    moves = [a for actions in lower(schedules.make("zb_v", 3, 4)).actions for a in actions if a.kind in SENDS]
    assert {(a.kind, a.stage) for a in moves} == {
        *((Kind.SEND_F, stage) for stage in (0, 1, 3, 4)),
        *((Kind.SEND_B, stage) for stage in (1, 2, 4, 5)),
    }


def test_ordered_moves_are_received_as_soon_as_they_are_sent():
    lowered = lower(schedules.make("1f1b", 2, 3))
    assert " ".join(lowered.to_text().splitlines()[2].split()) == (
        "rank 1: F0←0 F0 F1←0 B0 D0 B0→0 F1 B1 D1 B1→0 F2←0 F2 B2 D2 B2→0"
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(NAMES, st.integers(1, 8), st.integers(1, 24), st.lists(st.floats(0, 3), min_size=4, max_size=4))
def test_whatever_the_costs_ordered_moves_pass_even_where_each_waits_for_its_other_half(
    name, ranks, microbatches, costs
):
    schedule = schedules.make(name, ranks, microbatches)
    lowered = lower(schedule, costs=Costs.even(schedule.num_stages, *costs))
    validate(lowered)
    assert computations(lowered) == schedule.actions
    sent = [counterpart(a, rank) for rank, row in enumerate(lowered.actions) for a in row if a.kind in SENDS]
    received = [a for row in lowered.actions for a in row if a.kind in RECEIVES]
    assert sorted(sent, key=repr) == sorted(received, key=repr)


def test_order_communication_changes_nothing_where_there_is_nothing_to_move():
    schedule = schedules.make("zb_h1", 4, 8)
    assert order_communication(schedule) == schedule


def test_the_passes_may_be_run_in_another_order():
    schedule = schedules.make("dualpipe_v", 3, 7)
    validate(order_communication(add_communication(add_deletes(schedule))))


def test_a_delete_follows_the_last_pass_that_reads_what_it_frees():
    freed = add_deletes(schedules.make("zb_h1", 2, 2))
    assert [" ".join(line.split()) for line in freed.to_text().splitlines()[1:]] == [
        "rank 0: F0 F1 I0 W0 D0 I1 W1 D1",
        "rank 1: F0 I0 F1 I1 W0 D0 W1 D1",
    ]


@pytest.mark.parametrize("name", schedules.NAMES)
def test_a_lowered_schedule_takes_the_same_time_and_memory(name):
    schedule = schedules.make(name, 4, 9)
    costs = Costs.even(schedule.num_stages, 1.0, 1.5, 0.5, 0.25)
    before, after = simulate(schedule, costs), simulate(lower(schedule), costs)
    assert (before.events, before.makespan, before.peak_live) == (after.events, after.makespan, after.peak_live)


def test_lower_refuses_a_schedule_that_needs_too_much_memory():
    with pytest.raises(ScheduleError, match="rank 0 keeps 5 microbatches at once"):
        lower(schedules.make("gpipe", 2, 8), max_live=[4, 4])
