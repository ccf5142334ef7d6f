"""The patterns, largest first: a larger one takes what a smaller one is part of."""

from ..match import Pattern
from . import attention

PATTERNS: tuple[Pattern, ...] = (attention.PATTERN,)
