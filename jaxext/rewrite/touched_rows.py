"""A table of which an optimizer updates those rows alone that have a gradient.

The gradient of an embedding is an array of zeros to which a few rows are added, and an optimizer without momentum then
passes over the whole table to leave nearly all of it as it was. Where that can be proved of each array that the step
gives back (untouched.py), only the rows that were looked up are read, computed and written: what TensorFlow and
PyTorch have as sparse gradients, for any optimizer made of plain arithmetic (Adagrad, gradient descent).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import GatherScatterMode

from .. import _jax_compat as compat
from ..kernels._distinct_rows import DISTINCT
from ..kernels._indexed_rows import GATHER, SCATTER, updates_gain
from . import untouched, written
from .plan import left_out
from .row_numbers import scatters_whole_rows

KERNEL = "scatter"
_MOST_EQUATIONS = 100


@dataclasses.dataclass(frozen=True)
class Update:
    """What is computed from a table's gradient.

    Attributes:
      scatter, zeros: the equations that make the gradient, and what it is added to.
      fixed, computed: those that make arrays of one number, and those that read the gradient, in order.
      operands: what these read besides it.
      results: what is read of them; each is the operand in `unchanged`, but for the rows that have a gradient.
    """

    scatter: Any
    zeros: Any
    fixed: Sequence[Any]
    computed: Sequence[Any]
    operands: Sequence[Any]
    results: Sequence[Any]
    unchanged: Sequence[Any]

    def run(self, indices: jax.Array, updates: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
        """The results, each computed in the rows that have a gradient and written over its operand there."""
        table = self.scatter.outvars[0].aval
        clips = self.scatter.params["mode"] == GatherScatterMode.CLIP
        numbers = indices.reshape(-1, 1)
        rows, places = DISTINCT(numbers, held=table.shape[0], clips=clips)
        shape = (*rows.shape, *table.shape[1:])
        own = updates.reshape(-1, *table.shape[1:])
        (gradient,) = SCATTER(jnp.zeros(shape, table.dtype), places[:, None], own, kind="add", clips=False)
        held = [GATHER(x, rows[:, None], fill=None)[0] if x.shape == table.shape else x for x in arrays]

        def bind(eqn: Any, inputs: list[Any]) -> list[Any]:
            if eqn.primitive.name == "broadcast_in_dim":
                return [jnp.broadcast_to(jnp.asarray(inputs[0], eqn.outvars[0].aval.dtype), shape)]
            return compat.bind(eqn, inputs, eqn.params)

        known = [self.scatter.outvars[0], *self.operands]
        changed = written.evaluate([*self.fixed, *self.computed], known, [gradient, *held], self.results, bind)
        given = dict(zip(self.operands, arrays))
        return [
            SCATTER(given[var], rows[:, None], new, kind="set", clips=False)[0]
            for var, new in zip(self.unchanged, changed)
        ]

    def equation(self) -> Any:
        """The equation in the place of `scatter` and `computed`."""
        operands = [*self.scatter.invars[1:], *self.operands]
        original = [self.zeros, self.scatter, *self.fixed, *self.computed]
        return written.equation(original, operands, self.run, f"jaxext_{KERNEL}", self.results)


def replaced(jaxpr: Any, kept: Collection[Any], found: Callable[[Update], None]) -> Sequence[Any]:
    """An open jaxpr's equations, those of each update replaced by one, after `found(update)`.

    kept: the operands that must not be written over, so that a table among them would be copied.
    """
    scatters = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scatter-add" and _gains(eqn)]
    if not scatters:
        return jaxpr.eqns
    flat = [inner for eqn in jaxpr.eqns for inner in written.inlined(eqn, _is_arithmetic)]
    changed = False
    for scatter in scatters:
        update = _update(flat, jaxpr.outvars, scatter)
        later = [] if update is None else flat[flat.index(update.computed[-1]) + 1 :]
        needed = {*kept, *_variables([jaxpr.outvars]), *_variables(eqn.invars for eqn in later)}
        if update is not None and _pays(update, needed):
            found(update)
            changed, new = True, update.equation()
            gone, last = {var for eqn in update.computed for var in eqn.outvars}, update.computed[-1]
            flat = [new if eqn is last else eqn for eqn in flat if eqn is last or gone.isdisjoint(eqn.outvars)]
    return flat if changed else jaxpr.eqns


def _gains(scatter: Any) -> bool:
    table, indices, _ = (var.aval for var in scatter.invars)
    return (
        table.dtype == jnp.float32
        and indices.shape[-1:] == (1,)
        and scatters_whole_rows(scatter)
        and DISTINCT.refusal(indices, held=table.shape[0], clips=False) is None
        and not left_out(KERNEL, scatter)
    )


def _pays(update: Update, kept: Collection[Any]) -> bool:
    table, updates = update.scatter.outvars[0].aval, update.scatter.invars[2].aval
    return updates_gain(table, updates, tables=len(update.results), copied=not set(update.unchanged).isdisjoint(kept))


def _is_arithmetic(eqn: Any) -> bool:
    """Whether an equation, or all that a call calls, is arithmetic on each element that untouched.py knows."""
    if eqn.effects or left_out(KERNEL, eqn) or any(compat.explicit_sharding(var.aval) for var in eqn.outvars):
        return False
    if eqn.primitive.name in written.CALLS:
        inside = written.body(eqn)
        return inside is not None and all(map(_is_arithmetic, inside))
    return eqn.primitive.name in untouched.UNDERSTOOD


def _update(flat: Sequence[Any], outvars: Sequence[Any], scatter: Any) -> Update | None:
    """What is computed from the gradient that `scatter` makes, None where that is not an update of its rows alone."""
    table = scatter.outvars[0].aval.shape
    made_by = {var: eqn for eqn in flat for var in eqn.outvars}
    zeros = made_by.get(scatter.invars[0])
    if zeros is None or zeros.primitive.name != "broadcast_in_dim" or not _is_number(zeros.invars[0], 0):
        return None
    reached, computed = {scatter.outvars[0]}, []
    for eqn in flat:
        if reached.isdisjoint(var for var in eqn.invars if not written.is_literal(var)):
            continue
        if not _is_arithmetic(eqn) or eqn.outvars[0].aval.shape != table or len(computed) == _MOST_EQUATIONS:
            return None
        computed.append(eqn)
        reached.update(eqn.outvars)
    fixed = _fixed(flat, computed, table)
    made = reached.union(*(eqn.outvars for eqn in fixed))
    operands = [var for var in _variables(eqn.invars for eqn in [*fixed, *computed]) if var not in made]
    results = [var for var in _variables([outvars]) if var in reached]
    given = {x: untouched.Same(x) for x in operands if x.aval.shape == table} | {scatter.outvars[0]: untouched.ZERO}
    known = untouched.results([*fixed, *computed], given)
    kept = [value.var for var in results if isinstance(value := known[var], untouched.Same)]
    if not results or len(set(kept)) < len(results) or any(x.aval.shape not in (table, ()) for x in operands):
        return None
    return Update(scatter, zeros, fixed, computed, operands, results, kept)


def _variables(groups: Iterable[Sequence[Any]]) -> list[Any]:
    """All variables of the groups, each once."""
    return list(dict.fromkeys(var for group in groups for var in group if not written.is_literal(var)))


def _is_number(var: Any, number: float) -> bool:
    return written.is_literal(var) and var.val == number


def _fixed(flat: Sequence[Any], computed: Sequence[Any], table: tuple[int, ...]) -> list[Any]:
    """The equations that make what `computed` reads from numbers in the program: one number, or an array of one."""
    possible: dict[Any, Any] = {}
    for eqn in flat:
        numbers = all(written.is_literal(var) or var in possible for var in eqn.invars)
        if numbers and len(eqn.outvars) == 1 and eqn.outvars[0].aval.shape in ((), table) and _is_arithmetic(eqn):
            possible[eqn.outvars[0]] = eqn
    needed: set[Any] = set()
    stack = _variables(eqn.invars for eqn in computed)
    while stack:
        var = stack.pop()
        if var in possible and var not in needed:
            needed.add(var)
            stack += _variables([possible[var].invars])
    return [eqn for var, eqn in possible.items() if var in needed]
