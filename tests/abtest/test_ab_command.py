"""`jaxext ab` as it is called: exit codes, files, and the answer to each mistake."""

import json
import re

import pytest

from jaxext import cli

STEP = """
import jax, jax.numpy as jnp

@jax.jit
def step(params, x):
    def loss_fn(params):
        mean = jnp.mean(x @ params["w"], axis=-1, keepdims=True)
        return jnp.mean((jax.nn.tanh(x @ params["w"]) - mean) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss

def factory():
    print("factories may print")
    return step, ({"w": jnp.eye(8)}, jnp.ones((4, 8)) * jnp.arange(8.0))

def failing():
    return jax.jit(lambda x: x.no_such_attribute), (jnp.ones(3),)

def raising():
    raise RuntimeError("no data here")

def wrong():
    return step
"""
QUICK = ["--steps", "3", "--repeats", "3", "--no-contributions", "--no-memory-row", "--budget", "60"]


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("gone.py:factory", [], r"the file 'gone\.py' does not exist\. Give the path of a Python file"),
        ("{}:gone", [], r"factory 'gone': program\.py has no such function\. Define it at the top level"),
        ("{}:wrong", [], r"program\.py:wrong returned PjitFunction, expected \(step, args\)"),
        ("{}:raising", [], r"program\.py:raising raised RuntimeError: no data here"),
        ("{}:failing", [], r"fails on stock JAX: AttributeError: .*no_such_attribute.*Call step\(\*args\) yourself"),
        ("{}:factory", ["--vs", "fast"], r"--vs 'fast': 'fast' is no setting\. Expected one of stock"),
        ("{}:factory", ["--vs", "exclude=sorting"], r"unknown kernel 'sorting'\. The kernels are attention"),
        ("{}:factory", ["--steps", "0"], r"steps=0: expected at least 1"),
        ("{}:factory", ["--html", "no/such/folder/a.html"], r"the folder no/such/folder does not exist\. Make it"),
        (
            "{}:factory",
            ["--args", "x"],
            r"--args 'x': a factory takes none\. They are for a whole program: program\.py",
        ),
    ],
)
def test_mistakes_end_with_code_2_and_say_what_to_do(program, capfd, target, options, message):
    path = program(STEP)
    assert cli.main(["ab", target.format(path), *QUICK, *options]) == 2
    assert re.search(message, capfd.readouterr().err)


def test_missing_matplotlib_is_found_out_before_measuring(program, capfd, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    assert cli.main(["ab", f"{program(STEP)}:factory", "--png", "a.png"]) == 2
    assert 'pip install "jaxext[ab]"' in capfd.readouterr().err


def test_a_step_is_tested_in_processes_of_its_own(program, capfd, tmp_path):
    path, report = program(STEP), tmp_path / "report.json"
    assert cli.main(["ab", f"{path}:factory", *QUICK, "--json", str(report), "--html", f"{tmp_path}/a.html"]) == 0
    shown = capfd.readouterr()
    assert "jaxext against stock" in shown.out
    assert "factories may print" not in shown.out
    found = json.loads(report.read_text())
    assert found["agrees"] is True
    assert found["facts"]["memory"] == "reuse"
    assert found["reference"]["trace_seconds"] > 0
    assert found["wiring"] == "state: params; loss: output[1]"
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")


def test_sides_of_different_processes_are_compared_too(program, capfd):
    path = program(STEP)
    assert cli.main(["ab", f"{path}:factory", *QUICK, "--vs", "stock+memory=system", "--json", "-"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["reference"]["label"] == "stock with system memory"
    assert found["parity"]["leaves"][0]["name"] == "params['w']"
    assert any("memory differs between the sides: system and reuse" in note for note in found["notes"])
