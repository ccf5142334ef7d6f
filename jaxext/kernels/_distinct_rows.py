"""The rows that indices mean, each once: so that work on rows is done on those alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxext.kernels._op import ArgSpec, Op

__all__ = ["DISTINCT"]


def _reference(indices: jax.Array, *, held: int, clips: bool) -> Sequence[jax.Array]:
    """indices: [n, 1] into `held` rows -> rows: [m], places: [n], m = min(n, held).

    `rows` are in the order in which they first come, then `held`, which is none; `rows[places]` are the rows that the
    indices mean. `places` is m where there is no such row; `clips`: an index outside means the nearest row.
    """
    row, n = indices[:, 0], indices.shape[0]
    row = jnp.clip(row, 0, held - 1) if clips else jnp.where((row < 0) | (row >= held), held, row)
    most, order = min(n, held), jnp.arange(n, dtype=jnp.int32)
    earliest = jnp.full(held + 1, n, jnp.int32).at[row].min(order)[row]
    is_first = (earliest == order) & (row < held)
    place = jnp.cumsum(is_first, dtype=jnp.int32) - 1
    rows = jnp.full(most, held, jnp.int32).at[jnp.where(is_first, place, most)].set(row, mode="drop")
    return rows, jnp.where(row < held, place[earliest], most)


def _refuses(indices: Any, **_: Any) -> str | None:
    return None if indices.dtype == np.int32 else f"'indices' is {indices.dtype}; the kernel takes int32"


def _check(indices: Any, *, held: int, **_: Any) -> None:
    if len(indices.shape) != 2 or indices.shape[1] != 1:
        raise ValueError(f"'indices' has shape {indices.shape}; expected [n, 1], so reshape it")
    if not 1 <= held < 2**31:
        raise ValueError(f"'held' is {held}; expected the number of a table's rows, from 1 to 2**31 - 1")


def _attributes(*, held: int, clips: bool) -> Mapping[str, Any]:
    return {"held": np.int64(held), "clips": clips}


def _spec(name: str, n: int, held: int, clips: bool) -> ArgSpec:
    def make(rng: np.random.Generator, _: Any) -> tuple[np.ndarray, ...]:
        return (rng.integers(-2, held + 2, (n, 1)).astype(np.int32),)

    return ArgSpec(name, make, {"held": held, "clips": clips}, dtypes=("float32",))


DISTINCT = Op(
    "distinct_rows",
    _reference,
    target="distinct_rows",
    core_rank=None,  # a row's place depends on all indices before it
    attributes=_attributes,
    refuses=_refuses,
    check=_check,
    specs=(
        _spec("few of many", 300, 5000, False),
        _spec("many of few", 3000, 7, False),
        _spec("clipped", 300, 70, True),
        _spec("one row", 9, 1, False),
        _spec("no indices", 0, 9, False),
    ),
)
