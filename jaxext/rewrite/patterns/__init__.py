"""The patterns, largest first: a larger one takes what a smaller one is part of."""

from ..match import Pattern
from . import attention, cross_entropy, linear_cross_entropy, norm

PATTERNS: tuple[Pattern, ...] = (
    linear_cross_entropy.PATTERN,
    cross_entropy.PATTERN,
    attention.PATTERN,
    norm.LAYER_NORM,
    norm.RMS_NORM,
)
