"""What each value of a loss is to a part of the batch: found by tracing the loss at two batch sizes.

Where the two traces differ in a shape is the batch axis. From there each value is one of five kinds, and a loss can be
pipelined where it is a sum over examples: the gradients of the microbatches then add up to that of the batch, exactly
as in plain JAX but for the order of summation.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _jax_compat as compat
from ..rewrite import trace
from ..rewrite.trace import Graph, Node, Value
from . import rows
from .refusal import Refusal
from .stage import is_float


class Kind(enum.IntEnum):
    """What a value is to a microbatch.

    DATA does not depend on the parameters: it is computed once, for the whole batch, and sliced. PARAMETER depends on
    no example. ROW has one row for each example. SUM adds up over microbatches. WHOLE needs the batch as a whole.
    """

    DATA = 0
    PARAMETER = 1
    ROW = 2
    SUM = 3
    WHOLE = 4


@dataclasses.dataclass(frozen=True)
class Type:
    """`axis`: where the batch is, None for no axis. `reason` and `where`: of a WHOLE value, why and the user's line."""

    kind: Kind
    axis: int | None = None
    reason: str = ""
    where: str = ""


@dataclasses.dataclass(eq=False)
class Typing:
    """A loss on a microbatch beside the loss on the batch.

    Attributes:
      full, micro: the two graphs; equal but for shapes and constants.
      pair: the value of `full` that a value of `micro` is a part of.
      types: of the values of `micro`.
      count: microbatches in the batch.
      shared: nodes that add something that is no sum to a sum: which operands count once in M microbatches.
      numbered: gathers that pick each example of the batch by its number: the column of the indices that does.
    """

    full: Graph
    micro: Graph
    count: int
    pair: dict[Value, Value]
    types: dict[Value, Type]
    shared: dict[Node, tuple[bool, ...]]
    numbered: dict[Node, int]


_LINEAR = frozenset(
    ("neg", "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "transpose", "copy", "copy_p", "reduce_sum",
     "cumsum", "slice", "real", "imag", "conj", "name", "sharding_constraint", "reshard")
)  # fmt: skip
_GENERATORS = frozenset(("random_bits", "iota", "threefry2x32", "random_gamma"))
# Functions called with exactly the operands of the node.
_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call")
_CUSTOM = ("custom_jvp_call", "custom_vjp_call")
_LARGEST_CONSTANT = 1 << 22


def infer(full: Graph, micro: Graph, count: int) -> Typing:
    """Type the values of a loss, traced on the batch and on one of its `count` parts; its inputs are the parameters.

    Raises:
      Refusal: the program depends on the size of the batch in more than its shapes.
    """
    typing = Typing(full, micro, count, {}, {}, {}, {})
    _pair(typing, full, micro)
    for value in micro.inputs:
        if _axis(typing, value) is not None:
            raise Refusal("what is differentiated has a batch axis", "Differentiate in the parameters alone.")
        typing.types[value] = Type(Kind.PARAMETER)
    _Inference(typing).run(full, micro)
    return typing


def _pair(typing: Typing, full: Graph, micro: Graph) -> None:
    if [node.primitive for node in full.nodes] != [node.primitive for node in micro.nodes]:
        raise Refusal(
            "the loss is another program at another batch size",
            "Let no Python branch or loop depend on the number of examples.",
        )
    pairs = [*zip(micro.inputs, full.inputs, strict=True), *zip(micro.captures, full.captures, strict=True)]
    for ours, theirs in zip(micro.nodes, full.nodes):
        pairs += [*zip(ours.inputs, theirs.inputs, strict=True), *zip(ours.outputs, theirs.outputs, strict=True)]
    pairs += zip(micro.outputs, full.outputs, strict=True)
    for value, whole in pairs:
        typing.pair.setdefault(value, whole)


def _axis(typing: Typing, value: Value) -> int | None:
    ours, theirs = getattr(value.aval, "shape", ()), getattr(typing.pair[value].aval, "shape", ())
    differing = [axis for axis, (a, b) in enumerate(zip(ours, theirs)) if a != b]
    if len(ours) != len(theirs) or len(differing) > 1:
        where = compat.user_line(value.node.eqn) if value.node is not None else ""
        raise Refusal(
            f"an array of the loss has the batch in more than one axis ({theirs} for the batch, {ours} for a part)",
            "Losses that compare examples with each other (contrastive losses) need the whole batch at once.",
            where,
        )
    return differing[0] if differing else None


class _Inference:
    """Goes over a graph in order.

    `nested`: it is a function inside an operation, where data is not computed ahead. `derivative`: it is a derivative,
    which nobody differentiates.
    """

    def __init__(self, typing: Typing, nested: bool = False, derivative: bool = False) -> None:
        self.typing = typing
        self.nested = nested
        self.derivative = derivative

    def run(self, full: Graph, micro: Graph) -> None:
        for value in micro.captures:
            self.typing.types.setdefault(value, Type(Kind.DATA, _axis(self.typing, value)))
        for node, whole in zip(micro.nodes, full.nodes):
            for value, found in zip(node.outputs, self._outputs(node, whole), strict=True):
                self.typing.types[value] = found
        for value in micro.outputs:
            self.of(value)

    def of(self, value: Value) -> Type:
        types = self.typing.types
        if value not in types:  # a literal, or a constant of a called function
            types[value] = Type(Kind.DATA, _axis(self.typing, value))
            if self.nested and not _same_constant(value, self.typing.pair[value]):
                types[value] = Type(
                    Kind.WHOLE, None, "a function inside it has a constant that depends on the batch size"
                )
        return types[value]

    def _outputs(self, node: Node, full: Node) -> list[Type]:
        operands = [self.of(value) for value in node.inputs]
        for operand in operands:
            if operand.kind is Kind.WHOLE:
                return [operand] * len(node.outputs)
        axes = [_axis(self.typing, value) for value in node.outputs]
        if all(operand.kind is Kind.DATA for operand in operands) and not self.nested:
            return [Type(Kind.DATA, axis) for axis in axes]
        try:
            self._check_parts(node, operands)
            return self._kinds(node, full, operands, axes)
        except _Whole as whole:
            return [Type(Kind.WHOLE, axis, whole.reason, whole.where or compat.user_line(node.eqn)) for axis in axes]

    def _check_parts(self, node: Node, operands: list[Type]) -> None:
        """What was computed for the whole batch, such as differences of neighbours, may have no rows to part."""
        for value, operand in zip(node.inputs, operands):
            if operand.kind is Kind.DATA and operand.axis is not None:
                part, rows = value.shape[operand.axis], self.typing.pair[value].shape[operand.axis]
                if part * self.typing.count != rows:
                    raise _Whole(f"{rows} rows, made of the batch, are not those of {self.typing.count} microbatches")

    def _kinds(self, node: Node, full: Node, operands: list[Type], axes: list[int | None]) -> list[Type]:
        functions = _functions(self, node, full, operands)
        if functions is not None:
            return functions
        if node.primitive == "optimization_barrier":
            return _barrier(operands)
        if self.nested and node.primitive in _GENERATORS and any(axis is not None for axis in axes):
            raise _Whole(f"{node.primitive} of the batch's shape inside a loop or a called function")
        if any(operand.kind is Kind.SUM for operand in operands):
            return [self._of_sums(node, operands, axis) for axis in axes]
        highest = max((operand.kind for operand in operands), default=Kind.DATA)
        if all(operand.axis is None for operand in operands):
            return [Type(highest if axis is None else max(highest, Kind.ROW), axis) for axis in axes]
        return [self._of_rows(node, full, operands, axis, highest) for axis in axes]

    def _of_rows(self, node: Node, full: Node, operands: list[Type], axis: int | None, highest: Kind) -> Type:
        verdict = rows.rule(node, full, [operand.axis for operand in operands], axis)
        if verdict == rows.ROWS:
            return Type(highest if highest is Kind.DATA else Kind.ROW, axis)
        if verdict == rows.SUM and axis is None:
            return Type(Kind.SUM)
        column = _numbered_column(self.typing, node, operands) if node.primitive == "gather" else None
        if column is None or self.nested:
            raise _Whole(verdict)
        self.typing.numbered[node] = column
        return Type(Kind.ROW, axis)

    def _of_sums(self, node: Node, operands: list[Type], axis: int | None) -> Type:
        """An operation on sums over examples: linear ones give a sum again."""
        sums = [operand.kind is Kind.SUM for operand in operands]
        rest = [operand for operand in operands if operand.kind is not Kind.SUM]
        if axis is not None or any(operand.axis is not None or operand.kind is Kind.ROW for operand in rest):
            raise _Whole(f"a statistic of the batch goes into {node.primitive} with values of single examples")
        name = node.primitive
        if sums[0] and _is_linear(node):
            return Type(Kind.SUM)
        if name in ("add", "sub", "add_any"):
            if not all(sums):
                if self.nested:
                    raise _Whole("a term that is no sum over examples is added inside a loop or a called function")
                self.typing.shared[node] = tuple(not is_sum for is_sum in sums)
            return Type(Kind.SUM)
        if name in ("mul", "dot_general") and sum(sums) == 1:
            return Type(Kind.SUM)
        if name == "div" and sums == [True, False] and is_float(node.outputs[0]):
            return Type(Kind.SUM)
        if name == "select_n" and not sums[0] and all(sums[1:]):
            return Type(Kind.SUM)
        raise _Whole(f"{name} of a sum over the batch is not a sum over examples")


class _Whole(Exception):
    """An operation needs the whole batch."""

    def __init__(self, reason: str, where: str = "") -> None:
        self.reason, self.where = reason, where


# ---------------------------------------------------------------- functions inside operations


def _functions(outer: _Inference, node: Node, full: Node, operands: list[Type]) -> list[Type] | None:
    """The types of the results of an operation that runs functions, None for other operations."""
    if node.primitive in _CALLS:
        if node.primitive in _CUSTOM and not outer.derivative:
            _check_derivative(outer, node, full, operands)
        name = next(key for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in node.params)
        return _inside(outer, node.params[name], full.params[name], operands)
    if node.primitive == "scan":
        return _scan(outer, node, full, operands)
    if node.primitive == "cond":
        return _cond(outer, node, full, operands)
    if node.primitive == "while":
        raise _Whole("a while loop runs for as long as the values of the batch say")
    return None


def _inside(outer: _Inference, micro: Any, full: Any, operands: Sequence[Type], derivative: bool = False) -> list[Type]:
    typing = outer.typing
    theirs, ours = trace.build(full), trace.build(micro)
    _pair(typing, theirs, ours)
    typing.types.update(zip(ours.inputs, operands, strict=True))
    inner = _Inference(typing, nested=True, derivative=outer.derivative or derivative)
    inner.run(theirs, ours)
    found = [inner.of(value) for value in ours.outputs]
    for result in found:
        if result.kind is Kind.WHOLE:
            raise _Whole(result.reason, result.where)
    return found


def _check_derivative(outer: _Inference, node: Node, full: Node, operands: list[Type]) -> None:
    """A derivative that somebody wrote by hand has to treat examples one by one too."""
    ours, theirs = _derivative(node), _derivative(full)
    cotangents = [Type(Kind.ROW if _axis(outer.typing, v) is not None else Kind.DATA, _axis(outer.typing, v))
                  for v in node.outputs if is_float(v)]  # fmt: skip
    found = _inside(outer, ours, theirs, [*operands, *cotangents], derivative=True)
    differentiated = [operand for operand, value in zip(operands, node.inputs) if is_float(value)]
    for gradient, operand in zip(found, differentiated, strict=True):
        if gradient.axis != operand.axis or (operand.axis is None and gradient.kind is Kind.ROW):
            raise _Whole("a custom derivative moves the batch axis")


def _derivative(node: Node) -> Any:
    """The jaxpr of the gradients of a node, a function of its operands and of the cotangents of its results."""
    count = len(node.inputs)
    floats = [number for number, value in enumerate(node.inputs) if is_float(value)]

    def gradients(*arrays: Any) -> Any:
        operands, cotangents = list(arrays[:count]), list(arrays[count:])

        def call(*differentiated: Any) -> list[Any]:
            filled = list(operands)
            for number, array in zip(floats, differentiated):
                filled[number] = array
            results = compat.bind(node.eqn, filled, node.params)
            return [result for result, value in zip(results, node.outputs) if is_float(value)]

        _, pull = jax.vjp(call, *(operands[number] for number in floats))
        return list(pull(cotangents))

    cotangents = [value.aval for value in node.outputs if is_float(value)]
    return compat.trace(gradients, [*(value.aval for value in node.inputs), *cotangents])


def _cond(outer: _Inference, node: Node, full: Node, operands: list[Type]) -> list[Type]:
    if operands[0].axis is not None or operands[0].kind > Kind.PARAMETER:
        raise _Whole("a branch is chosen by values of the batch")
    branches = node.params["branches"]
    found = [_inside(outer, *pair, operands[1:]) for pair in zip(branches, full.params["branches"], strict=True)]
    for place, types in enumerate(zip(*found)):
        others = [branch for branch, result in zip(branches, types) if result.kind is not Kind.SUM]
        if len(others) < len(types) and not all(_is_zero(trace.build(other).outputs[place]) for other in others):
            raise _Whole("a branch gives a sum over the batch, another one something else")
    return [_join(types) for types in zip(*found)]


def _scan(outer: _Inference, node: Node, full: Node, operands: list[Type]) -> list[Type]:
    constants, carry = compat.scan_counts(node.params)
    start = constants + carry
    if any(operand.axis == 0 for operand in operands[start:]) or node.params["length"] != full.params["length"]:
        raise _Whole("a scan goes over the examples of the batch")
    slices = [_shifted(operand, -1) for operand in operands[start:]]
    carried = list(operands[constants:start])
    while True:
        found = _inside(outer, node.params["jaxpr"], full.params["jaxpr"], [*operands[:constants], *carried, *slices])
        joined = [_join(pair) for pair in zip(carried, found[:carry])]
        if joined == carried:
            break
        for value, before, after in zip(node.inputs[constants:start], operands[constants:start], joined):
            if after.kind is Kind.SUM and before.kind is not Kind.SUM and not _is_zero(value):
                raise _Whole("a scan adds up over the batch from a start that is not zero")
        carried = joined
    return [*carried, *(_shifted(result, 1) for result in found[carry:])]


def _shifted(operand: Type, by: int) -> Type:
    return operand if operand.axis is None else dataclasses.replace(operand, axis=operand.axis + by)


def _join(types: Sequence[Type]) -> Type:
    axes = {found.axis for found in types if found.axis is not None}
    highest = max(found.kind for found in types)
    if len(axes) > 1 or (axes and highest is Kind.SUM):
        raise _Whole("a loop or branch moves the batch axis")
    if len({found.kind is Kind.SUM for found in types}) > 1 and any(found.kind is Kind.PARAMETER for found in types):
        raise _Whole("a sum over the batch in one place is a parameter in another")
    return Type(highest, next(iter(axes), None))


# ---------------------------------------------------------------- sums


def _barrier(operands: list[Type]) -> list[Type]:
    """An optimization barrier gives what it is given, once all of it is there."""
    highest = max(found.kind for found in operands)
    if highest > Kind.PARAMETER and any(found.kind is not highest for found in operands):
        raise _Whole("optimization_barrier ties values of single examples to others")
    return [dataclasses.replace(found, kind=highest) for found in operands]


def _is_linear(node: Node) -> bool:
    """Whether a sum of results is the result for the sum of first operands."""
    if node.primitive == "convert_element_type":
        # A sum rounded to an integer, or compared with 0, is not the sum of its parts so treated.
        integers = all(jnp.issubdtype(value.dtype, jnp.integer) for value in (node.inputs[0], node.outputs[0]))
        return integers or jnp.issubdtype(node.outputs[0].dtype, jnp.inexact)
    if node.primitive == "pad":
        return _is_zero(node.inputs[1])
    return node.primitive in _LINEAR


# ---------------------------------------------------------------- constants


def _same_constant(value: Value, whole: Value) -> bool:
    if value.const is None or value.const is whole.const:
        return True
    ours, theirs = np.asarray(value.const), np.asarray(whole.const)
    return ours.shape == theirs.shape and bool(np.array_equal(ours, theirs, equal_nan=ours.dtype.kind == "f"))


def _is_zero(value: Value) -> bool:
    found = constant(value)
    return found is not None and not np.any(found)


def constant(value: Value) -> Any:
    """The array that `value` always is, None where it depends on an argument or is too large to look at."""
    if value.const is not None:
        return value.const
    size = int(np.prod(getattr(value.aval, "shape", ()) or (1,)))
    if value.node is None or value.node.eqn.effects or size > _LARGEST_CONSTANT:
        return None
    operands = [constant(operand) for operand in value.node.inputs]
    if any(operand is None for operand in operands):
        return None
    with jax.ensure_compile_time_eval():
        results = compat.bind(value.node.eqn, operands, value.node.params)
    return results[value.node.outputs.index(value)]


def _numbered_column(typing: Typing, node: Node, operands: list[Type]) -> int | None:
    """The column of a gather's indices that is 0, 1, 2, … along the batch and picks from its batch axis."""
    axis = operands[0].axis
    numbers = node.params["dimension_numbers"]
    indices = node.inputs[1]
    if axis is None or operands[1].axis is None or axis not in numbers.start_index_map:
        return None
    if node.params["slice_sizes"][axis] != 1 or operands[1].kind is not Kind.DATA:
        return None
    column = list(numbers.start_index_map).index(axis)
    for value in (indices, typing.pair[indices]):
        found = _column(value, column)
        batch = value.shape[operands[1].axis]
        shape = [batch if d == operands[1].axis else 1 for d in range(len(value.shape) - 1)]
        if found is None or not np.array_equal(found, np.broadcast_to(np.arange(batch).reshape(shape), found.shape)):
            return None
    return column


def _column(indices: Value, column: int) -> Any:
    node = indices.node
    last = len(indices.shape) - 1
    if node is not None and node.primitive == "concatenate" and node.params["dimension"] == last:
        for part in node.inputs:
            if column < part.shape[last]:
                found = constant(part)
                return None if found is None else np.asarray(found)[..., column]
            column -= part.shape[last]
    found = constant(indices)
    return None if found is None else np.asarray(found)[..., column]


# ---------------------------------------------------------------- what runs where


def refuse_unless_sum(typing: Typing, name: str) -> None:
    """
    Raises:
      Refusal: the loss, the first output, is not a sum over examples, or has side effects.
    """
    for node in typing.micro.nodes:
        if node.eqn.effects:
            raise Refusal(
                f"{name} has a side effect ({node.primitive}), which would happen for each microbatch and out of order",
                "Return what you want to see as aux, and print it outside of the loss.",
                compat.user_line(node.eqn),
            )
    found = typing.types[typing.micro.outputs[0]]
    if found.kind is Kind.WHOLE:
        raise Refusal(
            f"{name} is not a sum over examples: {found.reason}",
            "Normalise over features in place of the batch, or compute such a value once, outside of the loss.",
            found.where,
        )
    if found.kind is not Kind.SUM:
        raise Refusal(f"{name} does not add up over the examples of the batch", "Return a sum or mean over the batch.")
