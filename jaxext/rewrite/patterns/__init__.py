"""The patterns, largest first: a larger one takes what a smaller one is part of."""

from ..exchange import Exchange
from ..match import Pattern
from . import (
    arg_reduce,
    attention,
    convolution,
    cross_entropy,
    cumulative,
    distances,
    dot,
    gathered_product,
    group_norm,
    indexed_rows,
    linear_cross_entropy,
    linear_recurrence,
    max_pool,
    norm,
    random_bits,
    recurrence,
    searchsorted,
    sort,
    top_k,
)

PATTERNS: tuple[Pattern, ...] = (
    linear_cross_entropy.PATTERN,
    cross_entropy.PATTERN,
    attention.PATTERN,
    norm.LAYER_NORM,
    norm.RMS_NORM,
    group_norm.PATTERN,
    linear_recurrence.PATTERN,
    gathered_product.PATTERN,
    distances.PATTERN,
)

# What is exchanged once nobody differentiates the program any more.
EXCHANGES: tuple[Exchange, ...] = (
    dot.EXCHANGE,
    top_k.EXCHANGE,
    sort.EXCHANGE,
    searchsorted.EXCHANGE,
    *arg_reduce.EXCHANGES,
    *cumulative.EXCHANGES,
    *indexed_rows.EXCHANGES,
    random_bits.EXCHANGE,
    convolution.EXCHANGE,
    *max_pool.EXCHANGES,
    recurrence.EXCHANGE,
)
