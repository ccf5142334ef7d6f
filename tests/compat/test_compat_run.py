"""A project made of every kind of outcome, through the whole of compat/run.py but for downloads."""

import dataclasses
import re
import shutil
import sys
import tarfile
from pathlib import Path

import jax
import pytest
from harness import cli, environment, execute, schedule
from harness.errors import CompatError
from harness.results import FileResult, TestResult
from harness.suite import Suite

PROJECT = Path(__file__).parent / "fake_project"
# In place of jaxext's folder one that nobody edits while the tests run.
BASE = environment.Base(sys.executable, "3.11.7", jax.__version__, "", (), PROJECT)
PREPARED = environment.Prepared(sys.executable, PROJECT)
SUITE = """
name = "fake"
package = "fake"
version = "1"
paths = ["test_mixed.py", "test_crash.py", "test_broken.py"]
expects_replacements = true
"""
KNOWN = """
[[failure]]
test = "test_mixed.py::test_fails_as_known"
reason = "a good one"
[[failure]]
test = "test_mixed.py::test_passes_unexpectedly"
reason = "once"
[[failure]]
test = "test_mixed.py::test_of_another_release"
reason = "renamed"
[[failure]]
test = "test_mixed.py::test_fails_on_stock"
reason = "not ours"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the suite; its results are made once and then read from the cache."""
    folder = tmp_path_factory.mktemp("compat")
    for name, text in {"suites": SUITE, "known_failures": KNOWN}.items():
        (folder / name).mkdir()
        (folder / name / "fake.toml").write_text(text)
    shutil.copytree(PROJECT, folder / "cache" / "sources" / "fake-1")
    return folder


@pytest.fixture(autouse=True)
def _no_downloads(monkeypatch):
    monkeypatch.setattr(schedule, "prepare", lambda *_: PREPARED)
    monkeypatch.setattr(cli, "probe", lambda _: BASE)


def run(place, capsys, *options):
    code = cli.main(["--cache", str(place / "cache"), *options], compat=place)
    return code, re.sub(r"\s+", " ", capsys.readouterr().out)


def test_every_kind_of_outcome(place, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    code, output = run(place, capsys)
    assert code == 1
    expected = {
        "test_mixed.py::test_regresses": "failed: AssertionError: the first line",
        "test_mixed.py::test_passes_unexpectedly": "passes, but is a known failure (once): drop it",
        "test_mixed.py::test_of_another_release": "a known failure that names no test: correct or drop it",
        "test_mixed.py::test_fails_on_stock": "a known failure that is failed on stock JAX too: drop it",
        "test_mixed.py::test_teardown_breaks": "error: AssertionError: in teardown",
        "test_mixed.py::test_vanishes": "error: it was not collected",
        "test_crash.py::test_crashes": "crashed: its process was ended by SIGABRT",
        "test_crash.py::test_after": "failed: AssertionError: seen behind the crash",
    }
    for test, what in expected.items():
        assert f"{test} │ {what}" in output
    assert "TestClass::test_parts │ failed" in output
    assert "9 problems" in output
    assert "fake: test_broken.py cannot be collected on stock JAX: ImportError: no such dependency" in output
    # tests, pass on stock, of these on jaxext, known failures, replaced kernel calls, fall-backs
    assert re.search(r"fake │ 13 │ 11 │ 4 │ 2 │ [1-9]\d* │ 0 │", output)

    # What is recorded is not run again unless that is wanted.
    monkeypatch.setattr(execute, "run", lambda *_: pytest.fail("ran again"))
    assert run(place, capsys, "--write-docs", "--docs", str(place / "compat.md"))[0] == 1
    document = (place / "compat.md").read_text()
    assert f"## Test suites: Python 3.11, JAX {jax.__version__}" in document
    assert "| fake 1 | 3 | 13 | 11 | 4 | 36.36% | 2 |" in document
    assert "| `test_mixed.py::test_fails_as_known` | a good one |" in document
    assert "Replaced: attention " in document
    ran = []
    monkeypatch.setattr(execute, "run", lambda job, _: ran.append(job.side) or FileResult({"t": TestResult("passed")}))
    run(place, capsys, "--rerun")
    assert sorted(ran) == ["jaxext"] * 3 + ["stock"] * 3


def test_a_hanging_test_is_told_from_those_around_it(tmp_path):
    suite = Suite("fake", "fake", "1", ("test_hangs.py",), timeout=6)
    job = execute.Job(suite, PREPARED, "test_hangs.py", "stock", tmp_path / "job.events")
    tests = execute.run(job, execute.Processes()).tests
    assert {test.partition("::")[2]: result.outcome for test, result in tests.items()} == {
        "test_before": "passed",
        "test_hangs": "timed out",
        "test_after": "passed",
    }
    assert tests["test_hangs.py::test_hangs"].error == "its process took more than 6 s"


def test_pytest_that_cannot_start_is_an_error_with_its_words(tmp_path):
    suite = Suite("fake", "fake", "1", ("test_mixed.py",), options=("--no-such-option",))
    job = execute.Job(suite, PREPARED, "test_mixed.py", "stock", tmp_path / "job.events")
    with pytest.raises(CompatError, match=r"suite fake, test_mixed.py: pytest gave up .*\n(.*\n)*.*--no-such-option"):
        execute.run(job, execute.Processes())


def test_the_machines_settings_do_not_reach_the_tests(monkeypatch, tmp_path):
    for name in ("JAX_ENABLE_X64", "JAXEXT_DISABLE", "XLA_FLAGS", "PYTEST_ADDOPTS"):
        monkeypatch.setenv(name, "1")
    suite = Suite("fake", "fake", "1", ("test_mixed.py",), environment={"XLA_FLAGS": "own"})
    variables = execute.Job(suite, PREPARED, "test_mixed.py", "stock", tmp_path / "e").environment()
    assert not variables.keys() & {"JAX_ENABLE_X64", "JAXEXT_DISABLE", "PYTEST_ADDOPTS"}
    assert variables["XLA_FLAGS"] == "own" and variables["JAX_PLATFORMS"] == "cpu"


def test_a_result_depends_on_jaxexts_sources_on_one_side_alone(tmp_path):
    suite = Suite("fake", "fake", "1", ("test_mixed.py",))
    stock, jaxext_side = (schedule.result_key(suite, BASE, side, "code") for side in ("stock", "jaxext"))
    assert jaxext_side == {**stock, "jaxext": "code"}
    other = dataclasses.replace(suite, version="2")
    assert schedule.result_key(other, BASE, "stock", "code") != stock
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("1")
    before = environment.digest(package)
    (package / "a.py").write_text("2")
    assert environment.digest(package) != before


def test_a_source_distribution_is_unpacked_without_its_outer_folder(tmp_path):
    archives = tmp_path / "archives"
    archives.mkdir()
    with tarfile.open(archives / "fake-1.tar.gz", "w:gz") as archive:
        archive.add(PROJECT, "fake-1")
    environment.unpack(archives, tmp_path / "fake-1")
    assert (tmp_path / "fake-1" / "test_mixed.py").exists()
    (archives / "other.zip").touch()
    with pytest.raises(CompatError, match="2 source distributions, expected one"):
        environment.unpack(archives, tmp_path / "again")


def test_a_python_without_jaxext_is_an_error_that_says_what_to_do(tmp_path):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'jaxext'\" >&2\nexit 1\n")
    script.chmod(0o755)
    with pytest.raises(CompatError, match=r"No module named 'jaxext'. Install jaxext there first"):
        environment.probe(str(script))
    with pytest.raises(CompatError, match="Name the Python of an environment with jaxext"):
        environment.probe(str(tmp_path / "none"))
