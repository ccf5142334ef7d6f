"""Which dimension is what, and the call of the attention kernel that a match stands for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp

from ...kernels._attention import attention_op
from ...kernels._attention_rows import filled
from ...kernels._platform import foreseen
from ..axes import Axis, Dims, Splits, View, arrange, climb, refine
from ..facts import Facts, widens
from ..match import NoMatch
from ..trace import Value
from .attention_scores import Mask, Scores, added_only
from .masks import Array, Band, Condition, Never, Segments, conditions

if TYPE_CHECKING:
    from .attention import Probabilities

Fill = Literal["uniform", "nan"] | None
# A mask this much below another one wins wherever both hide a key.
_DOMINATES = 8.0


@dataclasses.dataclass(frozen=True)
class Roles:
    """The labels of each of the kernel's dimensions, outermost first within a group."""

    leading: tuple[Axis, ...]
    groups: tuple[Axis, ...]
    repeats: tuple[Axis, ...]
    rows: tuple[Axis, ...]
    keys: tuple[Axis, ...]
    features: tuple[Axis, ...]
    value_features: tuple[Axis, ...]

    @property
    def heads(self) -> tuple[Axis, ...]:
        return (*self.groups, *self.repeats)


@dataclasses.dataclass(frozen=True)
class Operand:
    """One of the call's arrays: `index` in the inputs, the labels of its dimensions."""

    index: int
    dims: Dims
    wanted: bool = True
    factor: float = 1.0
    # A mask that is true where any element along these is.
    over: tuple[Axis, ...] = ()


@dataclasses.dataclass
class Plan:
    """The call: `plan(*arrays) -> (result,)`."""

    root: View
    roles: Roles
    inputs: tuple[Value, ...] = ()
    query: Operand | None = None
    key: Operand | None = None
    value: Operand | None = None
    row_scales: tuple[Operand, ...] = ()
    biases: tuple[Operand, ...] = ()
    masks: tuple[Operand, ...] = ()
    # Masks that hide whole rows, put on the result.
    row_masks: tuple[Operand, ...] = ()
    equal: tuple[tuple[Operand, Operand], ...] = ()
    segments: tuple[Operand, Operand] | None = None
    keeps: tuple[Operand, ...] = ()
    # Multiplied onto the result, with one number.
    scales: tuple[Operand, ...] = ()
    number: float = 1.0
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, *arrays: Any) -> tuple[Any, ...]:
        query, key, value, options = _arranged(self, arrays)
        out = attention_op(query, key, value, **options, **self.options)
        roles, layout = self.roles, self.options["layout"][3]
        inner = (roles.rows, roles.heads) if layout == "btnh" else (roles.heads, roles.rows)
        leading = [(axis,) for axis in roles.leading]
        for mask in self.row_masks:
            hidden = jnp.logical_not(_truth(arrays, mask, (*leading, *inner)))
            out = filled(out, hidden, value, self.options["fill"], layout, self.options["layout"][2])
        for scale in self.scales:
            out = out * arrange(arrays[scale.index], scale.dims, (*leading, *inner, ())).astype(out.dtype)
        out = out if self.number == 1.0 else out * jnp.asarray(self.number, out.dtype)
        dims = (*leading, *inner, roles.value_features)
        return (arrange(out, dims, self.root.dims).astype(self.root.value.dtype),)

    @property
    def detail(self) -> str:
        roles, options = self.roles, self.options
        heads = f"heads={_size(roles.heads)}" + (f"/{_size(roles.groups)}" if roles.repeats else "")
        parts = [heads]
        if options["band"] != (None, None):
            parts.append("band=({}, {})".format(*options["band"]))
        masks = "lengths" if options["prefix"] else "mask"
        named = (("bias", self.biases), (masks, self.masks or self.equal), ("rows", self.row_masks))
        named = (*named, ("segments", self.segments))
        parts += [name for name, given in (*named, ("dropout", self.keeps)) if given]
        if options["soft_cap"] is not None:
            parts.append(f"soft_cap={options['soft_cap']:g}")
        return ", ".join(parts)


def _size(axes: Sequence[Axis]) -> int:
    return math.prod(axis.size for axis in axes)


def operand_types(call: Plan) -> tuple[Any, Any, Any, dict[str, Any]]:
    """The types of the kernel's operands, without tracing anything."""
    roles, inputs = call.roles, call.inputs
    assert call.query is not None and call.key is not None and call.value is not None
    leading = [axis.size for axis in roles.leading]
    dtype = jnp.result_type(*(inputs[operand.index].dtype for operand in (call.query, call.key, call.value)))

    def matrix(operands: Sequence[Operand], dtype: Any) -> Any:
        present = {axis for operand in operands for dim in operand.dims for axis in dim if axis not in operand.over}
        groups = (*((axis,) for axis in roles.leading), roles.heads, roles.rows, roles.keys)
        shape = [_size(group) if present & set(group) else 1 for group in groups]
        return jax.ShapeDtypeStruct(tuple(shape), dtype)

    def sequence(axes: Sequence[Axis], heads: Sequence[Axis], features: Sequence[Axis], layout: str) -> Any:
        inner = [_size(axes), _size(heads)] if layout == "btnh" else [_size(heads), _size(axes)]
        return jax.ShapeDtypeStruct((*leading, *inner, _size(features)), dtype)

    extras: dict[str, Any] = dict(call.options)
    if call.biases:
        extras["bias"] = matrix(call.biases, jnp.result_type(*(inputs[bias.index].dtype for bias in call.biases)))
    if call.masks or call.equal:
        extras["mask"] = matrix((*call.masks, *(side for pair in call.equal for side in pair)), jnp.bool_)
    if call.keeps:
        extras["keep"] = matrix(call.keeps, jnp.bool_)
    if call.segments is not None:
        extras["query_segment_ids"] = jax.ShapeDtypeStruct((*leading, _size(roles.rows)), jnp.int32)
        extras["key_value_segment_ids"] = jax.ShapeDtypeStruct((*leading, _size(roles.keys)), jnp.int32)
    layouts = call.options["layout"]
    return (
        sequence(roles.rows, roles.heads, roles.features, layouts[0]),
        sequence(roles.keys, roles.groups, roles.features, layouts[1]),
        sequence(roles.keys, roles.groups, roles.value_features, layouts[2]),
        extras,
    )


def _arranged(call: Plan, arrays: Sequence[Any]) -> tuple[Any, Any, Any, dict[str, Any]]:
    roles = call.roles
    assert call.query is not None and call.key is not None and call.value is not None
    leading = [(axis,) for axis in roles.leading]
    sizes = [axis.size for axis in roles.leading]

    def placed(operand: Operand, groups: Sequence[Sequence[Axis]], layout: str, feature: Sequence[Axis]) -> Any:
        inner = groups if layout == "btnh" else groups[::-1]
        array = arrange(arrays[operand.index], operand.dims, (*leading, *inner, feature))
        return jnp.broadcast_to(array, (*sizes, *(_size(group) for group in inner), _size(feature)))

    layouts = call.options["layout"]
    query = placed(call.query, (roles.rows, roles.heads), layouts[0], roles.features)
    key = placed(call.key, (roles.keys, roles.groups), layouts[1], roles.features)
    value = placed(call.value, (roles.keys, roles.groups), layouts[2], roles.value_features)
    dtype = jnp.result_type(query, key, value)
    for scale in call.row_scales:
        inner = (roles.rows, roles.heads) if layouts[0] == "btnh" else (roles.heads, roles.rows)
        query = query * arrange(arrays[scale.index], scale.dims, (*leading, *inner, ())).astype(dtype)
    return query.astype(dtype), key.astype(dtype), value.astype(dtype), _extras(call, arrays, leading)


def _truth(arrays: Sequence[Any], operand: Operand, groups: Sequence[tuple[Axis, ...]]) -> Any:
    if operand.over:
        groups = (*(() if group == operand.over else group for group in groups), operand.over)
    array = arrange(arrays[operand.index], operand.dims, groups)
    array = array if array.dtype == bool else array != 0
    array = array if operand.wanted else jnp.logical_not(array)
    return jnp.any(array, -1) if operand.over else array


def _extras(call: Plan, arrays: Sequence[Any], leading: Sequence[tuple[Axis, ...]]) -> dict[str, Any]:
    roles = call.roles
    matrix = (*leading, roles.heads, roles.rows, roles.keys)

    def on_scores(operand: Operand) -> Any:
        return arrange(arrays[operand.index], operand.dims, matrix)

    def truth(operand: Operand) -> Any:
        return _truth(arrays, operand, matrix)

    extras: dict[str, Any] = {}
    for operand in call.biases:
        bias = on_scores(operand)
        bias = bias if operand.factor == 1.0 else bias * jnp.asarray(operand.factor, bias.dtype)
        extras["bias"] = bias if "bias" not in extras else extras["bias"] + bias
    conjunction = [truth(operand) for operand in call.masks]
    conjunction += [on_scores(left) == on_scores(right) for left, right in call.equal]
    for mask in sorted(conjunction, key=lambda mask: mask.size):
        extras["mask"] = mask if "mask" not in extras else extras["mask"] & mask
    if call.segments is not None:
        for name, operand, axes in zip(
            ("query_segment_ids", "key_value_segment_ids"), call.segments, (roles.rows, roles.keys)
        ):
            extras[name] = arrange(arrays[operand.index], operand.dims, (*leading, axes)).astype(jnp.int32)
    for operand in call.keeps:
        keep = truth(operand)
        extras["keep"] = keep if "keep" not in extras else extras["keep"] & keep
    return extras


# ---------------------------------------------------------------- planning


def plan(facts: Facts, root: View, found: Scores, probabilities: Probabilities, value: View, splits: Splits) -> Plan:
    """Assign roles and operands. Raises NoMatch where the kernel cannot express it."""
    masks, keeps, zero_rows = _all_masks(facts, found, probabilities)
    masks, biases = _separate(masks, found, probabilities)
    combined = list(dict.fromkeys(condition for mask in masks for condition in mask.conditions))
    if any(isinstance(condition, Never) for condition in combined):
        raise NoMatch("the mask hides every key", near=True)

    def refined(view: View) -> View:
        return View(view.value, refine(view.dims, splits))

    k = probabilities.softmax.axis
    query, key, value, root = (refined(view) for view in (found.query, found.key, value, root))
    bands = [condition for condition in combined if isinstance(condition, Band)]
    segments = [condition for condition in combined if isinstance(condition, Segments)]
    roles = _roles(query, key, value, k, found.features, bands, segments)
    call = Plan(root, roles)
    inputs: list[Value] = []

    def take(view: View, wanted: bool = True, factor: float = 1.0, over: tuple[Axis, ...] = ()) -> Operand:
        view = refined(view)
        if view.value not in inputs:
            inputs.append(view.value)
        return Operand(inputs.index(view.value), view.dims, wanted, factor, over)

    call.query, call.key, call.value = take(query), take(key), take(value)
    call.row_scales = tuple(take(view) for view in found.row_scales)
    dtype = query.value.dtype
    call.biases = tuple(take(_at(view, dtype), factor=factor) for view, factor in (*found.biases, *biases))
    masked, of_rows = _with_row_masks(combined, roles, refined)
    call.masks = tuple(take(c.view, c.wanted, over=over) for c, over in masked)
    call.row_masks = tuple(take(c.view, c.wanted, over=over) for c, over in of_rows)
    call.keeps = tuple(take(view, wanted) for view, wanted in keeps)
    for pair in segments:
        left, right = (pair.left, pair.right) if k in pair.right.axes else (pair.right, pair.left)
        operands = take(left), take(right)
        if call.segments is None and _are_segment_ids(roles, refined(left), refined(right)):
            call.segments = operands
        else:
            call.equal = (*call.equal, operands)
    band = _band(bands, roles, k)
    call.options = {
        "scale": found.scale,
        "soft_cap": found.soft_cap,
        "band": band,
        "keep_scale": probabilities.keep_scale if call.keeps else 1.0,
        "fill": _fill(masks, band, roles, combined, probabilities, zero_rows) or "zeros",
        "layout": _layout(roles, query, key, value),
        "prefix": _only_lengths(masked, call, band, refined),
    }
    call.scales = tuple(take(view) for view in probabilities.scales)
    call.number = 1.0 if call.keeps else probabilities.keep_scale
    call.inputs = tuple(inputs)
    return call


def _at(view: View, dtype: Any) -> View:
    """`view` before it was widened from `dtype`, if it was: it is added in float32 anyway."""
    bare = climb(view, widens)
    return bare if bare.value.dtype == dtype else view


def _with_row_masks(
    combined: Sequence[Condition], roles: Roles, refined: Callable[[View], View]
) -> tuple[list[tuple[Array, tuple[Axis, ...]]], list[tuple[Array, tuple[Axis, ...]]]]:
    """(masks of the scores, masks that hide whole rows), each true where any element along the given axes is.

    They are apart only on CUDA: the CPU's kernel takes what a row and a key make together, cuDNN takes key lengths.
    """
    masked: list[tuple[Array, tuple[Axis, ...]]] = []
    rows: list[tuple[Array, tuple[Axis, ...]]] = []
    for condition in combined:
        if not isinstance(condition, Array):
            continue
        axes = set(refined(condition.view).axes)
        if foreseen() != "cuda":
            masked.append((condition, ()))
        elif not axes & set(roles.keys):
            rows.append((condition, ()))
        elif _is_product(condition, axes, roles):
            # A row and a key that are in it with anything are in it together, if the band lets them.
            masked.append((condition, roles.rows))
            rows.append((condition, roles.keys))
        else:
            masked.append((condition, ()))
    return masked, rows


def _is_product(mask: Array, axes: set[Axis], roles: Roles) -> bool:
    """Whether it is a mask of rows and one of key lengths, under bands."""
    ends = [factor for factor in mask.factors if set(roles.keys) & set(factor.view.axes)]
    return (
        bool(mask.factors)
        and all((end.prefix,) == roles.keys and set(end.view.axes) <= {*roles.leading, *roles.keys} for end in ends)
        and axes <= {*roles.leading, *roles.rows, *roles.keys}
    )


def _only_lengths(
    masked: Sequence[tuple[Array, tuple[Axis, ...]]],
    call: Plan,
    band: tuple[int | None, int | None],
    refined: Callable[[View], View],
) -> bool:
    """Whether all that the masks say is how many keys each sequence has; asked for CUDA."""
    if foreseen() != "cuda" or not masked or call.equal:
        return False
    # A window can hide the first keys from the rows that are left.
    split = all(band[0] is None for _, over in masked if over)
    axes = {*call.roles.leading, *call.roles.keys}
    whole = ((mask, set(refined(mask.view).axes)) for mask, over in masked if not over)
    return split and all((mask.prefix,) == call.roles.keys and own <= axes for mask, own in whole)


def _all_masks(
    facts: Facts, found: Scores, probabilities: Probabilities
) -> tuple[list[Mask], list[tuple[View, bool]], bool]:
    """(masks on the scores, keep masks of dropout, whether hidden rows are zeroed afterwards)."""
    masks = list(found.masks)
    for view, wanted in probabilities.softmax.masks:
        extra = conditions(facts, view, wanted)
        if not any(mask.conditions == extra for mask in masks):
            masks.append(Mask(extra, -math.inf, added=False))
    keeps: list[tuple[View, bool]] = []
    zero_rows = False
    for view, wanted in probabilities.keeps:
        after = conditions(facts, view, wanted)
        if any(mask.conditions == after for mask in masks):
            zero_rows = True
        elif after:
            keeps.append((view, wanted))
    return masks, keeps, zero_rows


def _separate(
    masks: list[Mask], found: Scores, probabilities: Probabilities
) -> tuple[list[Mask], list[tuple[View, float]]]:
    """The masks whose conditions can be put together, and those that stay additive arrays to be exact."""
    if all(_only_bands(mask) for mask in masks):
        return masks, []
    added = [mask for mask in masks if mask.added]
    chosen = [mask for mask in masks if not mask.added]
    if len({mask.fill for mask in chosen}) > 1:
        raise NoMatch("two masks of different fill values can hide a row together", near=True)
    if len(added) == 1 and (added_only(added[0]) or chosen):
        fills = [mask.fill for mask in chosen]
        if added[0].bias is not None and all(fill <= _DOMINATES * added[0].fill for fill in fills):
            return chosen, [(added[0].bias, added[0].factor)]
    if len(masks) > 1 and added:
        raise NoMatch("two masks that are added to the scores can hide a row together", near=True)
    return masks, []


def _only_bands(mask: Mask) -> bool:
    return all(isinstance(condition, Band) for condition in mask.conditions)


def _roles(
    query: View,
    key: View,
    value: View,
    k: Axis,
    features: Sequence[Axis],
    bands: Sequence[Band],
    segments: Sequence[Segments],
) -> Roles:
    if k in query.axes or k not in key.axes or k not in value.axes:
        raise NoMatch("the keys are not one dimension of key and value", near=True)
    of_query = [axis for axis in query.axes if axis not in features]
    of_key = [axis for axis in key.axes if axis not in features and axis is not k]
    value_features = tuple(a for a in value.axes if a is not k and a not in of_query and a not in of_key)
    of_value = [axis for axis in value.axes if axis is not k and axis not in value_features]
    shared = [axis for axis in of_query if axis in of_key or axis in of_value]
    shared += [axis for axis in of_key if axis not in shared]
    rows = [axis for axis in of_query if axis not in shared]
    row = _row_axis(rows, k, bands, segments)
    order = [axis for axis in query.axes if axis in shared or axis is row]
    place = order.index(row) if row is not None else len(order)
    groups = [axis for axis in order[place + 1 :]] or order[max(place - 1, 0) : place]
    if any(axis not in of_key or axis not in of_value for axis in groups):
        groups = [axis for axis in groups if axis in of_key and axis in of_value]
    return Roles(
        leading=tuple(axis for axis in shared if axis not in groups),
        groups=tuple(groups),
        repeats=tuple(axis for axis in rows if axis is not row),
        rows=() if row is None else (row,),
        keys=(k,),
        features=tuple(features),
        value_features=value_features,
    )


def _row_axis(rows: Sequence[Axis], k: Axis, bands: Sequence[Band], segments: Sequence[Segments]) -> Axis | None:
    named = {axis for band in bands for axis in (band.row, band.column) if axis is not k}
    if len(named) > 1 or not named <= set(rows) or any(k not in (band.row, band.column) for band in bands):
        raise NoMatch("the mask compares positions of other dimensions than rows and keys", near=True)
    if named:
        return named.pop()
    for pair in segments:
        compared = [axis for axis in (*pair.left.axes, *pair.right.axes) if axis in rows]
        if compared:
            return compared[-1]
    return max(reversed(rows), key=lambda axis: axis.size, default=None)


def _are_segment_ids(roles: Roles, left: View, right: View) -> bool:
    return (
        set(left.axes) <= {*roles.leading, *roles.rows}
        and set(right.axes) <= {*roles.leading, *roles.keys}
        and set(roles.rows) <= set(left.axes)
    )


def _band(bands: Sequence[Band], roles: Roles, k: Axis) -> tuple[int | None, int | None]:
    """All bands together, with None for a side that hides nothing."""
    rows, keys = _size(roles.rows), k.size
    low, high = -(rows - 1), keys - 1
    for band in bands:
        limits = (band.low, band.high)
        if band.column is not k:
            limits = (None if band.high is None else -band.high, None if band.low is None else -band.low)
        low = low if limits[0] is None else max(low, limits[0])
        high = high if limits[1] is None else min(high, limits[1])
    return (None if low <= -(rows - 1) else low, None if high >= keys - 1 else high)


def _fill(
    masks: Sequence[Mask],
    band: tuple[int | None, int | None],
    roles: Roles,
    combined: Sequence[Condition],
    probabilities: Probabilities,
    zero_rows: bool,
) -> Fill:
    """What stock JAX makes of a row whose keys are all hidden."""
    if zero_rows or (all(isinstance(c, Band) for c in combined) and _every_row_sees(band, roles)):
        return None
    found = probabilities.softmax
    fills = {mask.fill for mask in masks}
    if len(fills) > 1:
        raise NoMatch("two masks of different fill values can hide a row together", near=True)
    if -math.inf in fills:
        return None if found.epsilon and found.finite_maximum else "nan"
    if found.empty == "unknown":
        raise NoMatch("a row whose keys are all masked is not a mean of the values here", near=True)
    return "uniform" if found.empty == "uniform" else "nan"


def _every_row_sees(band: tuple[int | None, int | None], roles: Roles) -> bool:
    low, high = band
    last, keys = _size(roles.rows) - 1, roles.keys[0].size
    for row in (0, last):
        first_key = max(0, row + low) if low is not None else 0
        last_key = min(keys - 1, row + high) if high is not None else keys - 1
        if first_key > last_key:
            return False
    return True


def _layout(roles: Roles, query: View, key: View, value: View) -> tuple[str, str, str, str]:
    def natural(view: View, sequence: Sequence[Axis], heads: Sequence[Axis]) -> str:
        axes = list(view.axes)
        sequence = [axis for axis in sequence if axis in axes]
        heads = [axis for axis in heads if axis in axes]
        if not sequence or not heads:
            return "btnh" if heads else "bnth"
        return "btnh" if axes.index(sequence[0]) < axes.index(heads[0]) else "bnth"

    of_query = natural(query, roles.rows, roles.heads)
    return (of_query, natural(key, roles.keys, roles.groups), natural(value, roles.keys, roles.groups), of_query)
