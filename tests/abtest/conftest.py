"""Stand-ins for the jaxext side that are right or wrong on purpose, and programs written on the spot."""

import contextlib
import textwrap

import jax
import pytest
from tiny_step import make_args, train_step

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


def put_stand_in(monkeypatch):
    """A function that puts `accelerated(function)` in the place of jaxext's own work: the tester alone is tested."""

    def put(accelerated=lambda function: function):
        monkeypatch.setitem(
            vars(jaxext), "accelerate", lambda function, exclude=(), precision=None: accelerated(function)
        )
        monkeypatch.setitem(vars(jaxext), "disabled", contextlib.nullcontext)
        monkeypatch.setitem(vars(jaxext), "explain", lambda function: lambda *args: FakeReport())

    return put


@pytest.fixture
def stand_in(monkeypatch):
    return put_stand_in(monkeypatch)


@pytest.fixture(scope="module")
def result():
    """A result of two equal sides."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        put_stand_in(monkeypatch)()
        return jaxext.ab(jax.jit(train_step), *make_args(), steps=3, repeats=3, budget=20)


@pytest.fixture
def program(tmp_path):
    """Writes a Python file and returns its path."""

    def write(text, name="program.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return path

    return write
