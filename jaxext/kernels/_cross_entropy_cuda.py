"""Softmax cross-entropy on CUDA: native kernels, in builds that have them (JAXEXT_CUDA=ON); never run on a card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxext.kernels import _cross_entropy, _native_module
from jaxext.kernels._cross_entropy import LABELS, LABELS_BACKWARD, LABELS_BACKWARD_IN_PLACE, LABELS_WITH_GRADIENT
from jaxext.kernels._op import Op
from jaxext.kernels._platform import Lowering

# Below it a row leaves most of its block idle, and XLA's own fusions read it as often.
_LEAST_CLASSES = 512
_attributes = _cross_entropy._label_attributes


def _refuses(op: Op) -> Callable[..., str | None]:
    def refuses(*avals: Any, **params: Any) -> str | None:
        logits = avals[0]
        missing = _native_module.cuda_lacks(op.target) or _cross_entropy._refuses_labels(*avals, **params)
        if missing is None and logits.shape[-1] < _LEAST_CLASSES:
            return f"{logits.shape[-1]} classes are fewer than {_LEAST_CLASSES}; XLA's own fusions are as good"
        return missing or _native_module.cuda_rows_refusal(logits)

    return refuses


def _fused_gradient(refuses: Callable[..., str | None], target: str, aliases: Mapping[int, int]) -> Callable[..., Any]:
    """The backward's kernel, or the gradient element by element: the reference would scatter."""

    def run(*xs: jax.Array, **params: Any) -> tuple[jax.Array, ...]:
        if refuses(*xs, **params) is not None:
            return _cross_entropy._label_gradient(*xs, **params)
        kind = jax.ShapeDtypeStruct(xs[0].shape, xs[0].dtype)
        call = jax.ffi.ffi_call(target, kind, input_output_aliases=dict(aliases))
        return (call(*xs, **_attributes(**params)),)

    return run


def _with_gradient(*xs: jax.Array, gradient_dtype: str, out_dtype: str | None, **params: Any) -> tuple[jax.Array, ...]:
    """Losses, normalizers, and the gradient over the logits where both have one type."""
    logits = xs[0]
    types = [
        jax.ShapeDtypeStruct(logits.shape[:-1], out_dtype or logits.dtype),
        jax.ShapeDtypeStruct((*logits.shape[:-1], 2), jnp.float32),
        jax.ShapeDtypeStruct(logits.shape, gradient_dtype),
    ]
    aliases = {0: 2} if logits.dtype == gradient_dtype else {}
    call = jax.ffi.ffi_call(LABELS_WITH_GRADIENT.target, types, input_output_aliases=aliases)
    return tuple(call(*xs, **_attributes(**params)))


_HOW = _native_module.CUDA_HOW
LABELS.on("cuda", Lowering(_refuses(LABELS), target=LABELS.target, attributes=_attributes, how=_HOW))
LABELS_WITH_GRADIENT.on("cuda", Lowering(_refuses(LABELS_WITH_GRADIENT), _with_gradient, how=_HOW))
for _op, _aliases in ((LABELS_BACKWARD, {}), (LABELS_BACKWARD_IN_PLACE, {0: 0})):
    _run = _fused_gradient(_refuses(_op), _op.target, _aliases)
    _op.on("cuda", Lowering(lambda *_, **__: None, _run, how=_HOW))
