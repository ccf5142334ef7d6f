"""Matrix products whose operands are rounded to eight bits, on GPUs of compute capability 8.9 and later.

Formats and their use as in Micikevicius et al., "FP8 Formats for Deep Learning" (2022): E4M3 for activations and
weights, E5M2, which has more range, for cotangents. Each operand is scaled as a whole by its own largest value at that
moment, so that nothing has to be kept from step to step. Plain JAX in the form that XLA:GPU turns into one call of
cuBLASLt's eight-bit product, scales and rounding of the result included, or into a Triton kernel of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["fp8_device_refusal", "fp8_product", "fp8_refusal"]

Dimensions = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]

LEAST_CAPABILITY = (8, 9)
MULTIPLE = 16  # of cuBLASLt, for each dimension
E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
# Below it an operand's largest value counts as this much, so that the scale stays finite.
_SMALLEST = 2.0**-110

# What decides whether a product pays, counted and not measured: an H100's dense peaks, operations and bytes a second.
_BF16_RATE, _FP8_RATE, _BANDWIDTH = 990e12, 1980e12, 3.35e12
# The largest value and the rounding read two bytes an element each, one is written. In a step two products share the
# former, and XLA finds it where the operand is made: for layers of 4096 features it comes to 3.2 bytes and 4 kernels.
_BYTES_TO_ROUND, _MORE_KERNELS, _SECONDS_A_KERNEL = 5, 8, 2e-6


def fp8_device_refusal(platform: str, capability: tuple[int, int] | None) -> str | None:
    """Why no program on this platform multiplies in eight bits; `capability`: (major, minor), None where not known."""
    if platform != "cuda":
        return f"fp8 products are for GPUs of compute capability 8.9 or later; this program is for {platform}"
    if capability is not None and capability < LEAST_CAPABILITY:
        major, minor = capability
        return f"fp8 products are for GPUs of compute capability 8.9 or later; this one has {major}.{minor}"
    return None


def fp8_refusal(a: Any, b: Any, dimension_numbers: Dimensions, out_dtype: Any) -> str | None:
    """Why a `lax.dot_general` of arrays of these types stays as it is, None where it multiplies in eight bits.

    bfloat16 alone: who multiplies in float32, or asks for such a result, wants more than three bits of mantissa, and
    float16 has not the range for the scales.
    """
    (contract, _), (batch, _) = dimension_numbers
    if a.dtype != jnp.bfloat16 or b.dtype != jnp.bfloat16:
        return f"operands of {a.dtype} and {b.dtype}; eight bits stand in for bfloat16"
    if out_dtype != jnp.bfloat16:
        return f"a result of {out_dtype} asks for more than eight bits give"
    if batch:
        return "it has batch dimensions, as attention's products"
    if not contract:
        return "it sums over nothing"
    m, k, n = _sizes(a, b, dimension_numbers)
    odd = next((size for size in (m, k, n) if size == 0 or size % MULTIPLE), None)
    if odd is not None:
        return f"a dimension of {odd} is no multiple of {MULTIPLE}"
    if not fp8_pays(m, k, n):
        return f"{m} x {k} x {n}: scaling and rounding would take longer than eight bits save"
    return None


def _sizes(a: Any, b: Any, dimension_numbers: Dimensions) -> tuple[int, int, int]:
    """Rows, summed, columns."""
    (contract, other), _ = dimension_numbers
    k = math.prod(a.shape[d] for d in contract)
    m = math.prod(size for d, size in enumerate(a.shape) if d not in contract)
    n = math.prod(size for d, size in enumerate(b.shape) if d not in other)
    return m, k, n


def fp8_pays(m: int, k: int, n: int) -> bool:
    """Whether [m, k] x [k, n] takes less time in eight bits, by operations, bytes and kernels."""
    operations, read, written = 2 * m * k * n, m * k + k * n, m * n
    plain = max(operations / _BF16_RATE, 2 * (read + written) / _BANDWIDTH)
    eight = max(operations / _FP8_RATE, (read + 2 * written) / _BANDWIDTH)
    rounding = _BYTES_TO_ROUND * read / _BANDWIDTH + _MORE_KERNELS * _SECONDS_A_KERNEL
    return eight + rounding < plain


def fp8_product(a: jax.Array, b: jax.Array, *, dimension_numbers: Dimensions, cotangent: bool) -> jax.Array:
    """`lax.dot_general(a, b, dimension_numbers)` of bfloat16 operands rounded to eight bits, summed in float32.

    A rounding is off by 2^-4 of an element at most, of a cotangent 2^-3. What is 2^-15 of an operand's largest value
    (a cotangent's: 2^-29) or less loses more, or all. A sum with NaN or an infinity in it is NaN or an infinity, others
    are not touched. Sums too large for bfloat16 become infinities, as they do without this.

    Args:
      cotangent: `a` is one. It is rounded to E5M2, and sums are kept in full float32 on the way (cuBLASLt's fast
        accumulation is for the forward pass alone).
    """
    left, up = _rounded(a, E5M2 if cotangent else E4M3)
    right, more = _rounded(b, E4M3)
    precision = jax.lax.Precision.HIGHEST if cotangent else jax.lax.Precision.DEFAULT
    product = jax.lax.dot_general(left, right, dimension_numbers, precision, preferred_element_type=a.dtype)
    # One factor of the result's dtype: XLA makes it part of cuBLASLt's call, and a power of two is exact.
    return product * (up * more).astype(a.dtype)


def _rounded(x: jax.Array, dtype: str) -> tuple[jax.Array, jax.Array]:
    """x times a power of two, as `dtype`, its largest finite value in the upper half of the range; the way back."""
    largest = jnp.max(jnp.where(jnp.isfinite(x), jnp.abs(x), 0)).astype(jnp.float32)
    ratio = float(jnp.finfo(dtype).max) / jnp.maximum(largest, _SMALLEST)
    exponent = jax.lax.bitcast_convert_type(ratio, jnp.uint32) & jnp.uint32(0xFF800000)
    scale = jax.lax.bitcast_convert_type(exponent, jnp.float32)
    return (x.astype(jnp.float32) * scale).astype(dtype), 1 / scale
