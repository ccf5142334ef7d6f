"""`jaxext explain file.py:factory`: what jaxext replaces in a step, what it nearly would, and what fell back."""

import argparse
import json
import sys
from typing import Any


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "explain",
        help="list what jaxext replaces in a step, and why not more",
        description="Lists what jaxext replaces in a step, each with the line of the program that wrote it, what it "
        "nearly would and the operation that broke it, and what falls back to stock JAX. The step is traced, not run.",
    )
    parser.add_argument("target", metavar="file.py:factory", help="a function that returns (step, args)")
    platforms = ("cpu", "cuda", "rocm", "tpu")
    parser.add_argument("--platform", choices=platforms, help="where it would run (default: where JAX runs)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    from jaxext import explain
    from jaxext.abtest import protocol

    try:
        path, factory = protocol.parse_target(args.target)
        if factory is None:
            raise protocol.TargetError(
                f"target {args.target!r}: no factory is named. Write {args.target}:factory, factory() being a function "
                "that returns (step, args); for a whole program use `jaxext run --report`."
            )
        workload = protocol.load(path, factory)
    except protocol.TargetError as error:
        print(f"jaxext explain: {error}", file=sys.stderr)
        return 2
    report = explain(workload.step, platform=args.platform)(*workload.args)
    print(json.dumps(report.to_dict(), indent=2) if args.json else report)
    return 0
