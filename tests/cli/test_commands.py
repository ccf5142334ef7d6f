"""The dispatcher, and `jaxext explain`."""

import json
import os
import subprocess
import sys

import pytest

import jaxext
from jaxext.cli import COMMANDS, main

TRAIN = """
import jax
import jax.numpy as jnp

@jax.jit
def step(q):
    return jax.nn.dot_product_attention(q, q, q, is_causal=True)

def factory():
    return step, (jnp.ones((2, 128, 4, 16)),)

def wrong():
    return step
"""


@pytest.fixture
def train(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(TRAIN)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "train", raising=False)


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(name in shown and summary in shown for name, summary in COMMANDS.items())


def test_no_command_shows_the_help_and_fails(capsys):
    assert main([]) == 2
    assert "usage: jaxext" in capsys.readouterr().err


def test_an_unknown_command_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["docter"])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "invalid choice: 'docter'" in message and all(name in message for name in COMMANDS)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"jaxext {jaxext.__version__}, JAX ")


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_of_its_own_without_importing_jax(command):
    source = (
        "import sys; from jaxext.cli import main\n"
        f"try: main([{command!r}, '--help'])\nexcept SystemExit: print('jax' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(f"usage: jaxext {command}")
    assert done.stderr == "False\n"


def test_explain_prints_what_is_replaced_with_its_line(train, capsys):
    assert main(["explain", "train.py:factory"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "replaced (1):"
    assert "attention" in lines[1] and "train.py:7 (step)" in lines[1]
    assert lines[-1].startswith("note: memory=")


def test_explain_for_another_platform(train, capsys):
    assert main(["explain", "--platform", "tpu", "train.py:factory"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("nothing replaced")
    assert "has no kernel on tpu" in out


def test_explain_as_json(train, capsys):
    assert main(["explain", "--json", "train.py:factory"]) == 0
    assert [entry["kernel"] for entry in json.loads(capsys.readouterr().out)["replaced"]] == ["attention"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nope.py:factory", "the file 'nope.py' does not exist"),
        (
            "train.py",
            "jaxext explain: target 'train.py': no factory is named. Write train.py:factory, factory() being a "
            "function that returns (step, args); for a whole program use `jaxext run --report`.",
        ),
        ("train.py:nope", "factory 'nope': train.py has no such function"),
        ("train.py:wrong", "expected (step, args) or (step, args, advance), args a tuple of the step's arguments"),
    ],
)
def test_explain_names_what_is_wrong_with_the_target(train, capsys, target, message):
    assert main(["explain", target]) == 2
    assert message in capsys.readouterr().err


def test_run_reports_at_exit(train, tmp_path):
    (tmp_path / "run.py").write_text("import train\ntrain.step(*train.factory()[1])\nprint('done')")
    done = subprocess.run(
        [sys.executable, "-m", "jaxext", "run", "--report", "run.py"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "done\n"
    lines = done.stderr.splitlines()
    assert lines[0] == "jaxext run: replaced (1):"
    assert "train.py:7 (step)" in lines[1]
    assert lines[2].startswith("note: memory=reuse")
