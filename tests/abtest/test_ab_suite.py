"""`jaxext ab --suite`: many programs, their geometric mean, and what becomes of one that fails."""

import json
import re
import sys

import pytest

from jaxext import cli
from jaxext.abtest import process, suite, suite_report
from jaxext.abtest.experiment import Watcher
from jaxext.abtest.timing import geometric_mean

# jaxext takes a quarter of stock's time with memory reuse, which takes half of stock's.
PROGRAM = """
import sys

def factory():
    import jax, jax.numpy as jnp

    return jax.jit(lambda w, x: (w, jnp.sum(x @ w))), (jnp.ones((8, 4), jnp.bfloat16), jnp.ones((2, 8), jnp.bfloat16))

if __name__ == "__main__":
    milliseconds = {"stock": 8.0, "reuse": 4.0, "jaxext": float(sys.argv[1])}[sys.argv[2]]
    for step in range(6):
        print(f"step {step} loss {3.0 / (step + 1)} ms {milliseconds}")
"""


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """All sides run as plain Python and are told which side they are."""

    def command(path, arguments, setting):
        side = "jaxext" if setting.kernels else "reuse" if setting.memory == "reuse" else "stock"
        return [sys.executable, str(path), *arguments, side], {}

    monkeypatch.setattr(process, "command", command)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "printing.py").write_text(PROGRAM)
    (tmp_path / "failing.py").write_text("raise ValueError('no data')")
    return tmp_path


def write(folder, *tables):
    path = folder / "suite.toml"
    path.write_text(
        "\n".join("[[program]]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in t.items()) for t in tables)
    )
    return path


FAST = {"name": "fast", "target": "printing.py", "arguments": ["1"]}
SLOW = {"name": "slow", "target": "printing.py", "arguments": ["4"]}


def run(path, **options):
    programs = suite.read(path)
    return suite.run("some", programs, **{"budget": None, "seed": 0, "watcher": Watcher(), **options})


def test_ratios_of_both_kinds_and_their_geometric_means(folder):
    result = run(write(folder, FAST, SLOW))
    assert [(entry.as_run.ratio, entry.kernels.ratio) for entry in result.entries] == [(8.0, 4.0), (2.0, 1.0)]
    assert result.mean("as_run").value == pytest.approx(4.0)
    assert result.mean("kernels").value == pytest.approx(2.0)
    assert result.mean("as_run").interval == pytest.approx((4.0, 4.0))
    assert result.exit_code == 0


def test_arithmetic_and_dtype_come_from_the_factory(folder):
    (entry,) = run(write(folder, FAST | {"target": "printing.py:factory"})).entries
    assert entry.flops == 2 * 2 * 8 * 4
    assert entry.dtypes == ("bfloat16",)
    assert entry.as_run.parity.tolerance.dtype == "bfloat16"
    shares = entry.share_of_peak({"bf16": 1e6, "f32": 1.0})
    assert shares == pytest.approx((128 / 8e-3 / 1e6, 128 / 1e-3 / 1e6))


def test_a_program_that_fails_is_reported_and_the_others_go_on(folder):
    result = run(write(folder, {"name": "broken", "target": "failing.py"}, FAST))
    assert result.exit_code == 1
    assert "failing.py ended with code 1 on the stock with system memory side" in result.entries[0].error
    assert result.mean("as_run").pairs == 1
    assert re.search(r"broken failed: .*\n(.|\n)*ValueError: no data", suite_report.plain_text(result))


def test_what_is_done_is_handed_over_program_by_program(folder):
    seen = []
    run(write(folder, FAST, SLOW), after=seen.append)
    assert [len(result.entries) for result in seen] == [1, 2]
    assert seen[0].notes[-1] == "not reached: slow"
    assert (seen[0].complete, seen[1].complete) == (False, True)


def test_a_file_says_how_often_a_program_runs_and_the_command_overrides_it(folder):
    path = write(folder, FAST, SLOW | {"repeats": 4})
    assert [len(entry.as_run.reference.runs) for entry in run(path).entries] == [2, 4]
    assert [program.repeats for program in suite.read(path, repeats=3)] == [3, 3]


def test_other_losses_are_an_error_and_hide_the_speed(folder):
    (folder / "printing.py").write_text(PROGRAM.replace("3.0 /", "(3.1 if sys.argv[2] == 'jaxext' else 3.0) /"))
    result = run(write(folder, FAST))
    assert result.exit_code == 1
    assert suite_report.headline(result).startswith("1 of 1 program compute something else")
    assert run(write(folder, FAST | {"tolerance": 0.1})).exit_code == 0


def test_the_command_writes_all_reports(folder, capfd):
    path = write(folder, FAST, SLOW)
    files = [f"{folder}/a.{kind}" for kind in ("json", "html", "png")]
    options = [f"--{file.rsplit('.', 1)[1]}={file}" for file in files]
    assert cli.main(["ab", "--suite", str(path), "--only", "slow", *options]) == 0
    shown = capfd.readouterr().out
    assert "2.00x as fast as stock JAX, geometric mean of 1 program" in shown
    found = json.loads((folder / "a.json").read_text())
    assert found["geometric_mean"]["as_run"]["ratio"] == 2.0
    assert found["programs"][0]["command"] == "printing.py 4"
    page = (folder / "a.html").read_text()
    assert "<svg" in page and "2.00&times;" in page
    assert (folder / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ({"target": "printing.py"}, [], r"suite\.toml, program 1: the key 'name' is missing"),
        ({"name": "a", "target": "gone.py"}, [], r"program 1: target .*gone\.py' does not exist"),
        (
            FAST | {"steps": 3},
            [],
            r"program 1: unknown key 'steps', expected one of name, target, arguments, tolerance, repeats",
        ),
        (FAST | {"arguments": "1"}, [], r"program 1: arguments = '1', expected a list"),
        (FAST | {"repeats": 0}, [], r"program 1: repeats = 0, expected at least 1"),
        (FAST, ["--only", "quick"], r"--only 'quick': no such program in suite\.toml, expected one of fast"),
        (FAST, ["--vs", "jaxext"], r"--vs, --memory: a suite always compares stock JAX"),
        (FAST, ["--args", "3"], r"--args '3': a suite's file names its programs and their arguments"),
    ],
)
def test_mistakes_are_answered(folder, capfd, table, options, message):
    path = write(folder, table)
    assert cli.main(["ab", "--suite", str(path), *options]) == 2
    assert re.search(message, capfd.readouterr().err)


def test_nothing_to_test_is_answered(capfd):
    assert cli.main(["ab"]) == 2
    assert "give file.py:factory, file.py, or --suite" in capfd.readouterr().err


def test_a_missing_suite_is_answered(capfd):
    assert cli.main(["ab", "--suite", "no.toml"]) == 2
    assert "--suite 'no.toml': no such file" in capfd.readouterr().err


def test_the_geometric_mean_of_exact_ratios_is_exact():
    mean = geometric_mean([[([4.0] * 3, [1.0] * 3)], [([1.0] * 3, [1.0] * 3)]], seed=0)
    assert mean.value == pytest.approx(2.0)
    assert mean.interval == pytest.approx((2.0, 2.0))
    assert mean.pairs == 2


def test_a_program_of_two_pairs_leaves_the_mean_without_interval():
    assert geometric_mean([[([4.0] * 2, [1.0] * 2)]], seed=0).interval is None


def test_the_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="programs is empty: expected the measurements of at least one program"):
        geometric_mean([], seed=0)
