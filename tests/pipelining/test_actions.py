"""Schedules as text and CSV: what is written reads back, and what is no schedule is refused with its place."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxext.pipelining import schedules
from jaxext.pipelining.action import Action, Kind, Schedule, ScheduleFormatError, counterpart, needs
from jaxext.pipelining.passes import lower

TEXT = """\
1f1b microbatches=2 placement=0,1
rank 0: F0   F0→1 F1   F1→1 B0←1 B0   B1←1 B1
rank 1: F0←0 F0   B0   B0→0 F1←0 F1   B1   B1→0
"""


@st.composite
def any_schedules(draw):
    """Not only sensible ones: any actions in any order."""
    count, ranks = draw(st.integers(1, 64)), draw(st.integers(1, 16))
    placement = draw(st.permutations([*range(ranks)] * draw(st.integers(1, 4))))
    rows = []
    for rank in range(ranks):
        stages = st.sampled_from([stage for stage, own in enumerate(placement) if own == rank])
        microbatches = st.integers(0, count - 1)
        moves = st.sampled_from([kind for kind in Kind if "_" in kind])
        works = st.sampled_from([kind for kind in Kind if "_" not in kind])
        move = st.builds(Action, moves, stages, microbatches, st.integers(0, ranks - 1))
        rows.append(tuple(draw(st.lists(st.builds(Action, works, stages, microbatches) | move, max_size=8))))
    return Schedule(draw(st.sampled_from(schedules.NAMES)), count, tuple(placement), tuple(rows))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(any_schedules())
def test_every_schedule_reads_back_from_its_text_and_its_csv(schedule):
    assert Schedule.from_text(schedule.to_text()) == schedule
    assert Schedule.from_csv(schedule.to_csv()) == schedule


def test_the_text_is_a_grid_of_one_line_a_rank():
    schedule = Schedule.from_text(TEXT)
    assert (schedule.name, schedule.num_ranks, schedule.num_stages, schedule.num_microbatches) == ("1f1b", 2, 2, 2)
    assert schedule.actions[0][1] == Action(Kind.SEND_F, 0, 0, peer=1)
    assert schedule.actions[1][3] == Action(Kind.SEND_B, 1, 0, peer=0)
    assert schedule.to_text() == TEXT


def test_a_later_stage_of_a_rank_has_its_number_behind_the_microbatch():
    schedule = schedules.make("zb_v", 2, 1)
    assert lower(schedule).to_text() == (
        "zb_v microbatches=1 placement=0,1,1,0\n"
        "rank 0: F0     F0→1   F0.1←1 F0.1   I0.1   B0.1→1 W0.1   D0.1   B0←1   I0     W0     D0\n"
        "rank 1: F0←0   F0     F0.1   F0.1→0 B0.1←0 I0.1   I0     B0→0   W0.1   D0.1   W0     D0\n"
    )
    assert schedule.chunk == (0, 0, 1, 1) and schedule.stages_of(1) == [1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: '' is no header; expected such as '1f1b microbatches=8 placement=0,1,2,3'"),
        ("x microbatches=1 placement=0,1\nrank 0: F0 B0", "line 1: placement=0,1 does not fit the number of lines"),
        ("x microbatches=1 placement=0,2\nrank 0:\nrank 1:", "line 1: placement=0,2 does not fit the number of lines"),
        ("x microbatches=1 placement=0\nrank 1: F0 B0", "line 2: 'rank 1: F0 B0' does not begin with 'rank 0:'"),
        ("x microbatches=1 placement=0\nrank 0: F0 Q0", "line 2, cell 2: 'Q0' is no action; expected such as F0, B3"),
        ("x microbatches=1 placement=0\nrank 0: W0→0", "line 2, cell 1: 'W0→0' is no action"),
        ("x microbatches=1 placement=0\nrank 0: F0.1", "'F0.1' is of stage .1 of rank 0, which has 1"),
        ("x microbatches=2 placement=0\nrank 0: F2", "'F2' is of microbatch 2; line 1 says that there are 2"),
        ("x microbatches=1 placement=0\nrank 0: F0→1", "'F0→1' is a move to or from rank 1; there are 1 ranks"),
    ],
)
def test_a_text_that_is_no_schedule_is_an_error_that_says_where(text, message):
    with pytest.raises(ScheduleFormatError) as found:
        Schedule.from_text(text)
    assert message in str(found.value)


def test_a_csv_that_is_no_schedule_is_an_error_that_says_where():
    with pytest.raises(ScheduleFormatError, match="line 3, cell 2: '' is no action"):
        Schedule.from_csv('"x microbatches=1 placement=0,1"\nF0,B0\nF0,\n')


@pytest.mark.parametrize(
    ("name", "placement", "message"),
    [
        ("my own", (0,), "name='my own': expected a word without spaces"),
        ("x", (0, 2), r"placement=\(0, 2\): expected the rank of each stage, and every one of the 1 ranks"),
    ],
)
def test_a_schedule_that_no_text_could_hold_is_refused(name, placement, message):
    with pytest.raises(ValueError, match=message):
        Schedule(name, 1, placement, ((),))


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (Action(Kind.F, 0, 5), []),
        (Action(Kind.F, 2, 5), [(Kind.F, 1, 5)]),
        (Action(Kind.B, 3, 5), [(Kind.F, 3, 5)]),
        (Action(Kind.B, 2, 5), [(Kind.F, 2, 5), (Kind.I, 3, 5)]),
        (Action(Kind.I, 2, 5), [(Kind.F, 2, 5), (Kind.I, 3, 5)]),
        (Action(Kind.W, 2, 5), [(Kind.I, 2, 5)]),
        (Action(Kind.DELETE, 2, 5), []),
    ],
)
def test_a_computation_needs_the_stage_before_it_on_its_way(action, expected):
    assert needs(action, 4) == expected


@pytest.mark.parametrize("send", [Action(Kind.SEND_F, 1, 5, 3), Action(Kind.SEND_B, 1, 5, 3)])
def test_a_send_and_its_receive_move_the_same_result(send):
    receive = counterpart(send, rank=2)
    assert receive.result == send.result and receive.peer == 2
    assert receive.stage == (2 if send.kind is Kind.SEND_F else 0)
