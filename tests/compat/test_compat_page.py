"""docs/compat.md: what it says of architectures, and of suites that are not run."""

import json
import shutil

import pytest
from harness import document, records
from harness.results import FileResult, Store, TestResult

SUITE = """
name = "{name}"
package = "{name}"
version = "1"
paths = ["*.py"]
"""
SWEEP = {
    "architecture": "Some",
    "class": "FlaxSome",
    "loss_difference": 1e-7,
    "gradient_difference": 2.5e-6,
    "agree": True,
    "kernels": {"attention": [1, 2]},
    "missed": ["a | b", "a | b"],
}


def test_architectures_come_from_the_sweep(tmp_path):
    (tmp_path / "suites").mkdir()
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "sweep.json").write_text(json.dumps([SWEEP, SWEEP | {"agree": False, "missed": []}]))
    page = document.text(tmp_path / "records", tmp_path / "suites")
    assert "| Some | `FlaxSome` | attention 1 of 2 | 1.0e-07 | 2.5e-06 | yes | a \\| b |" in page
    assert "| Some | `FlaxSome` | attention 1 of 2 | 1.0e-07 | 2.5e-06 | **no** |  |" in page


@pytest.fixture
def place(tmp_path):
    """A suite of two files, of which a.py has results, and one that is skipped."""
    (tmp_path / "suites").mkdir()
    for name, more in {"some": "", "other": 'skip = "needs a newer JAX"\n'}.items():
        (tmp_path / "suites" / f"{name}.toml").write_text(SUITE.format(name=name) + more)
    source = tmp_path / "sources" / "some-1"
    source.mkdir(parents=True)
    for file in ("a.py", "b.py"):
        (source / file).touch()
    save(tmp_path, "a.py")
    return tmp_path


def save(place, file, outcome="passed", build="0123456789"):
    store = Store(place / "results")
    calls = {"replaced": {"attention": 2}, "fallbacks": {"attention: small": 3}}
    for side, key, result in (
        ("stock", {}, TestResult("passed")),
        ("jaxext", {"jaxext": build}, TestResult(outcome, **calls)),
    ):
        path = store.path("py3.13-jax0.12.0.1", "some", side, file)
        store.save(path, {"suite": "some==1", **key}, FileResult({f"{file}::t": result}))


def write(place):
    kept = [records.keep(record, place / "records") for record in records.collect(place, place)]
    return kept, document.text(place / "records", place / "suites")


def test_suites_say_how_much_of_them_ran_and_why_not(place):
    kept, page = write(place)
    assert kept == [True]
    assert "## Test suites: Python 3.13, JAX 0.12.0.1" in page
    assert "| some 1 | 1 of 2 | 1 | 1 | 1 | 100% | 0 | 2 | 3 | `012345` |" in page
    assert "Replaced: attention 2." in page
    assert "| fell back | times |\n|---|---|\n| attention: small | 3 |" in page
    assert "other is not run: needs a newer JAX" in page


def test_a_page_is_the_same_from_its_records_alone(place):
    page = write(place)[1]
    shutil.rmtree(place / "results")
    assert write(place) == ([], page)


def test_a_record_of_more_files_is_not_replaced_by_one_of_fewer(place):
    save(place, "b.py", outcome="failed", build="abcdefgh")
    page = write(place)[1]
    assert "| some 1 | 2 | 2 | 2 | 1 | 50% | 0 | 4 | 6 | `012345`, `abcdef` |" in page
    assert "| `b.py::t` | failed: |" in " ".join(page.split("  "))
    Store(place / "results").path("py3.13-jax0.12.0.1", "some", "jaxext", "b.py").unlink()
    assert write(place) == ([False], page)
