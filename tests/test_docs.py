"""Every example in the guides works: Python blocks run in order, console blocks print what they show."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
GUIDES = sorted((Path(__file__).parents[1] / "docs").glob("guide_*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

RUN_BLOCKS = """
import json, sys
names = {"__name__": "__main__"}
for line, source in json.load(sys.stdin):
    exec(compile("\\n" * line + source, sys.argv[1], "exec"), names)
"""


def blocks(guide: Path, language: str) -> list[tuple[int, str]]:
    """(lines before it, text) of each block."""
    text = guide.read_text()
    return [(text[: m.start(2)].count("\n"), m[2]) for m in BLOCK.finditer(text) if m[1] == language]


def write_files(guide: Path, folder: Path) -> list[tuple[int, str]]:
    """Writes the blocks that begin with a file's name; returns the others."""
    rest = []
    for line, source in blocks(guide, "python"):
        name = re.match(r"# (\w+\.py)\n", source)
        if name:
            (folder / name[1]).write_text(source)
        else:
            rest.append((line, source))
    return rest


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAXEXT_")}
    return kept | {"JAX_PLATFORMS": "cpu", "COLUMNS": "120"}


@pytest.mark.parametrize("guide", [*GUIDES, README], ids=lambda p: p.stem)
def test_python_blocks_run(guide, tmp_path):
    source = json.dumps(write_files(guide, tmp_path))
    command = [sys.executable, "-c", RUN_BLOCKS, str(guide)]
    done = subprocess.run(
        command, input=source, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def console_cases():
    for guide in GUIDES:
        for line, text in blocks(guide, "console"):
            for case in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
                command, _, expected = case.partition("\n")
                yield pytest.param(guide, command, expected, id=f"{guide.stem}:{line}:{command}")


def shows(expected: str, output: str) -> bool:
    """`...` stands for any text, within a line or for lines."""
    pattern = "".join(".*" if part == "..." else re.escape(part) for part in re.split(r"(\.\.\.)", expected.strip()))
    return re.fullmatch(pattern, output.strip(), re.DOTALL) is not None


@pytest.mark.parametrize(("guide", "command", "expected"), list(console_cases()))
def test_console_blocks_print_what_they_show(guide, command, expected, tmp_path):
    write_files(guide, tmp_path)
    shell = f'jaxext() {{ "{sys.executable}" -m jaxext "$@"; }}\n{command}'
    done = subprocess.run(
        ["bash", "-c", shell],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    assert shows(expected, done.stdout), done.stdout


def test_every_environment_variable_is_in_the_guide():
    """The one table of variables lists what the sources read, and nothing else."""
    root = Path(__file__).parents[1]
    sources = [*(root / "jaxext").rglob("*.py"), *(root / "native").rglob("*.cc")]
    read = {name for path in sources for name in re.findall(r"[\"'](JAXEXT_[A-Z]+)[\"']", path.read_text())}
    listed = set(
        re.findall(r"^\| `(JAXEXT_[A-Z]+)=", (root / "docs/guide_install_and_run.md").read_text(), re.MULTILINE)
    )
    assert listed == read


def test_guides_link_to_files_that_exist():
    for guide in GUIDES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", guide.read_text()):
            assert (guide.parent / target).exists(), f"{guide.name}: {target}"
