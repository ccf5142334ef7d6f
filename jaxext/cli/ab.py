"""`jaxext ab file.py:factory` and `jaxext ab file.py`: how much faster, and is it still the same?"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

EXIT_DISAGREES = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
SUITE = Path("compat/programs/suite.toml")

_DESCRIPTION = """\
Run a train step on jaxext and on stock JAX, side by side, and say how much faster it is and whether it computes the
same. file.py:factory tests one step (factory() returns the step and the tuple of its arguments); file.py runs the
whole program, each side in processes of its own. --suite tests many whole programs and gives their geometric mean."""

_EPILOG = """\
--vs names what to compare with, parts joined by '+':
  stock             stock JAX (the default)
  jaxext            the same again: shows the noise of the measurement
  exclude=KERNELS   jaxext without these kernels
  precision=fp8     jaxext with products in eight bits, on GPUs
  memory=system     without memory reuse (memory=reuse: with it)
  isa=v3            on an older instruction set (v2, v3, v4, v4bf16)
  stock+memory=system is stock JAX as it comes.

exit code: 0 same results, 1 results differ or a side fails, 2 bad input."""


def add_parser(subparsers: Any) -> None:
    """Add `ab` to the command's subparsers."""
    parser = subparsers.add_parser(
        "ab",
        help="how much faster, and is it still the same?",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", nargs="?", help="file.py:factory, or file.py for the whole program")
    parser.add_argument(
        "--suite",
        nargs="?",
        type=Path,
        const=SUITE,
        metavar="FILE",
        help=f"test every program of a TOML file ({SUITE})",
    )
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="of a suite, this (repeatable)")
    parser.add_argument("--args", default="", help="arguments of the whole program, as in --args='--steps 50'")
    parser.add_argument("--steps", type=int, default=20, help="steps whose losses are compared (20)")
    parser.add_argument("--repeats", type=int, help="timed pairs (20; whole program: 3; suite: as its file says, 2)")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="begin nothing new after SECONDS (300; suite: no limit)"
    )
    parser.add_argument("--vs", default="stock", metavar="SETTING", help="what to compare with (stock)")
    parser.add_argument("--memory", choices=("reuse", "system"), default="reuse", help="memory on both sides (reuse)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of measurements (0)")
    parser.add_argument("--tolerance", type=float, help="relative difference allowed to the losses (by dtype: 1e-4)")
    parser.add_argument("--no-contributions", action="store_true", help="do not time without each kernel")
    parser.add_argument("--no-memory-row", action="store_true", help="do not measure what memory reuse brings")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON ('-': standard output)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page with charts")
    parser.add_argument("--png", type=Path, metavar="FILE", help="write the charts as one picture")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Run the test; the exit code."""
    from rich.console import Console

    from jaxext.abtest.charts import ChartsUnavailable
    from jaxext.abtest.host import StepError
    from jaxext.abtest.process import ProgramError
    from jaxext.abtest.protocol import TargetError, parse_target

    # Results alone go to standard output, so that `--json -` can be piped.
    errors = Console(stderr=True)
    try:
        if args.suite is not None:
            return _suite(args, errors)
        if args.target is None:
            raise TargetError("nothing to test: give file.py:factory, file.py, or --suite.")
        path, factory = parse_target(args.target)
        _check(args, factory)
        if factory is None:
            return _program(args, path, errors)
        if args.args:
            raise TargetError(
                f"--args {args.args!r}: a factory takes none. They are for a whole program: {path.name} without "
                f":{factory}."
            )
        return _step(args, path, factory, errors)
    except (TargetError, ChartsUnavailable, ValueError) as error:
        errors.print(f"jaxext ab: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        written = (
            f", {args.json} has the programs that were done" if args.suite and args.json else ", nothing was written"
        )
        errors.print(f"jaxext ab: interrupted{written}", style="red")
        return EXIT_INTERRUPTED
    except (StepError, ProgramError) as error:
        errors.print(f"jaxext ab: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return EXIT_DISAGREES if error.kernels else EXIT_BAD_INPUT


def _check(args: argparse.Namespace, factory: str | None) -> None:
    """Whatever would fail only after minutes of measuring is checked first."""
    from jaxext.abtest import charts, check_counts

    for name in ("json", "html", "png"):
        path = getattr(args, name)
        if path is not None and str(path) != "-" and not path.absolute().parent.is_dir():
            raise ValueError(f"--{name} {path}: the folder {path.parent} does not exist. Make it first.")
    if args.html or args.png:
        charts.require_matplotlib()
    least = 3 if factory else 1  # A program's run has many steps, which are paired one by one.
    repeats = least if args.repeats is None else args.repeats
    check_counts(steps=args.steps, repeats=repeats, budget=args.budget, least_repeats=least)


def _step(args: argparse.Namespace, path: Path, factory: str, errors: Console) -> int:
    from jaxext.abtest.experiment import Experiment, Options, remote_starter
    from jaxext.abtest.progress import ProgressBar
    from jaxext.abtest.settings import Setting, parse_versus

    candidate = Setting(memory=args.memory)
    reference = parse_versus(args.vs, args.memory)
    row = reference == Setting(kernels=False, memory="reuse") and not args.no_memory_row
    options = Options(
        reference,
        candidate,
        steps=args.steps,
        repeats=args.repeats or 20,
        budget=args.budget or 300.0,
        contributions=not args.no_contributions,
        memory_row=row,
        seed=args.seed,
        tolerance=args.tolerance,
    )
    with ProgressBar(errors) as bar:
        result = Experiment(f"{path.name}:{factory}", options, remote_starter(path, factory, args.seed), bar).run()
    _write(args, result, errors)
    return result.exit_code


def _program(args: argparse.Namespace, path: Path, errors: Console) -> int:
    from jaxext.abtest.process import compare_programs
    from jaxext.abtest.progress import ProgressBar
    from jaxext.abtest.settings import Setting, parse_versus

    candidate = Setting(memory=args.memory)
    # A whole program is compared as a user runs it, so stock JAX has the memory behaviour it comes with.
    reference = parse_versus(args.vs, "system" if args.vs == "stock" else args.memory)
    with ProgressBar(errors) as bar:
        result = compare_programs(
            path,
            shlex.split(args.args),
            reference,
            candidate,
            repeats=args.repeats or 3,
            budget=args.budget or 300.0,
            seed=args.seed,
            tolerance=args.tolerance,
            watcher=bar,
        )
    _write(args, result, errors)
    return result.exit_code


def _suite(args: argparse.Namespace, errors: Console) -> int:
    from jaxext.abtest import suite
    from jaxext.abtest.progress import ProgressBar

    for value, name in ((args.target, "target"), (args.args, "--args")):
        if value:
            raise ValueError(f"{name} {value!r}: a suite's file names its programs and their arguments. Leave it out.")
    if args.vs != "stock" or args.memory != "reuse":
        raise ValueError(
            "--vs, --memory: a suite always compares stock JAX, with and without memory reuse. Leave them out."
        )
    _check(args, None)
    programs = suite.read(args.suite, tuple(args.only), args.tolerance, args.repeats)

    def save(result: Any) -> None:
        if args.json is not None and str(args.json) != "-":
            args.json.write_text(json.dumps(result.to_dict(), indent=1) + "\n")

    with ProgressBar(errors) as bar:
        result = suite.run(
            args.suite.name,
            programs,
            budget=args.budget,
            seed=args.seed,
            watcher=bar,
            after=save,
        )
    _write(args, result, errors)
    return result.exit_code


def _write(args: argparse.Namespace, result: Any, errors: Console) -> None:
    from rich.console import Console

    if args.json is not None and str(args.json) == "-":
        json.dump(result.to_dict(), sys.stdout, indent=1)
        print()
    else:
        terminal = Console()
        # A narrow or unknown terminal would break the tables; a log has no width of its own.
        least = 80 if args.suite is None else 130
        (terminal if terminal.is_terminal and terminal.width >= least else Console(width=max(120, least))).print(result)
    if args.json is not None and str(args.json) != "-":
        args.json.write_text(json.dumps(result.to_dict(), indent=1) + "\n")
    if args.html is not None:
        from jaxext.abtest import html, suite_report

        page = html.page if args.suite is None else suite_report.page
        args.html.write_text(page(result))
    if args.png is not None:
        from jaxext.abtest import charts, suite_report

        picture = charts.picture if args.suite is None else suite_report.picture
        args.png.write_bytes(picture(result))
    written = [str(path) for path in (args.json, args.html, args.png) if path is not None and str(path) != "-"]
    if written:
        errors.print(f"wrote {', '.join(written)}", highlight=False)
