"""How an op shards: its leading dimensions stay on their devices, every other dimension is whole on each.

Stock custom calls gather every sharded operand. Where a program spans several devices an op is therefore lowered
through `jax.experimental.custom_partitioning`, which runs the same primitive on each device's rows and sums over the
mesh what an op sums over its rows (the gradient of a scale). Programs on one device take the plain call, so that their
persistent compilation cache keeps working.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

__all__ = ["partitioned", "resized", "spans_devices"]


def spans_devices(ctx: Any) -> bool:
    """Whether XLA is to partition the program being lowered (inside shard_map it already is)."""
    axis_context = ctx.module_context.axis_context
    if getattr(axis_context, "manual_axes", None):
        return False
    return (getattr(axis_context, "num_devices", 1) or 1) > 1


def resized(aval: Any, leading: int, ndim: int) -> Any:
    """The sharding of an aval with `ndim` dimensions that shares the first `leading` dimensions of `aval`."""
    sharding = aval.sharding
    spec = (*sharding.spec[:leading], *(None,) * (ndim - leading))
    return sharding.update(spec=PartitionSpec(*spec))


def _rule(
    leading: int, roles: Sequence[str], shapes: Sequence[tuple[int, ...]], n_operands: int
) -> tuple[str, list[str]]:
    """The op's sharding rule as text, and its factors that must be whole on every device."""
    whole: list[str] = []

    def factors(index: int, role: str, shape: tuple[int, ...]) -> str:
        names = []
        for d, size in enumerate(shape):
            if (role == "full" and d < leading) or (role == "broadcast" and d < leading and size != 1):
                names.append(f"b{d}")
            else:
                names.append(f"x{index}d{d}")
                whole.append(names[-1])
        return " ".join(names)

    texts = [factors(i, role, shape) for i, (role, shape) in enumerate(zip(roles, shapes))]
    return f"{', '.join(texts[:n_operands])} -> {', '.join(texts[n_operands:])}", whole


@functools.lru_cache(maxsize=1024)
def partitioned(
    run: Callable[..., Any],
    leading: int,
    roles: tuple[str, ...],
    output_roles: tuple[str, ...],
    shapes: tuple[tuple[int, ...], ...],
) -> Callable[..., Any]:
    """`run` (one op with its parameters) as a function that XLA partitions over its first `leading` dimensions.

    Args:
      run: operands -> tuple of outputs.
      leading: number of leading dimensions of operand 0 that are a batch.
      roles: one Role per operand.
      output_roles: one Role per output; what is "shared" there is summed over the batch, so also over devices.
      shapes: global shapes of operands, then outputs.
    """
    n = len(roles)

    def spec(batch: Sequence[Any], role: str, shape: tuple[int, ...]) -> PartitionSpec:
        if role == "shared":
            return PartitionSpec()
        return PartitionSpec(*(axis if size != 1 else None for axis, size in zip(batch, shape)))

    def placed(mesh: Any, batch: Sequence[Any]) -> tuple[list[NamedSharding], list[NamedSharding]]:
        all_roles = (*roles, *output_roles)
        shardings = [NamedSharding(mesh, spec(batch, r, s)) for r, s in zip(all_roles, shapes)]
        return shardings[:n], shardings[n:]

    def batch_axes(arg_shapes: Sequence[Any]) -> tuple[Any, ...]:
        found = tuple(arg_shapes[0].sharding.spec)
        return (*found, *(None,) * leading)[:leading]

    def partition(mesh: Any, arg_shapes: Sequence[Any], result_shape: Any) -> Any:
        batch = batch_axes(arg_shapes)
        args, results = placed(mesh, batch)
        axes = tuple(a for axis in batch if axis is not None for a in (axis if isinstance(axis, tuple) else (axis,)))

        def on_each(*xs: Any) -> tuple[Any, ...]:
            outs = run(*xs)
            return tuple(jax.lax.psum(o, axes) if r == "shared" and axes else o for o, r in zip(outs, output_roles))

        return mesh, on_each, tuple(results), tuple(args)

    def infer(mesh: Any, arg_shapes: Sequence[Any], result_shape: Any) -> Any:
        return tuple(placed(mesh, batch_axes(arg_shapes))[1])

    rule, whole = _rule(leading, (*roles, *output_roles), shapes, n)
    wrapped = custom_partitioning(run)
    wrapped.def_partition(
        partition=partition,
        infer_sharding_from_operands=infer,
        sharding_rule=rule,
        need_replication_factors=tuple(whole),
    )
    return wrapped
