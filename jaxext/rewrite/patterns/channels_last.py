"""Convolutions of images or sequences whose channels come last, and what differentiating them makes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from ...kernels._depthwise import Window


@dataclasses.dataclass(frozen=True)
class ChannelsLast:
    """A `conv_general_dilated` of [batch, places.., channels]; `gradient`: of its kernel, by the result's cotangent.

    `window`: a sequence is an image of one row. `places`: of the result, images included. `features`: of the result.
    """

    gradient: bool
    window: Window
    taps: tuple[int, int]
    places: int
    features: int
    numbers: Any

    def image(self, x: jax.Array) -> jax.Array:
        """x with one row where it is a sequence."""
        return x if x.ndim == 4 else x[:, None]

    def kernel_dimensions(self) -> tuple[tuple[int, ...], int, int]:
        """Where the kernel, or its gradient, has its taps, the channels of x and the features of the result."""
        first, second, *taps = self.numbers.out_spec if self.gradient else self.numbers.rhs_spec
        return (tuple(taps), first, second) if self.gradient else (tuple(taps), second, first)


def find(eqn: Any) -> ChannelsLast | None:
    """None where the channels do not come last, or the result has a type of its own."""
    params, (x, other) = eqn.params, (var.aval for var in eqn.invars)
    numbers, out = params["dimension_numbers"], eqn.outvars[0].aval
    if len(x.shape) not in (3, 4) or params["preferred_element_type"] not in (None, x.dtype):
        return None
    last = len(x.shape) - 1
    places = tuple(range(1, last))
    images, turned = (0, last, *places), (last, 0, *places)
    if numbers.lhs_spec == numbers.out_spec == images:
        gradient, taps, counted = False, [other.shape[d] for d in numbers.rhs_spec[2:]], out
    elif numbers.lhs_spec == numbers.rhs_spec == turned:
        gradient, taps, counted = True, [out.shape[d] for d in numbers.out_spec[2:]], other
    else:
        return None
    window = _window([out.shape[d] for d in numbers.out_spec[2:]], params)
    return ChannelsLast(gradient, window, _pair(taps, 1), math.prod(counted.shape[:-1]), counted.shape[last], numbers)


def _pair(values: Any, single: int) -> tuple[int, int]:
    first, *rest = values
    return (first, rest[0]) if rest else (single, first)


def _window(shape: list[int], params: Any) -> Window:
    low = [low for low, _ in params["padding"]]
    stride, dilation, base = (_pair(params[name], 1) for name in ("window_strides", "rhs_dilation", "lhs_dilation"))
    return Window(_pair(shape, 1), stride, dilation, base, _pair(low, 0))
