"""Kinds of convolution that XLA computes far off the machine's limit, written as what it computes well.

A window larger than the image (the last stages of a network on small pictures) becomes patches and products
("im2col"; Chellapilla, Puri and Simard, 2006). The kernel's gradient of a transposed convolution slides one picture
over another that is full of zeros; with the operands exchanged, the zeros are strides instead. Depthwise ones have
kernels (`.depthwise`).
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import jax
import numpy as np

from ... import _jax_compat as compat
from ..exchange import Exchange, Expression
from ..neighbours import Neighbours
from . import dense, depthwise

# Below, both take so little that starting them counts. Measured in tests/bench/bench_primitives.py.
LEAST_OPERATIONS = 1 << 22
LEAST_KERNEL, LEAST_FEATURES = 1 << 13, 16
MOST_TAPS = 49  # of a window that becomes patches: each is a slice of the program


def _choose(eqn: Any, neighbours: Neighbours) -> Expression | None:
    if any(compat.explicit_sharding(var.aval) for var in eqn.invars):
        return None
    maker = neighbours.maker(eqn.invars[-1])
    reverse = maker if maker is not None and maker.primitive.name == "rev" else None
    return depthwise.choose(eqn) or dense.choose(eqn, reverse) or _otherwise(eqn)


def _otherwise(eqn: Any) -> Expression | None:
    x, w = (var.aval for var in eqn.invars)
    params = eqn.params
    plain = params["feature_group_count"] == params["batch_group_count"] == 1
    if not plain or x.dtype.name not in ("float32", "bfloat16") or w.dtype != x.dtype:
        return None
    numbers = params["dimension_numbers"]
    image = [x.shape[d] for d in numbers.lhs_spec[2:]]
    window = [w.shape[d] for d in numbers.rhs_spec[2:]]
    if _operations(eqn) < LEAST_OPERATIONS or not image:
        return None
    out = tuple(eqn.outvars[0].aval.shape[d] for d in numbers.out_spec[2:])
    slides = _ones(params["window_strides"]) and _ones(params["rhs_dilation"]) and not _ones(params["lhs_dilation"])
    # Few places or features leave XLA's other form nothing to work on.
    broad = math.prod(eqn.outvars[0].aval.shape) >= LEAST_KERNEL and x.shape[numbers.lhs_spec[0]] >= LEAST_FEATURES
    if slides and broad and all(k > o for k, o in zip(window, out)):
        return Expression(functools.partial(_exchanged, params=params, out=out), "operands exchanged")
    small = any(n < k for n, k in zip(image, window)) and all(n <= k for n, k in zip(image, window))
    if small and math.prod(window) <= MOST_TAPS:
        return Expression(functools.partial(_patches, params=params), "patches and products")
    return None


def _ones(values: Any) -> bool:
    return all(value == 1 for value in values)


def _operations(eqn: Any) -> int:
    numbers, w = eqn.params["dimension_numbers"], eqn.invars[1].aval
    features = w.shape[numbers.rhs_spec[0]]
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(w.shape) // max(features, 1)


def _exchanged(x: jax.Array, w: jax.Array, *, params: Any, out: tuple[int, ...]) -> jax.Array:
    """The convolution of w [.., window ..] with x dilated, which is the wanted one with its places reversed."""
    numbers = params["dimension_numbers"]
    padding = []
    for place, (low, _) in enumerate(params["padding"]):
        n, k = x.shape[numbers.lhs_spec[2 + place]], w.shape[numbers.rhs_spec[2 + place]]
        dilated = (n - 1) * params["lhs_dilation"][place] + 1
        before = out[place] - 1 - low
        padding.append((before, out[place] + dilated - 1 - k - before))
    swapped = jax.lax.conv_general_dilated(
        w,
        x,
        window_strides=(1,) * len(out),
        padding=padding,
        rhs_dilation=params["lhs_dilation"],
        dimension_numbers=jax.lax.ConvDimensionNumbers(
            numbers.rhs_spec, numbers.lhs_spec, (numbers.out_spec[1], numbers.out_spec[0], *numbers.out_spec[2:])
        ),
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    return jax.lax.rev(swapped, numbers.out_spec[2:])


def _patches(x: jax.Array, w: jax.Array, *, params: Any) -> jax.Array:
    """The products of each tap's pieces [batch, places.., features] with its part of the kernel, summed."""
    numbers = params["dimension_numbers"]
    x = x.transpose(numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
    pads = [(low, high, dilation - 1) for (low, high), dilation in zip(params["padding"], params["lhs_dilation"])]
    x = jax.lax.pad(x, np.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
    window = [w.shape[d] for d in numbers.rhs_spec[2:]]
    dilations, strides = params["rhs_dilation"], params["window_strides"]
    reaches = [n - (k - 1) * d for n, k, d in zip(x.shape[1:-1], window, dilations)]
    pieces = []
    for tap in itertools.product(*map(range, window)):
        first = [t * d for t, d in zip(tap, dilations)]
        last = [f + reach for f, reach in zip(first, reaches)]
        pieces.append(jax.lax.slice(x, (0, *first, 0), (x.shape[0], *last, x.shape[-1]), (1, *strides, 1)))
    # A product for each tap, summed afterwards: one long sum over taps and features would round three times as far off.
    taken = jax.numpy.stack(pieces)
    # Apart from what reversed the kernel: XLA would do both at once, element by element, at a third of the speed. And
    # apart from the product, which sums less exactly over features that come last.
    taps = jax.lax.optimization_barrier(w).transpose(*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])
    taps = jax.lax.optimization_barrier(taps)
    taps = taps.reshape(len(pieces), *taps.shape[-2:])
    product = jax.lax.dot_general(
        taken,
        taps,
        (((taken.ndim - 1,), (1,)), ((0,), (0,))),
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"] or jax.numpy.float32,
    ).sum(0)
    order = (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])
    return product.transpose(np.argsort(order)).astype(params["preferred_element_type"] or x.dtype)


EXCHANGE = Exchange("convolution", "conv_general_dilated", _choose, looks_round=True)
