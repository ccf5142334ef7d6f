"""The `jaxext` command: one file a command, imported only when it is the one that was called."""

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "run": "run a program with jaxext installed",
    "ab": "prove by a paired speed test what jaxext brings to a step or a program",
    "explain": "list what jaxext replaces in a step, and why not more",
    "pipeline": "plan a step over pipeline stages, compare it with plain JAX, and time it",
    "launch": "run a program as several processes of this machine, one device each",
    "doctor": "show what this machine offers and what costs speed",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code, 2 where the command line is wrong."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in arguments if not word.startswith("-")), "")
    parser = argparse.ArgumentParser(prog="jaxext", description="JAX on faster kernels, without changing the program.")
    parser.add_argument("--version", action="store_true", help="show the versions of jaxext, JAX and Python")
    commands = parser.add_subparsers(dest="command", metavar="command")
    command = None
    for name, summary in COMMANDS.items():
        if name == chosen:
            command = importlib.import_module(f"jaxext.cli.{name}")
            command.add_parser(commands)
        else:
            commands.add_parser(name, help=summary)
    args = parser.parse_args(arguments)
    if args.version:
        return _print_version()
    if command is None:
        parser.print_help(sys.stderr)
        return 2
    return command.main(args)


def _print_version() -> int:
    from importlib.metadata import version

    import jaxext

    print(f"jaxext {jaxext.__version__}, JAX {version('jax')}, Python {sys.version.split()[0]}")
    return 0
