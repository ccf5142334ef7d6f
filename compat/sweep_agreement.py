"""One train step on stock JAX, on jaxext and in double precision: how far apart they are, and what jaxext replaced.

The tolerance is stock JAX's own rounding: a gradient on jaxext may be off the double-precision one by twice what stock
JAX's single-precision one is off, plus a floor of a few units in the last place.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from architectures import Architecture, Step

import jaxext

DROPOUT = 0.1
# A leaf's floor, of its largest element: units in the last place of a sum of some dozens of products.
FLOOR = 64 * float(np.finfo(np.float32).eps)
# Where terms cancel (no score depends on a key bias) only rounding is left: measured against this part of the largest.
_SMALLEST_SCALE = 1e-2
_ATTENTION = re.compile(r"Attention$")
_LAYER_NORM = re.compile(r"LayerNorm$")
_RMS_NORM = re.compile(r"(RMSNorm|T5LayerNorm)$")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the sweep says of one architecture; differences are relative, the largest over runs and leaves."""

    architecture: str
    class_name: str
    loss_difference: float
    gradient_difference: float
    agree: bool
    disagreements: list[str]
    kernels: dict[str, tuple[int, int]]
    missed: list[str]
    fallbacks: list[str]

    @property
    def complete(self) -> bool:
        """Whether every attention and norm layer runs on a kernel."""
        return all(found >= expected for found, expected in self.kernels.values())

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        values["class"] = values.pop("class_name")
        return values | {"kernels": {name: list(counts) for name, counts in self.kernels.items()}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Outcome:
        """What `to_dict` was made of."""
        kernels = {name: (found, expected) for name, (found, expected) in values["kernels"].items()}
        return cls(
            **{name: value for name, value in values.items() if name != "class"}
            | {"class_name": values["class"], "kernels": kernels}
        )


def measure(architecture: Architecture) -> Outcome:
    """Run it without dropout, also in double precision, and with dropout; both under the same keys."""
    step = architecture.build(0.0, np.float32)
    stock, ours = _gradients(step, jax.jit), _gradients(step, jaxext.accelerate)
    with jax.enable_x64(True):
        exact = _gradients(_double(architecture.build(0.0, np.float64), step), jax.jit)
    allowed, problems, differences = {}, [], []
    scales = _scales(exact)
    for name, true in exact.items():
        off = [float(np.abs(side[name] - true).max(initial=0)) / scales[name] for side in (stock, ours)]
        allowed[name] = 2 * off[0] + FLOOR
        differences.append((name, float(np.abs(stock[name] - ours[name]).max(initial=0)) / scales[name]))
        if not off[1] <= allowed[name]:
            problems.append(f"{name}: {off[1]:.1e} off, stock JAX {off[0]:.1e}")
    dropped = architecture.build(DROPOUT, np.float32)
    stock, ours = _gradients(dropped, jax.jit), _gradients(dropped, jaxext.accelerate)
    scales = _scales(stock)
    # Both may be off as far as they are allowed to be without dropout.
    bound = 2 * max(allowed.values())
    for name, expected in stock.items():
        off = float(np.abs(ours[name] - expected).max(initial=0)) / scales[name]
        differences.append((name, off))
        if not off <= bound:
            problems.append(f"with dropout, {name}: {off:.1e} apart, {bound:.1e} allowed")
    return _outcome(architecture, dropped, differences, problems)


def _outcome(
    architecture: Architecture, step: Step, differences: list[tuple[str, float]], problems: list[str]
) -> Outcome:
    report = jaxext.explain(_step_function(step))(step.params, step.batch, jax.random.key(3))
    found = Counter(entry.kernel for entry in report.replaced)
    expected = _layers(step) if architecture.layers is None else architecture.layers
    names = [name for name in dict.fromkeys((*expected, *sorted(found))) if expected.get(name) or found[name]]
    return Outcome(
        architecture=architecture.name,
        class_name=architecture.class_name,
        loss_difference=max(off for name, off in differences if name == "loss"),
        gradient_difference=max(off for name, off in differences if name != "loss"),
        agree=not problems,
        disagreements=problems,
        # A kernel that no layer asks for, such as the loss's, is a find.
        kernels={name: (found[name], expected.get(name, found[name])) for name in names},
        missed=[str(entry) for entry in report.missed],
        fallbacks=[str(entry) for entry in report.fallbacks],
    )


def _step_function(step: Step) -> Any:
    return jax.value_and_grad(step.loss)


def _gradients(step: Step, jit: Any) -> dict[str, np.ndarray]:
    loss, gradients = jit(_step_function(step))(step.params, step.batch, jax.random.key(3))
    named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)}
    return {name: np.asarray(leaf, np.float64) for name, leaf in {"loss": loss, **named}.items()}


def _scales(leaves: dict[str, np.ndarray]) -> dict[str, float]:
    largest = {name: float(np.abs(leaf).max(initial=0)) for name, leaf in leaves.items()}
    smallest = _SMALLEST_SCALE * max(size for name, size in largest.items() if name != "loss")
    return {name: max(size, smallest) for name, size in largest.items()}


def _double(step: Step, single: Step) -> Step:
    """The step in double precision, at the numbers that the single-precision one has."""

    def widened(leaf: Any) -> Any:
        array = np.asarray(leaf)
        return jax.numpy.asarray(array, np.float64 if array.dtype == np.float32 else array.dtype)

    return Step(step.loss, jax.tree.map(widened, single.params), jax.tree.map(widened, single.batch))


def _layers(step: Step) -> dict[str, int]:
    """How many attention and norm layers one loss runs: calls of flax.linen modules by class, innermost ones only.

    A module that is called again on the same array counts once: XLA computes it once, too.
    """
    calls: dict[tuple[str, Any, int], Any] = {}
    inner: list[list[str]] = [[]]

    def kind(name: str) -> str:
        if _ATTENTION.search(name):
            return "attention"
        return "rms_norm" if _RMS_NORM.search(name) else "layer_norm" if _LAYER_NORM.search(name) else ""

    def counted(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        found = kind(type(context.module).__name__) if context.method_name == "__call__" else ""
        if not found:
            return call(*args, **kwargs)
        inner.append([])
        try:
            return call(*args, **kwargs)
        finally:
            inside = inner.pop()
            x = args[0] if args else next(iter(kwargs.values()))
            if found not in inside:
                calls[found, context.module.path, id(x)] = x  # kept, so that no other array gets its id
            inner[-1] += [found, *inside]

    with nn.intercept_methods(counted), jaxext.disabled():
        jax.eval_shape(step.loss, step.params, step.batch, jax.random.key(3))
    return dict(Counter(found for found, _, _ in calls))
