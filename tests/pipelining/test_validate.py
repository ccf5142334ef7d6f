"""A wrong schedule is refused, and the error shows where."""

import pytest

from jaxext.pipelining import schedules
from jaxext.pipelining.action import Action, Kind, Schedule
from jaxext.pipelining.passes import add_communication, lower
from jaxext.pipelining.validate import ScheduleError, validate

GOOD = schedules.make("1f1b", 2, 3)


def altered(schedule, rank, old, new):
    """The schedule with a piece of one rank's text exchanged."""
    lines = [" ".join(line.split()) for line in schedule.to_text().splitlines()]
    assert f" {old} " in lines[rank + 1] + " "
    lines[rank + 1] = (lines[rank + 1] + " ").replace(f" {old} ", f" {new} ", 1)
    return Schedule.from_text("\n".join(lines))


@pytest.mark.parametrize(
    ("rank", "old", "new", "message", "shown"),
    [
        (0, "B1", "B2", "B2 is done a second time", "rank 0: F0 F1 B0 F2 B2 [B2]"),
        (1, "F1", "", "stage 1 does B of microbatch 1; expected F and B, or F, I and W", "rank 1: F0 B0 [B1] F2 B2"),
        (1, "F2 B2", "", "stage 1 does nothing of microbatch 2", "rank 1: F0 B0 F1 B1 []"),
        (0, "B1", "B1 W1", "stage 0 does B, F, W of microbatch 1", "rank 0: F0 F1 B0 F2 B1 [W1] B2"),
        (1, "F0 B0", "B0 F0", "rank 1's B0 needs rank 1's F0, which comes later", "rank 1: [B0] F0 F1"),
        (0, "B1", "W1 I1", "rank 0's W1 needs rank 0's I1, which comes later", "F2 [W1] I1 B2"),
    ],
)
def test_a_wrong_order_is_refused_with_the_action_at_fault_in_brackets(rank, old, new, message, shown):
    with pytest.raises(ScheduleError) as found:
        validate(altered(GOOD, rank, old, new))
    assert message in str(found.value) and shown in str(found.value)


def test_ranks_that_wait_for_each_other_are_all_shown():
    text = "x microbatches=2 placement=0,1\nrank 0: F0 B0 F1 B1\nrank 1: F0 F1 B0 B1"
    with pytest.raises(ScheduleError) as found:
        validate(Schedule.from_text(text))
    assert str(found.value) == (
        "schedule x: deadlock: rank 0's B0 needs rank 1's B0; rank 1's F1 needs rank 0's F1.\n"
        "  rank 0: F0 [B0] F1 B1\n"
        "  rank 1: F0 [F1] B0 B1"
    )
    assert found.value.at == {0: 1, 1: 1}


def test_of_a_long_schedule_only_the_surroundings_are_shown():
    with pytest.raises(ScheduleError) as found:
        validate(altered(schedules.make("gpipe", 1, 64), 0, "F30", "F29"))
    assert str(found.value).splitlines()[1] == "  rank 0: … F24 F25 F26 F27 F28 F29 [F29] F31 F32 F33 F34 F35 F36 …"


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (Action(Kind.F, 1, 0), "stage 1 is not on rank 0"),
        (Action(Kind.F, 7, 0), "stage 7 is not on rank 0"),
        (Action(Kind.F, 0, 3), "microbatch 3 is not one of the 3"),
        (Action(Kind.SEND_F, 0, 0), "peer=None: expected the other rank of the move"),
    ],
)
def test_an_action_that_no_rank_can_do_is_refused(action, message):
    first, second = GOOD.actions
    with pytest.raises(ScheduleError, match=message) as found:
        validate(Schedule("1f1b", 3, (0, 1), ((*first, action), second)))
    assert found.value.at == {0: len(first)}


def test_more_memory_than_allowed_is_refused_where_it_is_first_exceeded():
    gpipe = schedules.make("gpipe", 2, 8)
    with pytest.raises(ScheduleError, match="rank 1 keeps 5 microbatches at once from here, 4 are allowed") as found:
        validate(gpipe, max_live=[8, 4])
    assert "rank 1: F0 F1 F2 F3 [F4] F5" in str(found.value)
    validate(gpipe, max_live=[8, 8])
    with pytest.raises(ValueError, match=r"max_live=\[8\]: expected one limit for each of 2 ranks"):
        validate(gpipe, max_live=[8])


@pytest.mark.parametrize(
    ("rank", "old", "new", "message"),
    [
        (0, "F2→1", "", "nothing is sent where rank 1's F2←0 is received; expected the two halves of one move"),
        (1, "F2←0", "", "rank 0's F2→1 is sent where nothing is received"),
        (1, "F1←0", "F2←0", "F2←0 is done a second time"),
        (0, "F0 F0→1", "F0→1 F0", "rank 0's F0→1 precedes rank 0's F0, whose result it sends"),
        (1, "F0←0 F0", "F0 F0←0", "rank 1's F0 has not received the result of rank 0's F0"),
        (0, "D0 F2", "F2", "no D after rank 0's B0"),
        (0, "B0 D0", "D0 B0", "rank 0's D0 comes before the last pass that reads what it frees"),
    ],
)
def test_moves_and_deletes_that_do_not_fit_the_passes_are_refused(rank, old, new, message):
    with pytest.raises(ScheduleError) as found:
        validate(altered(lower(GOOD), rank, old, new))
    assert message in str(found.value)


def test_moves_in_another_order_than_they_are_received_are_refused():
    swapped = altered(add_communication(schedules.make("gpipe", 2, 2)), 0, "F0 F0→1 F1 F1→1", "F0 F1 F1→1 F0→1")
    with pytest.raises(ScheduleError, match="rank 0's F1→1 is sent where rank 1's F0←0 is received"):
        validate(swapped)


def test_sends_that_would_wait_for_each_other_are_refused_with_the_remedy():
    with pytest.raises(ScheduleError) as found:
        validate(add_communication(GOOD))
    assert "rank 0's F1→1, rank 1's B0→0 wait for each other; run order_communication" in str(found.value)
    assert "rank 0: F0 F0→1 F1 [F1→1] B0←1" in str(found.value)
