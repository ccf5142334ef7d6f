"""The tool that swaps a program's imports: what it rewrites, what it compares, and what it says."""

import importlib.util
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "compat" / "swap_program.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("swap_program", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["swap_program"] = module
    spec.loader.exec_module(module)
    return module


STATEMENTS = {
    "import jax": "import jaxext as jax",
    "import jax as J": "import jaxext as J",
    "import jax.numpy as jnp  # arrays": "import jaxext.numpy as jnp  # arrays",
    "import jax.numpy": "import jaxext.numpy, jaxext as jax",
    "import os, jax, sys": "import os, jaxext as jax, sys",
    "import jax.scipy.stats as s, jax.lax": "import jaxext.scipy.stats as s, jaxext.lax, jaxext as jax",
    "from jax import numpy as jnp, grad": "from jaxext import numpy as jnp, grad",
    "from jax.sharding import (\n    Mesh,  # a mesh\n)": "from jaxext.sharding import (\n    Mesh,  # a mesh\n)",
    "from  jax.nn import softmax": "from  jaxext.nn import softmax",
    "from \\\n  jax import jit": "from \\\n  jaxext import jit",
    "if True:\n\timport jax ; x = 1": "if True:\n\timport jaxext as jax ; x = 1",
    'é = "é"; import jax': 'é = "é"; import jaxext as jax',
    "import jax._src.core": "import jax._src.core",
    "from jax._src import core": "from jax._src import core",
    "from . import jax": "from . import jax",
    "import jaxlib, jaxtyping": "import jaxlib, jaxtyping",
    "text = 'import jax'": "text = 'import jax'",
    "# import jax\n\x0c\nimport jax": "# import jax\n\x0c\nimport jaxext as jax",
}


@pytest.mark.parametrize("statement", STATEMENTS)
def test_imports_are_rewritten_in_place(tool, statement):
    found, count = tool.swap(statement)
    assert found == STATEMENTS[statement]
    assert found.count("\n") == statement.count("\n")
    assert count == (found != statement)


@pytest.mark.parametrize(
    ("expected", "found", "problem"),
    [
        ("loss 1.0000\n", "loss 1.0004\n", ""),
        ("loss 1.0000 12.5 ms\n", "loss 1.0000 99.1 ms\n", ""),
        ("step 1 loss 2.5 ms 12.1\n", "step 1 loss 2.5 ms 99.2\n", ""),
        ("loss 2.5 ms 12.1\n", "loss 2.6 ms 12.1\n", "line 1: 'loss 2.5 …' on stock, 'loss 2.6 …' here"),
        ("loss nan inf\n", "loss nan inf\n", ""),
        ("loss  1\n", "loss 1\n", ""),
        ("loss 1.0\n", "loss 1.1\n", "line 1: 'loss 1.0' on stock, 'loss 1.1' here"),
        ("loss 1.0\n", "loss nan\n", "line 1: 'loss 1.0' on stock, 'loss nan' here"),
        ("a\nb 1\n", "a\nc 1\n", "line 2: 'b 1' on stock, 'c 1' here"),
        ("a\nb\n", "a\n", "2 lines on stock, 1 here"),
    ],
)
def test_output_is_compared_line_by_line(tool, expected, found, problem):
    assert tool.compare(expected, found, 1e-3)[0] == problem


PROGRAM = """
import sys
import jax
import jax.numpy as jnp
import helper

@jax.jit
def step(x):
    return jax.nn.dot_product_attention(x, x, x).sum()

print("value", step(jnp.ones((1, 8, 2, 4))), "options", sys.argv[1:], helper.SIDE if "--wrong" in sys.argv else "")
raise SystemExit(helper.code())
"""
HELPER = """
import jax
SIDE = jax.__name__
def code():
    return 0
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "helper.py").write_text(HELPER)
    (tmp_path / "no_jax.py").write_text("import os\n")
    return tmp_path


def test_a_folder_of_programs_runs_with_its_own_modules(tool, folder, capsys):
    assert tool.main([str(folder), "--", "--size", "3"]) == 0
    shown = capsys.readouterr().out
    assert "program.py" in shown and "agrees" in shown
    assert "no_jax.py" not in shown


def test_a_program_that_differs_fails_with_its_line(tool, folder):
    outcome = tool.run_program(folder / "program.py", ["--wrong"], 1e-3, tool.TIMES, 60)
    assert "'value 64.0 options ['--wrong'] jax' on stock" in outcome.problem.replace('"', "'")
    (folder / "helper.py").write_text(HELPER.replace("return 0", "return int(jax.__name__ == 'jaxext')"))
    outcome = tool.run_program(folder / "program.py", [], 1e-3, tool.TIMES, 60)
    assert outcome.problem.startswith("exit code 0 on stock, 1 here")


def test_what_cannot_be_run_is_named(tool, tmp_path, capsys):
    for path, message in ((tmp_path / "missing.py", "does not exist"), (tmp_path, "imports JAX")):
        with pytest.raises(SystemExit) as error:
            tool.main([str(path)])
        assert error.value.code == 2
        assert message in capsys.readouterr().err


def test_the_rewritten_program_can_be_shown(tool, folder, capsys):
    assert tool.main(["--show", str(folder / "program.py")]) == 0
    assert capsys.readouterr().out == PROGRAM.replace("import jax\n", "import jaxext as jax\n").replace(
        "import jax.numpy", "import jaxext.numpy"
    )
