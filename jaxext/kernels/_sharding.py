"""How an op's operands shard: batch-like dimensions stay where they are, everything else is whole on each device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def resized(aval: Any, ndim: int) -> Any:
    return aval.sharding


def attributes(ctx: Any, roles: Sequence[str], output_roles: Sequence[str]) -> dict[str, Any] | None:
    return {}
