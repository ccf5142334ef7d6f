"""Linear layer + softmax cross-entropy without the [rows, classes] logits.

Rows are taken a chunk at a time: XLA's own matrix product makes a chunk's logits, the cross-entropy kernel reads them,
and they are gone, so that memory falls from rows x classes to chunk x classes. Under differentiation the chunk's
gradients are taken while its logits are there, as if every row's cotangent were 1 (Liger kernels, Hsu et al., 2024):
a cotangent that is the same for every row, as of a mean, only scales them, and costs no more products than stock JAX.
Any other cotangent makes the logits again (Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models",
2024).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

from jaxext.kernels._cross_entropy import LABELS, LABELS_BACKWARD, OutOfRange, check_choices, int32_labels
from jaxext.kernels._op import Op, Role, derive

__all__ = ["linear_cross_entropy", "linear_cross_entropy_refusal"]


class _Problem(NamedTuple):
    """One call: operands by name, and how to make logits and losses of some rows."""

    x: jax.Array
    weight: jax.Array
    labels: jax.Array
    bias: jax.Array | None
    classes_first: bool
    label_smoothing: float
    out_of_range: OutOfRange

    @property
    def wide(self) -> Any:
        return jnp.promote_types(jnp.promote_types(self.x.dtype, self.weight.dtype), jnp.float32)

    @property
    def loss_params(self) -> dict[str, Any]:
        return {"label_smoothing": self.label_smoothing, "out_of_range": self.out_of_range, "out_dtype": None}

    def logits(self, rows: jax.Array) -> jax.Array:
        contract = (((1,), (1 if self.classes_first else 0,)), ((), ()))
        made = jax.lax.dot_general(rows, self.weight, contract, preferred_element_type=self.wide)
        return made if self.bias is None else made + self.bias.astype(self.wide)

    def losses(self, rows: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Losses and normalizers of some rows, and their logits."""
        logits = self.logits(rows)
        return (*LABELS(logits, labels, **self.loss_params), logits)

    def gradients(
        self, rows: jax.Array, labels: jax.Array, logits: jax.Array, normalizer: jax.Array, cotangent: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Gradients of some rows' losses: of the rows, of weight and of bias, in the wide dtype."""
        (dlogits,) = LABELS_BACKWARD(logits, labels, normalizer, cotangent, wrt=(0,), **self.loss_params)
        narrow = dlogits.astype(jnp.promote_types(rows.dtype, self.weight.dtype))
        product = functools.partial(jax.lax.dot_general, preferred_element_type=self.wide)
        drows = product(narrow, self.weight, (((1,), (0 if self.classes_first else 1,)), ((), ())))
        left, right = (narrow, rows) if self.classes_first else (rows, narrow)
        return drows, product(left, right, (((0,), (0,)), ((), ()))), jnp.sum(dlogits, 0)


def _problem(operands: Sequence[jax.Array], extras: tuple[str, ...], uniform: bool, **choices: Any) -> _Problem:
    x, weight, labels = operands[:3]
    return _Problem(x.reshape(-1, x.shape[-1]), weight, labels.reshape(-1), *(operands[3:] if extras else (None,)), **choices)


def _chunk_count(rows: int) -> int:
    """Sixteen chunks keep temporaries below an eighth of the logits and their gradient; 64 rows or more feed a product."""
    return max(1, min(16, rows // 64))


def _split(x: jax.Array, n: int) -> jax.Array:
    """[rows, ...] -> [n, rows / n, ...], every n-th row at a time: a batch split over devices stays split in each."""
    padded = jnp.pad(x, ((0, -x.shape[0] % n), *((0, 0),) * (x.ndim - 1)))
    return padded.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1)


def _join(chunks: jax.Array, rows: int) -> jax.Array:
    return chunks.swapaxes(0, 1).reshape(-1, *chunks.shape[2:])[:rows]


def _reference(*operands: jax.Array, **params: Any) -> tuple[jax.Array, jax.Array]:
    """Losses and normalizers; differentiating it makes each chunk's logits again."""
    problem = _problem(operands, **params)
    shape, rows = operands[2].shape, problem.x.shape[0]
    chunk = jax.checkpoint(lambda both: problem.losses(*both)[:2])
    n = _chunk_count(rows)
    losses, normalizers = jax.lax.map(chunk, (_split(problem.x, n), _split(problem.labels, n)))
    return _join(losses, rows).reshape(shape), _join(normalizers, rows).reshape(shape)


def _with_gradients(*operands: jax.Array, **params: Any) -> tuple[jax.Array, ...]:
    """Losses and normalizers, and the gradients of x, weight and bias for cotangents of 1."""
    problem = _problem(operands, **params)
    shape, rows = operands[2].shape, problem.x.shape[0]
    n = _chunk_count(rows)

    def step(sums: tuple[jax.Array, jax.Array], chunk: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        x, labels, ones = chunk
        losses, normalizers, logits = problem.losses(x, labels)
        dx, dweight, dbias = problem.gradients(x, labels, logits, normalizers, ones)
        return (sums[0] + dweight, sums[1] + dbias), (losses, normalizers, dx)

    zeros = jnp.zeros(problem.weight.shape, problem.wide), jnp.zeros(_classes(problem), problem.wide)
    chunks = (_split(problem.x, n), _split(problem.labels, n), _split(jnp.ones(rows, problem.wide), n))
    sums, (losses, normalizers, dx) = jax.lax.scan(step, zeros, chunks)
    per_row = (_join(losses, rows).reshape(shape), _join(normalizers, rows).reshape(shape))
    return (*per_row, _join(dx, rows).reshape(operands[0].shape), *sums)


def _classes(problem: _Problem) -> int:
    return problem.weight.shape[0 if problem.classes_first else 1]


def _backward(*xs: jax.Array, wrt: tuple[int, ...], **params: Any) -> tuple[jax.Array, ...]:
    """Gradients for any cotangent: of the operands, the normalizers, [the gradients for cotangents of 1], cotangents."""
    n_operands = 3 + len(params["extras"])
    operands, (normalizers, *units), cotangents = xs[:n_operands], xs[n_operands:-1], xs[-1]
    problem = _problem(operands, **params)
    rows = problem.x.shape[0]
    n = _chunk_count(rows)
    cotangent = cotangents.reshape(-1)
    split = [_split(v, n) for v in (problem.x, problem.labels, normalizers.reshape(-1), cotangent)]
    first = cotangent[0] if rows else jnp.zeros((), problem.wide)
    same = jnp.all(cotangent == first) if units else jnp.asarray(False)
    shapes = split[0].shape, problem.weight.shape, (_classes(problem),)
    if units:
        units[0] = _split(units[0].reshape(problem.x.shape), n)
        sums = tuple(jnp.where(same, first * unit, 0) for unit in units)
    else:
        sums = tuple(jnp.zeros(shape, problem.wide) for shape in shapes)

    def step(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        x, labels, normalizer, g = (v[i] for v in split)
        dx, dweight, dbias = problem.gradients(x, labels, problem.logits(x), normalizer, g)
        return jax.lax.dynamic_update_index_in_dim(sums[0], dx, i, 0), sums[1] + dweight, sums[2] + dbias

    # A loop of no turns, not a branch: it works in place, a branch would copy the gradients.
    dx, dweight, dbias = jax.lax.fori_loop(0, jnp.where(same, 0, n), step, sums)
    grads = {0: _join(dx, rows).reshape(operands[0].shape), 1: dweight, 3: dbias}
    return tuple(grads[i].astype(operands[i].dtype) for i in wrt)


def _roles(n_operands: int, **_: Any) -> tuple[Role, ...]:
    every: tuple[Role, ...] = ("full", "shared", "full", "shared")
    return every[:n_operands]


def _op(name: str, reference: Any) -> Op:
    """An op without a target of its own: its program is made of XLA's products and the cross-entropy kernel."""
    return Op(
        name, reference, target="cross_entropy", core_rank=1, attributes=lambda **_: {}, roles=_roles,
        refuses=lambda *_, **__: "made of matrix products and the cross-entropy kernel",
    )  # fmt: skip


PLAIN = _op("linear_cross_entropy", _reference)
PLAIN_BACKWARD = _op("linear_cross_entropy_backward", None)
EAGER = _op("linear_cross_entropy_with_gradients", _with_gradients)
EAGER_BACKWARD = _op("linear_cross_entropy_with_gradients_backward", None)
_plain_linear = derive(PLAIN, PLAIN_BACKWARD, saved=(1,))
_eager_linear = derive(EAGER, EAGER_BACKWARD, saved=(1, 2, 3, 4))


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, uniform: bool, **params: Any) -> tuple[Any, Any]:
    """Chooses where the gradients are made: beside the losses, or in the backward."""
    forward, linear = (EAGER, _eager_linear) if uniform else (PLAIN, _plain_linear)
    outs = forward(*primals, uniform=uniform, **params)
    which = tuple(i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero))
    moving = (tangents[i] for i in which)
    (dot,) = linear.bind(*primals, *outs[1:], *moving, which=which, uniform=uniform, **params)
    return outs[:2], [dot, ad.Zero(jax.typeof(outs[1]).to_tangent_aval())]


def _batch_sums(operands: Sequence[Any], dims: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    outs = jax.vmap(lambda *xs: list(_with_gradients(*xs, **params)), in_axes=tuple(dims))(*operands)
    return outs, [0] * len(outs)


ad.primitive_jvps[PLAIN.primitive] = _jvp
batching.primitive_batchers[EAGER.primitive] = _batch_sums
for _op_with_program in (PLAIN_BACKWARD, EAGER_BACKWARD):
    for _platform in (None, "cpu"):  # the reference, which derivatives of the backward use, is the plain transpose
        mlir.register_lowering(
            _op_with_program.primitive, mlir.lower_fun(_backward, multiple_results=True), platform=_platform
        )


def linear_cross_entropy(
    x: Any,
    weight: Any,
    labels: Any,
    bias: Any = None,
    *,
    classes_first: bool = False,
    label_smoothing: float = 0.0,
    out_of_range: OutOfRange = "nan",
    out_dtype: Any = None,
    uniform: bool = True,
) -> jax.Array:
    """Cross-entropy of softmax(x @ weight + bias) with integer labels, without materialising the logits.

    Args:
      x: [..., features], floating point.
      weight: [features, classes], or [classes, features] with `classes_first` (a tied embedding table).
      labels: [...] integer classes.
      bias: [classes] or None.
      classes_first: which way round `weight` is.
      label_smoothing: share of the target spread evenly over the classes, 0..1.
      out_of_range: what a label outside the classes means, as in `softmax_cross_entropy`.
      out_dtype: dtype of the result; None: the dtype that x and weight promote to.
      uniform: whether the losses are expected to be summed or averaged, each with the same share. Gradients are right
        either way; with True a sum costs no more products than stock JAX and a weighted sum (a mask) twice as many,
        with False both cost a third more.

    Returns:
      [...] losses in nats; logits and losses are accumulated in float32.

    Raises:
      ValueError, TypeError: shapes that do not fit, labels not integers, a smoothing outside 0..1.
    """
    check_choices("linear_cross_entropy", label_smoothing, out_of_range)
    x, weight, labels = jnp.asarray(x), jnp.asarray(weight), jnp.asarray(labels)
    extras = () if bias is None else (jnp.asarray(bias),)
    _check(x, weight, labels, *extras, classes_first=classes_first)
    out = out_dtype or jnp.promote_types(x.dtype, weight.dtype)
    return PLAIN(
        x, weight, int32_labels(labels), *extras, extras=("bias",) * len(extras), classes_first=bool(classes_first),
        label_smoothing=float(label_smoothing), out_of_range=out_of_range, uniform=bool(uniform),
    )[0].astype(out)  # fmt: skip


def _check(x: Any, weight: Any, labels: Any, bias: Any = None, *, classes_first: bool) -> None:
    op = "jaxext linear_cross_entropy"
    for name, value in (("x", x), ("weight", weight), ("bias", bias)):
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
    if labels.shape != x.shape[:-1]:
        raise ValueError(
            f"{op}: argument 'labels' must have shape {tuple(x.shape[:-1])} to fit x of shape {tuple(x.shape)}, got "
            f"{tuple(labels.shape)}"
        )
    if bias is not None and bias.shape != (classes,):
        raise ValueError(f"{op}: argument 'bias' must have shape ({classes},), got {tuple(bias.shape)}")


def linear_cross_entropy_refusal(x: Any, weight: Any, labels: Any, bias: Any = None) -> str | None:
    """None where `linear_cross_entropy` of these avals is worth its chunks, else the reason why plain JAX runs."""
    return None
