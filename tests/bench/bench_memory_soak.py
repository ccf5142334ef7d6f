"""What memory reuse costs and brings over many steps with changing shapes: stock JAX beside it, as ratios.

    python tests/bench/bench_memory_soak.py [--steps 1000]

Each side runs in processes of its own, in turn. A step is the gradient of an attention and a feed-forward block at
one of many sequence lengths, and keeps a few results of earlier steps alive, so that freed memory has holes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LENGTHS = (384, 512, 640, 768, 1000, 1024, 1280, 1500, 1536, 2048)
HEADS = (2, 4, 6, 8)
KEPT_RESULTS = 4


def soak(memory: str, steps: int, seed: int) -> dict[str, Any]:
    """Runs the steps in this process; seconds, page faults and resident bytes along the way."""
    import resource

    from jaxext import _memory

    note = _memory.apply(memory)
    import jax
    import numpy as np

    @jax.jit
    @jax.grad
    def gradient(x):
        mixed = jax.nn.dot_product_attention(x, x, x, is_causal=True)
        wide = mixed.reshape(x.shape[1], -1)
        return (jax.nn.gelu(wide @ wide.T) @ wide).sum()

    shapes = [(1, length, heads, 64) for length in LENGTHS for heads in HEADS]
    for shape in shapes:  # compile
        gradient(np.ones(shape, np.float32)).block_until_ready()
    order = np.random.default_rng(seed).choice(len(shapes), steps)
    faults_before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept, resident, start = [], [], time.perf_counter()
    for number, chosen in enumerate(order):
        kept = [*kept[-KEPT_RESULTS + 1 :], gradient(jax.numpy.ones(shapes[chosen])).block_until_ready()]
        if number % max(1, steps // 20) == 0:
            resident.append(_memory.state().resident)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "note": note,
        "seconds": time.perf_counter() - start,
        "faults": usage.ru_minflt - faults_before,
        "peak": usage.ru_maxrss * 1024,
        "resident": resident,
        "released": _memory.release_memory(),
    }


def in_own_process(memory: str, steps: int, seed: int) -> dict[str, Any]:
    command = [sys.executable, Path(__file__), "--side", memory, "--steps", str(steps), "--seed", str(seed)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def growth(resident: list[int]) -> float:
    """Resident memory of the last quarter over that of the second quarter: 1 where it is level."""
    quarter = max(1, len(resident) // 4)
    return statistics.mean(resident[-quarter:]) / statistics.mean(resident[quarter : 2 * quarter])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="steps of one process (1000)")
    parser.add_argument("--rounds", type=int, default=1, help="processes of each side (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the shapes")
    parser.add_argument("--side", choices=("system", "reuse"), help="run one side here and print JSON")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(soak(args.side, args.steps, args.seed)))
        return
    ratios: dict[str, list[float]] = {"seconds": [], "faults": [], "peak": []}
    for number in range(args.rounds):
        sides = {memory: in_own_process(memory, args.steps, args.seed + number) for memory in ("system", "reuse")}
        for memory, result in sides.items():
            levels = " ".join(f"{size / 2**20:.0f}" for size in result["resident"])
            print(f"{memory}: {result['note'] or 'in force'}")
            print(
                f"  {result['seconds']:.1f} s, {result['faults']:,} page faults, peak {result['peak'] / 2**20:.0f} MiB"
            )
            print(f"  resident MiB: {levels}; last quarter / second quarter {growth(result['resident']):.2f}")
            print(f"  release_memory() gave back {result['released'] / 2**20:.0f} MiB", flush=True)
        for name, values in ratios.items():
            values.append(sides["reuse"][name] / sides["system"][name])
    print("reuse / system: " + ", ".join(f"{name} {statistics.median(v):.3f}" for name, v in ratios.items()))


if __name__ == "__main__":
    main()
