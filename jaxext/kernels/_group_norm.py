"""Group norm of images whose channels come last, forward and backward; with one channel a group, instance norm.

Wu and He, "Group Normalization" (2018); Ulyanov, Vedaldi and Lempitsky, "Instance Normalization" (2016). Bytes are what
they cost: forward reads x twice (the second time from a cache where an image fits one) and writes the result, backward
reads x and the cotangent twice and writes dx; the gradients of scale and bias fall out of its first pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxext.kernels._norm import refused_type
from jaxext.kernels._op import ArgSpec, Op, Role, derive

__all__ = ["GROUP_NORM", "group_norm", "group_norm_refusal"]


def _reference(
    x: jax.Array,
    *parameters: jax.Array,
    groups: int,
    epsilon: float,
    extras: tuple[str, ...],
    out_dtype: str | None,
) -> tuple[jax.Array, ...]:
    """(out, mean, rstd) of x[..., pixels, channels]; statistics and the affine step in f32, one rounding at the end."""
    named = dict(zip(extras, parameters))
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    grouped = wide.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    mean = jnp.mean(grouped, (-3, -1), keepdims=True)
    centre = grouped - mean
    rstd = jax.lax.rsqrt(jnp.mean(jnp.square(centre), (-3, -1), keepdims=True) + epsilon)
    out = (centre * rstd).reshape(x.shape)
    if "scale" in named:
        out = out * named["scale"].astype(wide.dtype)
    if "bias" in named:
        out = out + named["bias"].astype(wide.dtype)
    return out.astype(out_dtype or x.dtype), mean[..., 0, :, 0], rstd[..., 0, :, 0]


def _check(*avals: Any, groups: int, extras: tuple[str, ...], **_: Any) -> None:
    x, parameters = avals[0], avals[1:]
    if len(x.shape) < 2 or x.shape[-1] == 0:
        raise ValueError(f"jaxext group_norm: argument 'x' must be [..., pixels, channels >= 1], got shape {x.shape}")
    if groups < 1 or x.shape[-1] % groups:
        raise ValueError(
            f"jaxext group_norm: argument 'groups' must divide the {x.shape[-1]} channels of x, got {groups}"
        )
    for name, value in zip(("x", *extras), avals):
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(
                f"jaxext group_norm: argument '{name}' must be floating point, got {value.dtype}; "
                "cast it with astype(...)"
            )
    for name, value in zip(extras, parameters):
        if value.shape != x.shape[-1:]:
            raise ValueError(
                f"jaxext group_norm: argument '{name}' must have shape {tuple(x.shape[-1:])} to fit x of shape "
                f"{tuple(x.shape)}, got {tuple(value.shape)}; broadcast or reshape it first"
            )


def _refuses(*avals: Any, extras: tuple[str, ...], out_dtype: str | None, **_: Any) -> str | None:
    refused = refused_type(avals, extras, out_dtype)
    if refused is not None:
        return refused
    if avals[0].shape[-1] < 8:
        return f"{avals[0].shape[-1]} channels are fewer than a register holds"
    if avals[0].shape[-2] == 0:
        return "images without pixels have no mean"
    return None


def _attributes(*, epsilon: float, groups: int, extras: tuple[str, ...], **_: Any) -> Mapping[str, Any]:
    has = {f"has_{name}": name in extras for name in ("scale", "bias")}
    return {"epsilon": np.float32(epsilon), "groups": np.int64(groups), **has}


def _backward_attributes(*, groups: int, extras: tuple[str, ...], wrt: tuple[int, ...], **_: Any) -> Mapping[str, Any]:
    wanted = {("x", *extras)[i] for i in wrt}
    has = {f"has_{name}": name in extras for name in ("scale", "bias")}
    wants = {f"wants_d{name}": name in wanted for name in ("x", "scale", "bias")}
    return {"groups": np.int64(groups), **has, **wants}


def _roles(n_operands: int, **_: Any) -> tuple[Role, ...]:
    every: tuple[Role, ...] = ("full", "shared", "shared")
    return every[:n_operands]


def _spec(
    name: str, shape: tuple[int, ...], groups: int, extras: tuple[str, ...], scale_dtype: Any = None, **params: Any
) -> ArgSpec:
    def make(rng: np.random.Generator, dtype: Any) -> list[Any]:
        made = [(rng.standard_normal(shape) + 0.5).astype(dtype)]
        for extra in extras:
            centre = 1.0 if extra == "scale" else 0.0
            value = centre + 0.2 * rng.standard_normal(shape[-1:])
            made.append(value.astype(jnp.dtype(scale_dtype or dtype)))
        return made

    every = {"groups": groups, "epsilon": 1e-6, "out_dtype": None, "extras": extras, **params}
    return ArgSpec(name, make, every)


_BOTH = ("scale", "bias")
GROUP_NORM = Op(
    "group_norm",
    _reference,
    target="group_norm",
    core_rank=2,
    attributes=_attributes,
    roles=_roles,
    refuses=_refuses,
    check=_check,
    specs=(
        _spec("images", (2, 60, 32), 4, _BOTH),
        _spec("bare", (3, 33, 48), 8, ()),
        _spec("scale_only", (1, 70, 24), 3, ("scale",)),
        _spec("f32_parameters", (2, 3, 17, 40), 5, _BOTH, jnp.float32),
        _spec("odd", (5, 7, 33), 11, _BOTH, epsilon=1e-5),
        _spec("one group", (2, 9, 20), 1, _BOTH),
        _spec("instance norm", (2, 200, 16), 16, _BOTH),
        _spec("few channels", (2, 30, 4), 2, _BOTH),
        _spec("one image of many chunks", (2000, 64), 8, _BOTH),
        _spec("wide", (3, 5, 1100), 4, _BOTH),
        _spec("no images", (0, 6, 16), 2, _BOTH),
        _spec("f32_result", (2, 66, 64), 4, _BOTH, out_dtype="float32"),
    ),
)
_BACKWARD = Op(
    "group_norm_backward",
    None,
    target="group_norm_backward",
    core_rank=2,
    attributes=_backward_attributes,
    refuses=_refuses,
)
derive(GROUP_NORM, _BACKWARD, saved=(1, 2))


def _pixels(x: Any) -> tuple[int, ...]:
    """x's shape [batch, ..., channels] with all between as one dimension."""
    if len(x.shape) < 2:
        raise ValueError(f"jaxext group_norm: argument 'x' must be [batch, ..., channels], got shape {tuple(x.shape)}")
    return (x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def group_norm(
    x: Any, scale: Any = None, bias: Any = None, *, groups: int, epsilon: float = 1e-6, out_dtype: Any = None
) -> jax.Array:
    """Group normalisation: (x - mean) / sqrt(variance + epsilon) * scale + bias, statistics over a group of an image.

    A group is channels / groups neighbouring channels of all places of one batch entry. Statistics, scale and bias are
    applied in float32 whatever x's dtype, and the result is rounded once. `groups` = channels is instance norm.

    Args:
      x: [batch, ..., channels], floating point.
      scale: [channels] or None; any floating dtype.
      bias: [channels] or None; any floating dtype.
      groups: a divisor of channels.
      epsilon: added to the variance.
      out_dtype: dtype of the result; None: x's.

    Returns:
      [batch, ..., channels] normalised.

    Raises:
      ValueError, TypeError: a shape does not fit x's last axis, groups do not divide it, or a dtype is not floating.
    """
    x = jnp.asarray(x)
    given = {name: jnp.asarray(value) for name, value in (("scale", scale), ("bias", bias)) if value is not None}
    out, _, _ = GROUP_NORM(
        x.reshape(_pixels(x)),
        *given.values(),
        groups=groups,
        epsilon=float(epsilon),
        extras=tuple(given),
        out_dtype=None if out_dtype is None else jnp.dtype(out_dtype).name,
    )
    return out.reshape(x.shape)


def group_norm_refusal(x: Any, scale: Any = None, bias: Any = None, *, out_dtype: Any = None) -> str | None:
    """None where `group_norm` of these avals runs natively, else the reason why plain JAX does."""
    given = {name: value for name, value in (("scale", scale), ("bias", bias)) if value is not None}
    name = None if out_dtype is None else jnp.dtype(out_dtype).name
    flat = jax.ShapeDtypeStruct(_pixels(x), x.dtype)
    return GROUP_NORM.refusal(flat, *given.values(), extras=tuple(given), out_dtype=name)
