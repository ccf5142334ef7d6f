"""docs/compat.md: what it says of architectures, and of suites that are not run."""

import json

from harness import document
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
    (tmp_path / "sweep.json").write_text(json.dumps([SWEEP, SWEEP | {"agree": False, "missed": []}]))
    page = document.text(tmp_path, tmp_path)
    assert "| Some | `FlaxSome` | attention 1 of 2 | 1.0e-07 | 2.5e-06 | yes | a \\| b |" in page
    assert "| Some | `FlaxSome` | attention 1 of 2 | 1.0e-07 | 2.5e-06 | **no** |  |" in page


def test_suites_say_how_much_of_them_ran_and_why_not(tmp_path):
    (tmp_path / "suites").mkdir()
    for name, more in {"some": "", "other": 'skip = "needs a newer JAX"\n'}.items():
        (tmp_path / "suites" / f"{name}.toml").write_text(SUITE.format(name=name) + more)
    source = tmp_path / "sources" / "some-1"
    source.mkdir(parents=True)
    store = Store(tmp_path / "results")
    for file in ("a.py", "b.py"):
        (source / file).touch()
    result = FileResult({"a.py::t": TestResult("passed", replaced={"attention": 2}, fallbacks={"attention: small": 3})})
    for side in ("stock", "jaxext"):
        store.save(store.path("py3.13-jax0.12.0.1", "some", side, "a.py"), {"suite": "some==1"}, result)
    page = document.text(tmp_path, tmp_path)
    assert "## Test suites: Python 3.13, JAX 0.12.0.1" in page
    assert "| some 1 | 1 of 2 | 1 | 1 | 1 | 100% | 0 | 2 | 3 |" in page
    assert "Replaced: attention 2." in page
    assert "| fell back | times |\n|---|---|\n| attention: small | 3 |" in page
    assert "other is not run: needs a newer JAX" in page
