"""A call of a train step as flat arrays, and back: static arguments and leaves, flax.nnx objects, the batch."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from .._check import has_nnx
from . import filtered
from .refusal import Refusal


@dataclasses.dataclass(frozen=True)
class Options:
    """What `jax.jit` and `pipeline` are told of a step's arguments, by name of the parameter.

    filtered: in all arguments, what is no array is static, as in `eqx.filter_jit`.
    """

    static: frozenset[str]
    donated: frozenset[str]
    batch: frozenset[str] | None
    filtered: bool = False

    @classmethod
    def of(cls, signature: inspect.Signature, jit: dict[str, Any], batch: Any, filtered: bool = False) -> Options:
        """
        Raises:
          ValueError: a name or number that is no argument of the step.
        """
        names = list(signature.parameters)

        def named(argument: str, *values: Any) -> frozenset[str]:
            found = set()
            for value in (v for group in values for v in ((group,) if isinstance(group, (int, str)) else group or ())):
                known = value in names if isinstance(value, str) else -len(names) <= value < len(names)
                if not known:
                    raise ValueError(f"pipeline({argument}={value!r}): the step's arguments are {', '.join(names)}.")
                found.add(value if isinstance(value, str) else names[value])
            return frozenset(found)

        return cls(
            named("static_argnums", jit.get("static_argnums"), jit.get("static_argnames")),
            named("donate_argnums", jit.get("donate_argnums"), jit.get("donate_argnames")),
            None if batch is None else named("batch_argnames", batch),
            filtered,
        )


@dataclasses.dataclass(eq=False)
class Call:
    """One call of a step.

    Attributes:
      leaves: its arrays. owners: the argument that each belongs to. key: what a compilation of the step depends on.
      run: the step as a function of the leaves, whose results `results` puts together.
    """

    leaves: list[Any]
    owners: list[str]
    key: Any
    run: Callable[..., list[Any]]
    _box: dict[str, Any]
    _objects: dict[str, Any]

    @property
    def types(self) -> list[Any]:
        return [_type(leaf) for leaf in self.leaves]

    def output(self) -> Any:
        """What `results` needs to know of the traced step."""
        return dict(self._box)

    def results(self, leaves: Sequence[Any], output: dict[str, Any]) -> Any:
        """The step's result from its flat results; flax.nnx objects are updated in place."""
        arrays = iter(leaves)
        everything = [next(arrays) if is_array else leaf for is_array, leaf in output["leaves"]]
        result, state = jax.tree.unflatten(output["tree"], everything)
        if self._objects:
            sys.modules["flax.nnx"].update(self._objects, state)
        return result


def flatten(step: Callable[..., Any], signature: inspect.Signature, options: Options, args: Any, kwargs: Any) -> Call:
    """
    Raises:
      TypeError: the arguments do not fit the step, as Python says it.
    """
    bound = signature.bind(*args, **kwargs)
    given = {name: value for name, value in bound.arguments.items() if name not in options.static}
    static = {name: value for name, value in bound.arguments.items() if name in options.static}
    objects = {name: value for name, value in given.items() if has_nnx(value)}
    plain = {name: value for name, value in given.items() if name not in objects}
    definition, state = sys.modules["flax.nnx"].split(objects) if objects else (None, {})
    paths, tree = jax.tree_util.tree_flatten_with_path((plain, state))
    owned = [(path[1].key if path[0].idx == 0 else "", leaf) for path, leaf in paths]
    modules = {name for name, value in plain.items() if options.filtered or filtered.holds_module(value)}
    fixed = {n: leaf for n, (owner, leaf) in enumerate(owned) if owner in modules and filtered.is_static(leaf)}
    free = [(owner, leaf) for n, (owner, leaf) in enumerate(owned) if n not in fixed]
    leaves = [_array(leaf, owner) for owner, leaf in free]
    box: dict[str, Any] = {}

    def run(*arrays: Any) -> list[Any]:
        given = iter(arrays)
        everything = [fixed[n] if n in fixed else next(given) for n in range(len(owned))]
        own, own_state = jax.tree.unflatten(tree, everything)
        merged = sys.modules["flax.nnx"].merge(definition, own_state) if objects else {}
        call = inspect.BoundArguments(signature, {})  # type: ignore[arg-type]
        call.arguments.update({name: {**own, **merged, **static}[name] for name in bound.arguments})
        result = step(*call.args, **call.kwargs)
        new = sys.modules["flax.nnx"].state(merged) if objects else {}
        flat, box["tree"] = jax.tree.flatten((result, new))
        kept = [not (modules and filtered.is_static(leaf)) for leaf in flat]
        box["leaves"] = [(is_array, None if is_array else leaf) for is_array, leaf in zip(kept, flat)]
        return [leaf for leaf, is_array in zip(flat, kept) if is_array]

    constants = tuple((n, type(leaf), leaf) for n, leaf in fixed.items())
    key = (
        tree,
        definition,
        tuple(sorted(static.items())),
        constants,
        tuple(_type(leaf) for leaf in leaves),
    )
    return Call(leaves, [owner for owner, _ in free], key, run, box, objects)


def _array(leaf: Any, owner: str) -> Any:
    if isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, int, float, complex)):
        return leaf if isinstance(leaf, jax.Array) else jax.numpy.asarray(leaf)
    raise TypeError(
        f"pipeline: argument {owner!r} holds a {type(leaf).__name__}, which is no array. "
        "Name it in static_argnames, as with jax.jit."
    )


def _type(leaf: Any) -> Any:
    """The type of an array, wherever it is: without the mesh that it may name."""
    found = jax.typeof(leaf)
    return found if found.sharding.mesh.empty else found.update(sharding=None)


def donated(call: Call, options: Options) -> list[int]:
    """Which leaves the caller gives up."""
    return [number for number, owner in enumerate(call.owners) if owner in options.donated]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Leaves that may hold the examples along their first axis, `size` of them."""

    leaves: tuple[int, ...]
    size: int


def batches(call: Call, reaching: Iterable[int], options: Options) -> list[Batch]:
    """What the batch may be, the likeliest first.

    reaching: leaves that the loss takes without being differentiated in them. Without `batch_argnames`, a batch is made
    of arguments whose arrays all begin with one and the same size; what is passed last is likelier.

    Raises:
      Refusal: no argument looks like a batch.
    """
    reached = set(reaching)
    names = options.batch if options.batch is not None else _candidates(call, reached)
    leaves = [n for n, owner in enumerate(call.owners) if owner in names and np.ndim(call.leaves[n]) and n in reached]
    sizes: dict[int, list[int]] = {}
    for n in reversed(leaves):
        sizes.setdefault(call.leaves[n].shape[0], []).append(n)
    found = [
        Batch(tuple(sorted(chosen)), size)
        for size, own in sizes.items()
        for chosen in _choices(call, own, fixed=options.batch is not None)
        if size > 1
    ]
    if not found:
        raise Refusal("no argument of the step looks like a batch", "Name those that do: batch_argnames=('batch',).")
    return found


def _choices(call: Call, leaves: list[int], fixed: bool) -> list[list[int]]:
    """All of these leaves; then, as a table may be as long as the batch, those of all arguments but one, or of one."""
    owners = list(dict.fromkeys(call.owners[n] for n in leaves))
    if fixed or len(owners) == 1:
        return [leaves]
    but_one = [[n for n in leaves if call.owners[n] != owner] for owner in reversed(owners)]
    single = [[n for n in leaves if call.owners[n] == owner] for owner in owners]
    return [leaves, *but_one, *(single if len(owners) > 2 else [])]


def _candidates(call: Call, reached: set[int]) -> set[str]:
    found = set()
    for name in dict.fromkeys(owner for owner in call.owners if owner):
        own = [n for n, owner in enumerate(call.owners) if owner == name]
        arrays = [call.leaves[n] for n in own if np.ndim(call.leaves[n])]
        sizes = {array.shape[0] for array in arrays}
        is_key = all(array.shape == (2,) and array.dtype == np.uint32 for array in arrays)
        if len(sizes) == 1 and not is_key and any(n in reached for n in own):
            found.add(name)
    return found
