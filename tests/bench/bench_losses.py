"""Losses of 200 real training steps on jaxext against stock JAX: fresh batches of text every step.

    python tests/bench/bench_losses.py            small GPT (2 x 128, sequence 256)
    python tests/bench/bench_losses.py --real     the 6 x 768 GPT at sequence 1024

Prints the largest relative difference over the first 20 steps, and the two curves as means of ten steps.
"""

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxext.abtest import parity
from jaxext.abtest.process import Run, run_program
from jaxext.abtest.settings import Setting

PROGRAM = Path(__file__).resolve().parents[2] / "compat" / "programs" / "gpt_nnx.py"
SMALL = ["--layers", "2", "--width", "128", "--heads", "4", "--sequence", "256", "--batch", "4"]
SIDES = {"stock": Setting(kernels=False), "jaxext": Setting()}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--steps", type=int, default=200)
    return parser.parse_args()


def curve(runs: dict[str, Run]) -> Table:
    """Means of ten steps side by side."""
    table = Table("steps", "stock", "jaxext", "difference")
    left, right = runs["stock"].losses, runs["jaxext"].losses
    for start in range(0, min(len(left), len(right)) - 9, 10):
        a, b = float(np.mean(left[start : start + 10])), float(np.mean(right[start : start + 10]))
        table.add_row(f"{start + 1} to {start + 10}", f"{a:.4f}", f"{b:.4f}", f"{(b - a) / a:+.1e}")
    return table


def main() -> None:
    options = parse_arguments()
    console = Console(width=100)
    arguments = ([] if options.real else SMALL) + ["--dtype", options.dtype, "--steps", str(options.steps)]
    runs = {}
    for name, setting in SIDES.items():
        console.print(f"{name}: python gpt_nnx.py {' '.join(arguments)}")
        runs[name] = run_program(PROGRAM, arguments, setting, name)
    rule = parity.TOLERANCES[options.dtype]
    result = parity.judge(runs["stock"].losses, runs["jaxext"].losses, [], rule)
    console.print(curve(runs))
    console.print(
        f"largest relative difference over the first {parity.FIRST_STEPS} steps: {result.worst_loss:.2e} "
        f"(tolerance {rule.loss:.0e}); {'agrees' if result.agrees else 'DISAGREES: ' + '; '.join(result.failures)}"
    )


if __name__ == "__main__":
    main()
