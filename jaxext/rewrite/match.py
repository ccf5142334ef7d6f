"""What a pattern is and what a match of it says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from .trace import Graph, Value


class NoMatch(Exception):
    """The pattern is not here. `near`: it is recognisable, and `reason` names the one operation that broke it."""

    def __init__(self, reason: str, near: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.near = near


@dataclasses.dataclass(frozen=True)
class Match:
    """`roots` are the results of `call(*inputs)`; `refusal`: why the kernel would not take it, so that stock stays."""

    kernel: str
    roots: tuple[Value, ...]
    inputs: tuple[Value, ...]
    call: Callable[..., tuple[Any, ...]]
    detail: str
    refusal: str | None = None


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A kernel's pattern: `match(root, graph)` is tried on the outputs of the primitives in `roots`.

    `for_cpu`: what it stands for is plain JAX that XLA runs faster on a CPU, and stays as it was on other platforms.
    """

    kernel: str
    roots: frozenset[str]
    match: Callable[[Value, Graph], Match]
    for_cpu: bool = False
