"""Stand-ins for the jaxext side that are right or wrong on purpose, and programs written on the spot."""

import contextlib
import textwrap

import pytest

import jaxext


class FakeReport:
    def to_dict(self):
        entry = {
            "kernel": "layer_norm",
            "source": "model.py:7 (block)",
            "location": "loss/scan",
            "shapes": ["f32[8,16]"],
            "dtype": "float32",
            "detail": "",
            "reason": "",
        }
        missed = {**entry, "kernel": "attention", "reason": "the scores are used twice"}
        return {"replaced": [entry, entry], "missed": [missed], "fallbacks": [], "notes": ["a note"]}


@pytest.fixture
def stand_in(monkeypatch):
    """Puts `accelerated(function)` in the place of jaxext's own work, so that the tester alone is tested."""

    def put(accelerated=lambda function: function):
        monkeypatch.setitem(vars(jaxext), "accelerate", lambda function, exclude=(): accelerated(function))
        monkeypatch.setitem(vars(jaxext), "disabled", contextlib.nullcontext)
        monkeypatch.setitem(vars(jaxext), "explain", lambda function: lambda *args: FakeReport())

    return put


@pytest.fixture
def program(tmp_path):
    """Writes a Python file and returns its path."""

    def write(text, name="program.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return path

    return write
