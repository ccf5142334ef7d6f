"""A GPT's train step: stock JAX, jaxext as run, and PyTorch, eager and compiled; whole processes, in turn.

    python tests/bench/bench_against_torch.py --torch-python PATH [--sequence 2048] [--dtype bfloat16]

Ratios are of medians over steps, round by round, without the first steps, which compile.
"""

import argparse
import re
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROGRAM = HERE.parents[1] / "compat" / "programs" / "gpt_nnx.py"


def step_time(command: list[str], warm: int) -> float:
    """Median milliseconds of a program's steps after the first `warm`."""
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1]}")
    times = [float(found) for found in re.findall(r"ms ([\d.]+)", done.stdout)]
    return statistics.median(times[warm:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", required=True, help="a Python with PyTorch and NumPy")
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    sizes = ["--sequence", str(options.sequence), "--dtype", options.dtype, "--steps", str(options.steps)]
    torch_gpt = [options.torch_python, str(HERE / "torch_gpt.py"), *sizes]
    sides = {
        "jaxext, as run": [sys.executable, "-m", "jaxext", "run", str(PROGRAM), *sizes],
        "stock JAX": [sys.executable, str(PROGRAM), *sizes],
        "torch, eager": torch_gpt,
        "torch, compiled": [*torch_gpt, "--compile"],
    }
    seen: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(options.rounds):
        names = list(sides)[turn % len(sides) :] + list(sides)[: turn % len(sides)]
        for name in names:
            seen[name].append(step_time(sides[name], warm=3))
    ours = seen["jaxext, as run"]
    for name, times in seen.items():
        ratios = sorted(time / mine for time, mine in zip(times, ours, strict=True))
        print(f"{name:16} {statistics.median(ratios):5.2f}x of jaxext's time [{ratios[0]:.2f}, {ratios[-1]:.2f}]")


if __name__ == "__main__":
    main()
