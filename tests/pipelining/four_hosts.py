"""A program for `jaxext launch`: timed steps over a process for each stage, whose passes are made to last a known time.

The hosts of the test share a machine's cores, those of a cluster do not: so each pass computes, and then sleeps until a
fixed time after it began, in which it leaves the cores to the others.

Arguments: folder, steps, then for each of several pipelines the number of its link, schedule and the seconds of a
forward pass.
"""

import dataclasses
import functools
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from network import address
from programs import BATCH, dense, normal

import jaxext
from jaxext.pipelining import transport
from jaxext.pipelining.simulate import simulate

WIDE = 512


def step(params, x):
    def loss_fn(params):
        y = x
        for w in params:
            y = jnp.tanh(y @ w)
        return jnp.mean(y**2)

    loss, gradients = jax.value_and_grad(loss_fn)(params)
    return jax.tree.map(lambda w, g: w - g, params, gradients), loss


def arguments():
    return [dense(n, WIDE, WIDE) for n in range(4)], normal(9, BATCH, WIDE)


def lasting(run, seconds):
    """`run`, ending so many seconds after it began."""

    def slowed(*arrays):
        start = time.perf_counter()
        results = jax.block_until_ready(run(*arrays))
        time.sleep(max(0.0, start + seconds - time.perf_counter()))
        return results

    return slowed


class Lasting:
    """A backward pass that ends so many seconds after it began."""

    def __init__(self, backward, seconds):
        self._backward, self._seconds = backward, seconds

    def resolve(self, accumulators):
        return lasting(self._backward.resolve(accumulators), self._seconds)


class Addresses(transport._Addresses):
    """The addresses of processes on one of several links."""

    def __init__(self, link):
        super().__init__()
        self._link = link

    def host(self):
        return address(jax.process_index(), self._link)

    def put(self, rank, address):
        super().put(f"{self._link}/{rank}", address)

    def get(self, rank, timeout):
        return super().get(f"{self._link}/{rank}", timeout)


@functools.cache
def connections(link):
    return transport.Transport(jax.process_index(), jax.process_count(), Addresses(link), 60.0)


def measured(schedule, seconds, steps):
    """What is seen of a pipeline here, and what this process has of the parameters."""
    pipelined = jaxext.pipeline(step, num_microbatches=4, schedule=schedule)
    params, x = arguments()
    params, loss = pipelined(params, x)
    losses, times = [float(loss)], []
    (built,) = pipelined._built.values()
    for program in built.step.programs:
        program.forward = lasting(program.forward, seconds)
        program.backward = Lasting(program.backward, 2 * seconds)
    (params, loss), costs = pipelined.measure(params, x)
    losses.append(float(loss))
    for _ in range(steps):
        start = time.perf_counter()
        params, loss = pipelined(params, x)
        losses.append(float(loss))
        times.append(time.perf_counter() - start)
    predicted = simulate(built.schedule, costs).makespan
    undelayed = simulate(built.schedule, dataclasses.replace(costs, transfer=0.0)).makespan
    found = {"losses": losses, "seconds": times, "predicted": predicted, "undelayed": undelayed}
    found |= {"latency": costs.transfer, "bandwidth": costs.bandwidth}
    return found, [w for w in params if w.is_fully_addressable]


def main(folder, steps, *cases):
    for number, (link, schedule, seconds) in enumerate(zip(cases[::3], cases[1::3], cases[2::3], strict=True)):
        transport._connected[:] = [connections(int(link))]
        found, own = measured(schedule, float(seconds), int(steps))
        place = Path(folder) / f"{number}_{jax.process_index()}"
        place.with_suffix(".json").write_text(json.dumps(found))
        np.savez(place.with_suffix(".npz"), *own)


if __name__ == "__main__":
    main(*sys.argv[1:])
