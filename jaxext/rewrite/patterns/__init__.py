"""The patterns, largest first: a larger one takes what a smaller one is part of."""

from ..exchange import Exchange
from ..match import Pattern
from . import attention, cross_entropy, dot, linear_cross_entropy, norm, top_k

PATTERNS: tuple[Pattern, ...] = (
    linear_cross_entropy.PATTERN,
    cross_entropy.PATTERN,
    attention.PATTERN,
    norm.LAYER_NORM,
    norm.RMS_NORM,
)

# What is exchanged once nobody differentiates the program any more.
EXCHANGES: tuple[Exchange, ...] = (dot.EXCHANGE, top_k.EXCHANGE)
