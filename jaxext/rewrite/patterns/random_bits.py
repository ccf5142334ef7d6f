"""Random bits of the default generator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ... import _jax_compat as compat
from ...kernels._op import Op
from ...kernels._random_bits import RANDOM_BITS, random_bits_gains
from ..exchange import Exchange


def _choose(eqn: Any) -> tuple[Op, Mapping[str, Any]] | None:
    keys, params = eqn.invars[0].aval, {name: eqn.params[name] for name in ("bit_width", "shape")}
    if not compat.is_partitionable_threefry(keys) or compat.explicit_sharding(eqn.outvars[0].aval):
        return None
    if RANDOM_BITS.refusal(keys, **params) is not None or not random_bits_gains(keys.shape, params["shape"]):
        return None
    return RANDOM_BITS, params


# The op takes the words of a key, which is not an array of numbers itself.
EXCHANGE = Exchange("random_bits", "random_bits", _choose, before=compat.key_words)
