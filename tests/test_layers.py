"""The house rules that a reader relies on: who may import whom, and how large a file may be."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jaxext"
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = [*MODULES, *sorted((ROOT / "native").rglob("*.*")), *sorted((ROOT / "tests").rglob("*.py"))]

# layer -> the jaxext layers it may import; a module belongs to the longest prefix that fits.
ALLOWED = {
    "kernels": {"kernels", "_jax_compat", "_native"},
    "rewrite": {"rewrite", "kernels", "_jax_compat", "_settings"},
    "pipelining": {"pipelining", "rewrite", "kernels", "_accelerate", "_check", "_jax_compat", "_settings"},
    "_jax_compat": set(),
    "_settings": {"_jax_compat"},
    "abtest": {"abtest", "accelerate", "disabled", "explain", "kernels", "_memory", "_native", "_settings"},
}


def imports(path: Path) -> set[str]:
    """Dotted names under jaxext that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("jaxext.") for name in found if name.startswith("jaxext.")}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_import_only_downwards(path):
    layer = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if layer not in ALLOWED:
        return
    above = {name for name in imports(path) if name.split(".")[0] not in ALLOWED[layer]}
    assert not above, f"{layer} may import {sorted(ALLOWED[layer])}, not {sorted(above)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_compatibility_module_reaches_into_jax(path):
    if path.name != "_jax_compat.py":
        assert not re.search(r"\bjax\._src\b", path.read_text())


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_within_the_budget(path):
    if path.suffix in {".py", ".cc", ".cu", ".h"}:
        assert len(path.read_text().splitlines()) <= 600


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_stay_within_the_budget(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"


def test_kernels_include_no_nanobind():
    for path in (ROOT / "native" / "cpu").iterdir():
        assert "nanobind" not in path.read_text(), path.name


def test_no_machine_paths_in_the_repository():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in tracked.stdout.split():
        text = (ROOT / name).read_bytes().decode(errors="ignore")
        assert not re.search(r"(?<![\w.])/(work|root)/", text) or name == "tests/test_layers.py", name
