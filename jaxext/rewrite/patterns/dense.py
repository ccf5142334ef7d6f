"""Convolutions over all channels, which come last, of images or sequences, and the gradients of their kernels."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...kernels._convolution import CONVOLUTION, CONVOLUTION_GRADIENT
from ..exchange import Expression, Instead
from . import channels_last

# Below, starting the call costs what it gains. Measured in tests/bench/bench_primitives.py.
LEAST_PRODUCTS = 1 << 16
# Fewer leave most of a register, or of a tile, empty.
LEAST_FEATURES, LEAST_CHANNELS_OF_GRADIENT = 8, 2


def choose(eqn: Any, reverse: Any = None) -> Expression | None:
    """How a `conv_general_dilated` runs on the kernels; None where they do not take it, or XLA is as fast.

    `reverse`: the equation that made its kernel, if a `rev`. As an operation of its own it takes XLA as long as the
    convolution takes the kernel.
    """
    found, params = channels_last.find(eqn), eqn.params
    if found is None or not params["feature_group_count"] == params["batch_group_count"] == 1:
        return None
    x, other = (var.aval for var in eqn.invars)
    if x.dtype.name not in ("float32", "bfloat16") or other.dtype != x.dtype or _refused(found, x, other):
        return None
    channels = x.shape[-1]
    if found.places * math.prod(found.taps) * channels * found.features < LEAST_PRODUCTS:
        return None
    if found.features < LEAST_FEATURES or (found.gradient and channels < LEAST_CHANNELS_OF_GRADIENT):
        return None
    if found.gradient:
        return Expression(functools.partial(_gradient, found=found), "channels last")
    taps, _, _ = found.kernel_dimensions()
    instead = None
    if reverse is not None and set(reverse.params["dimensions"]) == set(taps):
        instead = Instead(reverse, (eqn.invars[0], reverse.invars[0]))
    run = functools.partial(_result, found=found, reversed=instead is not None)
    return Expression(run, "channels last", instead=instead)


def _refused(found: channels_last.ChannelsLast, x: Any, other: Any) -> str | None:
    first = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    if found.gradient:
        return CONVOLUTION_GRADIENT.refusal(first, jax.ShapeDtypeStruct(other.shape, jnp.float32), window=found.window)
    kernel = jax.ShapeDtypeStruct((*found.taps, x.shape[-1], found.features), jnp.float32)
    return CONVOLUTION.refusal(first, kernel, window=found.window)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _result(x: jax.Array, kernel: jax.Array, *, found: channels_last.ChannelsLast, reversed: bool) -> jax.Array:
    taps, channels, features = found.kernel_dimensions()
    kernel = kernel.transpose(*taps, *sorted((channels, features)))
    kernel = kernel if x.ndim == 4 else kernel[None]
    operands = _wide(found.image(x)), _wide(kernel)
    (result,) = CONVOLUTION(*operands, window=found.window, turned=channels > features, reversed=reversed)
    return (result if x.ndim == 4 else result[:, 0]).astype(x.dtype)


def _gradient(x: jax.Array, cotangent: jax.Array, *, found: channels_last.ChannelsLast) -> jax.Array:
    taps, channels, features = found.kernel_dimensions()
    (kernel,) = CONVOLUTION_GRADIENT(_wide(found.image(x)), _wide(found.image(cotangent)), window=found.window)
    kernel = kernel if x.ndim == 4 else kernel[0]
    return kernel.transpose(np.argsort((*taps, channels, features))).astype(x.dtype)
