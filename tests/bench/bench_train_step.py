"""Train steps of the 6x768 GPT as a user runs them, and by kernels alone.

    python tests/bench/bench_train_step.py [--sequences 512 2048] [--dtypes float32 bfloat16]

"as run": `python gpt_nnx.py` against `python -m jaxext run gpt_nnx.py`. "kernels alone": both with memory reuse, all
kernels off on one side. Every run is a process of its own, the sides in random order, repeated; the ratio is the
median over steps paired run by run, without the first step, which compiles.
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jaxext.abtest.process import compare_programs
from jaxext.abtest.progress import ProgressBar
from jaxext.abtest.report import duration, size
from jaxext.abtest.settings import Setting

PROGRAM = Path(__file__).resolve().parents[2] / "compat" / "programs" / "gpt_nnx.py"
COMPARISONS = {
    "as run": Setting(kernels=False, memory="system"),
    "kernels alone": Setting(kernels=False, memory="reuse"),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--comparisons", nargs="+", choices=COMPARISONS, default=list(COMPARISONS))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    console = Console(width=140)
    table = Table("sequence", "dtype", "comparison", "stock", "jaxext", "ratio [95%]", "peak RSS", "loss difference")
    with ProgressBar(Console(stderr=True)) as bar:
        for sequence in options.sequences:
            for dtype in options.dtypes:
                for name in options.comparisons:
                    sizes = ["--sequence", str(sequence), "--dtype", dtype, "--steps", str(options.steps)]
                    result = compare_programs(
                        PROGRAM,
                        sizes,
                        COMPARISONS[name],
                        Setting(),
                        repeats=options.repeats,
                        budget=None,
                        seed=options.seed,
                        tolerance=1e-2 if dtype == "bfloat16" else None,
                        watcher=bar,
                    )
                    left, right = result.reference, result.candidate
                    table.add_row(
                        str(sequence),
                        dtype,
                        name,
                        duration(left.median),
                        duration(right.median),
                        str(result.speed),
                        f"{size(left.peak_rss)} / {size(right.peak_rss)}",
                        f"{result.parity.worst_loss or 0.0:.1e}" + ("" if result.agrees else " DISAGREES"),
                    )
                    for note in result.notes:
                        console.print(f"{sequence} {dtype} {name}: {note}")
    console.print(table)


if __name__ == "__main__":
    main()
