"""Every schedule is complete, free of deadlock, and as short and as lean as its source says."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxext.pipelining import schedules
from jaxext.pipelining.action import Kind, Schedule, ScheduleFormatError
from jaxext.pipelining.passes import add_communication, lower
from jaxext.pipelining.simulate import Costs, global_order, needs, simulate
from jaxext.pipelining.validate import ScheduleError, validate

SIZES = {
    "name": st.sampled_from(schedules.NAMES),
    "ranks": st.integers(1, 16),
    "microbatches": st.integers(1, 64),
    "chunks": st.integers(1, 4),
}


def make(name, ranks, microbatches, chunks):
    return schedules.make(name, ranks, microbatches, num_chunks=chunks if name == "interleaved_1f1b" else 1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(**SIZES)
def test_a_schedule_is_valid_and_lowers_and_reads_back_from_its_texts(name, ranks, microbatches, chunks):
    schedule = make(name, ranks, microbatches, chunks)
    validate(schedule)
    assert schedule.num_microbatches == microbatches and schedule.num_ranks == ranks
    for written in (schedule, lower(schedule)):
        assert Schedule.from_text(written.to_text()) == written
        assert Schedule.from_csv(written.to_csv()) == written


@settings(max_examples=30, deadline=None, derandomize=True)
@given(**SIZES | {"microbatches": st.integers(1, 24)}, transfer=st.floats(0, 2))
def test_the_global_order_keeps_each_ranks_order_and_all_that_an_action_needs(
    name, ranks, microbatches, chunks, transfer
):
    schedule = make(name, ranks, microbatches, chunks)
    order = global_order(schedule, Costs.even(schedule.num_stages, 1.0, 2.0, 0.0, transfer))
    for rank, actions in enumerate(schedule.actions):
        assert tuple(a for a in order if schedule.placement[a.stage] == rank) == actions
    done = set()
    for action in order:
        for kinds, stage in needs(action, schedule.num_stages):
            assert any((kind, stage, action.microbatch) in done for kind in kinds)
        done.add((action.kind, action.stage, action.microbatch))


F, I, W = 1.0, 1.5, 0.75
B = I + W


@pytest.mark.parametrize("microbatches", [8, 16, 64])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_bubble_and_memory_of_1f1b_and_gpipe_are_the_closed_forms(ranks, microbatches):
    costs = Costs.even(ranks, F, I, W)
    one = simulate(schedules.make("1f1b", ranks, microbatches), costs)
    assert one.bubble == pytest.approx((ranks - 1) * (F + B))
    assert one.peak_live == tuple(min(microbatches, ranks - rank) for rank in range(ranks))
    gpipe = simulate(schedules.make("gpipe", ranks, microbatches), costs)
    assert gpipe.bubble == pytest.approx((ranks - 1) * (F + B))
    assert gpipe.peak_live == (microbatches,) * ranks


@pytest.mark.parametrize("chunks", [2, 3, 4])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_bubble_of_interleaved_1f1b_is_that_of_1f1b_by_the_number_of_chunks(ranks, chunks):
    costs = Costs.even(ranks * chunks, F / chunks, I / chunks, W / chunks)
    found = simulate(schedules.make("interleaved_1f1b", ranks, 4 * ranks, num_chunks=chunks), costs)
    assert found.bubble == pytest.approx((ranks - 1) * (F + B) / chunks)
    assert max(found.peak_live) == 2 * (ranks - 1) + (chunks - 1) * ranks + 1


@pytest.mark.parametrize("microbatches", [1, 2, 3])
def test_with_several_microbatches_at_least_zb_h1_has_its_closed_form_in_the_memory_of_1f1b(microbatches):
    ranks = 8
    found = simulate(schedules.make("zb_h1", ranks, microbatches * ranks), Costs.even(ranks))
    assert found.bubble == pytest.approx((ranks - 1) * (1 + 2 - 2))
    assert max(found.peak_live) == ranks


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
def test_zb_v_takes_no_longer_than_the_last_rank_has_to_wait_for_its_first_pass(ranks):
    found = simulate(schedules.make("zb_v", ranks, 2 * ranks), Costs.even(2 * ranks))
    assert found.makespan == 6 * 2 * ranks + ranks - 1
    assert max(found.peak_live) <= 2 * ranks


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_dualpipe_v_has_a_bubble_of_one_pass_a_rank_at_most(ranks):
    found = simulate(schedules.make("dualpipe_v", ranks, 4 * ranks), Costs.even(2 * ranks))
    assert found.bubble <= ranks
    assert max(found.peak_live) <= 2 * ranks + 1


@settings(max_examples=25, deadline=None, derandomize=True)
@given(ranks=st.integers(1, 8), microbatches=st.integers(1, 24), data=st.data(), transfer=st.sampled_from([0.0, 0.3]))
def test_auto_is_never_slower_than_1f1b_or_zb_h1_and_keeps_within_their_memory(ranks, microbatches, data, transfer):
    each = st.lists(st.floats(0.1, 4.0), min_size=ranks, max_size=ranks)
    costs = Costs(*(tuple(data.draw(each)) for _ in range(3)), transfer)
    found = simulate(schedules.make("auto", ranks, microbatches, costs=costs), costs)
    for name in ("1f1b", "zb_h1"):
        assert found.makespan <= simulate(schedules.make(name, ranks, microbatches), costs).makespan + 1e-9
    assert max(found.peak_live) <= ranks


def test_an_unknown_schedule_is_an_error_that_lists_them():
    with pytest.raises(ValueError, match="expected one of gpipe, 1f1b, interleaved_1f1b"):
        schedules.make("2f2b", 4, 8)


GOOD = schedules.make("1f1b", 2, 3)


@pytest.mark.parametrize(
    ("rank", "old", "new", "message"),
    [
        (0, "B1", "B2", r"it is done 2 times"),
        (1, "F1", "", r"does B for microbatch 1; expected F and B, or F, I and W"),
        (1, "F0 B0", "B0 F0", r"deadlock: .*rank 1 at B0 of stage 1"),
        (0, "F0", "D0", r"does B for microbatch 0"),
    ],
)
def test_a_wrong_schedule_is_refused_at_the_action_at_fault(rank, old, new, message):
    lines = GOOD.to_text().splitlines()
    lines[rank + 1] = " ".join(lines[rank + 1].split()).replace(old, new)
    with pytest.raises(ScheduleError, match=message):
        validate(Schedule.from_text("\n".join(lines)))


def test_the_action_at_fault_is_shown_among_its_neighbours():
    text = GOOD.to_text().replace("F0 B0 F1", "B0 F0 F1")
    with pytest.raises(ScheduleError, match=r"rank 1: \[B0\] F0 F1 B1"):
        validate(Schedule.from_text(text))


def test_more_memory_than_allowed_is_refused():
    with pytest.raises(ScheduleError, match="rank 0 keeps 8 microbatches at once, 4 are allowed"):
        validate(schedules.make("gpipe", 2, 8), max_live=[4, 4])


def test_a_receive_without_its_send_is_refused():
    text = add_communication(GOOD).to_text().replace("F2→1", "", 1)
    with pytest.raises(ScheduleError, match="what rank 0 sends to rank 1 is not what is received"):
        validate(Schedule.from_text(text))


def test_a_schedule_with_its_moves_reads_as_documented():
    first, second = (" ".join(line.split()) for line in lower(schedules.make("1f1b", 2, 1)).to_text().splitlines()[1:])
    assert first == "rank 0: F0 F0→1 B0←1 B0 D0"
    assert second == "rank 1: F0←0 F0 B0 B0→0 D0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no header; expected 'name microbatches=8 placement=0,1,2,3'"),
        ("x microbatches=1 placement=0,1\nrank 0: F0 B0", "1 ranks have a line, the placement has 2"),
        ("x microbatches=1 placement=0\nrank 1: F0 B0", "line 2: 'rank 1: F0 B0' does not begin with 'rank 0:'"),
        ("x microbatches=1 placement=0\nrank 0: F0 Q0", "rank 0, cell 1: 'Q0' is no action"),
        ("x microbatches=1 placement=0\nrank 0: F0.1", "'F0.1' is no action of a rank with 1 stages"),
    ],
)
def test_a_text_that_is_no_schedule_is_an_error_that_says_where(text, message):
    with pytest.raises(ScheduleFormatError) as found:
        Schedule.from_text(text)
    assert message in str(found.value)


def test_weight_gradients_come_after_their_cotangents():
    schedule = schedules.make("zb_h1", 4, 8)
    for actions in schedule.actions:
        seen = set()
        for action in actions:
            assert action.kind is not Kind.W or action.microbatch in seen
            if action.kind is Kind.I:
                seen.add(action.microbatch)
