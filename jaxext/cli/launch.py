"""`jaxext launch -n 4 train.py`: a program as several processes of one machine, joined by `jax.distributed`."""

import argparse
import os
import socket
import subprocess
import sys
import threading
import time
from typing import IO, Any

from jaxext.cli import _program

_USAGE = "jaxext launch -n PROCESSES [--grace SECONDS] script [arguments …]"


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "launch",
        usage=_USAGE,
        description="Runs a script as several processes of this machine. Each joins JAX's distributed runtime before "
        "the script begins, and its lines are shown with its number. Where one fails, the others have some time to "
        "end by themselves. On a cluster use its own launcher; jax.distributed.initialize() finds what it needs there.",
    )
    parser.add_argument("-n", "--processes", type=int, required=True, help="how many processes")
    parser.add_argument("--grace", type=float, default=10.0, help="seconds that the others have when one failed (10)")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)
    parser.add_argument("script", help="the program")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    parser.set_defaults(parser=parser)


def main(args: argparse.Namespace) -> int:
    if args.processes < 1:
        args.parser.error(f"-n {args.processes}: expected at least 1")
    return _start_all(args) if args.rank is None else _run_one(args)


def _run_one(args: argparse.Namespace) -> int:
    import jax

    jax.distributed.initialize(args.coordinator, args.processes, args.rank)
    try:
        program = _program.from_script(args.script, args.arguments)
    except _program.ProgramError as error:
        print(f"jaxext launch: {error}", file=sys.stderr)
        return error.exit_code
    try:
        program.run()
    except Exception as error:
        # JAX's runtime waits at exit for all processes, also for those that wait for this one.
        sys.excepthook(type(error), error, error.__traceback__)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    return 0


def _start_all(args: argparse.Namespace) -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    children = []
    for rank in range(args.processes):
        command = [sys.executable, "-m", "jaxext", "launch", "-n", str(args.processes), "--rank", str(rank)]
        command += ["--coordinator", coordinator, args.script, *args.arguments]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert child.stdout is not None
        threading.Thread(target=_show, args=(rank, child.stdout), daemon=True).start()
        children.append(child)
    try:
        return _wait(children, args.grace)
    finally:
        for child in children:
            child.kill()
            child.wait()


def _show(rank: int, lines: IO[str]) -> None:
    for line in lines:
        print(f"[{rank}] {line}", end="", flush=True)


def _wait(children: list[subprocess.Popen[str]], grace: float) -> int:
    """The exit code of the first process that fails, 0 where none does."""
    deadline, failed = None, 0
    while True:
        codes = [child.poll() for child in children]
        if deadline is None and any(codes):
            rank, failed = next((rank, code) for rank, code in enumerate(codes) if code)
            deadline = time.monotonic() + grace
            print(f"jaxext launch: process {rank} ended with {failed}", file=sys.stderr)
        if None not in codes or (deadline is not None and time.monotonic() > deadline):
            return abs(failed)
        time.sleep(0.05)
