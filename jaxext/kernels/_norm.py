"""Layer norm and RMS norm over the last axis, forward and backward, with an optional fused residual addition.

Ba, Kiros and Hinton, "Layer Normalization" (2016); Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
Bytes are what they cost: forward reads x once and writes the result, backward reads x and the cotangent once and
writes dx; the gradients of scale and bias fall out of the same pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad

from jaxext.kernels._op import ArgSpec, Op, Role, derive

__all__ = ["OPS", "layer_norm", "layer_norm_refusal", "rms_norm", "rms_norm_refusal"]


def _statistics_dtype(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _normalized(
    x: jax.Array, parameters: Sequence[jax.Array], centred: bool, extras: tuple[str, ...], **params: Any
) -> tuple[jax.Array, ...]:
    """(out, [mean], rstd) of x[..., features]; statistics and the affine step in f32, one rounding at the end."""
    named = dict(zip((e for e in extras if e != "residual"), parameters))
    wide = x.astype(_statistics_dtype(x.dtype))
    mean = jnp.mean(wide, -1, keepdims=True) if centred else None
    centre = wide - mean if mean is not None else wide
    rstd = jax.lax.rsqrt(jnp.mean(jnp.square(centre), -1, keepdims=True) + params["epsilon"])
    out = centre * rstd
    if "scale" in named:
        out = out * (named["scale"].astype(wide.dtype) + params["scale_offset"])
    if "bias" in named:
        out = out + named["bias"].astype(wide.dtype)
    out = out.astype(params["out_dtype"] or x.dtype)
    return (out, *(s[..., 0] for s in (mean, rstd) if s is not None))


def _check(op: str, extras: tuple[str, ...], *avals: Any) -> None:
    x, parameters = avals[0], avals[1:]
    if len(x.shape) < 1 or x.shape[-1] == 0:
        raise ValueError(f"jaxext {op}: argument 'x' must have a last axis of size >= 1, got shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"jaxext {op}: argument 'x' must be floating point, got {x.dtype}; cast it with x.astype(...)")
    for name, value in zip(extras, parameters):
        expected = x.shape if name == "residual" else x.shape[-1:]
        if value.shape != expected:
            raise ValueError(
                f"jaxext {op}: argument '{name}' must have shape {tuple(expected)} to fit x of shape {tuple(x.shape)}, "
                f"got {tuple(value.shape)}; broadcast or reshape it first"
            )
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(f"jaxext {op}: argument '{name}' must be floating point, got {value.dtype}")


_NATIVE = (jnp.float32, jnp.bfloat16)


def refused_type(avals: Sequence[Any], extras: Sequence[str], out_dtype: str | None) -> str | None:
    """Which type of x, of what `extras` name or of the result the kernels of norms do not know; None: they know all."""
    for name, aval in zip(("x", *extras), avals):
        if aval.dtype not in _NATIVE:
            return f"'{name}' is {aval.dtype}; the kernel takes float32 and bfloat16"
    if out_dtype is not None and jnp.dtype(out_dtype) not in _NATIVE:
        return f"out_dtype is {out_dtype}; the kernel gives float32 and bfloat16"
    return None


def _refuses(*avals: Any, extras: tuple[str, ...], out_dtype: str | None, **_: Any) -> str | None:
    refused = refused_type(avals, extras, out_dtype)
    if refused is not None:
        return refused
    if avals[0].shape[-1] < 8:
        return f"rows of {avals[0].shape[-1]} features are shorter than a register"
    return None


def _refuses_backward(*avals: Any, extras: tuple[str, ...], **params: Any) -> str | None:
    return _refuses(*avals, extras=tuple(e for e in extras if e != "residual"), **params)


def _forward_attributes(*, epsilon: float, scale_offset: float, extras: tuple[str, ...], **_: Any) -> Mapping[str, Any]:
    return {
        "epsilon": np.float32(epsilon),
        "scale_offset": np.float32(scale_offset),
        **{f"has_{name}": name in extras for name in ("residual", "scale", "bias")},
    }


def _backward_attributes(
    *, scale_offset: float, extras: tuple[str, ...], wrt: tuple[int, ...], **_: Any
) -> Mapping[str, Any]:
    names = ("x", *(e for e in extras if e != "residual"))
    wanted = {names[i] for i in wrt}
    return {
        "scale_offset": np.float32(scale_offset),
        "has_scale": "scale" in extras,
        "has_bias": "bias" in extras,
        "has_grad_sum": "residual" in extras,
        "wants_dx": "x" in wanted,
        "wants_dscale": "scale" in wanted,
        "wants_dbias": "bias" in wanted,
    }


def _roles(n_operands: int, *, extras: tuple[str, ...], **_: Any) -> tuple[Role, ...]:
    every: tuple[Role, ...] = ("full", *("full" if e == "residual" else "shared" for e in extras))
    return every[:n_operands]


def _summed_roles(n_operands: int, **_: Any) -> tuple[Role, ...]:
    every: tuple[Role, ...] = ("full", "shared", "shared")
    return every[:n_operands]


def _make_plain(kind: str, centred: bool, specs: Sequence[ArgSpec]) -> Op:
    """The op without a residual: x, [scale], [bias] -> out, [mean], rstd."""

    def reference(x: jax.Array, *parameters: jax.Array, **params: Any) -> tuple[jax.Array, ...]:
        return _normalized(x, parameters, centred, **params)

    def check(*avals: Any, extras: tuple[str, ...], **_: Any) -> None:
        _check(kind, extras, *avals)

    forward = Op(
        kind, reference, target=kind, core_rank=1, attributes=_forward_attributes, roles=_roles, refuses=_refuses,
        check=check, specs=specs,
    )  # fmt: skip
    backward = Op(
        f"{kind}_backward", None, target=f"{kind}_backward", core_rank=1, attributes=_backward_attributes, roles=_roles,
        refuses=_refuses_backward,
    )  # fmt: skip
    derive(forward, backward, saved=(1, 2) if centred else (1,))
    return forward


def _make_added(kind: str, centred: bool, specs: Sequence[ArgSpec]) -> Op:
    """The op with a residual: x, residual, [scale], [bias] -> out, x + residual, [mean], rstd.

    Its derivative is that of the norm of the sum, which is all that the backward keeps: x and residual are not.
    """

    def reference(x: jax.Array, residual: jax.Array, *parameters: jax.Array, **params: Any) -> tuple[jax.Array, ...]:
        return of_sum(x + residual, *parameters, **params)

    def of_sum(total: jax.Array, *parameters: jax.Array, **params: Any) -> tuple[jax.Array, ...]:
        out, *statistics = _normalized(total, parameters, centred, **params)
        return out, total, *statistics

    def check(*avals: Any, extras: tuple[str, ...], **_: Any) -> None:
        _check(kind, extras, *avals)

    added = Op(
        f"add_{kind}", reference, target=kind, core_rank=1, attributes=_forward_attributes, roles=_roles,
        refuses=_refuses, check=check, specs=specs,
    )  # fmt: skip
    summed = Op(
        f"{kind}_of_sum", of_sum, target=kind, core_rank=1, attributes=_forward_attributes, roles=_summed_roles,
        refuses=lambda *_, **__: "only its derivative is used",
    )  # fmt: skip
    backward = Op(
        f"add_{kind}_backward", None, target=f"{kind}_backward", core_rank=1, attributes=_backward_attributes,
        roles=_summed_roles, refuses=_refuses_backward,
    )  # fmt: skip
    linear = derive(summed, backward, saved=(2, 3) if centred else (2,), outputs=(0, 1))

    def jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
        outs = added(*primals, **params)
        moved = (ad.add_tangents(tangents[0], tangents[1]), *tangents[2:])
        which = tuple(i for i, t in enumerate(moved) if not isinstance(t, ad.Zero))
        moving = (moved[i] for i in which)
        dots = linear.bind(outs[1], *primals[2:], *outs[2:], *moving, which=which, **params)
        return outs, [*dots, *(ad.Zero(jax.typeof(out).to_tangent_aval()) for out in outs[2:])]

    ad.primitive_jvps[added.primitive] = jvp
    added.backward, added.outputs = backward, (0, 1)
    return added


def _rows(*shape: int, extras: Sequence[str] = (), scale_dtype: Any = None) -> Any:
    """Makes x (and a residual) around a mean that is not zero, and parameters around 1 and 0."""

    def make(rng: np.random.Generator, dtype: Any) -> list[Any]:
        parameter = jnp.dtype(scale_dtype or dtype)
        made = [(rng.standard_normal(shape) + 0.5).astype(dtype)]
        for name in extras:
            size = shape if name == "residual" else shape[-1:]
            centre = 1.0 if name == "scale" else 0.0
            made.append((centre + 0.2 * rng.standard_normal(size)).astype(dtype if name == "residual" else parameter))
        return made

    return make


def _spec(
    name: str, shape: tuple[int, ...], extras: tuple[str, ...], scale_dtype: Any = None, **params: Any
) -> ArgSpec:
    every = {"epsilon": 1e-6, "scale_offset": 0.0, "out_dtype": None, "extras": extras, **params}
    return ArgSpec(name, _rows(*shape, extras=extras, scale_dtype=scale_dtype), every)


_BOTH = ("scale", "bias")
_LAYER_SPECS = (
    _spec("rows", (2, 24, 96), _BOTH),
    _spec("bare", (40, 128), ()),
    _spec("scale_only", (33, 80), ("scale",)),
    _spec("f32_parameters", (3, 17, 100), _BOTH, jnp.float32),
    _spec("odd", (5, 7, 33), _BOTH),
    _spec("one_feature", (9, 1), _BOTH),
    _spec("vector", (257,), _BOTH, epsilon=1e-5),
    _spec("no_rows", (0, 64), _BOTH),
    _spec("chunks", (700, 48), _BOTH),
    _spec("wide", (3, 5000), _BOTH),
    _spec("f32_result", (16, 72), _BOTH, out_dtype="float32"),
)
_RMS_SPECS = (
    _spec("rows", (2, 24, 96), ("scale",)),
    _spec("bare", (40, 128), ()),
    _spec("offset", (33, 80), ("scale",), scale_offset=1.0),
    _spec("f32_parameters", (3, 17, 100), ("scale",), jnp.float32),
    _spec("odd", (5, 7, 33), ("scale",)),
    _spec("no_rows", (0, 64), ("scale",)),
    _spec("chunks", (700, 48), ("scale",)),
)
_ADD_LAYER_SPECS = (
    _spec("rows", (2, 24, 96), ("residual", *_BOTH)),
    _spec("bare", (3, 50), ("residual",)),
    _spec("f32_parameters", (3, 17, 100), ("residual", *_BOTH), jnp.float32),
)
_ADD_RMS_SPECS = (
    _spec("rows", (2, 24, 96), ("residual", "scale")),
    _spec("offset", (33, 81), ("residual", "scale"), scale_offset=1.0),
)

LAYER_NORM = _make_plain("layer_norm", True, _LAYER_SPECS)
RMS_NORM = _make_plain("rms_norm", False, _RMS_SPECS)
ADD_LAYER_NORM = _make_added("layer_norm", True, _ADD_LAYER_SPECS)
ADD_RMS_NORM = _make_added("rms_norm", False, _ADD_RMS_SPECS)
OPS = (LAYER_NORM, RMS_NORM, ADD_LAYER_NORM, ADD_RMS_NORM)


def _call(plain: Op, added: Op, x: Any, residual: Any, parameters: Mapping[str, Any], **params: Any) -> Any:
    given = {name: jnp.asarray(value) for name, value in parameters.items() if value is not None}
    extras = tuple(given)
    out_dtype = params.pop("out_dtype")
    params["out_dtype"] = None if out_dtype is None else jnp.dtype(out_dtype).name
    x = jnp.asarray(x)
    if residual is None:
        return plain(x, *given.values(), extras=extras, **params)[0]
    dtype = jnp.promote_types(x.dtype, jnp.asarray(residual).dtype)
    x, residual = x.astype(dtype), jnp.asarray(residual).astype(dtype)
    return added(x, residual, *given.values(), extras=("residual", *extras), **params)[:2]


def layer_norm(
    x: Any,
    scale: Any = None,
    bias: Any = None,
    *,
    epsilon: float = 1e-6,
    residual: Any = None,
    out_dtype: Any = None,
) -> Any:
    """Layer normalisation over the last axis: (x - mean) / sqrt(variance + epsilon) * scale + bias.

    Statistics, scale and bias are applied in float32 whatever x's dtype, and the result is rounded once.

    Args:
      x: [..., features], floating point.
      scale: [features] or None; any floating dtype.
      bias: [features] or None; any floating dtype.
      epsilon: added to the variance.
      residual: [..., features] or None: x + residual is normalised, and returned too.
      out_dtype: dtype of the result; None: x's.

    Returns:
      [..., features] normalised; with `residual` the pair (normalised, x + residual).

    Raises:
      ValueError, TypeError: a shape does not fit x's last axis, or a dtype is not floating point.
    """
    parameters = {"scale": scale, "bias": bias}
    params = {"epsilon": float(epsilon), "scale_offset": 0.0, "out_dtype": out_dtype}
    return _call(LAYER_NORM, ADD_LAYER_NORM, x, residual, parameters, **params)


def rms_norm(
    x: Any,
    scale: Any = None,
    *,
    epsilon: float = 1e-6,
    scale_offset: float = 0.0,
    residual: Any = None,
    out_dtype: Any = None,
) -> Any:
    """RMS normalisation over the last axis: x / sqrt(mean(x^2) + epsilon) * (scale + scale_offset).

    Statistics and scale are applied in float32 whatever x's dtype, and the result is rounded once.

    Args:
      x: [..., features], floating point.
      scale: [features] or None; any floating dtype.
      epsilon: added to the mean square.
      scale_offset: added to scale (Gemma stores scale - 1: give 1.0).
      residual: [..., features] or None: x + residual is normalised, and returned too.
      out_dtype: dtype of the result; None: x's.

    Returns:
      [..., features] normalised; with `residual` the pair (normalised, x + residual).

    Raises:
      ValueError, TypeError: a shape does not fit x's last axis, or a dtype is not floating point.
    """
    params = {"epsilon": float(epsilon), "scale_offset": float(scale_offset), "out_dtype": out_dtype}
    return _call(RMS_NORM, ADD_RMS_NORM, x, residual, {"scale": scale}, **params)


def _refusal(plain: Op, added: Op, x: Any, residual: Any, out_dtype: Any, **parameters: Any) -> str | None:
    given = {name: aval for name, aval in parameters.items() if aval is not None}
    name = None if out_dtype is None else jnp.dtype(out_dtype).name
    if residual is None:
        return plain.refusal(x, *given.values(), extras=tuple(given), out_dtype=name)
    return added.refusal(x, residual, *given.values(), extras=("residual", *given), out_dtype=name)


def layer_norm_refusal(
    x: Any, scale: Any = None, bias: Any = None, *, residual: Any = None, out_dtype: Any = None
) -> str | None:
    """None where `layer_norm` of these avals runs natively, else the reason why plain JAX does."""
    return _refusal(LAYER_NORM, ADD_LAYER_NORM, x, residual, out_dtype, scale=scale, bias=bias)


def rms_norm_refusal(x: Any, scale: Any = None, *, residual: Any = None, out_dtype: Any = None) -> str | None:
    """None where `rms_norm` of these avals runs natively, else the reason why plain JAX does."""
    return _refusal(RMS_NORM, ADD_RMS_NORM, x, residual, out_dtype, scale=scale)
