"""Linear layer + softmax cross-entropy without the [rows, classes] logits.

Rows are taken a chunk at a time: XLA's own matrix product makes a chunk's logits, the cross-entropy kernel reads them,
and they are gone; the backward makes them again (Wijmans et al., "Cut Your Losses in Large-Vocabulary Language
Models", 2024; Liger kernels, 2024). Memory falls from rows x classes to chunk x classes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxext.kernels._cross_entropy import OutOfRange, check_choices, int32_labels, softmax_cross_entropy

__all__ = ["linear_cross_entropy", "linear_cross_entropy_refusal"]


def _chunk_count(rows: int) -> int:
    """Sixteen chunks keep temporaries below an eighth of the logits and their gradient; fewer than 64 rows waste flops."""
    return max(1, min(16, rows // 64))


def linear_cross_entropy(
    x: Any,
    weight: Any,
    labels: Any,
    bias: Any = None,
    *,
    classes_first: bool = False,
    label_smoothing: float = 0.0,
    out_of_range: OutOfRange = "nan",
    out_dtype: Any = None,
) -> jax.Array:
    """Cross-entropy of softmax(x @ weight + bias) with integer labels, without materialising the logits.

    Args:
      x: [..., features], floating point.
      weight: [features, classes], or [classes, features] with `classes_first` (a tied embedding table).
      labels: [...] integer classes.
      bias: [classes] or None.
      classes_first: which way round `weight` is.
      label_smoothing: share of the target spread evenly over the classes, 0..1.
      out_of_range: what a label outside the classes means, as in `softmax_cross_entropy`.
      out_dtype: dtype of the result; None: the dtype that x and weight promote to.

    Returns:
      [...] losses in nats; logits and losses are accumulated in float32.

    Raises:
      ValueError, TypeError: shapes that do not fit, labels not integers, a smoothing outside 0..1.
    """
    check_choices("linear_cross_entropy", label_smoothing, out_of_range)
    x, weight, labels = jnp.asarray(x), jnp.asarray(weight), jnp.asarray(labels)
    bias = None if bias is None else jnp.asarray(bias)
    _check(x, weight, labels, bias, classes_first)
    out = out_dtype or jnp.promote_types(x.dtype, weight.dtype)
    wide = jnp.promote_types(jnp.promote_types(x.dtype, weight.dtype), jnp.float32)

    @jax.checkpoint
    def chunk(rows: jax.Array, labels: jax.Array) -> jax.Array:
        contract = (((1,), (1 if classes_first else 0,)), ((), ()))
        logits = jax.lax.dot_general(rows, weight, contract, preferred_element_type=wide)
        logits = logits if bias is None else logits + bias.astype(wide)
        return softmax_cross_entropy(logits, labels, label_smoothing=label_smoothing, out_of_range=out_of_range)

    losses = _by_chunks(chunk, x.reshape(-1, x.shape[-1]), int32_labels(labels).reshape(-1))
    return losses.reshape(labels.shape).astype(out)


def _by_chunks(chunk: Any, rows: jax.Array, labels: jax.Array) -> jax.Array:
    """chunk(rows, labels) for every n-th row at a time: a batch split over devices stays split in every chunk."""
    count, n = rows.shape[0], _chunk_count(rows.shape[0])
    if n == 1:
        return chunk(rows, labels)
    padding = -count % n
    rows, labels = jnp.pad(rows, ((0, padding), (0, 0))), jnp.pad(labels, (0, padding))
    split = rows.reshape(-1, n, rows.shape[1]).swapaxes(0, 1), labels.reshape(-1, n).swapaxes(0, 1)
    losses = jax.lax.map(lambda both: chunk(*both), split)
    return losses.swapaxes(0, 1).reshape(-1)[:count]


def _check(x: Any, weight: Any, labels: Any, bias: Any, classes_first: bool) -> None:
    op = "jaxext linear_cross_entropy"
    for name, value in (("x", x), ("weight", weight), ("bias", bias)):
        if value is not None and not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(f"{op}: argument '{name}' must be floating point, got {value.dtype}")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"{op}: argument 'labels' must be integer classes, got {labels.dtype}; for target distributions use "
            "softmax_cross_entropy(x @ weight, targets)"
        )
    if len(x.shape) < 1 or len(weight.shape) != 2:
        raise ValueError(
            f"{op}: arguments 'x' and 'weight' must have ranks >= 1 and 2, got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    features, classes = weight.shape[::-1] if classes_first else weight.shape
    if x.shape[-1] != features or classes == 0:
        layout = "[classes, features]" if classes_first else "[features, classes]"
        raise ValueError(
            f"{op}: argument 'weight' must have shape {layout} with features = {x.shape[-1]} (x's last axis) and "
            f"classes >= 1, got {tuple(weight.shape)}; `classes_first` says which way round it is"
        )
    if labels.shape != x.shape[:-1]:
        raise ValueError(
            f"{op}: argument 'labels' must have shape {tuple(x.shape[:-1])} to fit x of shape {tuple(x.shape)}, got "
            f"{tuple(labels.shape)}"
        )
    if bias is not None and bias.shape != (classes,):
        raise ValueError(f"{op}: argument 'bias' must have shape ({classes},), got {tuple(bias.shape)}")


def linear_cross_entropy_refusal(x: Any, weight: Any, labels: Any, bias: Any = None) -> str | None:
    """None where `linear_cross_entropy` of these avals is worth its chunks, else the reason why plain JAX runs."""
    return None
