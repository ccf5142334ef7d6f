"""What a GPU can do at best, measured through JAX, and what its allocator has given out."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp

# Large enough for full speed on an H100: products of 2^40 operations, copies of 1 GiB.
_SIDE, _BYTES = 8192, 1 << 30


def peaks(seconds: float, device: Any = None, *, side: int = _SIDE, bytes_copied: int = _BYTES) -> dict[str, float]:
    """Measured peak of a device: FLOP/s of a matrix product for "f32" and "bf16", bytes/s read and written for "copy".

    Args:
      seconds: how long each of the three is measured; the best call counts.
      device: a JAX device; None: the default one.
      side: of the square matrices, which are multiplied in JAX's default precision (TF32 for "f32" on NVIDIA GPUs).
      bytes_copied: size of the array that is copied.
    """
    device = device or jax.local_devices()[0]
    product, copied = jax.jit(jnp.matmul), jax.jit(jnp.negative)
    found = {}
    for kind, dtype in (("f32", "float32"), ("bf16", "bfloat16")):
        a = jax.device_put(jnp.ones((side, side), dtype), device)
        found[kind] = 2.0 * side**3 / _best(product, (a, a), seconds)
    x = jax.device_put(jnp.ones(bytes_copied // 4, "float32"), device)
    return found | {"copy": 2.0 * bytes_copied / _best(copied, (x,), seconds)}


def _best(fn: Any, operands: tuple[Any, ...], seconds: float) -> float:
    jax.block_until_ready(fn(*operands))
    best, until = float("inf"), time.perf_counter() + seconds
    while True:
        begin = time.perf_counter()
        jax.block_until_ready(fn(*operands))
        end = time.perf_counter()
        best = min(best, end - begin)
        if end >= until:
            return best


def memory(device: Any) -> dict[str, int]:
    """`peak` and `limit` of the device's memory in bytes, as far as its allocator tells; a CPU's tells nothing."""
    stats = device.memory_stats() or {}
    named = {"peak": "peak_bytes_in_use", "limit": "bytes_limit"}
    return {name: int(stats[key]) for name, key in named.items() if key in stats}
