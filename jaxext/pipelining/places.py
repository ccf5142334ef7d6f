"""Where a stage runs: on one device, or on its slice of a mesh, whose inner axes keep the user's own shardings."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from .. import _jax_compat as compat
from .refusal import Refusal


@dataclasses.dataclass(frozen=True)
class Single:
    """A stage's one device."""

    device: Any

    @property
    def process_index(self) -> int:
        return self.device.process_index

    def put(self, arrays: Sequence[Any]) -> list[Any]:
        """The arrays, here; those that are stay as they are."""
        return [self._put(array) for array in arrays]

    def _put(self, array: Any) -> Any:
        sharding = getattr(array, "sharding", None)
        if not isinstance(sharding, SingleDeviceSharding) or not array.is_fully_addressable:
            return jax.device_put(array, self.device)
        return array if array.committed and sharding == self._sharding else self.bring([array])[0]

    def bring(self, arrays: list[Any]) -> list[Any]:
        """Arrays of another stage's place, here: as `put`, but for the time that it takes to look at each."""
        return compat.copied(arrays, [self._sharding] * len(arrays))

    @functools.cached_property
    def _sharding(self) -> Sharding:
        return SingleDeviceSharding(self.device)

    def received(self, array: Any, spec: Any) -> Any:
        """An array of another process, here."""
        return jax.device_put(array, self.device)

    def check(self, array: Any, name: str) -> None:
        """
        Raises:
          ValueError: the argument cannot be put here.
        """

    def whole(self) -> Sharding:
        """An array that is here, as a sharding."""
        return self._sharding

    def tracing(self) -> contextlib.AbstractContextManager[Any]:
        """In which the user's step is traced."""
        return contextlib.nullcontext()

    def running(self) -> contextlib.AbstractContextManager[Any]:
        """In which stages run."""
        return contextlib.nullcontext()

    def __str__(self) -> str:
        return str(self.device)


@dataclasses.dataclass(frozen=True)
class Slice:
    """A stage's part of a mesh: `mesh` has the inner axes, `axis` is the one that the stages lie along.

    An array keeps its spec on the inner axes; what is sharded over the stages' axis is whole on each stage.
    """

    mesh: Mesh
    axis: str

    @property
    def process_index(self) -> int:
        return self.mesh.devices.flat[0].process_index

    def put(self, arrays: Sequence[Any]) -> list[Any]:
        return [self._put(array) for array in arrays]

    def _put(self, array: Any) -> Any:
        sharding = getattr(array, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh == self.mesh:
            return array
        return jax.device_put(array, self._of_spec(self.spec(array)))

    def bring(self, arrays: list[Any]) -> list[Any]:
        if not all(isinstance(array.sharding, NamedSharding) for array in arrays):
            return self.put(arrays)
        return compat.copied(arrays, [self._of_spec(array.sharding.spec) for array in arrays])

    def _of_spec(self, spec: PartitionSpec) -> NamedSharding:
        found = self._shardings.get(spec)
        if found is None:
            found = self._shardings[spec] = NamedSharding(self.mesh, spec)
        return found

    @functools.cached_property
    def _shardings(self) -> dict[PartitionSpec, NamedSharding]:
        return {}

    def received(self, array: Any, spec: Any) -> Any:
        return jax.device_put(array, NamedSharding(self.mesh, self.inner(spec, "a result")))

    def check(self, array: Any, name: str) -> None:
        self.spec(array, name)

    def whole(self) -> Sharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def tracing(self) -> contextlib.AbstractContextManager[Any]:
        return jax.set_mesh(self.mesh)

    def running(self) -> contextlib.AbstractContextManager[Any]:
        # A mesh that the caller is in would be taken for that of the stages.
        return jax.set_mesh(None)  # type: ignore[arg-type]

    def spec(self, array: Any, name: str = "an argument") -> PartitionSpec:
        """How `array`, by this name in errors, is sharded over the inner axes.

        Raises:
          ValueError: it is sharded over an axis that the mesh does not have, or not by names.
        """
        sharding = getattr(array, "sharding", None)
        if isinstance(sharding, NamedSharding):
            return self.inner(sharding.spec, name)
        if sharding is None or sharding.is_fully_replicated:
            return PartitionSpec()
        raise ValueError(
            f"pipeline(mesh=…): {name}, {jax.typeof(array)}, has the sharding {sharding}, expected a NamedSharding. "
            "Put it on the mesh: jax.device_put(array, NamedSharding(mesh, PartitionSpec(…)))."
        )

    def inner(self, spec: Any, name: str) -> PartitionSpec:
        """A spec on the mesh of all stages, or of one, on the inner axes alone; `name`: of what has it.

        Raises:
          ValueError: it has an axis that the mesh does not have.
        """
        return PartitionSpec(*(self._entry(entry, name) for entry in spec))

    def _entry(self, entry: Any, what: str) -> Any:
        if entry is None or entry is PartitionSpec.UNCONSTRAINED:
            return entry
        names = entry if isinstance(entry, tuple) else (entry,)
        unknown = [name for name in names if name != self.axis and name not in self.mesh.axis_names]
        if unknown:
            raise ValueError(
                f"pipeline(mesh=…): {what} is sharded over the axis {unknown[0]!r}, but the mesh has "
                f"{', '.join(map(repr, (self.axis, *self.mesh.axis_names)))}. Give a mesh with that axis, or shard it "
                "over one of these."
            )
        kept = tuple(name for name in names if name != self.axis)
        return kept if len(kept) > 1 else kept[0] if kept else None

    def size(self, names: Sequence[str]) -> int:
        """Devices along these inner axes."""
        return int(np.prod([self.mesh.shape[name] for name in names], dtype=np.int64))

    def __str__(self) -> str:
        devices = list(self.mesh.devices.flat)
        return f"{devices[0].platform}:{','.join(str(device.id) for device in devices)}"


Place = Single | Slice


def slices(mesh: Mesh, axis: str) -> list[Place]:
    """The places of the stages along `axis` of a mesh. Inner axes are of the type Auto, whatever they are in the mesh.

    Raises:
      Refusal: the devices of a stage belong to several processes.
    """
    along = mesh.axis_names.index(axis)
    names = tuple(name for name in mesh.axis_names if name != axis)
    found: list[Place] = []
    for stage in range(mesh.shape[axis]):
        devices = mesh.devices.take(stage, along)
        if not names:
            found.append(Single(np.asarray(devices).item()))
            continue
        owners = sorted({device.process_index for device in devices.flat})
        if len(owners) > 1:
            raise Refusal(
                f"mesh= has devices of the processes {', '.join(map(str, owners))} in stage {stage}",
                f"Let one process own a stage: order the devices so that {axis!r} goes over processes.",
            )
        found.append(Slice(Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names)), axis))
    return found
