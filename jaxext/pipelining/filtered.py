"""Equinox: steps under `eqx.filter_jit`, and modules whose leaves need not be arrays.

Whatever is no array in them is static, as in `eqx.filter_jit`. Equinox is never imported here: where nobody did that,
nothing of it can be among the arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def is_filter_jitted(step: Callable[..., Any]) -> bool:
    """True for what `eqx.filter_jit` returned."""
    return type(step).__module__.startswith("equinox.") and hasattr(step, "donate_first")


def donated(step: Callable[..., Any], names: list[str]) -> dict[str, Any]:
    """What such a step gives up of its arguments, as an option of `jax.jit`; `names`: of the arguments."""
    given = [name for place, name in enumerate(names) if (step.donate_rest if place else step.donate_first)]
    return {"donate_argnames": tuple(given)}


def holds_module(argument: Any) -> bool:
    """True where an argument is or holds an Equinox module."""
    equinox = sys.modules.get("equinox")
    if equinox is None:
        return False
    found = jax.tree.leaves(argument, is_leaf=lambda x: isinstance(x, equinox.Module))
    return any(isinstance(leaf, equinox.Module) for leaf in found)


def is_static(leaf: Any) -> bool:
    return not isinstance(leaf, (jax.Array, np.ndarray, np.generic))
