"""Linear layer + softmax cross-entropy without the [rows, classes] logits.

Rows are taken a chunk at a time: XLA's own matrix product makes a chunk's logits, the cross-entropy kernel reads them,
and they are gone, so that memory falls from rows x classes to chunk x classes. Under differentiation the chunk's
gradients are taken while its logits are there, as if every row's cotangent were 1 (Liger kernels, Hsu et al., 2024):
a cotangent that is the same for every row, as of a mean, only scales them, and costs no more products than stock JAX.
Any other cotangent makes the logits again (Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models",
2024). On other platforms than the CPU the same program is plain JAX, with larger chunks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

from jaxext.kernels import _platform
from jaxext.kernels._cross_entropy import (
    LABELS,
    LABELS_BACKWARD_IN_PLACE,
    LABELS_WITH_GRADIENT,
    OutOfRange,
    check_choices,
    int32_labels,
)
from jaxext.kernels._op import Op, Role, derive, relaxed
from jaxext.kernels._product import matrix_product

__all__ = ["linear_cross_entropy", "linear_cross_entropy_refusal"]


class _Problem(NamedTuple):
    """One call with its rows flattened, and how to make the logits, losses and gradients of some of them."""

    x: jax.Array
    weight: jax.Array
    labels: jax.Array
    bias: jax.Array | None
    weights: jax.Array | None
    classes_first: bool
    label_smoothing: float
    out_of_range: OutOfRange
    logits_dtype: str
    on_cpu: bool

    @property
    def wide(self) -> Any:
        return jnp.promote_types(jnp.promote_types(self.x.dtype, self.weight.dtype), jnp.float32)

    @property
    def classes(self) -> int:
        return self.weight.shape[0 if self.classes_first else 1]

    @property
    def chunks(self) -> int:
        """How many chunks the rows make.

        On a CPU logits of about 32 MiB and at most an eighth of all, 128 rows or more. Elsewhere an eighth of bfloat16
        ones, else a twelfth: as few as keep temporaries below an eighth of stock's, for each chunk reads and writes all
        of the weight's gradient.
        """
        rows = self.x.shape[0]
        if self.on_cpu:
            chunk = max(128, min(-(-rows // 8), 2**23 // self.classes))
        else:
            chunk = max(256, -(-rows // (8 if self.logits_dtype == "bfloat16" else 12)))
        return -(-rows // chunk) if rows else 1

    @property
    def loss_params(self) -> dict[str, Any]:
        out = jnp.dtype(self.wide).name
        return {"label_smoothing": self.label_smoothing, "out_of_range": self.out_of_range, "out_dtype": out}

    @property
    def rounds(self) -> bool:
        return jnp.promote_types(self.x.dtype, self.weight.dtype) == jnp.bfloat16

    def logits(self, rows: jax.Array) -> jax.Array:
        made = matrix_product(rows, self.weight, b_turned=self.classes_first, rounds=self.rounds)
        made = made if self.bias is None else made + self.bias.astype(self.wide)
        return made if self.on_cpu else made.astype(self.logits_dtype)

    def losses_and_gradient(
        self, logits: jax.Array, labels: jax.Array, cotangent: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Losses, normalizers, the logits' gradient: in place on a CPU, elsewhere as the products round it anyway."""
        if not self.on_cpu:
            dtype = jnp.dtype("bfloat16" if self.rounds and self.bias is None else self.wide).name
            found = LABELS_WITH_GRADIENT(logits, labels, cotangent, gradient_dtype=dtype, **self.loss_params)
            return found[0], found[1], found[2]
        losses, normalizers = LABELS(logits, labels, **self.loss_params)
        return losses, normalizers, self.gradient(logits, labels, normalizers, cotangent)

    def gradient(self, logits: jax.Array, labels: jax.Array, normalizer: jax.Array, cotangent: jax.Array) -> jax.Array:
        operands = logits, labels, normalizer, cotangent
        return LABELS_BACKWARD_IN_PLACE(*operands, wrt=(0,), **self.loss_params)[0]

    def add_products(
        self, sums: tuple[jax.Array, jax.Array], rows: jax.Array, dlogits: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        """Adds to the gradients of weight and bias those of some rows' losses; the rows' own gradients beside."""
        dweight, dbias = sums
        if self.bias is not None:
            dbias = dbias + jnp.sum(dlogits, 0)
        first, second = (dlogits, rows) if self.classes_first else (rows, dlogits)
        dweight = matrix_product(first, second, dweight, a_turned=True, rounds=self.rounds)
        drows = matrix_product(dlogits, self.weight, b_turned=not self.classes_first, rounds=self.rounds)
        return (dweight, dbias), drows


def _problem(
    operands: Sequence[jax.Array], extras: tuple[str, ...], uniform: bool, on_cpu: bool = True, **choices: Any
) -> _Problem:
    x, weight, labels = operands[:3]
    named = dict(zip(extras, operands[3:]))
    weights = named["weights"].reshape(-1) if "weights" in named else None
    flat = x.reshape(-1, x.shape[-1])
    return _Problem(flat, weight, labels.reshape(-1), named.get("bias"), weights, on_cpu=on_cpu, **choices)


def _split(x: jax.Array, n: int) -> jax.Array:
    """[rows, ...] -> [n, rows / n, ...], every n-th row at a time: a batch split over devices stays split in each."""
    padded = jnp.pad(x, ((0, -x.shape[0] % n), *((0, 0),) * (x.ndim - 1)))
    return padded.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1)


def _join(chunks: jax.Array, rows: int) -> jax.Array:
    return chunks.swapaxes(0, 1).reshape(-1, *chunks.shape[2:])[:rows]


def _weighted(problem: _Problem, losses: jax.Array) -> jax.Array:
    if problem.weights is None:
        return losses
    if problem.weights.dtype == jnp.bool_:
        return jnp.where(problem.weights, losses, 0)
    return losses * problem.weights.astype(losses.dtype)


def _reference(*operands: jax.Array, **params: Any) -> tuple[jax.Array, ...]:
    """Losses, losses before their weights, normalizers; differentiating it makes each chunk's logits again."""
    problem = _problem(operands, **params)
    shape, rows, n = operands[2].shape, problem.x.shape[0], problem.chunks
    chunk = jax.checkpoint(lambda both: LABELS(problem.logits(both[0]), both[1], **problem.loss_params))
    losses, normalizers = jax.lax.map(chunk, (_split(problem.x, n), _split(problem.labels, n)))
    losses = _join(losses, rows)
    per_row = (v.reshape(shape) for v in (_weighted(problem, losses), losses))
    return (*per_row, _join(normalizers, rows).reshape(*shape, 2))


def _with_gradients(*operands: jax.Array, **params: Any) -> tuple[jax.Array, ...]:
    """The reference's results, and the gradients of x, weight and bias for cotangents of 1."""
    problem = _problem(operands, **params)
    shape, rows, n = operands[2].shape, problem.x.shape[0], problem.chunks

    def step(sums: tuple[jax.Array, jax.Array], chunk: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        x, labels, share = chunk
        losses, normalizers, dlogits = problem.losses_and_gradient(problem.logits(x), labels, share)
        sums, dx = problem.add_products(sums, x, dlogits)
        return sums, (losses, normalizers, dx)

    zeros = jnp.zeros(problem.weight.shape, problem.wide), jnp.zeros(problem.classes, problem.wide)
    share = _weighted(problem, jnp.ones(rows, problem.wide))
    chunks = tuple(_split(v, n) for v in (problem.x, problem.labels, share))
    sums, (losses, normalizers, dx) = jax.lax.scan(step, zeros, chunks)
    losses = _join(losses, rows)
    per_row = (v.reshape(shape) for v in (_weighted(problem, losses), losses))
    return (*per_row, _join(normalizers, rows).reshape(*shape, 2), _join(dx, rows).reshape(operands[0].shape), *sums)


def _backward(*xs: jax.Array, wrt: tuple[int, ...], **params: Any) -> tuple[jax.Array, ...]:
    """Gradients for any cotangent.

    Operands: those of the forward, unweighted losses, normalizers, [gradients for cotangents of 1], cotangents.
    """
    extras = params["extras"]
    operands, (losses, normalizers, *units) = xs[: 3 + len(extras)], xs[3 + len(extras) : -1]
    problem = _problem(operands, **params)
    rows, n, cotangent = problem.x.shape[0], problem.chunks, xs[-1].reshape(-1)
    share = _weighted(problem, cotangent)
    split = [_split(v, n) for v in (problem.x, problem.labels, normalizers.reshape(-1, 2), share)]
    same = jnp.asarray(False)
    if units and rows:
        same = jnp.all(cotangent == cotangent[0])
        units[0] = _split(units[0].reshape(problem.x.shape), n)
        sums = tuple(jnp.where(same, cotangent[0] * unit, 0) for unit in units)
    else:
        shapes = split[0].shape, problem.weight.shape, (problem.classes,)
        sums = tuple(jnp.zeros(shape, problem.wide) for shape in shapes)

    def step(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        x, labels, normalizer, g = (v[i] for v in split)
        dlogits = problem.gradient(problem.logits(x), labels, normalizer, g)
        added, dx = problem.add_products((sums[1], sums[2]), x, dlogits)
        return jax.lax.dynamic_update_index_in_dim(sums[0], dx, i, 0), *added

    # A loop of no turns, not a branch: it works in place, a branch would copy the gradients.
    dx, dweight, dbias = jax.lax.fori_loop(0, jnp.where(same, 0, n), step, sums)
    dx = _join(dx, rows).reshape(operands[0].shape)
    grads = {"x": dx, "weight": dweight, "bias": dbias, "weights": xs[-1] * losses}
    names = ("x", "weight", "labels", *extras)
    return tuple(grads[names[i]].astype(operands[i].dtype) for i in wrt)


def _roles(n_operands: int, *, extras: tuple[str, ...], **_: Any) -> tuple[Role, ...]:
    every: tuple[Role, ...] = ("full", "shared", "full", *("shared" if e == "bias" else "full" for e in extras))
    return every[:n_operands]


def _op(name: str, reference: Any) -> Op:
    """An op without a target of its own: its program is made of XLA's products and the cross-entropy kernel."""
    return Op(
        name, reference, target="cross_entropy", core_rank=1, roles=_roles,
        refuses=lambda *_, **__: "made of matrix products and the cross-entropy kernel",
    )  # fmt: skip


PLAIN = _op("linear_cross_entropy", _reference)
PLAIN_BACKWARD = _op("linear_cross_entropy_backward", None)
EAGER = _op("linear_cross_entropy_with_gradients", _with_gradients)
EAGER_BACKWARD = _op("linear_cross_entropy_with_gradients_backward", None)
_plain_linear = derive(PLAIN, PLAIN_BACKWARD, saved=(1, 2))
_eager_linear = derive(EAGER, EAGER_BACKWARD, saved=(1, 2, 3, 4, 5))


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, uniform: bool, **params: Any) -> tuple[Any, Any]:
    """Chooses where the gradients are made: beside the losses, or in the backward."""
    forward, linear = (EAGER, _eager_linear) if uniform else (PLAIN, _plain_linear)
    outs = forward(*primals, uniform=uniform, **params)
    which = tuple(i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero))
    moving = (tangents[i] for i in which)
    (dot,) = linear.bind(*primals, *outs[1:], *moving, which=which, uniform=uniform, **params)
    return outs[:3], [dot, *(ad.Zero(jax.typeof(out).to_tangent_aval()) for out in outs[1:3])]


def _batch_sums(operands: Sequence[Any], dims: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    outs = jax.vmap(lambda *xs: list(_with_gradients(*xs, **params)), in_axes=tuple(dims))(*operands)
    return outs, [0] * len(outs)


ad.primitive_jvps[PLAIN.primitive] = _jvp
batching.primitive_batchers[EAGER.primitive] = _batch_sums


def _lower_everywhere(op: Op, program: Any) -> None:
    for name in (None, "cpu"):

        def run(*operands: jax.Array, on_cpu: bool = name == "cpu", **params: Any) -> tuple[jax.Array, ...]:
            with relaxed():
                return program(*operands, on_cpu=on_cpu, **params)

        mlir.register_lowering(op.primitive, mlir.lower_fun(run, multiple_results=True), platform=name)


_lower_everywhere(PLAIN, _reference)
_lower_everywhere(EAGER, _with_gradients)
# The references of these, which derivatives of the backward use, are the plain transposes.
_lower_everywhere(PLAIN_BACKWARD, _backward)
_lower_everywhere(EAGER_BACKWARD, _backward)


def linear_cross_entropy(
    x: Any,
    weight: Any,
    labels: Any,
    bias: Any = None,
    *,
    weights: Any = None,
    classes_first: bool = False,
    label_smoothing: float = 0.0,
    out_of_range: OutOfRange = "nan",
    out_dtype: Any = None,
    logits_dtype: Any = None,
    uniform: bool = True,
) -> jax.Array:
    """Cross-entropy of softmax(x @ weight + bias) with integer labels, without materialising the logits.

    Args:
      x: [..., features], floating point.
      weight: [features, classes], or [classes, features] with `classes_first` (a tied embedding table).
      labels: [...] integer classes.
      bias: [classes] or None.
      weights: [...] or None: factors of the losses, or booleans, the losses that count (others are 0, whatever they
        were). Given here, and not applied afterwards, they leave the cotangents uniform.
      classes_first: which way round `weight` is.
      label_smoothing: share of the target spread evenly over the classes, 0..1.
      out_of_range: what a label outside the classes means, as in `softmax_cross_entropy`.
      out_dtype: dtype of the result; None: the dtype that x and weight promote to.
      logits_dtype: what logits may be rounded to on a GPU, such as the bfloat16 in which a program makes them; None:
        float32. On a CPU they are float32 anyway.
      uniform: whether the result is expected to be summed or averaged. Gradients are right either way; then a sum costs
        no more products than stock JAX and any other use twice as many. With False all uses cost a third more.

    Returns:
      [...] losses in nats; logits and losses are accumulated in float32.

    Raises:
      ValueError, TypeError: shapes that do not fit, labels not integers, a smoothing outside 0..1.
    """
    check_choices("linear_cross_entropy", label_smoothing, out_of_range)
    x, weight, labels = jnp.asarray(x), jnp.asarray(weight), jnp.asarray(labels)
    given = {k: jnp.asarray(v) for k, v in (("bias", bias), ("weights", weights)) if v is not None}
    _check(x, weight, labels, **given, classes_first=classes_first)
    out = out_dtype or jnp.promote_types(x.dtype, weight.dtype)
    wide = jnp.promote_types(jnp.promote_types(x.dtype, weight.dtype), jnp.float32)
    rounded = jnp.dtype(logits_dtype or wide).name
    return PLAIN(
        x, weight, int32_labels(labels), *given.values(), extras=tuple(given), classes_first=bool(classes_first),
        label_smoothing=float(label_smoothing), out_of_range=out_of_range, logits_dtype=rounded, uniform=bool(uniform),
    )[0].astype(out)  # fmt: skip


def _check(x: Any, weight: Any, labels: Any, bias: Any = None, weights: Any = None, *, classes_first: bool) -> None:
    op = "jaxext linear_cross_entropy"
    given = weights if weights is None or weights.dtype != jnp.bool_ else None
    for name, value in (("x", x), ("weight", weight), ("bias", bias), ("weights", given)):
        if value is not None and not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(f"{op}: argument '{name}' must be floating point, got {value.dtype}; cast it")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"{op}: argument 'labels' must be integer classes, got {labels.dtype}; for target distributions use "
            "softmax_cross_entropy(x @ weight, targets)"
        )
    if len(x.shape) < 1 or len(weight.shape) != 2:
        raise ValueError(
            f"{op}: arguments 'x' and 'weight' must have ranks >= 1 and 2, got shapes {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    features, classes = weight.shape[::-1] if classes_first else weight.shape
    if x.shape[-1] != features or classes == 0:
        layout = "[classes, features]" if classes_first else "[features, classes]"
        raise ValueError(
            f"{op}: argument 'weight' must have shape {layout} with features = {x.shape[-1]} (x's last axis) and "
            f"classes >= 1, got {tuple(weight.shape)}; `classes_first` says which way round it is"
        )
    for name, value in (("labels", labels), ("weights", weights)):
        if value is not None and value.shape != x.shape[:-1]:
            raise ValueError(
                f"{op}: argument '{name}' must have shape {tuple(x.shape[:-1])} to fit x of shape {tuple(x.shape)}, "
                f"got {tuple(value.shape)}"
            )
    if bias is not None and bias.shape != (classes,):
        raise ValueError(f"{op}: argument 'bias' must have shape ({classes},), got {tuple(bias.shape)}")


_LEAST_LOGITS = 2**21
# In float32 XLA's own dots are as good over whole logits: chunks cost 8 to 25% there, and pay from 1 GiB of them.
_FLOAT32_FACTOR = 2**7
# Counted for an H100, not measured: a chunk reads and writes all of the weight's gradient, which below these rows costs
# more than 5%; from 4 GiB of float32 logits memory is what counts.
_LEAST_ROWS_ELSEWHERE, _MANY_LOGITS = 2**15, 2**30


def linear_cross_entropy_refusal(x: Any, weight: Any, labels: Any, bias: Any = None) -> str | None:
    """None where `linear_cross_entropy` of these avals is worth its chunks, else the reason why plain JAX runs."""
    for name, aval in (("x", x), ("weight", weight), ("bias", bias)):
        if aval is not None and aval.dtype not in (jnp.float32, jnp.bfloat16):
            return f"'{name}' is {aval.dtype}; the kernel takes float32 and bfloat16"
    rows = math.prod(x.shape[:-1])
    classes = math.prod(weight.shape) // max(x.shape[-1], 1)
    if _platform.foreseen() != "cpu":
        if rows < _LEAST_ROWS_ELSEWHERE and rows * classes < _MANY_LOGITS:
            return f"{rows} rows are fewer than {_LEAST_ROWS_ELSEWHERE}; whole logits, which are small, are as fast"
        return None
    least = _LEAST_LOGITS * (_FLOAT32_FACTOR if x.dtype == jnp.float32 else 1)
    if rows * classes < least:
        return f"{rows} x {classes} {x.dtype} logits are fewer than {least}; making them whole is as fast"
    wide = jax.ShapeDtypeStruct((rows, classes), jnp.float32)
    return LABELS.refusal(wide, jax.ShapeDtypeStruct((rows,), jnp.int32), out_dtype=None)
