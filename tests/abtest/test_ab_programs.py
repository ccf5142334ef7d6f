"""Whole programs, each side in its own process: reading what they print, and what is concluded."""

import sys
from pathlib import Path

import pytest

from jaxext import _memory
from jaxext.abtest import process, protocol
from jaxext.abtest.process import ProgramError
from jaxext.abtest.settings import Setting, label, parse_versus

PROGRAMS = Path(__file__).resolve().parents[2] / "compat" / "programs"
STOCK = Setting(kernels=False, memory="system")
PRINTING = """
import sys
offset = float(sys.argv[1]) if len(sys.argv) > 1 else 0.0
for step in range(6):
    print(f"step {step} loss {3.0 / (step + 1) + offset} ms {10.0 + step}")
"""


@pytest.fixture
def plain(monkeypatch):
    """Runs both sides as plain Python; `extra` are arguments of the jaxext side alone."""

    def use(extra=()):
        def command(path, arguments, setting):
            return [sys.executable, str(path), *arguments, *(extra if setting.kernels else ())], {}

        monkeypatch.setattr(process, "command", command)

    return use


def compare(path, **options):
    return process.compare_programs(path, [], STOCK, Setting(), **{"repeats": 2, "budget": 60, "seed": 0, **options})


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("step 3 loss 2.5 ms 41.5", (2.5, 0.0415)),
        ("[12] loss=1e-3, 40 ms/step", (1e-3, 0.04)),
        ("Loss: nan", (float("nan"), None)),
        ("epoch 1 done in 3 s", (None, None)),
        ("lossless", (None, None)),
    ],
)
def test_lines_are_read(line, found):
    loss, seconds = process.read_line(line)
    assert loss == pytest.approx(found[0], nan_ok=True) if found[0] is not None else loss is None
    assert seconds == (pytest.approx(found[1]) if found[1] is not None else None)


def test_printed_steps_and_losses_are_compared(program, plain):
    plain()
    result = compare(program(PRINTING))
    assert result.agrees
    assert result.ratio == 1.0
    assert result.speed.pairs == 10  # five steps of two runs: the first step compiles
    assert result.wall.pairs == 2
    assert "peak resident memory" in str(result)


def test_other_losses_disagree(program, plain):
    plain(["0.1"])
    result = compare(program(PRINTING))
    assert result.exit_code == 1
    assert "loss at step 1" in result.parity.failures[0]


def test_a_program_that_prints_nothing_is_timed_as_a_whole(program, plain):
    plain()
    result = compare(program("pass"))
    assert result.speed.pairs == 2
    assert any("prints no losses" in note for note in result.notes)


def test_a_program_that_fails_is_quoted(program, plain):
    plain()
    with pytest.raises(
        ProgramError, match=r"program.py ended with code 1 on the stock .* side:\n(.|\n)*ValueError: ha"
    ):
        compare(program("raise ValueError('ha')"))


def test_the_budget_ends_the_repeats(program, plain):
    plain()
    result = compare(program(PRINTING), repeats=50, budget=0.01)
    assert result.speed.pairs == 5
    assert any("time budget allowed 1 of 50 runs" in note for note in result.notes)
    assert any("does not tell what differs from process to process" in note for note in result.notes)


def test_the_interval_spans_processes_that_are_fast_or_slow_as_a_whole(program, plain):
    """The second run of the jaxext side takes half the time of all others."""
    plain(["seen"])
    counting = """
import pathlib, sys
seen = pathlib.Path(__file__).with_suffix(".seen")
fast = sys.argv[1:] == ["seen"] and seen.exists()
if sys.argv[1:]: seen.touch()
for step in range(9):
    print(f"step {step} loss 1.0 ms {10.0 if fast else 20.0}")
"""
    result = compare(program(counting))
    assert result.interval == (1.0, 2.0)


def test_stock_as_it_comes_runs_without_jaxext(tmp_path):
    line, environment = process.command(tmp_path / "p.py", ["--x"], STOCK)
    assert line == [sys.executable, str(tmp_path / "p.py"), "--x"]
    assert "JAXEXT_KERNELS" not in environment


# Prints what is in force as a loss: 1 for the kernels, 2 for memory reuse.
IN_FORCE = """
import sys, jax
kernels = "jaxext" in sys.modules and sys.modules["jaxext"].is_installed()
memory = "jaxext._memory" in sys.modules and sys.modules["jaxext._memory"].state().memory == "reuse"
print("loss", kernels + 2 * memory)
"""


@pytest.mark.skipif(bool(_memory.impossible()), reason=_memory.impossible())
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("memory", ["system", "reuse"])
def test_each_side_runs_under_what_it_is_called(program, kernels, memory):
    path, setting = program(IN_FORCE), Setting(kernels=kernels, memory=memory)
    found = process.run_program(path, [], setting, "some")
    assert found.losses == [kernels + 2 * (memory == "reuse")]


def test_settings_reach_the_command(tmp_path):
    setting = Setting(exclude=("attention", "rms_norm"), memory="system", isa="v3", precision="fp8")
    line, environment = process.command(tmp_path / "p.py", [], setting)
    assert line[1].endswith("__main__.py")
    assert line[2:5] == ["run", "--memory", "system"]
    assert environment["JAXEXT_KERNELS"] == "-attention,-rms_norm"
    assert environment["JAXEXT_ISA"] == "v3" and environment["JAXEXT_PRECISION"] == "fp8"


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("stock", Setting(kernels=False)),
        ("jaxext", Setting()),
        ("stock+memory=system", STOCK),
        ("exclude=attention,layer_norm", Setting(exclude=("attention", "layer_norm"))),
        ("isa=v3", Setting(isa="v3")),
        ("precision=fp8", Setting(precision="fp8")),
    ],
)
def test_versus_names_settings(text, setting):
    assert parse_versus(text, "reuse") == setting
    assert Setting.from_dict(setting.to_dict()) == setting


@pytest.mark.parametrize("text", ["", "fast", "memory=none", "isa=v9", "precision=fp4", "exclude=", "stock=1"])
def test_unknown_settings_are_answered_with_the_known(text):
    with pytest.raises(ValueError, match=r"is no setting\. Expected one of stock, jaxext, exclude=KERNEL"):
        parse_versus(text, "reuse")


def test_labels_mention_only_what_differs():
    assert label(Setting(kernels=False), Setting()) == "stock"
    assert label(STOCK, Setting()) == "stock with system memory"
    assert label(Setting(exclude=("attention",)), Setting()) == "jaxext without attention"
    assert label(Setting(precision="fp8"), Setting()) == "jaxext in fp8"


@pytest.mark.parametrize("name", ["gpt_nnx", "gpt_linen", "llama_jax", "vit_linen", "hf_gpt2"])
def test_programs_know_nothing_of_jaxext(name):
    path = PROGRAMS / f"{name}.py"
    assert "jaxext" not in path.read_text()
    options = protocol.load_module(path).parse_arguments([])
    assert options.dtype in ("float32", "bfloat16")
    assert options.steps == 20
