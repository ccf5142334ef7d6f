"""What an equation's choice may depend on beside the equation itself: who made its operands, who reads its result."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from . import written


class Neighbours:
    """The equations of one function by the variables that they make and read, looked through when first asked."""

    def __init__(self, equations: Sequence[Any], results: Sequence[Any]) -> None:
        self._equations, self._results = equations, results

    def maker(self, var: Any) -> Any:
        """The equation that made `var`, None for the function's own operands and for literals."""
        return None if written.is_literal(var) else self._makers.get(var)

    def only_reader(self, var: Any) -> Any:
        """The equation that reads `var`, None where there are several or none, or where the function returns it."""
        readers = self._readers.get(var, ())
        return readers[0] if len(readers) == 1 else None

    @functools.cached_property
    def _makers(self) -> dict[Any, Any]:
        return {var: eqn for eqn in self._equations for var in eqn.outvars}

    @functools.cached_property
    def _readers(self) -> dict[Any, list[Any]]:
        readers: dict[Any, list[Any]] = {var: [None] for var in self._results if not written.is_literal(var)}
        for eqn in self._equations:
            for var in eqn.invars:
                if not written.is_literal(var):
                    readers.setdefault(var, []).append(eqn)
        return readers
