"""What a suite runs in: a virtual environment over the given Python's packages, and the project's unpacked source."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import tarfile
import threading
import zipfile
from pathlib import Path
from typing import Any

from .errors import CompatError
from .suite import Suite

_PROBE = """
import json, pathlib, platform, site, sysconfig, jax, jaxlib, jaxext
paths = sysconfig.get_paths()
print(json.dumps({
    "python": platform.python_version(), "jax": jax.__version__, "jaxlib": jaxlib.__version__,
    "jaxext": str(pathlib.Path(jaxext.__file__).parent),
    "packages": list(dict.fromkeys([paths["purelib"], paths["platlib"], *site.getsitepackages()])),
}))
"""


@dataclasses.dataclass(frozen=True)
class Base:
    """The Python whose JAX and jaxext are compared.

    Attributes:
      executable: its path.
      python, jax, jaxlib: versions.
      packages: folders of installed packages, which each suite's environment sees.
      jaxext: folder of the jaxext package.
    """

    executable: str
    python: str
    jax: str
    jaxlib: str
    packages: tuple[str, ...]
    jaxext: Path

    @property
    def platform(self) -> str:
        """Such as `py3.11-jax0.10.2`."""
        return f"py{'.'.join(self.python.split('.')[:2])}-jax{self.jax}"

    @property
    def versions(self) -> dict[str, str]:
        return {"python": self.python, "jax": self.jax}


def probe(executable: str) -> Base:
    """
    Raises:
      CompatError: the Python cannot import jax or jaxext.
    """
    try:
        # -P: jaxext as installed, not the sources that may lie in the working directory.
        done = subprocess.run([executable, "-P", "-c", _PROBE], capture_output=True, text=True)
    except OSError as error:
        raise CompatError(f"--python {executable}: {error}. Name the Python of an environment with jaxext.") from error
    if done.returncode:
        problem = (done.stderr.strip().splitlines() or ["it failed"])[-1]
        raise CompatError(f"--python {executable}: {problem}. Install jaxext there first: pip install '.[test]'.")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    versions = {name: found[name] for name in ("python", "jax", "jaxlib")}
    return Base(executable, packages=tuple(found["packages"]), jaxext=Path(found["jaxext"]), **versions)


def digest(package: Path) -> str:
    """Of jaxext's Python sources and native module: results of another jaxext are no results of this one."""
    total = hashlib.sha256()
    for path in sorted([*package.rglob("*.py"), *package.rglob("*.so")]):
        total.update(str(path.relative_to(package)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A suite that is ready to run: the Python of its environment, and its unpacked source."""

    python: str
    source: Path


def prepare(suite: Suite, base: Base, cache: Path) -> Prepared:
    """
    Raises:
      CompatError: pip fails, with its last line, or the index has no source distribution.
    """
    with _fetching:
        source = _source(suite, base, cache)
    folder = cache / "environments" / f"{suite.name}-{base.platform}"
    python = folder / "bin" / "python"
    wanted = [f"{suite.package}=={suite.version}", *suite.requires]
    content = json.dumps({"wanted": wanted, "over": [base.executable, *base.packages]})
    stamp = folder / "compat.json"
    if not stamp.exists() or stamp.read_text() != content:
        shutil.rmtree(folder, ignore_errors=True)
        _make(folder, python, wanted, base, suite)
        stamp.write_text(content)
    return Prepared(str(python), source)


def _make(folder: Path, python: Path, wanted: list[str], base: Base, suite: Suite) -> None:
    _run([base.executable, "-m", "venv", "--without-pip", str(folder)], suite)
    (libraries,) = folder.glob("lib/python*/site-packages")
    # What the suite requires comes first; whatever else is there, JAX and jaxext above all, is the given Python's.
    lines = [f"import site; site.addsitedir({package!r})" for package in base.packages]
    (libraries / "over.pth").write_text("\n".join(lines) + "\n")
    constraints = folder / "constraints.txt"
    constraints.write_text(f"jax=={base.jax}\njaxlib=={base.jaxlib}\n")
    pip = [base.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    _run([*pip, "install", "--quiet", "--constraint", str(constraints), *wanted], suite)


# Suites of one release share its source.
_fetching = threading.Lock()


def source_folder(suite: Suite, cache: Path) -> Path:
    """Where the suite's unpacked source is, or will be."""
    return cache / "sources" / f"{suite.package}-{suite.version}"


def _source(suite: Suite, base: Base, cache: Path) -> Path:
    folder = source_folder(suite, cache)
    if not folder.exists():
        archives = cache / "archives" / folder.name
        pip = [base.executable, "-m", "pip", "--disable-pip-version-check"]
        fetch = ["download", "--quiet", "--no-deps", "--no-binary", suite.package, "--dest", str(archives)]
        _run([*pip, *fetch, f"{suite.package}=={suite.version}"], suite)
        unpack(archives, folder)
    return folder


def unpack(archives: Path, folder: Path) -> None:
    """The one archive in `archives`, without its outermost folder, as `folder`.

    Raises:
      CompatError: there is not one archive, or it does not hold one folder.
    """
    found = sorted([*archives.glob("*.tar.gz"), *archives.glob("*.zip")])
    if len(found) != 1:
        raise CompatError(f"{archives}: {len(found)} source distributions, expected one. Remove the folder.")
    unfinished = folder.with_name(folder.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    if found[0].suffix == ".zip":
        with zipfile.ZipFile(found[0]) as archive:
            archive.extractall(unfinished)
    else:
        with tarfile.open(found[0]) as archive:
            archive.extractall(unfinished, filter="data")
    inner = list(unfinished.iterdir())
    if len(inner) != 1:
        raise CompatError(f"{found[0].name} holds {len(inner)} entries, expected one folder.")
    inner[0].rename(folder)
    unfinished.rmdir()


def _run(command: list[str], suite: Suite) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        problem = "\n  ".join(lines[-5:]) or "no output"
        raise CompatError(f"suite {suite.name}: {' '.join(command[1:])} failed:\n  {problem}")
