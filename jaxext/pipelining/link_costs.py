"""What the passes and the links of a pipeline of several processes cost, measured by each process and known to all."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Sequence

import numpy as np

from .simulate import Costs
from .transport import Transport

# A connection sends little at first and more with each answer (TCP's slow start): a step's messages find it warm.
_WARM_UP, _REPETITIONS = 5, 5


def joined(
    costs: Costs, owners: Sequence[int], sent_bytes: Sequence[int], transport: Transport, timeout: float
) -> Costs:
    """The costs of all stages, in seconds, from those that each process measured of its own.

    owners: the process of each stage. sent_bytes: what one microbatch hands from each stage to the next.

    The slowest of the links between neighbouring stages stands for all: a pipeline is as fast as that. All processes
    call this alike.
    """
    ranks = sorted(set(owners))
    passes = np.array([costs.forward, costs.backward_input, costs.backward_weight])
    everyones = transport.exchange(passes.ravel(), ranks, "the costs of the stages", timeout)
    found = np.stack([everyones[owner].reshape(passes.shape)[:, stage] for stage, owner in enumerate(owners)], 1)
    pairs = sorted({(min(pair), max(pair)) for pair in itertools.pairwise(owners) if pair[0] != pair[1]})
    size = max(sent_bytes, default=0)
    own = np.array([_probe(pair, size, transport, timeout) for pair in pairs])
    links = np.nanmax(list(transport.exchange(own.ravel(), ranks, "the costs of the links", timeout).values()), axis=0)
    latency, per_byte = links.reshape(-1, 2).max(axis=0)
    return dataclasses.replace(
        costs,
        forward=tuple(found[0].tolist()),
        backward_input=tuple(found[1].tolist()),
        backward_weight=tuple(found[2].tolist()),
        transfer=float(latency),
        sent_bytes=tuple(map(float, sent_bytes)),
        bandwidth=1.0 / float(per_byte) if per_byte > 0 else float("inf"),
    )


def _probe(pair: tuple[int, int], size: int, transport: Transport, timeout: float) -> tuple[float, float]:
    """Seconds that one byte takes from process to process, and what each further one adds; NaN for others' links."""
    asking, answering = pair
    other = answering if transport.rank == asking else asking
    seconds: dict[int, list[float]] = {1: [], size: []}
    for nbytes, times in seconds.items():
        for _ in range(_WARM_UP + _REPETITIONS):
            there, back = (f"a probe of {nbytes} bytes #{next(transport.moves)}" for _ in range(2))
            start = time.perf_counter()
            if transport.rank == asking:
                transport.send(other, there, [np.zeros(nbytes, np.uint8)])
                transport.receive(other, back, timeout)
                times.append(time.perf_counter() - start)
            elif transport.rank == answering:
                transport.receive(other, there, timeout)
                transport.send(other, back, [np.zeros(1, np.uint8)])
    if not seconds[1]:
        return float("nan"), float("nan")
    # What a message waits for besides the link, such as a core that others have, only ever adds to it.
    least = min(seconds[1][_WARM_UP:])
    most = statistics.median(seconds[size][_WARM_UP:])
    return least / 2, max(most - least, 0.0) / max(size - 1, 1)
