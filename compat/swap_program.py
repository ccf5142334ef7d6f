"""Whole programs under the swap-in import: `import jax` becomes `import jaxext as jax`, and the output must stay.

    python compat/swap_program.py PROGRAM_OR_FOLDER … [--tolerance 1e-3] [--ignore REGEX] [-- PROGRAM OPTIONS]

Each program runs twice from a temporary copy of its folder, as it is and with its imports of JAX rewritten (its own
modules' imports too), with the same options and environment. Exit code and standard output are compared, numbers at a
tolerance. Exit codes: 0 all agree, 1 one does not, 2 nothing to run.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\bnan\b|\binf\b)")
# What two runs of one program never share.
TIMES = (
    r"\b(?:ms|seconds) [\d.]+"
    r"|[\d.,]+ ?(?:ns|us|µs|ms|s|min|seconds|tokens/s|it/s|steps/s|images/s|examples/s)\b(?! [\d.])"
)


# ---------------------------------------------------------------- rewriting


def swap(source: str) -> tuple[str, int]:
    """The program with its imports of JAX turned to jaxext, and how many statements that were.

    Nothing else moves: lines keep their numbers, and comments and formatting stay. JAX's private modules
    (`jax._src`) stay as they are.

    Raises:
      SyntaxError: the source is no Python.
    """
    edits: list[tuple[int, int, str]] = []
    starts = _line_starts(source)
    statements = 0
    for node in ast.walk(ast.parse(source)):
        found: list[tuple[int, int, str]] = []
        if isinstance(node, ast.Import):
            for alias in node.names:
                if _is_public(alias.name):
                    found.append(_import_edit(source, starts, alias))
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and _is_public(node.module or ""):
            begin = _offset(source, starts, node)
            match = re.compile(r"from(?:\s|\\\n)+(jax)\b").match(source, begin)
            assert match is not None, ast.unparse(node)
            found.append((match.start(1), match.end(1), "jaxext"))
        edits += found
        statements += bool(found)
    for begin, end, text in sorted(edits, reverse=True):
        source = source[:begin] + text + source[end:]
    return source, statements


def _is_public(module: str) -> bool:
    package, _, rest = module.partition(".")
    return package == "jax" and not rest.startswith("_")


def _import_edit(source: str, starts: list[int], alias: ast.alias) -> tuple[int, int, str]:
    begin = _offset(source, starts, alias)
    end = begin + len("jax")
    assert source[begin:end] == "jax", alias.name
    if alias.asname is not None:
        return begin, end, "jaxext"
    end = begin + len(alias.name)
    if source[begin:end] != alias.name:
        raise SyntaxError(
            f"line {alias.lineno}: `{alias.name}` with spaces in it cannot be rewritten. Write it as one."
        )
    if alias.name == "jax":
        return begin, end, "jaxext as jax"
    # `import jax.numpy` also binds `jax`.
    return begin, end, f"jaxext{alias.name.removeprefix('jax')}, jaxext as jax"


def _line_starts(source: str) -> list[int]:
    starts = [0]
    for line in source.split("\n"):  # form feeds end no line of Python's
        starts.append(starts[-1] + len(line) + 1)
    return starts


def _offset(source: str, starts: list[int], node: ast.stmt | ast.alias) -> int:
    """Where a node begins in the text; ast counts columns in bytes."""
    start = starts[node.lineno - 1]
    line = source[start : starts[node.lineno]]
    return start + len(line.encode()[: node.col_offset].decode())


# ---------------------------------------------------------------- running


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one program. `problem`: "" where both sides agree; `worst`: the largest relative difference."""

    program: Path
    statements: int
    numbers: int
    worst: float
    problem: str


def _copied(folder: Path, target: Path, swapped: bool) -> None:
    """The folder as links, its Python files and packages as copies."""
    target.mkdir()
    for entry in folder.iterdir():
        if entry.name in ("__pycache__", ".git"):
            continue
        if entry.suffix == ".py" and entry.is_file():
            source = entry.read_text(encoding="utf-8-sig")
            (target / entry.name).write_text(swap(source)[0] if swapped else source, encoding="utf-8")
        elif entry.is_dir() and (entry / "__init__.py").exists():
            _copied(entry, target / entry.name, swapped)
        else:
            (target / entry.name).symlink_to(entry.resolve())


def run_program(program: Path, options: list[str], tolerance: float, ignore: str, timeout: float) -> Outcome:
    """Runs the program on both sides and compares them."""
    _, statements = swap(program.read_text(encoding="utf-8-sig"))
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        for side in ("stock", "swap"):
            folder = Path(temporary, side)
            _copied(program.resolve().parent, folder, swapped=side == "swap")
            command = [sys.executable, str(folder / program.name), *options]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
            except subprocess.TimeoutExpired:
                return Outcome(program, statements, 0, math.nan, f"{side}: not done after {timeout:g} s")
            # The program's own path is the only thing that has to differ.
            results.append((done.returncode, done.stdout.replace(str(folder), "."), done.stderr))
    (code, output, errors), (own_code, own_output, own_errors) = results
    if code != own_code:
        last = (own_errors if own_code else errors).strip().splitlines()[-1:]
        return Outcome(program, statements, 0, math.nan, f"exit code {code} on stock, {own_code} here: {''.join(last)}")
    problem, numbers, worst = compare(output, own_output, tolerance, ignore)
    if code and not output:
        problem = f"exit code {code} on both sides before any output: {''.join(errors.strip().splitlines()[-1:])}"
    return Outcome(program, statements, numbers, worst, problem)


def compare(expected: str, found: str, tolerance: float, ignore: str = TIMES) -> tuple[str, int, float]:
    """The first line that differs ("" where none does), how many numbers agree, and the worst relative difference.

    Args:
      tolerance: how far a number may be off, relative to the larger of its size and 1e-3.
      ignore: what is left out of both texts, as a regular expression.
    """
    skipped = re.compile(ignore) if ignore else None
    texts = [(skipped.sub("…", text) if skipped else text).splitlines() for text in (expected, found)]
    numbers, worst = 0, 0.0
    for number, (stock, own) in enumerate(zip(*texts), 1):
        values = [list(map(float, NUMBER.findall(line))) for line in (stock, own)]
        words = [re.sub(r"\s+", " ", NUMBER.sub("#", line)) for line in (stock, own)]
        differences = [_difference(a, b) for a, b in zip(*values)]
        if words[0] != words[1] or any(difference > tolerance for difference in differences):
            return f"line {number}: {stock.strip()!r} on stock, {own.strip()!r} here", numbers, math.nan
        numbers += len(differences)
        worst = max(worst, *differences, 0.0)
    if len(texts[0]) != len(texts[1]):
        return f"{len(texts[0])} lines on stock, {len(texts[1])} here", numbers, math.nan
    return "", numbers, worst


def _difference(a: float, b: float) -> float:
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    difference = abs(a - b) / max(abs(a), abs(b), 1e-3)
    return difference if math.isfinite(difference) else math.inf


# ---------------------------------------------------------------- the command


def programs(paths: list[Path]) -> list[Path]:
    """The programs among `paths`; of a folder, its Python files that import JAX."""
    found = []
    for path in paths:
        if path.is_dir():
            found += [file for file in sorted(path.glob("*.py")) if swap(file.read_text(encoding="utf-8-sig"))[1]]
        else:
            found.append(path)
    return found


def main(arguments: list[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    own, options = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    parser = argparse.ArgumentParser(description="Programs with `import jax` swapped for jaxext, against stock JAX.")
    parser.add_argument("paths", nargs="+", type=Path, metavar="PROGRAM_OR_FOLDER")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="relative difference of numbers (default 1e-3)")
    parser.add_argument("--ignore", default=TIMES, help="regular expression of what is not compared (default: times)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds a run may take (default 600)")
    parser.add_argument("--show", action="store_true", help="print a program with its imports swapped and stop")
    asked = parser.parse_args(own)
    missing = [path for path in asked.paths if not path.exists()]
    if missing:
        parser.error(f"{missing[0]} does not exist. Give a Python file or a folder of them.")
    chosen = programs(asked.paths)
    if not chosen:
        parser.error(f"no file in {asked.paths[0]} imports JAX.")
    if asked.show:
        print(swap(chosen[0].read_text(encoding="utf-8-sig"))[0], end="")
        return 0
    table = Table("program", "imports swapped", "numbers", "largest difference", "result")
    console = Console()
    outcomes = []
    with console.status("") as status:
        for program in chosen:
            status.update(program.name)
            outcome = run_program(program, options, asked.tolerance, asked.ignore, asked.timeout)
            outcomes.append(outcome)
            worst = "" if math.isnan(outcome.worst) else f"{outcome.worst:.1e}"
            result = Text(outcome.problem or "agrees", style="red" if outcome.problem else "green")
            table.add_row(program.name, str(outcome.statements), str(outcome.numbers), worst, result)
    console.print(table)
    return int(any(outcome.problem for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
