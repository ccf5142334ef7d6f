"""Which operations treat the examples of a batch one by one.

Each rule is told where an operation's operands and its result have the batch axis, and says whether the result's rows
depend on the same rows of the operands alone. What is not listed here is refused: the list is all that is trusted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..rewrite.trace import Node

# The result has a row for each row of the operands; it is a sum over rows; else a reason why neither.
ROWS, SUM = "rows", "sum"
Axes = Sequence[int | None]

ELEMENTWISE = frozenset(
    ("abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "bessel_i0e",
     "bessel_i1e", "cbrt", "ceil", "clamp", "conj", "convert_element_type", "copy", "copy_p", "cos", "cosh",
     "digamma", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "imag",
     "integer_pow", "is_finite", "le", "lgamma", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne",
     "neg", "nextafter", "not", "or", "polygamma", "population_count", "pow", "real", "reduce_precision",
     "rem", "round", "rsqrt", "select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical",
     "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor", "name",
     "one_minus_square", "optimization_barrier", "sharding_constraint", "reshard", "complex", "igamma", "igammac")
)  # fmt: skip
# Operations along the last axes, batched over all others: how many axes.
_LAST_AXES = {"cholesky": 2, "triangular_solve": 2, "eigh": 2, "qr": 2, "lu": 2, "svd": 2, "householder_product": 2}


def rule(node: Node, full: Node, axes: Axes, out: int | None) -> str:
    """ROWS, SUM or the reason why `node` cannot be run on a part of the batch.

    node, full: the operation on a microbatch and on the batch. axes: the batch axis of each operand, None: it has none.
    out: that of the result.
    """
    name = node.primitive
    if name in ELEMENTWISE:
        return ROWS if all(axis in (None, out) for axis in axes) else _moved(name)
    found = _RULES.get(name)
    if found is not None:
        return found(node, full, axes, out)
    if name in _LAST_AXES:
        return (
            ROWS
            if axes[0] == out and out is not None and out < node.inputs[0].aval.ndim - _LAST_AXES[name]
            else (f"{name} works along the batch")
        )
    return f"{name} is not known to treat examples one by one"


def _moved(name: str) -> str:
    return f"{name} does not keep the batch axis"


def _expect(condition: bool, name: str) -> str:
    return ROWS if condition else _moved(name)


def _broadcast(node: Node, full: Node, axes: Axes, out: int | None) -> str:
    axis = axes[0]
    return _expect(axis is None or node.params["broadcast_dimensions"][axis] == out, "broadcast_in_dim")


def _reshape(node: Node, full: Node, axes: Axes, out: int | None) -> str:
    axis = axes[0]
    if axis is None or out is None or node.params.get("dimensions") is not None:
        return _moved("reshape")
    # Microbatches stay contiguous only where the batch is the major part of the axis that it ends up in.
    before, after = full.inputs[0].shape[:axis], full.outputs[0].shape[:out]
    return ROWS if math.prod(before) == math.prod(after) else "reshape mixes examples with another axis"


def _squeeze(node: Node, full: Node, axes: Axes, out: int | None) -> str:
    axis = axes[0]
    if axis is None:
        return _moved("squeeze")
    removed = [d % node.inputs[0].aval.ndim for d in node.params["dimensions"]]
    return _expect(axis not in removed and axis - sum(d < axis for d in removed) == out, "squeeze")


def _expand_dims(node: Node, full: Node, axes: Axes, out: int | None) -> str:
    kept = [d for d in range(node.outputs[0].aval.ndim) if d not in node.params["dimensions"]]
    axis = axes[0]
    return _expect(axis is not None and kept[axis] == out, "expand_dims")


def _transpose(node: Node, full: Node, axes: Axes, out: int | None) -> str:
    return _expect(out is not None and node.params["permutation"][out] == axes[0], "transpose")


def _reduce(node: Node, full: Node, axes: Axes, out: int | None) -> str:
    if axes[0] not in node.params["axes"]:
        return ROWS
    return SUM if node.primitive == "reduce_sum" else f"{node.primitive} over the batch"


def _reduces_one(node: Node, full: Node, axes: Axes, out: int | None) -> str:
    return f"{node.primitive} over the batch" if axes[0] in node.params["axes"] else ROWS


def _along(parameter: str) -> Callable[..., str]:
    def along(node: Node, full: Node, axes: Axes, out: int | None) -> str:
        given = node.params.get(parameter, node.inputs[0].aval.ndim - 1)
        along = [given] if isinstance(given, int) else list(given)
        touched = {d % node.inputs[0].aval.ndim for d in along}
        if any(axis in touched for axis in axes):
            return f"{node.primitive} along the batch"
        return _expect(all(axis in (None, out) for axis in axes), node.primitive)

    return along


def _pad(node: Node, full: Node, axes: Axes, out: int | None) -> str:
    axis = axes[0]
    untouched = axis is not None and tuple(node.params["padding_config"][axis]) == (0, 0, 0)
    return ROWS if untouched and axes[1] is None else "padding along the batch"


def _slice(node: Node, full: Node, axes: Axes, out: int | None) -> str:
    axis = axes[0]
    if axis is None:
        return _moved("slice")
    strides = full.params["strides"]
    whole = full.params["start_indices"][axis] == 0 and full.params["limit_indices"][axis] == full.inputs[0].shape[axis]
    return ROWS if whole and (strides is None or strides[axis] == 1) else "a slice takes a part of the batch"


def _dynamic_slice(node: Node, full: Node, axes: Axes, out: int | None) -> str:
    axis = axes[0]
    whole = axis is not None and full.params["slice_sizes"][axis] == full.inputs[0].shape[axis]
    return ROWS if whole and not any(a is not None for a in axes[1:]) else "dynamic_slice takes a part of the batch"


def _dynamic_update_slice(node: Node, full: Node, axes: Axes, out: int | None) -> str:
    axis = axes[0]
    whole = axis is not None and axes[1] == axis and full.inputs[1].shape[axis] == full.inputs[0].shape[axis]
    return ROWS if whole and not any(a is not None for a in axes[2:]) else "dynamic_update_slice at a part of the batch"


def _dot_general(node: Node, full: Node, axes: Axes, out: int | None) -> str:
    contracted, batched = node.params["dimension_numbers"]
    for (lhs, rhs), meaning in ((contracted, SUM), (batched, ROWS)):
        if axes[0] in lhs or axes[1] in rhs:
            aligned = axes[0] in lhs and axes[1] in rhs and list(lhs).index(axes[0]) == list(rhs).index(axes[1])
            return meaning if aligned else "a product pairs every example with others"
    return ROWS if None in axes else "a product pairs every example with every other"


def _convolution(node: Node, full: Node, axes: Axes, out: int | None) -> str:
    numbers = node.params["dimension_numbers"]
    ours = axes[0] == numbers.lhs_spec[0] and axes[1] is None and node.params["batch_group_count"] == 1
    return ROWS if ours and out == numbers.out_spec[0] else "a convolution runs along the batch"


def _window(node: Node, full: Node, axes: Axes, out: int | None) -> str:
    axis = axes[0]
    if axis is None or any(a not in (None, axis) for a in axes):
        return _moved(node.primitive)
    params = node.params
    dilations = [params.get(name) for name in ("base_dilation", "window_dilation")]
    plain = params["window_dimensions"][axis] == params["window_strides"][axis] == 1
    plain = plain and tuple(params["padding"][axis]) == (0, 0) and all(d is None or d[axis] == 1 for d in dilations)
    return ROWS if plain else f"{node.primitive} runs along the batch"


def _gather(node: Node, full: Node, axes: Axes, out: int | None) -> str:
    operand, indices = axes
    numbers = node.params["dimension_numbers"]
    if indices is not None and indices == node.inputs[1].aval.ndim - 1:
        return "gather's indices run over the batch"
    if operand is None:
        return ROWS
    if operand in numbers.operand_batching_dims:
        place = numbers.operand_batching_dims.index(operand)
        return _expect(numbers.start_indices_batching_dims[place] == indices, "gather")
    if indices is None and full.params["slice_sizes"][operand] == full.inputs[0].shape[operand]:
        return ROWS
    return "gather picks examples by their number"


def _scatter(node: Node, full: Node, axes: Axes, out: int | None) -> str:
    operand, indices, updates = axes
    numbers = node.params["dimension_numbers"]
    if operand is None or updates is None:
        return f"{node.primitive} adds up over the batch"
    if operand in numbers.operand_batching_dims:
        place = numbers.operand_batching_dims.index(operand)
        return _expect(numbers.scatter_indices_batching_dims[place] == indices, node.primitive)
    outside = operand not in (*numbers.inserted_window_dims, *numbers.scatter_dims_to_operand_dims)
    return ROWS if outside and indices is None else f"{node.primitive} writes examples by their number"


def _fft(node: Node, full: Node, axes: Axes, out: int | None) -> str:
    last = node.inputs[0].aval.ndim - len(node.params["fft_lengths"])
    return ROWS if axes[0] is not None and axes[0] < last else "fft along the batch"


_RULES: dict[str, Callable[[Node, Node, Axes, int | None], str]] = {
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "expand_dims": _expand_dims,
    "transpose": _transpose,
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"), _reduce),
    **dict.fromkeys(("argmax", "argmin"), _reduces_one),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "split"), _along("axis")),
    **dict.fromkeys(("sort", "concatenate"), _along("dimension")),
    "rev": _along("dimensions"),
    "top_k": _along("axis"),
    "pad": _pad,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max", "reduce_window_min", "reduce_window"), _window),
    "gather": _gather,
    **dict.fromkeys(("scatter", "scatter_add", "scatter-add", "scatter_mul", "scatter_min", "scatter_max"), _scatter),
    "fft": _fft,
}
