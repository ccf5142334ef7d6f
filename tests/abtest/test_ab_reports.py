"""What a person sees: the table, the page, the picture."""

import dataclasses
import re
import struct
import sys

import pytest

from jaxext.abtest import charts, html, report


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.234, "1.23 s"), (0.0123, "12.3 ms"), (0.456, "456 ms"), (42e-6, "42 µs"), (None, "-")]
)
def test_durations_read_well(seconds, text):
    assert report.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12 B"), (2048, "2.0 KiB"), (300 << 20, "300 MiB"), (5 << 30, "5.00 GiB"), (None, "-")]
)
def test_sizes_read_well(count, text):
    assert report.size(count) == text


def test_the_table_says_what_was_measured_and_under_what(result):
    text = str(result)
    for words in (
        "interleaved pairs in random order",
        "losses of",
        "step time, median",
        "temporary memory",
        "layer_norm",
        "replaced: 2 layer_norm",
        "missed: 1 attention at model.py:7 (block): the scores are used twice",
        "note: a note",
        "equal on both sides",
        "state: params, opt_state; loss: output[2]",
    ):
        assert words in " ".join(text.split()), words


def test_the_page_is_self_contained(result):
    page = html.page(result)
    assert page.startswith("<!doctype html>")
    assert page.count("<svg") == len(charts.panels(result)) >= 6
    # No script, style, picture or font is fetched; the w3.org names are SVG's own and fetch nothing.
    assert not re.search(r"""(src|href)=["'](?!#)""", page)
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page
    assert page.count("<script") == 1


def test_the_page_escapes_what_a_program_is_called(result):
    page = html.page(dataclasses.replace(result, name="<b>&.py:factory"))
    assert "<b>" not in page.split('id="result"')[0]
    assert "&lt;b&gt;&amp;.py:factory" in page


def test_the_picture_is_a_png_of_readable_size(result):
    data = charts.picture(result)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width >= 1200
    assert height >= 800


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(charts.ChartsUnavailable, match=re.escape('pip install "jaxext[ab]"')):
        charts.require_matplotlib()
