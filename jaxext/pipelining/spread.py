"""How a stage's mesh comes into the traced loss: examples spread over its axes, the user's constraints on its slice.

A step is traced once and runs on the slices of all stages, so that what it says of meshes is said of an abstract one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import jaxpr_as_fun
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from .. import _jax_compat as compat
from .places import Place, Slice
from .refusal import Refusal


@dataclasses.dataclass(frozen=True)
class Spread:
    """The inner axes over which the examples of a microbatch are spread on their stage; none on one device."""

    place: Place
    axes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """The parts of each microbatch."""
        return self.place.size(self.axes) if isinstance(self.place, Slice) else 1

    def pin(self, array: Any, axis: int | None) -> Any:
        """`array`, traced, with its examples along `axis` spread so."""
        return self._constrained(array, {axis: self.axes}) if axis is not None else array

    def parts(self, array: Any, axis: int | None, count: int) -> Any:
        """`array`, traced, with `count` microbatches along `axis`, and the examples of each along the next one."""
        if axis is None:
            return array
        shape = (*array.shape[:axis], count, array.shape[axis] // count, *array.shape[axis + 1 :])
        return self._constrained(array.reshape(shape), {axis: None, axis + 1: self.axes})

    def _constrained(self, array: Any, axes: dict[int, Any]) -> Any:
        if not self.axes or not isinstance(self.place, Slice):
            return array
        spec = PartitionSpec(*(axes.get(d, PartitionSpec.UNCONSTRAINED) for d in range(array.ndim)))
        return jax.lax.with_sharding_constraint(array, NamedSharding(self.place.mesh.abstract_mesh, spec))


def of_batch(place: Place, arrays: Sequence[Any]) -> Spread:
    """As the examples of the batch are: over the axes that the first dimension of one of `arrays`, with most, has."""
    if not isinstance(place, Slice):
        return Spread(place)
    firsts = [(*place.spec(array), None)[0] or () for array in arrays]
    axes = [first if isinstance(first, tuple) else (first,) for first in firsts]
    return Spread(place, max(axes, key=len, default=()))


def localised(jaxpr: Any, place: Place) -> Any:
    """A closed jaxpr whose shardings, in loops and branches too, are on the inner axes of whichever stage runs it.

    Raises:
      Refusal: it has shardings, but the stages no mesh.
      ValueError: they are over axes that the mesh of the stages does not have.
    """
    found = _Localiser(place).jaxpr(jaxpr)
    if found is jaxpr:
        return jaxpr
    # Traced again, as the types of values behind a constraint name its mesh.
    return compat.trace(jaxpr_as_fun(found), compat.in_types(found), like=jaxpr)


class _Localiser:
    def __init__(self, place: Place) -> None:
        self._place = place

    def jaxpr(self, jaxpr: Any) -> Any:
        opened, _ = compat.open_jaxpr(jaxpr)
        equations = [self._equation(eqn) for eqn in opened.eqns]
        same = all(new is old for new, old in zip(equations, opened.eqns))
        return jaxpr if same else compat.with_equations(jaxpr, equations)

    def _equation(self, eqn: Any) -> Any:
        params = {name: self._value(value, eqn) for name, value in eqn.params.items()}
        same = all(params[name] is value for name, value in eqn.params.items())
        return eqn if same else eqn.replace(params=params)

    def _value(self, value: Any, eqn: Any) -> Any:
        if compat.is_jaxpr(value):
            return self.jaxpr(value)
        if type(value) in (tuple, list):
            values = [self._value(item, eqn) for item in value]
            return value if all(new is old for new, old in zip(values, value)) else type(value)(values)
        # Types name an empty mesh where there is none.
        if isinstance(value, NamedSharding) and not value.mesh.empty:
            return self._sharding(value, eqn)
        if isinstance(value, (Mesh, AbstractMesh)) and isinstance(self._place, Slice) and not value.empty:
            own = self._place.mesh.abstract_mesh
            return value if value == own else own
        return value

    def _sharding(self, sharding: NamedSharding, eqn: Any) -> NamedSharding:
        if not isinstance(self._place, Slice):
            raise Refusal(
                f"the step shards its values over a mesh ({sharding.spec})",
                "Give the mesh of stages and inner axes: jaxext.pipeline(mesh=mesh, axis='stage').",
                compat.user_line(eqn),
            )
        own = self._place.mesh.abstract_mesh
        return (
            sharding
            if sharding.mesh == own
            else NamedSharding(own, self._place.inner(sharding.spec, f"a value at {compat.user_line(eqn)}"))
        )
