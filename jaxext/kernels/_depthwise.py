"""Depthwise convolution, each channel with a kernel of its own, and the gradient of that kernel.

XLA has no fast form of it on a CPU. Bytes and multiplications are few, so the limit is how often a register is loaded:
once for each tap and place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxext.kernels._op import ArgSpec, Op

__all__ = ["DEPTHWISE", "DEPTHWISE_GRADIENT", "Window", "depthwise_gains"]

_NATIVE = ("float32", "bfloat16")
_NUMBERS = ("NHWC", "HWIO", "NHWC")

# Below, starting the call costs what it gains. Measured in tests/bench/bench_primitives.py.
LEAST_PRODUCTS, LEAST_CHANNELS = 1 << 10, 2


@dataclasses.dataclass(frozen=True)
class Window:
    """Where tap k of place o is, in rows and columns: at o * stride + k * dilation - low, x being `base` apart.

    `shape`: places of the result; of the kernel, in the gradient.
    """

    shape: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    base: tuple[int, int] = (1, 1)
    low: tuple[int, int] = (0, 0)

    def turned(self, shape: tuple[int, int]) -> Window:
        """With taps as places and places as taps, of which there are `shape`."""
        return dataclasses.replace(self, shape=shape, stride=self.dilation, dilation=self.stride)

    def padding(self, size: Sequence[int], taps: Sequence[int]) -> list[tuple[int, int]]:
        """The padding of x that makes exactly `shape` places."""
        reaches = [(s - 1) * a + (k - 1) * b + 1 for s, a, k, b in zip(self.shape, self.stride, taps, self.dilation)]
        inner = [(n - 1) * b + 1 if n else 0 for n, b in zip(size, self.base)]
        return [(low, reach - n - low) for low, reach, n in zip(self.low, reaches, inner)]


def _depthwise(x: jax.Array, kernel: jax.Array, *, window: Window) -> Sequence[jax.Array]:
    channels = x.shape[-1]
    return (
        jax.lax.conv_general_dilated(
            x,
            kernel[:, :, None],
            window.stride,
            window.padding(x.shape[1:3], kernel.shape),
            window.base,
            window.dilation,
            _NUMBERS,
            channels,
        ),
    )


def _gradient(x: jax.Array, cotangent: jax.Array, *, window: Window) -> Sequence[jax.Array]:
    numbers = jax.lax.ConvDimensionNumbers((3, 0, 1, 2), (3, 0, 1, 2), (2, 3, 0, 1))
    padding = window.padding(x.shape[1:3], cotangent.shape[1:3])
    kernel = jax.lax.conv_general_dilated(
        x, cotangent, window.stride, padding, window.base, window.dilation, numbers, batch_group_count=x.shape[-1]
    )
    return (kernel[:, :, 0],)


def _refuses(x: Any, other: Any, **_: Any) -> str | None:
    for name, aval in (("x", x), ("the other operand", other)):
        if aval.dtype.name not in _NATIVE or aval.dtype != x.dtype:
            return f"{name} is {aval.dtype}; the kernel takes {' or '.join(_NATIVE)}, both alike"
    return None


def depthwise_gains(places: int, taps: int, channels: int) -> bool:
    """Whether the kernel is faster than XLA for so many places (images included), taps and channels."""
    return channels >= LEAST_CHANNELS and places * taps * channels >= LEAST_PRODUCTS


def _result_attributes(*, window: Window) -> Mapping[str, Any]:
    names = ("stride", "dilation", "base", "low")
    return {name: np.asarray(getattr(window, name), np.int64) for name in names}


def _gradient_attributes(*, window: Window) -> Mapping[str, Any]:
    # To the kernel, the places of the cotangent are the places, and the taps what is asked for.
    return _result_attributes(window=window.turned(window.shape))


def _spec(name: str, x: tuple[int, ...], window: Window, other: tuple[int, ...]) -> ArgSpec:
    def make(rng: np.random.Generator, dtype: Any) -> tuple[np.ndarray, ...]:
        return tuple(rng.standard_normal(shape).astype(dtype) for shape in (x, other))

    return ArgSpec(name, make, {"window": window})


def _specs(gradient: bool) -> tuple[ArgSpec, ...]:
    def row(name: str, x: tuple[int, ...], taps: tuple[int, int], window: Window) -> ArgSpec:
        places = (x[0], *window.shape, x[3])
        if not gradient:
            return _spec(name, x, window, (*taps, x[3]))
        return _spec(name, x, window.turned(taps), places)

    return (
        row("3 x 3", (2, 6, 9, 33), (3, 3), Window((6, 9), low=(1, 1))),
        row("7 x 7 over a smaller image", (1, 4, 5, 16), (7, 7), Window((4, 5), low=(3, 3))),
        row("strides", (2, 7, 8, 20), (3, 3), Window((4, 3), stride=(2, 3), low=(1, 0))),
        row("dilated, inside", (1, 9, 12, 8), (3, 2), Window((5, 9), dilation=(2, 3))),
        row("one row, long kernel", (2, 1, 40, 5), (1, 11), Window((1, 30))),
        row("apart", (1, 5, 4, 16), (4, 4), Window((9, 10), base=(2, 3), low=(1, 2))),
        row("no images", (0, 4, 4, 8), (3, 3), Window((4, 4), low=(1, 1))),
    )


DEPTHWISE = Op(
    "depthwise",
    _depthwise,
    target="depthwise",
    core_rank=None,  # over several devices XLA's own, which it knows how to divide
    attributes=_result_attributes,
    refuses=_refuses,
    specs=_specs(gradient=False),
)
DEPTHWISE_GRADIENT = Op(
    "depthwise_gradient",
    _gradient,
    target="depthwise_gradient",
    core_rank=None,  # over several devices XLA's own, which it knows how to divide
    attributes=_gradient_attributes,
    refuses=_refuses,
    specs=_specs(gradient=True),
)
