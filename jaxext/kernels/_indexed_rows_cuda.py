"""Rows added to by number on CUDA: bfloat16 rows are added up in float32 and rounded once, always in the same order.

XLA adds them one by one in bfloat16, with atomic operations: of the gradients of a frequent token most are lost, as
256 + 1 is 256 there. Native, in builds that have it (JAXEXT_CUDA=ON); never run on a card.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxext.kernels import _indexed_rows, _native_module
from jaxext.kernels._indexed_rows import SCATTER
from jaxext.kernels._platform import Lowering

CHUNK = 32  # kScatterChunk in native/cuda/scatter_rows.h
# Sorting the row numbers and starting two kernels costs what XLA's own takes for this many elements.
_LEAST_ELEMENTS = 1 << 20


def _refuses(table: Any, indices: Any, updates: Any, *, kind: str = "add", **_: Any) -> str | None:
    missing = _native_module.cuda_lacks(SCATTER.target) or _indexed_rows._refuses_indices(table, indices)
    if missing is not None:
        return missing
    if kind != "add" or table.dtype != jnp.bfloat16 or updates.dtype != table.dtype:
        return f"{kind} of {table.dtype} rows; the kernel adds bfloat16, XLA's own does the others as well"
    if indices.shape[-1] != 1:
        return f"{indices.shape[-1]} dimensions are indexed; the kernel takes one"
    if math.prod(updates.shape) < _LEAST_ELEMENTS:
        return f"{math.prod(updates.shape)} elements are fewer than {_LEAST_ELEMENTS}; XLA's own is as fast"
    return None


def _add(table: jax.Array, indices: jax.Array, updates: jax.Array, *, clips: bool, **_: Any) -> tuple[jax.Array]:
    rows, width = table.shape[0], math.prod(table.shape[1:])
    numbers = indices.reshape(-1)
    numbers = jnp.clip(numbers, 0, rows - 1) if clips else numbers
    places = jax.lax.iota(jnp.int32, numbers.size)
    ordered, order = jax.lax.sort((numbers, places), num_keys=1, is_stable=True)
    scratch = jax.ShapeDtypeStruct((-(-numbers.size // CHUNK), 2, width), jnp.float32)
    types = [jax.ShapeDtypeStruct((rows, width), table.dtype), scratch]
    call = jax.ffi.ffi_call(SCATTER.target, types, input_output_aliases={0: 0})
    added = call(table.reshape(rows, width), ordered, order, updates.reshape(-1, width))[0]
    return (added.reshape(table.shape),)


SCATTER.on("cuda", Lowering(_refuses, _add, how=_native_module.CUDA_HOW))
