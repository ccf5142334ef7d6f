"""Depthwise convolutions of images or sequences whose channels come last, and the gradients of their kernels."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import numpy as np

from ...kernels._depthwise import DEPTHWISE, DEPTHWISE_GRADIENT, depthwise_gains
from ..exchange import Expression
from . import channels_last


def choose(eqn: Any) -> Expression | None:
    """How a `conv_general_dilated` runs on the kernels; None where it is no depthwise one, or XLA as fast."""
    found = channels_last.find(eqn)
    if found is None:
        return None
    (x, other), params, channels = (var.aval for var in eqn.invars), eqn.params, eqn.invars[0].aval.shape[-1]
    groups = params["batch_group_count" if found.gradient else "feature_group_count"]
    if (
        not groups == channels == found.features
        or DEPTHWISE.refusal(x, other) is not None
        or not depthwise_gains(found.places, math.prod(found.taps), channels)
    ):
        return None
    return Expression(functools.partial(_gradient if found.gradient else _result, found=found), "depthwise")


def _result(x: jax.Array, kernel: jax.Array, *, found: channels_last.ChannelsLast) -> jax.Array:
    taps, each, features = found.kernel_dimensions()
    kernel = kernel.transpose(*taps, features, each)[..., 0]
    (result,) = DEPTHWISE(found.image(x), kernel if x.ndim == 4 else kernel[None], window=found.window)
    return result if x.ndim == 4 else result[:, 0]


def _gradient(x: jax.Array, cotangent: jax.Array, *, found: channels_last.ChannelsLast) -> jax.Array:
    (kernel,) = DEPTHWISE_GRADIENT(found.image(x), found.image(cotangent), window=found.window)
    taps, each, features = found.kernel_dimensions()
    kernel = (kernel if x.ndim == 4 else kernel[0])[..., None]
    return kernel.transpose(np.argsort((*taps, features, each)))
