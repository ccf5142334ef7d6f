"""Cells of a notebook: install, %timeit, errors, and a kernel that runs them."""

import re

import jax
import pytest
from fidelity_program import HERE

import jaxext

SETUP = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
import jax, jaxext
jaxext.install(memory="system")
from fidelity_program import arguments, kernels_in, step
data = arguments()
function = jax.jit(step)
"""


@pytest.fixture
def shell():
    interactive = pytest.importorskip("IPython.core.interactiveshell")
    shell = interactive.InteractiveShell()
    yield shell
    jaxext.uninstall()
    interactive.InteractiveShell.clear_instance()


def test_cells_install_and_time_a_step(shell, capsys):
    assert shell.run_cell(SETUP).success
    assert shell.run_cell("found = kernels_in(function.lower(*data))").success
    assert shell.user_ns["found"]
    assert shell.run_cell("timing = %timeit -o -q -n 1 -r 1 jax.block_until_ready(function(*data))").success
    assert shell.user_ns["timing"].best > 0
    assert shell.run_cell("report = jaxext.explain(function)(*data)").success
    assert {entry.kernel for entry in shell.user_ns["report"].replaced} == {"attention", "layer_norm", "matmul"}
    assert shell.run_cell("@jax.jit\ndef redefined(w, x):\n    return step(w, x)[0]\nredefined(*data)").success
    assert shell.run_cell(
        "@jax.jit\ndef redefined(w, x):\n    return step(w, x)[0] * 2\ntwice = redefined(*data)"
    ).success
    assert float(shell.user_ns["twice"]) == pytest.approx(
        2 * float(jax.jit(shell.user_ns["step"])(*shell.user_ns["data"])[0])
    )


def test_an_error_in_a_cell_shows_the_users_lines_only(shell, capsys):
    shell.run_cell(SETUP)
    capsys.readouterr()
    assert not shell.run_cell("def wrong(w, x):\n    return step(w, x[0])[0]\njax.jit(wrong)(*data)").success
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "step(w, x[0])" in shown
    assert "jaxext/rewrite" not in shown and "hooks.py" not in shown


def test_a_notebook_runs(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    cells = [SETUP, "print(sorted(kernels_in(function.lower(*data))))", "print(float(function(*data)[0]))"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    text = [cell.outputs[0].text for cell in notebook.cells[1:]]
    assert "jaxext_attention_forward" in text[0]
    assert float(text[1]) > 0
