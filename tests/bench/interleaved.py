"""Timing of several functions turn by turn in one process, with memory reuse on for all of them."""

import os
import statistics
import time

from jaxext import _memory, _native

MEMORY = _memory.apply("reuse")

import jax  # noqa: E402


def medians(functions, repeats=15, seconds=3.0):
    """Median seconds of each of {name: function of no arguments}: A B A B ..., at least 3 turns, at most `seconds`."""
    for f in functions.values():
        jax.block_until_ready(f())
    times = {name: [] for name in functions}
    start = time.perf_counter()
    for turn in range(repeats):
        for name, f in functions.items():
            before = time.perf_counter()
            jax.block_until_ready(f())
            times[name].append(time.perf_counter() - before)
        if turn >= 2 and time.perf_counter() - start > seconds:
            break
    return {name: statistics.median(t) for name, t in times.items()}


def copy_bandwidth():
    """Bytes per second this machine reads and writes, all threads, measured now."""
    return max(_native.measure_peak("copy", os.cpu_count() or 1, 0.3) for _ in range(2))
