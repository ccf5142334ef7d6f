"""Does jaxext compute what stock JAX computes? Losses step by step, and every state leaf after the same step.

**Losses.** Relative difference over the first 20 steps: at most 1e-4 where the program computes in float32, 1e-2
where it computes in bfloat16 or float16. Later two correct runs drift apart, as rounding grows step by step, so the
mean of the last ten losses is compared, within 2% (5%) of the range that stock's losses went through.

**Leaves.** What a leaf gained since the first step, D, is compared by its norm, ||D_jaxext - D_stock||. It is
measured against stock's own rounding error: a probe, the same stock program with its state disturbed by one unit
roundoff of the dtype it computes in, gains D_probe, and the bound is

    factor * ||D_probe - D_stock|| + floor * ||D_stock|| + 8 * eps * ||leaf||

with factor 16 and floor 1e-4 for float32 (the probe rounds once, sums round at each term), 4 and 2e-2 for bfloat16
and float16. A leaf whose true gradient is zero (an attention key's bias) is moved by rounding alone, by Adam at full
speed; there the probe is as far off as jaxext is, and the bound says so. An update of nearly one size in all elements
(Adam's first steps) turns round in an element whose gradient is near zero, in the probe or not: four such elements and
a tenth of the floor's share of all are allowed for, while the moments, which are linear in the gradient, are held to
the bound above. Integers, keys and booleans whose probe is
exact must be exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxext.abtest.state import Leaves, copy_array, numeric

Three = tuple[np.ndarray, np.ndarray, np.ndarray]

FIRST_STEPS = 20
BLOCK = 1 << 16


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Bounds for one compute dtype; `eps` is its unit roundoff as a relative disturbance."""

    dtype: str
    loss: float
    curve: float
    factor: float
    floor: float
    eps: float


TOLERANCES = {
    "float64": Tolerance("float64", 1e-9, 2e-2, 16.0, 1e-6, 2.0**-52),
    "float32": Tolerance("float32", 1e-4, 2e-2, 16.0, 1e-4, 2.0**-23),
    "float16": Tolerance("float16", 1e-2, 5e-2, 4.0, 2e-2, 2.0**-11),
    "bfloat16": Tolerance("bfloat16", 1e-2, 5e-2, 4.0, 2e-2, 2.0**-8),
}


def tolerance_for(dtypes: Sequence[str]) -> Tolerance:
    """The tolerance of the coarsest dtype in which the program does matrix products."""
    for name in ("bfloat16", "float16", "float32", "float64"):
        if name in dtypes:
            return TOLERANCES[name]
    return TOLERANCES["float32"]


def with_loss_tolerance(rule: Tolerance, loss: float | None) -> Tolerance:
    """`rule` with another tolerance of the losses, where one is given."""
    return rule if loss is None else dataclasses.replace(rule, loss=loss)


@dataclasses.dataclass(frozen=True)
class LeafError:
    """How far one leaf is off after `step` steps, and how far it may be (both norms)."""

    name: str
    step: int
    error: float
    bound: float
    scale: float

    @property
    def fraction(self) -> float:
        """Share of the bound that is used up; above 1 is a disagreement."""
        if self.error == 0:
            return 0.0
        return self.error / self.bound if self.bound > 0 else float("inf")

    def to_dict(self) -> dict[str, object]:
        return {**dataclasses.asdict(self), "fraction": self.fraction}


def _is_inexact(values: np.ndarray) -> bool:
    return bool(np.issubdtype(values.dtype, np.inexact)) or values.dtype.name in TOLERANCES


def _flat(values: np.ndarray) -> np.ndarray:
    flat = np.ascontiguousarray(values).ravel()
    return flat.view(np.real(flat).dtype) if np.iscomplexobj(flat) else flat


def _square(left: np.ndarray, right: np.ndarray) -> float:
    """||left - right||^2, where NaN equals NaN and an infinity itself; infinite where one side alone is not finite."""
    # einsum, not BLAS, whose threads would still spin when timing begins.
    with np.errstate(invalid="ignore", over="ignore"):
        difference = left - right
        square = float(np.einsum("i,i->", difference, difference))
        if not np.isfinite(square):
            same = (left == right) | (np.isnan(left) & np.isnan(right))
            difference = np.where(same, 0, difference)
            square = float(np.einsum("i,i->", difference, difference))
    return square if np.isfinite(square) else float("inf")


def _norms(after: Three, before: tuple[np.ndarray, np.ndarray] | None) -> list[float]:
    """Norms of: candidate - reference, reference, what the reference gained, and by how much the probe gained else.

    In float64, because squares of second moments underflow in float32, and block by block, to stay in the cache.
    """
    reference, candidate, probe = (_flat(leaf) for leaf in after)
    starts = None if before is None else [_flat(leaf) for leaf in before]
    sums = [0.0] * 4
    for begin in range(0, reference.size, BLOCK):
        part = slice(begin, begin + BLOCK)
        r, c, p = (array[part].astype(np.float64) for array in (reference, candidate, probe))
        zero = np.zeros_like(r)
        first, disturbed = (zero, zero) if starts is None else (start[part].astype(np.float64) for start in starts)
        # The probe began elsewhere, so what they gained is compared, not where they are.
        pairs = ((c, r), (r, zero), (r, first), (p - disturbed, r - first))
        sums = [total + _square(*pair) for total, pair in zip(sums, pairs, strict=True)]
    return [float(np.sqrt(total)) for total in sums]


def _turned_elements(
    reference: np.ndarray, before: tuple[np.ndarray, np.ndarray] | None, gain: float, rule: Tolerance
) -> float:
    """Norm of the few elements whose update may point the other way, where all updates are of nearly one size."""
    if before is None or gain == 0 or reference.size < 16:
        return 0.0
    # In the dtype of the leaf: of largest elements the roundoff does not matter.
    largest = float(np.max(np.abs(_flat(reference) - _flat(before[0]))))
    if not largest <= 1.4 * gain / reference.size**0.5:
        return 0.0
    count = min(4 + 0.1 * rule.floor * reference.size, reference.size / 16)
    return 2 * largest * count**0.5


def compare_leaf(
    name: str, step: int, after: Three, before: tuple[np.ndarray, np.ndarray] | None, rule: Tolerance
) -> LeafError:
    """Compare one leaf, `after` in (reference, candidate, probe).

    `before`: its value ahead of the first step in (reference, probe); None for an output.
    """
    if len({leaf.shape for leaf in after}) != 1:
        return LeafError(name, step, float("inf"), 0.0, 0.0)
    error, *others = _norms(after, before)
    # Where stock itself is not finite, no bound follows from it, and only equal values agree.
    size, gain, noise = (norm if np.isfinite(norm) else 0.0 for norm in others)
    bound = rule.factor * noise
    if _is_inexact(after[0]):
        bound += _turned_elements(after[0], before, gain, rule)
        own = 2.0**-23 if after[0].dtype.itemsize >= 4 else 2.0**-8
        bound += rule.floor * gain + 8 * own * size
    return LeafError(name, step, error, bound, gain)


def compare_leaves(
    step: int, sides: tuple[Leaves, Leaves, Leaves], starts: tuple[Leaves, Leaves], rule: Tolerance
) -> list[LeafError]:
    """Compare all leaves of (reference, candidate, probe) by name; one that a side lacks is infinitely far off.

    `starts`: the state ahead of the first step of (reference, probe).
    """
    found = []
    for name in sorted(sides[0].keys() | sides[1].keys()):
        after = [numeric(side[name]) if name in side else None for side in sides]
        if after[0] is None and after[1] is None:
            continue
        if after[0] is None or after[1] is None or after[2] is None:
            found.append(LeafError(name, step, float("inf"), 0.0, 0.0))
            continue
        before = [numeric(start[name]) if name in start else None for start in starts]
        pair = None if before[0] is None or before[1] is None else (before[0], before[1])
        found.append(compare_leaf(name, step, (after[0], after[1], after[2]), pair, rule))
    return found


def disturber(rule: Tolerance, seed: int) -> Callable[[Any], Any]:
    """A function that returns an array times (1 + eps u), u uniform in [-1, 1]; what is not inexact stays."""
    rng = np.random.default_rng(seed)

    def disturb(array: Any) -> Any:
        values = numeric(array)
        if values is None or not _is_inexact(values) or not values.any():
            return copy_array(array)
        noise = rng.random(size=values.shape, dtype=np.float32).astype(np.float64)
        disturbed = (values * (1 + rule.eps * (2 * noise - 1))).astype(values.dtype)
        return jax.device_put(disturbed, array.sharding) if isinstance(array, jax.Array) else disturbed

    return disturb


@dataclasses.dataclass(frozen=True)
class Parity:
    """Both sides' losses, the compared leaves (worst first), and each disagreement in words."""

    tolerance: Tolerance
    reference_losses: list[float]
    candidate_losses: list[float]
    leaves: list[LeafError]
    leaf_steps: list[int]
    failures: list[str]

    @property
    def agrees(self) -> bool:
        return not self.failures

    @property
    def losses_agree(self) -> bool:
        return not any(failure.startswith("loss") for failure in self.failures)

    @property
    def worst_loss(self) -> float | None:
        """Largest relative difference over the first 20 steps, None where the step has no loss."""
        differences = relative_differences(self.reference_losses, self.candidate_losses)[:FIRST_STEPS]
        return max(differences, default=None)

    def to_dict(self) -> dict[str, object]:
        return {
            "agrees": self.agrees,
            "losses_agree": self.losses_agree,
            "worst_relative_loss_difference": self.worst_loss,
            "tolerance": dataclasses.asdict(self.tolerance),
            "reference_losses": self.reference_losses,
            "candidate_losses": self.candidate_losses,
            "leaf_steps": self.leaf_steps,
            "leaves": [leaf.to_dict() for leaf in self.leaves],
            "failures": self.failures,
        }


def relative_differences(left: Sequence[float], right: Sequence[float]) -> list[float]:
    """|a - b| / max(|a|, |b|) step by step; equal values (NaN and infinities too) differ by 0."""
    found = []
    for a, b in zip(left, right, strict=False):
        if a == b or (np.isnan(a) and np.isnan(b)):
            found.append(0.0)
            continue
        difference = abs(a - b) / max(abs(a), abs(b), 1e-30)
        found.append(float(difference) if np.isfinite(difference) else float("inf"))
    return found


def judge(
    reference: list[float],
    candidate: list[float],
    leaves: list[LeafError],
    rule: Tolerance,
    names: tuple[str, str] = ("stock", "jaxext"),
) -> Parity:
    """Apply the tolerances; each failure names the leaf or the step, the two values and the bound."""
    failures = []
    differences = relative_differences(reference, candidate)
    for step, difference in enumerate(differences[:FIRST_STEPS], start=1):
        if difference > rule.loss:
            failures.append(
                f"loss at step {step}: {names[0]} {reference[step - 1]:.7g}, {names[1]} {candidate[step - 1]:.7g}, "
                f"relative difference {difference:.2e} above the tolerance {rule.loss:.0e}"
            )
            break
    if len(differences) >= FIRST_STEPS + 10:
        a, b = float(np.mean(reference[-10:])), float(np.mean(candidate[-10:]))
        room = rule.curve * float(np.ptp(reference)) + rule.loss * abs(a)
        if relative_differences([a], [b])[0] > 0 and not abs(a - b) <= room:
            failures.append(
                f"loss curve: mean of the last ten losses {names[0]} {a:.6g}, {names[1]} {b:.6g}, "
                f"further apart than {room:.2g}"
            )
    worst: dict[str, LeafError] = {}
    for leaf in leaves:
        if leaf.name not in worst or leaf.fraction > worst[leaf.name].fraction:
            worst[leaf.name] = leaf
    ordered = sorted(worst.values(), key=lambda leaf: -leaf.fraction)
    wrong = [leaf for leaf in leaves if leaf.fraction > 1]
    # What is wrong at first shows the cause; later everything is.
    first = min((leaf.step for leaf in wrong), default=0)
    for leaf in sorted((leaf for leaf in wrong if leaf.step == first), key=lambda leaf: -leaf.fraction):
        failures.append(
            f"leaf {leaf.name} after step {leaf.step}: error {leaf.error:.2e} above its bound {leaf.bound:.2e} "
            f"({names[0]} changed it by {leaf.scale:.2e}; norms)"
        )
    steps = sorted({leaf.step for leaf in leaves})
    return Parity(rule, reference, candidate, ordered, steps, failures)
