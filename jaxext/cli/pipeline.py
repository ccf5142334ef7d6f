"""`jaxext pipeline file.py:factory --stages 4`: the plan of a pipeline, its parity with plain JAX, its time."""

import argparse
import statistics
import sys
import time
from typing import Any


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "pipeline",
        help="plan a step over pipeline stages, compare it with plain JAX, and time it",
        description="Cuts a step into pipeline stages and prints the plan. Unless --plan-only is given, it then runs "
        "one step beside plain JAX, compares the results, and times both. On CPU it makes as many devices as stages, "
        "which share the machine's cores: the time then shows what the pipeline costs, not what devices gain.",
    )
    parser.add_argument("target", metavar="file.py:factory", help="a function that returns (step, args)")
    parser.add_argument("--stages", type=int, default=None, help="devices in the pipeline (all)")
    parser.add_argument("--microbatches", type=int, default=None, help="parts of the batch (chosen)")
    parser.add_argument(
        "--schedule", default="1f1b", help="gpipe, 1f1b, interleaved_1f1b, zb_h1, zb_v, dualpipe_v, auto"
    )
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side (5)")
    parser.add_argument("--plan-only", action="store_true", help="run nothing")
    parser.add_argument("--plot", metavar="FILE", help="draw the timeline (.svg, .png, .pdf)")
    parser.add_argument("--trace", metavar="FILE", help="write the timeline for ui.perfetto.dev (.json)")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON, and run nothing")


def main(args: argparse.Namespace) -> int:
    import jax

    from jaxext.abtest import protocol

    if args.stages is not None and args.stages > 0:
        # Of the CPU alone: other devices are as many as there are.
        jax.config.update("jax_num_cpu_devices", args.stages)
    try:
        path, factory = protocol.parse_target(args.target)
        if factory is None:
            raise protocol.TargetError(f"target {args.target!r}: no factory is named. Write {args.target}:factory.")
        workload = protocol.load(path, factory)
        return _run(args, workload)
    except (protocol.TargetError, ValueError) as error:
        print(f"jaxext pipeline: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace, workload: Any) -> int:
    from rich.console import Console

    import jaxext

    pipelined = jaxext.pipeline(
        workload.step, num_stages=args.stages, num_microbatches=args.microbatches, schedule=args.schedule
    )
    plan = pipelined.plan(*workload.args)
    if args.plot:
        plan.plot(args.plot)
    if args.trace:
        plan.trace(args.trace)
    if args.json:
        print(plan.to_json())
        return 0
    console = Console()
    console.print(plan)
    return 0 if args.plan_only else _compare(console, workload, pipelined, plan, args.steps)


def _compare(console: Any, workload: Any, pipelined: Any, plan: Any, steps: int) -> int:
    import jax

    import jaxext
    from jaxext._check import Checked, CheckError, copied
    from jaxext.pipelining.simulate import simulate

    try:
        with console.status("one step beside plain JAX"):
            Checked(pipelined)(*copied(workload.args))
    except CheckError as error:
        console.print(f"parity: {error}", style="red")
        return 1
    console.print("parity: all results of one step agree with plain JAX")
    seconds: dict[str, list[float]] = {"plain": [], "pipelined": []}
    with console.status("timing"):
        for _ in range(steps):
            for side, times in seconds.items():
                own = copied(workload.args)
                jax.block_until_ready(jax.tree.leaves(own))
                start = time.perf_counter()
                if side == "plain":
                    with jaxext.disabled():
                        jax.block_until_ready(pipelined(*own))
                else:
                    jax.block_until_ready(pipelined(*own))
                times.append(time.perf_counter() - start)
        _, costs = pipelined.measure(*copied(workload.args))
    plain, piped = (statistics.median(times) for times in seconds.values())
    predicted = simulate(plan.schedule, costs)
    console.print(f"time: {plain / piped:.2f}x plain jit on one device, medians of {steps} interleaved steps")
    speedup, bubble = sum(predicted.busy) / predicted.makespan, predicted.bubble_fraction
    console.print(
        f"from the stages' measured passes, on devices that do not share cores: {speedup:.2f}x one device, "
        f"bubble {bubble:.0%} of the loss"
    )
    return 0
