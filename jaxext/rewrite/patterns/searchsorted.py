"""`jnp.searchsorted` by its loop: a jitted function that is, word for word, what JAX makes of the two arrays' types."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ... import _jax_compat as compat
from ... import _settings
from ...kernels._op import Op
from ...kernels._searchsorted import SEARCHSORTED, searchsorted_gains
from ..exchange import Exchange


@functools.lru_cache(maxsize=256)
def _written(array: jax.ShapeDtypeStruct, query: jax.ShapeDtypeStruct, side: str) -> str:
    with _settings.use(None):
        traced = jax.make_jaxpr(functools.partial(jnp.searchsorted, side=side))(array, query)
    return str(compat.low_level(traced).eqns[-1].params.get("jaxpr"))


def _choose(eqn: Any) -> tuple[Op, Mapping[str, Any]] | None:
    if eqn.params["name"] != "searchsorted" or len(eqn.invars) != 2 or len(eqn.outvars) != 1:
        return None
    array, query = avals = [var.aval for var in eqn.invars]
    if len(array.shape) != 1 or any(map(compat.explicit_sharding, avals)) or eqn.outvars[0].aval.dtype != np.int32:
        return None
    if SEARCHSORTED.refusal(array, query) is not None or not searchsorted_gains(array, query):
        return None
    text = str(eqn.params["jaxpr"])
    types = [jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type) for x in avals]
    side = next((side for side in ("left", "right") if text == _written(*types, side)), None)
    return None if side is None else (SEARCHSORTED, {"side": side})


EXCHANGE = Exchange("sort", "jit", _choose)
