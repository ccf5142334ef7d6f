"""Loops over the steps of a sequence, with the products that need not wait for their turn taken out of them.

A step of a recurrent network multiplies few rows, so it reads its weights at the speed of the cache; all steps at once
multiply at the speed of the cores. See `..loop` for what leaves a loop.
"""

from __future__ import annotations

import functools
from typing import Any

from ... import _jax_compat as compat
from .. import loop
from ..exchange import Exchange, Expression

# A product of more rows is as fast in the loop. Measured in tests/bench/bench_recurrence.py.
MOST_ROWS = 64
LEAST_STEPS = 8
# What may be stacked besides what the loop stacks anyhow, where that is more.
MOST_BYTES = 64 << 20


def _choose(eqn: Any) -> Expression | None:
    params = eqn.params
    if params["length"] < LEAST_STEPS or eqn.effects or not eqn.outvars:
        return None
    if any(compat.explicit_sharding(var.aval) for var in eqn.invars):
        return None
    parts = loop.cut(eqn, lambda rows: 0 < rows <= MOST_ROWS)
    if parts is None or params["length"] * parts.more_bytes() > max(MOST_BYTES, params["length"] * parts.own_bytes()):
        return None
    after = {*parts.late.values(), *(sum_.source for sum_ in parts.sums.values())}
    moved = [f"{len(nodes)} {place}" for nodes, place in ((parts.early, "before"), (after, "after")) if nodes]
    detail = f"{params['length']} steps, products outside the loop: {' and '.join(moved)} it"
    moving = [value for node in (*parts.early, *after) for value in node.inputs if value not in parts.constants]
    shapes = tuple(dict.fromkeys(compat.short_type(value.aval) for value in moving))
    return Expression(functools.partial(_run, parts=parts, params=params), detail, shapes)


def _run(*operands: Any, parts: loop.Cut, params: Any) -> list[Any]:
    return loop.run(parts, params, operands)


EXCHANGE = Exchange("recurrence", "scan", _choose)
