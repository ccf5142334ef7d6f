"""Pictures of a timeline show what happens when, and on which rank."""

import json
import sys
import xml.etree.ElementTree as ET

import pytest

from jaxext.pipelining import schedules
from jaxext.pipelining.simulate import Costs, simulate
from jaxext.pipelining.timeline import to_ascii, to_perfetto, to_plot


def timeline(name="1f1b", ranks=2, microbatches=3, transfer=0.0):
    schedule = schedules.make(name, ranks, microbatches)
    return simulate(schedule, Costs.even(schedule.num_stages, transfer=transfer))


def test_the_text_picture_has_microbatches_where_there_is_room():
    assert to_ascii(timeline(), 7 + 36) == (
        "rank 0 F0─F1─······B0────F2─B1────···B2────\n"
        "rank 1 ···F0─B0────F1─B1────F2─B2────······"
    )  # fmt: skip


def test_a_narrow_text_picture_has_kinds_alone():
    assert to_ascii(timeline(), 7 + 12) == "rank 0 FF··BBFBB·BB\nrank 1 ·FBBFBBFBB··"


def test_later_stages_of_a_rank_are_in_lower_case():
    assert to_ascii(timeline("zb_v", 2, 1), 7 + 27).splitlines()[1] == "rank 1 ···F0─f0─······i0─I0─w0─W0─"


@pytest.mark.parametrize("name", schedules.NAMES)
@pytest.mark.parametrize("width", [1, 40, 200])
def test_every_rank_has_a_line_of_the_same_length(name, width):
    lines = to_ascii(timeline(name, 12, 16), width).splitlines()
    assert len(lines) == 12
    assert {len(line) for line in lines} == {max(width, len("rank 10 ") + 10)}


def test_what_takes_no_time_is_not_in_the_text_picture():
    schedule = schedules.make("zb_h1", 2, 2)
    assert "W" not in to_ascii(simulate(schedule, Costs.even(2, 1.0, 1.0, 0.0)), 40)


def test_the_trace_has_a_track_for_each_rank_and_microseconds(tmp_path):
    found = timeline("zb_v", 2, 3)
    to_perfetto(found, tmp_path / "trace.json", microseconds=1e6)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names == {0: "rank 0", 1: "rank 1"}
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == len(found.events) == 3 * 3 * 4
    assert max(span["ts"] + span["dur"] for span in spans) == found.makespan * 1e6
    first = spans[0]
    assert (first["name"], first["cat"], first["tid"], first["args"]) == (
        "F0", "forward", 0, {"stage": 0, "microbatch": 0},
    )  # fmt: skip
    assert {"F2.1", "I2.1", "W2.1"} < {span["name"] for span in spans}


def svg(found, path):
    to_plot(found, path)
    root = ET.parse(path).getroot()
    return [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_the_plot_names_ranks_kinds_and_microbatches(tmp_path):
    texts = svg(timeline("zb_h1", 3, 4), tmp_path / "plan.svg")
    assert {"rank 0", "rank 2", "forward", "cotangents", "weight gradients", "zb_h1: 14% bubble"} < set(texts)
    assert "backward" not in texts
    # One on the time axis may read 3 too.
    assert texts.count("3") >= 3 * 3


def test_the_plot_leaves_out_numbers_that_would_not_be_legible(tmp_path):
    assert "57" not in svg(timeline("1f1b", 4, 64), tmp_path / "plan.svg")


def test_the_same_timeline_gives_the_same_plot(tmp_path):
    for name in ("a.svg", "b.svg"):
        to_plot(timeline(), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_the_plot_may_be_a_bitmap(tmp_path):
    to_plot(timeline(), tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install 'jaxext\[ab\]'"):
        to_plot(timeline(), tmp_path / "plan.svg")
