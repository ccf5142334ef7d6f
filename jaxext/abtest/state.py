"""The arguments of a step over many calls: fresh copies, what is fed back, where the loss is, leaves by name.

Nothing here times or judges; it makes any train step callable again and again from equal states.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Leaves = dict[str, Any]


def _nnx() -> Any:
    """flax.nnx where the program has imported it, else None: no module of it can be among the arguments."""
    return sys.modules.get("flax.nnx")


def is_module(tree: Any) -> bool:
    """True for a flax.nnx object, which a step changes in place."""
    nnx = _nnx()
    return nnx is not None and isinstance(tree, nnx.Module | nnx.Optimizer | nnx.Rngs | nnx.Variable)


def has_modules(args: tuple[Any, ...]) -> bool:
    return any(is_module(leaf) for leaf in jax.tree.leaves(args, is_leaf=is_module))


def modules_in(args: tuple[Any, ...]) -> tuple[int, ...]:
    """Positions of the arguments that hold modules."""
    return tuple(index for index, arg in enumerate(args) if has_modules((arg,)))


def _map_arrays(function: Callable[[Any], Any], tree: Any) -> Any:
    return jax.tree.map(lambda leaf: function(leaf) if isinstance(leaf, jax.Array | np.ndarray) else leaf, tree)


def copy_array(array: Any) -> Any:
    """A copy in a buffer of its own, with the same sharding."""
    return jnp.copy(array) if isinstance(array, jax.Array) else np.copy(array)


def copy_args(args: tuple[Any, ...], change: Callable[[Any], Any] = copy_array) -> tuple[Any, ...]:
    """Equal arguments in new buffers; references that modules share stay shared. `change` makes each new array."""
    nnx = _nnx()
    if nnx is not None and has_modules(args):
        graph, state = nnx.split(args)
        return nnx.merge(graph, _map_arrays(change, state))
    return _map_arrays(change, args)


def is_deleted(tree: Any) -> bool:
    """True where a buffer was donated and is gone."""
    return any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(tree))


def flat(tree: Any) -> list[tuple[str, Any]]:
    """(path, leaf) pairs with the paths JAX prints, modules included."""
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def argument_names(step: Callable[..., Any], count: int) -> list[str]:
    """The step's own parameter names, as far as they can be read."""
    try:
        parameters = list(inspect.signature(step).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    plain = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return plain[:count] + [f"args[{index}]" for index in range(len(plain), count)]


def numeric(leaf: Any) -> np.ndarray | None:
    """The leaf as a NumPy array of numbers; PRNG keys as their bits; None for what is no array."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(leaf))
    if isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float | complex):
        return np.asarray(leaf)
    return None


def _is_scalar_float(leaf: Any) -> bool:
    return isinstance(leaf, float) or (
        isinstance(leaf, jax.Array | np.ndarray | np.generic)
        and np.ndim(leaf) == 0
        and jnp.issubdtype(leaf.dtype, jnp.floating)
    )


def _describe(leaf: Any) -> tuple[Any, ...]:
    if isinstance(leaf, jax.Array | np.ndarray | np.generic):
        return (leaf.shape, leaf.dtype)
    if isinstance(leaf, bool | int | float | complex):
        return ((), jnp.result_type(leaf))  # A step counter starts as a Python number and comes back as an array.
    return (type(leaf),)


def _same_kind(output: Any, argument: Any) -> bool:
    """Equal in tree structure, shapes and dtypes."""
    left, left_tree = jax.tree.flatten(output)
    right, right_tree = jax.tree.flatten(argument)
    return bool(left) and left_tree == right_tree and [*map(_describe, left)] == [*map(_describe, right)]


def _points_elsewhere(output: Any, argument: Any) -> bool:
    """True where `output` cannot be the next `argument`: gradients have the parameters' shapes, not their direction."""
    dot = left = right = 0.0
    for new, old in zip(jax.tree.leaves(output), jax.tree.leaves(argument), strict=True):
        if isinstance(old, jax.Array | np.ndarray) and jnp.issubdtype(old.dtype, jnp.floating):
            x, y = np.asarray(new, np.float32).ravel(), np.asarray(old, np.float32).ravel()
            # Not through BLAS, whose threads would still spin when timing begins.
            products = [float(np.einsum("i,i->", a, b)) for a, b in ((x, y), (x, x), (y, y))]
            dot, left, right = dot + products[0], left + products[1], right + products[2]
    return right > 0 and not dot >= 0.5 * (left * right) ** 0.5


@dataclasses.dataclass(frozen=True)
class Wiring:
    """How outputs and arguments hang together.

    `feeds`: (output index, argument index) pairs; output index -1 is the whole output. `in_place`: arguments that
    hold modules. `loss`: path of the loss among the remaining outputs, None where there is none.
    """

    feeds: tuple[tuple[int, int], ...]
    in_place: tuple[int, ...]
    loss: str | None
    names: tuple[str, ...]

    @property
    def state(self) -> tuple[int, ...]:
        """Arguments that change from call to call."""
        return tuple(sorted({argument for _, argument in self.feeds} | set(self.in_place)))

    def describe(self) -> str:
        state = ", ".join(self.names[index] for index in self.state)
        return f"state: {state or 'none, every step starts alike'}; loss: {self.loss or 'none found'}"


def _elements(outputs: Any) -> list[Any]:
    return list(outputs) if type(outputs) in (tuple, list) else [outputs]


def wire(step: Callable[..., Any], args: tuple[Any, ...], outputs: Any) -> Wiring:
    """Find what is fed back and the loss. `args` are the arguments before the call (copies), `outputs` its result."""
    in_place = modules_in(args)
    candidates = [i for i, arg in enumerate(args) if i not in in_place and jax.tree.leaves(arg)]
    feeds: list[tuple[int, int]] = []
    if candidates and _same_kind(outputs, args[candidates[0]]) and not _is_scalar_float(outputs):
        feeds.append((-1, candidates[0]))
    else:
        for index, output in enumerate(_elements(outputs)):
            if len(feeds) == len(candidates) or _is_scalar_float(output):
                continue
            if _same_kind(output, args[candidates[len(feeds)]]):
                feeds.append((index, candidates[len(feeds)]))
    if feeds and _points_elsewhere(_pick(outputs, feeds[0][0]), args[feeds[0][1]]):
        feeds = []
    scalars = [path for path, leaf in _remaining(outputs, feeds) if _is_scalar_float(leaf)]
    named = [path for path in scalars if "loss" in path.lower()]
    names = tuple(argument_names(step, len(args)))
    return Wiring(tuple(feeds), in_place, (named or scalars or [None])[0], names)


def _pick(outputs: Any, index: int) -> Any:
    return outputs if index < 0 else _elements(outputs)[index]


def _remaining(outputs: Any, feeds: list[tuple[int, int]] | tuple[tuple[int, int], ...]) -> list[tuple[str, Any]]:
    fed = {index for index, _ in feeds}
    if -1 in fed:
        return []
    elements = _elements(outputs)
    single = len(elements) == 1 and type(outputs) not in (tuple, list)
    return [
        (("output" if single else f"output[{index}]") + path, leaf)
        for index, element in enumerate(elements)
        if index not in fed
        for path, leaf in flat(element)
    ]


def next_args(wiring: Wiring, args: tuple[Any, ...], outputs: Any) -> tuple[Any, ...]:
    """The next call's arguments."""
    following = list(args)
    for index, argument in wiring.feeds:
        following[argument] = _pick(outputs, index)
    return tuple(following)


def loss_of(wiring: Wiring, outputs: Any) -> float | None:
    """The loss as a Python float."""
    for path, leaf in _remaining(outputs, wiring.feeds):
        if path == wiring.loss:
            return float(leaf)
    return None


def leaves(wiring: Wiring, args: tuple[Any, ...], outputs: Any = None) -> Leaves:
    """All state leaves of `args` and all remaining outputs but the loss, by name."""
    found: Leaves = {}
    for index in wiring.state:
        for path, leaf in flat(args[index]):
            found[wiring.names[index] + path.removesuffix(".value")] = leaf
    for path, leaf in _remaining(outputs, wiring.feeds) if outputs is not None else []:
        if path != wiring.loss:
            found[path] = leaf
    return found
