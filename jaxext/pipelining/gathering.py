"""A state whose leaves live on several processes, whole on each of them: what a checkpoint is written from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from .transport import Transport


def local(tree: Any) -> Any:
    """The leaves of a pytree that are all here, as NumPy arrays; typed random keys stay as they are."""
    return jax.tree.map(_on_host, tree)


def gather(tree: Any, transport: Transport, processes: Iterable[int], timeout: float) -> Any:
    """As `local`, where some leaves are on others of `processes`, which all call this with the same tree.

    Raises:
      PeerError: another process is gone, or has sent nothing for `timeout` seconds.
    """
    leaves, structure = jax.tree.flatten(tree)
    ranks = sorted(processes)
    own = np.array([not _is_here(leaf) for leaf in leaves], np.uint8)
    missing = transport.exchange(own, ranks, "what a state lacks", timeout)
    found = [_on_host(leaf) if _is_here(leaf) else None for leaf in leaves]
    for number in range(len(leaves)):
        tag = f"leaf {number} of a state #{next(transport.moves)}"
        owner = next((rank for rank in ranks if not missing[rank][number]), None)
        if owner is None:
            raise ValueError(f"pipeline.gather: no process has leaf {number}. Give each process the same state.")
        if owner == transport.rank:
            for rank in ranks:
                if missing[rank][number]:
                    transport.send(rank, tag, [found[number]])
        elif missing[transport.rank][number]:
            # Only keys of a kind that is typed carry its name.
            array = transport.receive(owner, tag, timeout)[0]
            is_key = bool(array.key)
            found[number] = (
                jax.random.wrap_key_data(jax.numpy.asarray(array.words), impl=array.key) if is_key else array.words
            )
    return jax.tree.unflatten(structure, found)


def _is_here(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable


def _on_host(leaf: Any) -> Any:
    is_key = isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return leaf if is_key else np.asarray(leaf)
