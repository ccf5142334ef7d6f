"""`jaxext run`: any program, with jaxext installed before it can use JAX and everything else as without."""

import argparse
import atexit
import sys
from typing import Any

from jaxext import _memory
from jaxext.cli import _program, _startup

_USAGE = (
    "jaxext run [--memory {reuse,system}] [--no-kernels] [--report] (script | -m module | -c code | -) [arguments …]"
)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "run",
        usage=_USAGE,
        description="Runs a program as Python does, with jaxext installed. What follows the program is its own.",
    )
    parser.add_argument(
        "--memory",
        choices=_memory.CHOICES,
        default="reuse",
        help="reuse: keep freed buffers for the next step (default); system: leave the allocator alone",
    )
    parser.add_argument("--no-kernels", action="store_true", help="JAX's own code, with what --memory says alone")
    parser.add_argument("--report", action="store_true", help="at exit, list on stderr what was replaced")
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help="run a module")
    parser.add_argument("-c", dest="code", nargs=argparse.REMAINDER, help="run code given as text")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="run a script, or - for standard input")
    parser.set_defaults(parser=parser)


def main(args: argparse.Namespace) -> int:
    _startup.install_with_jax(args.memory, not args.no_kernels, _report_at_exit if args.report else lambda: None)
    try:
        program = _load(args)
    except _program.ProgramError as error:
        print(f"jaxext run: {error}", file=sys.stderr)
        return error.exit_code
    program.run()
    return 0


def _load(args: argparse.Namespace) -> _program.Program:
    if args.module:
        return _program.from_module(args.module[0], args.module[1:])
    if args.code:
        return _program.from_code(args.code[0], args.code[1:])
    if not args.script:
        args.parser.error("no program given: name a script, -m module, -c code, or - to read it from standard input")
    script, *arguments = args.script
    return _program.from_stdin(arguments) if script == "-" else _program.from_script(script, arguments)


def _report_at_exit() -> None:
    from jaxext.rewrite.report import Report, collect_everywhere

    report = Report()
    collect_everywhere(report)

    def show() -> None:
        report.notes.append(str(_memory.state()))
        print(f"jaxext run: {report}", file=sys.stderr)

    atexit.register(show)
