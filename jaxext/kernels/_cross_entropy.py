"""Softmax cross-entropy over the last axis, with integer labels or with target distributions.

Forward reads the logits once (a running maximum and sum of exponentials: Milakov and Gimelshein, "Online normalizer
calculation for softmax", 2018) and keeps two float32 a row; backward reads them once more and writes the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import mlir

from jaxext.kernels._op import ArgSpec, Op, derive, relaxed

__all__ = ["OPS", "OutOfRange", "softmax_cross_entropy", "softmax_cross_entropy_refusal"]

OutOfRange = Literal["nan", "zero"]
"""What a label outside the classes means. "nan": -V..-1 count from the end and any other gives NaN, as
`jnp.take_along_axis` (and so optax's integer labels); "zero": an all-zero target, as `jax.nn.one_hot`."""

_NATIVE = (jnp.float32, jnp.bfloat16)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _kept(wide: jax.Array) -> jax.Array:
    """[..., 2]: a row's maximum, and the log of the sum of exponentials below it: their sum would round at its size."""
    top = jax.lax.stop_gradient(jnp.max(wide, -1))
    return jnp.stack([top, jnp.log(jnp.sum(jnp.exp(wide - top[..., None]), -1))], -1)


def _label_losses(wide: jax.Array, labels: jax.Array, normalizer: jax.Array, smoothing: float, one_hot: bool) -> Any:
    """[...] losses of logits with these logarithms of their sums of exponentials."""
    if one_hot:
        smooth = smoothing / wide.shape[-1]
        targets = jax.nn.one_hot(labels, wide.shape[-1], dtype=wide.dtype) * (1.0 - smoothing) + smooth
        return -jnp.sum(targets * jax.nn.log_softmax(wide), -1)
    loss = normalizer - jnp.take_along_axis(wide, labels[..., None], -1)[..., 0]
    return (1.0 - smoothing) * loss + smoothing * (normalizer - jnp.mean(wide, -1)) if smoothing else loss


def _labels_reference(
    logits: jax.Array, labels: jax.Array, *, label_smoothing: float, out_of_range: OutOfRange, out_dtype: str | None
) -> tuple[jax.Array, ...]:
    wide = _wide(logits)
    normalizer = jax.nn.logsumexp(wide, -1)
    loss = _label_losses(wide, labels, normalizer, label_smoothing, out_of_range == "zero")
    return loss.astype(out_dtype or logits.dtype), _kept(wide)


def _targets_reference(logits: jax.Array, targets: jax.Array, *, out_dtype: str | None) -> tuple[jax.Array, ...]:
    wide, shares = _wide(logits), _wide(targets)
    loss = -jnp.sum(shares * jax.nn.log_softmax(wide), -1)
    out = out_dtype or jnp.promote_types(logits.dtype, targets.dtype)
    return loss.astype(out), _kept(wide), jnp.sum(shares, -1)


def _check_logits(logits: Any) -> None:
    if len(logits.shape) < 1 or logits.shape[-1] == 0:
        raise ValueError(
            "jaxext softmax_cross_entropy: argument 'logits' must have a last axis of size >= 1 (the classes), "
            f"got shape {tuple(logits.shape)}"
        )
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(
            f"jaxext softmax_cross_entropy: argument 'logits' must be floating point, got {logits.dtype}; "
            "cast them with logits.astype(...)"
        )


def _check_labels(logits: Any, labels: Any, **_: Any) -> None:
    _check_logits(logits)
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            "jaxext softmax_cross_entropy: argument 'labels' must have shape "
            f"{tuple(logits.shape[:-1])} (integer classes) or {tuple(logits.shape)} (floating-point targets) to fit "
            f"logits of shape {tuple(logits.shape)}, got {labels.dtype} of shape {tuple(labels.shape)}"
        )


def _check_targets(logits: Any, targets: Any, **_: Any) -> None:
    _check_logits(logits)
    if targets.shape != logits.shape:
        _check_labels(logits, targets)
        raise TypeError(
            f"jaxext softmax_cross_entropy: argument 'labels' of shape {tuple(targets.shape)} must be integers, got "
            f"{targets.dtype}; cast them with labels.astype(int), or give targets of shape {tuple(logits.shape)}"
        )


def _refuses(*avals: Any, out_dtype: str | None, **_: Any) -> str | None:
    for name, aval in zip(("logits", "labels"), avals):
        if jnp.issubdtype(aval.dtype, jnp.floating) and aval.dtype not in _NATIVE:
            return f"'{name}' is {aval.dtype}; the kernel takes float32 and bfloat16"
    if out_dtype is not None and jnp.dtype(out_dtype) not in _NATIVE:
        return f"out_dtype is {out_dtype}; the kernel gives float32 and bfloat16"
    if avals[0].shape[-1] >= 2**31:
        return "the kernel takes fewer than 2^31 classes"
    return None


def _refuses_labels(*avals: Any, **params: Any) -> str | None:
    if avals[1].dtype != jnp.int32:
        return f"'labels' are {avals[1].dtype}; the kernel takes int32"
    return _refuses(*avals, **params)


def _label_attributes(*, label_smoothing: float, out_of_range: OutOfRange, **_: Any) -> Mapping[str, Any]:
    return {"label_smoothing": np.float32(label_smoothing), "one_hot": out_of_range == "zero"}


def _wanted_attributes(*, wrt: tuple[int, ...], **_: Any) -> Mapping[str, Any]:
    return {"wants_dlogits": 0 in wrt, "wants_dtargets": 1 in wrt}


def _logits_and_labels(*shape: int, low: int = 0, high: int | None = None, masked: bool = False) -> Any:
    def make(rng: np.random.Generator, dtype: Any) -> list[Any]:
        logits = 3 * rng.standard_normal(shape)
        if masked:
            logits[..., shape[-1] // 2 :] = -np.inf
        labels = rng.integers(low, shape[-1] if high is None else high, shape[:-1])
        return [logits.astype(dtype), labels.astype(np.int32)]

    return make


def _labels_spec(
    name: str, make: Any, smoothing: float = 0.0, out_of_range: OutOfRange = "nan", **params: Any
) -> ArgSpec:
    every = {"label_smoothing": smoothing, "out_of_range": out_of_range, "out_dtype": None, **params}
    return ArgSpec(name, make, every)


def _logits_and_targets(*shape: int) -> Any:
    def make(rng: np.random.Generator, dtype: Any) -> list[Any]:
        shares = rng.random(shape) ** 4
        return [
            (3 * rng.standard_normal(shape)).astype(dtype),
            (shares / np.maximum(shares.sum(-1, keepdims=True), 1e-9)).astype(dtype),
        ]

    return make


_LABEL_SPECS = (
    _labels_spec("rows", _logits_and_labels(2, 12, 500)),
    _labels_spec("smoothed", _logits_and_labels(19, 333), 0.1),
    _labels_spec("one_hot", _logits_and_labels(19, 333, low=-2, high=336), 0.0, "zero"),
    _labels_spec("one_hot_smoothed", _logits_and_labels(19, 333, low=-2, high=336), 0.1, "zero"),
    _labels_spec("out_of_range", _logits_and_labels(40, 9, low=-11, high=12)),
    _labels_spec("masked", _logits_and_labels(11, 200, high=100)),
    _labels_spec("blocks", _logits_and_labels(3, 9001)),
    _labels_spec("two_classes", _logits_and_labels(3, 151, 2)),
    _labels_spec("few_one_hot", _logits_and_labels(70, 5, low=-2, high=7), 0.0, "zero"),
    _labels_spec("few_smoothed", _logits_and_labels(70, 16, low=-2, high=18), 0.1, "zero"),
    _labels_spec("one_class", _logits_and_labels(7, 1)),
    _labels_spec("one_row", _logits_and_labels(65)),
    _labels_spec("no_rows", _logits_and_labels(0, 8)),
    _labels_spec("f32_loss", _logits_and_labels(16, 257), out_dtype="float32"),
)
_TARGET_SPECS = (
    ArgSpec("rows", _logits_and_targets(2, 12, 500), {"out_dtype": None}),
    ArgSpec("odd", _logits_and_targets(5, 67), {"out_dtype": None}),
    ArgSpec("blocks", _logits_and_targets(3, 9001), {"out_dtype": None}),
    ArgSpec("no_rows", _logits_and_targets(0, 8), {"out_dtype": None}),
)

LABELS = Op(
    "softmax_cross_entropy", _labels_reference, target="cross_entropy", core_rank=1, attributes=_label_attributes,
    refuses=_refuses_labels, check=_check_labels, specs=_LABEL_SPECS,
)  # fmt: skip
LABELS_BACKWARD = Op(
    "softmax_cross_entropy_backward", None, target="cross_entropy_backward", core_rank=1, attributes=_label_attributes,
    refuses=_refuses_labels,
)  # fmt: skip
TARGETS = Op(
    "target_cross_entropy", _targets_reference, target="target_cross_entropy", core_rank=1,
    refuses=_refuses, check=_check_targets, specs=_TARGET_SPECS,
)  # fmt: skip
TARGETS_BACKWARD = Op(
    "target_cross_entropy_backward", None, target="target_cross_entropy_backward", core_rank=1,
    attributes=_wanted_attributes, refuses=_refuses,
)  # fmt: skip
LABELS_BACKWARD_IN_PLACE = Op(
    "softmax_cross_entropy_backward_in_place", LABELS_BACKWARD.reference, target="cross_entropy_backward", core_rank=1,
    attributes=_label_attributes, refuses=_refuses_labels, aliases={0: 0},
)  # fmt: skip
derive(LABELS, LABELS_BACKWARD, saved=(1,))


def _label_gradient(
    logits: jax.Array,
    labels: jax.Array,
    kept: jax.Array,
    cotangent: jax.Array,
    *,
    wrt: tuple[int, ...],
    label_smoothing: float,
    out_of_range: OutOfRange,
    **_: Any,
) -> tuple[jax.Array]:
    """The gradient element by element, which XLA fuses; the derivative of indexing would be a scatter of its own."""
    classes, wide = logits.shape[-1], _wide(logits)
    share = jnp.exp(wide - kept[..., :1].astype(wide.dtype) - kept[..., 1:].astype(wide.dtype))
    label = labels if out_of_range == "zero" else jnp.where(labels < 0, labels + classes, labels)
    hit = jax.lax.broadcasted_iota(label.dtype, logits.shape, logits.ndim - 1) == label[..., None]
    target = jnp.where(hit, 1.0 - label_smoothing, 0.0) + label_smoothing / classes
    if out_of_range == "zero":
        known = (label >= 0) & (label < classes)
        share = share * (jnp.where(known, 1.0 - label_smoothing, 0.0) + label_smoothing)[..., None]
    return (((share - target) * cotangent[..., None].astype(wide.dtype)).astype(logits.dtype),)


def _lower_gradient(ctx: mlir.LoweringRuleContext, *args: Any, **params: Any) -> Any:
    def run(*xs: jax.Array) -> tuple[jax.Array]:
        with relaxed():
            return _label_gradient(*xs, **params)

    return mlir.lower_fun(run, multiple_results=True)(ctx, *args)


for _op in (LABELS_BACKWARD, LABELS_BACKWARD_IN_PLACE):
    mlir.register_lowering(_op.primitive, _lower_gradient)
derive(TARGETS, TARGETS_BACKWARD, saved=(1, 2))


def _with_gradient(
    logits: jax.Array,
    labels: jax.Array,
    cotangent: jax.Array,
    *,
    label_smoothing: float,
    out_of_range: OutOfRange,
    out_dtype: str | None,
    gradient_dtype: str,
) -> tuple[jax.Array, ...]:
    """Losses, normalizers, and the gradient of the logits, whose maximum and sum are taken once for all three."""
    wide, choices = _wide(logits), {"label_smoothing": label_smoothing, "out_of_range": out_of_range}
    kept = _kept(wide)
    loss = _label_losses(wide, labels, jnp.sum(kept, -1), label_smoothing, out_of_range == "zero")
    (gradient,) = _label_gradient(wide, labels, kept, cotangent, wrt=(0,), **choices)
    return loss.astype(out_dtype or logits.dtype), kept, gradient.astype(gradient_dtype)


LABELS_WITH_GRADIENT = Op(
    "softmax_cross_entropy_with_gradient", _with_gradient, target="cross_entropy_with_gradient", core_rank=1,
    attributes=_label_attributes, refuses=lambda *_, **__: "on a CPU losses and gradients are two kernels",
)  # fmt: skip
OPS = (LABELS, TARGETS)


def int32_labels(labels: jax.Array) -> jax.Array:
    """Labels as int32; what int32 does not hold stays out of every range."""
    if labels.dtype.itemsize < 4 or labels.dtype == jnp.int32:
        return labels.astype(jnp.int32)
    info = jnp.iinfo(jnp.int32)
    least = labels.dtype.type(info.min) if jnp.issubdtype(labels.dtype, jnp.signedinteger) else labels.dtype.type(0)
    return jnp.clip(labels, least, labels.dtype.type(info.max)).astype(jnp.int32)


def check_choices(op: str, label_smoothing: float, out_of_range: str) -> None:
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"jaxext {op}: argument 'label_smoothing' must be within 0..1, got {label_smoothing}")
    if out_of_range not in ("nan", "zero"):
        raise ValueError(f"jaxext {op}: argument 'out_of_range' must be 'nan' or 'zero', got {out_of_range!r}")


def _name(dtype: Any) -> str | None:
    return None if dtype is None else jnp.dtype(dtype).name


def softmax_cross_entropy(
    logits: Any,
    labels: Any,
    *,
    label_smoothing: float = 0.0,
    out_of_range: OutOfRange = "nan",
    out_dtype: Any = None,
) -> jax.Array:
    """Softmax cross-entropy over the last axis, accumulated in float32.

    Args:
      logits: [..., classes], floating point.
      labels: [...] integer classes, or [..., classes] floating-point targets (which need not sum to 1).
      label_smoothing: share of the target spread evenly over the classes, 0..1 (Szegedy et al., 2016).
      out_of_range: what an integer label outside the classes means: "nan" (-classes..-1 count from the end, any other
        gives NaN, as optax's integer labels) or "zero" (an all-zero target, as `jax.nn.one_hot`).
      out_dtype: dtype of the result; None: the logits', or with targets the dtype both promote to (as optax).

    Returns:
      [...] losses in nats.

    Raises:
      ValueError, TypeError: shapes that do not fit, logits not floating point, a smoothing outside 0..1.
    """
    check_choices("softmax_cross_entropy", label_smoothing, out_of_range)
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        return LABELS(
            logits, int32_labels(labels), label_smoothing=float(label_smoothing), out_of_range=out_of_range,
            out_dtype=_name(out_dtype),
        )[0]  # fmt: skip
    if not jnp.issubdtype(labels.dtype, jnp.floating):
        raise TypeError(
            "jaxext softmax_cross_entropy: argument 'labels' must be integer classes or floating-point targets, "
            f"got {labels.dtype}"
        )
    if label_smoothing:
        labels = labels * (1.0 - label_smoothing) + label_smoothing / logits.shape[-1]
    return TARGETS(logits, labels, out_dtype=_name(out_dtype))[0]


def softmax_cross_entropy_refusal(logits: Any, labels: Any, *, out_dtype: Any = None) -> str | None:
    """None where `softmax_cross_entropy` of these avals runs natively, else the reason why plain JAX does."""
    if jnp.issubdtype(labels.dtype, jnp.integer):
        return LABELS.refusal(logits, jax.ShapeDtypeStruct(labels.shape, jnp.int32), out_dtype=_name(out_dtype))
    return TARGETS.refusal(logits, labels, out_dtype=_name(out_dtype))
