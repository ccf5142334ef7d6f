"""What the executor of a pipeline costs: microseconds an action, and CPU time against the plain microbatched step.

Run it on a quiet machine: `python tests/bench/bench_pipeline.py`. Both sides of a ratio are interleaved; medians.
"""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import jaxext

LAYERS, MICROBATCHES = 8, 8


def make(width, batch):
    rng = np.random.default_rng(0)
    params = [jnp.asarray(rng.normal(size=(width, width)) / width**0.5, jnp.float32) for _ in range(LAYERS)]
    return params, jnp.asarray(rng.normal(size=(batch, width)), jnp.float32)


def loss_fn(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)


def step(params, x):
    loss, gradients = jax.value_and_grad(loss_fn)(params, x)
    return jax.tree.map(lambda p, g: p - 0.01 * g, params, gradients), loss


@jax.jit
def microbatched(params, x):
    """The same work by hand: gradients of microbatches added up in a loop."""

    def body(total, part):
        loss, gradients = jax.value_and_grad(loss_fn)(params, part)
        return jax.tree.map(jnp.add, total, (gradients, loss)), None

    zero = (jax.tree.map(jnp.zeros_like, params), jnp.zeros(()))
    parts = x.reshape(MICROBATCHES, -1, x.shape[1])
    (gradients, loss), _ = jax.lax.scan(body, zero, parts)
    return jax.tree.map(lambda p, g: p - 0.01 * g / MICROBATCHES, params, gradients), loss / MICROBATCHES


def timed(run, args):
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(run(*args))
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(width, batch, schedule, rounds):
    args = make(width, batch)
    pipelined = jaxext.pipeline(step, num_stages=4, num_microbatches=MICROBATCHES, schedule=schedule)
    params, _ = pipelined(*args)
    placed = (params, args[1])
    for _ in range(2):
        pipelined(*placed)
        microbatched(*args)
    found = {"pipelined": [], "microbatched": []}
    for _ in range(rounds):
        found["pipelined"].append(timed(pipelined, placed))
        found["microbatched"].append(timed(microbatched, args))
    median = {name: [statistics.median(column) for column in zip(*rows)] for name, rows in found.items()}
    actions = sum(map(len, pipelined.plan(*placed).schedule.actions))
    wall = [median[name][0] for name in ("pipelined", "microbatched")]
    cpu = [median[name][1] for name in ("pipelined", "microbatched")]
    more = (wall[0] - wall[1]) / actions * 1e6
    print(
        f"width {width:5} batch {batch:5} {schedule:6} {actions} actions: {more:6.1f} µs more wall time an action; "
        f"total CPU time {cpu[0] / cpu[1]:.2f}x the microbatched step, wall {wall[0] / wall[1]:.2f}x"
    )


if __name__ == "__main__":
    for width, batch, rounds in ((16, 32, 60), (256, 256, 30), (1024, 2048, 15)):
        for schedule in ("1f1b", "zb_h1"):
            compare(width, batch, schedule, rounds)
