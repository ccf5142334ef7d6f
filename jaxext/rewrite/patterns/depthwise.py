"""Depthwise convolutions of images or sequences whose channels come last, and the gradients of their kernels."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax

from ...kernels._depthwise import DEPTHWISE, DEPTHWISE_GRADIENT, Window, depthwise_gains
from ..exchange import Expression


def choose(eqn: Any) -> Expression | None:
    """How a `conv_general_dilated` runs on the kernels; None where it is no depthwise one, or XLA as fast."""
    params, (x, other) = eqn.params, (var.aval for var in eqn.invars)
    numbers, out = params["dimension_numbers"], eqn.outvars[0].aval
    if len(x.shape) not in (3, 4) or params["preferred_element_type"] not in (None, x.dtype):
        return None
    last = len(x.shape) - 1
    places = tuple(range(1, last))
    images, turned = (0, last, *places), (last, 0, *places)
    channels = x.shape[last]
    if numbers.lhs_spec == numbers.out_spec == images:
        taps = [other.shape[d] for d in numbers.rhs_spec[2:]]
        depthwise = params["feature_group_count"] == channels == other.shape[numbers.rhs_spec[0]]
        run, count = _result, math.prod(out.shape[:-1])
    elif numbers.lhs_spec == numbers.rhs_spec == turned:
        taps = [out.shape[d] for d in numbers.out_spec[2:]]
        depthwise = params["batch_group_count"] == channels == other.shape[last]
        run, count = _gradient, math.prod(other.shape[:-1])
    else:
        return None
    window = _window([out.shape[d] for d in numbers.out_spec[2:]], params)
    if (
        not depthwise
        or DEPTHWISE.refusal(x, other) is not None
        or not depthwise_gains(count, math.prod(taps), channels)
    ):
        return None
    return Expression(functools.partial(run, window=window, numbers=numbers), "depthwise")


def _window(shape: list[int], params: Any) -> Window:
    """The window, a sequence being an image of one row."""

    def pair(values: Any, single: int) -> tuple[int, int]:
        first, *rest = values
        return (first, rest[0]) if rest else (single, first)

    low = [low for low, _ in params["padding"]]
    stride, dilation, base = (pair(params[name], 1) for name in ("window_strides", "rhs_dilation", "lhs_dilation"))
    return Window(pair(shape, 1), stride, dilation, base, pair(low, 0))


def _rows(x: jax.Array) -> jax.Array:
    return x if x.ndim == 4 else x[:, None]


def _result(x: jax.Array, kernel: jax.Array, *, window: Window, numbers: Any) -> jax.Array:
    features, each, *taps = numbers.rhs_spec
    kernel = kernel.transpose(*taps, features, each)[..., 0]
    (result,) = DEPTHWISE(_rows(x), kernel if kernel.ndim == 3 else kernel[None], window=window)
    return result if x.ndim == 4 else result[:, 0]


def _gradient(x: jax.Array, cotangent: jax.Array, *, window: Window, numbers: Any) -> jax.Array:
    (kernel,) = DEPTHWISE_GRADIENT(_rows(x), _rows(cotangent), window=window)
    kernel = (kernel if x.ndim == 4 else kernel[0])[..., None]
    each, features, *taps = numbers.out_spec
    order = [0] * len(numbers.out_spec)
    for place, dimension in enumerate((*taps, features, each)):
        order[dimension] = place
    return kernel.transpose(*order)
