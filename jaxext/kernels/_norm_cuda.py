"""The norms on CUDA: native kernels, in builds that have them (JAXEXT_CUDA=ON). They were never run on a card."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxext.kernels import _native_module, _norm
from jaxext.kernels._op import Op
from jaxext.kernels._platform import Lowering

# A block keeps its rows' sums for both parameters in the 48 KiB of shared memory that every device gives.
_MOST_FEATURES = 6128
_MOST_CHUNKS = 512  # of norm_chunks in native/cuda/norm.cu


def _limits(own: Callable[..., str | None], target: str) -> Callable[..., str | None]:
    """`own`, the CPU kernel's limits on types, and those of the CUDA kernel."""

    def refuses(*avals: Any, **params: Any) -> str | None:
        x = avals[0]
        missing = _native_module.cuda_lacks(target) or own(*avals, **params)
        if missing is None and x.shape[-1] > _MOST_FEATURES:
            return f"rows of {x.shape[-1]} features; the gradient's kernel takes at most {_MOST_FEATURES}"
        return missing or _native_module.cuda_rows_refusal(x)

    return refuses


def _forward(target: str, n_statistics: int, added: bool) -> Callable[..., tuple[jax.Array, ...]]:
    def run(*operands: jax.Array, out_dtype: str | None, **params: Any) -> tuple[jax.Array, ...]:
        x = operands[0]
        types = [jax.ShapeDtypeStruct(x.shape, out_dtype or x.dtype)]
        types += [jax.ShapeDtypeStruct(x.shape, x.dtype)] * added
        types += [jax.ShapeDtypeStruct(x.shape[:-1], jnp.float32)] * n_statistics
        return tuple(jax.ffi.ffi_call(target, types)(*operands, **_norm._forward_attributes(**params)))

    return run


def _backward(target: str) -> Callable[..., tuple[jax.Array, ...]]:
    def run(*xs: jax.Array, wrt: tuple[int, ...], **params: Any) -> tuple[jax.Array, ...]:
        x = xs[0]
        types = [jax.ShapeDtypeStruct(xs[i].shape, xs[i].dtype) for i in wrt]
        chunks = max(1, min(math.prod(x.shape[:-1]), _MOST_CHUNKS)) if any(wrt) else 0
        # Scratch is a result: XLA owns it, so that a CUDA graph may run again.
        scratch = jax.ShapeDtypeStruct((chunks, 2, x.shape[-1]), jnp.float32)
        return tuple(
            jax.ffi.ffi_call(target, [*types, scratch])(*xs, **_norm._backward_attributes(wrt=wrt, **params))[:-1]
        )

    return run


def _register(forward: Op, kind: str, centred: bool, added: bool) -> None:
    assert forward.backward is not None
    target, how = f"jaxext_{kind}", _native_module.CUDA_HOW
    refuses = _limits(_norm._refuses, target)
    forward.on("cuda", Lowering(refuses, _forward(target, 2 if centred else 1, added), how=how))
    refuses = _limits(_norm._refuses_backward, f"{target}_backward")
    forward.backward.on("cuda", Lowering(refuses, _backward(f"{target}_backward"), how=how))


_register(_norm.LAYER_NORM, "layer_norm", centred=True, added=False)
_register(_norm.RMS_NORM, "rms_norm", centred=False, added=False)
_register(_norm.ADD_LAYER_NORM, "layer_norm", centred=True, added=True)
_register(_norm.ADD_RMS_NORM, "rms_norm", centred=False, added=True)
