"""Where an entry of a TOML file holds: `python<3.12 and jax>=0.11`."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping

from .errors import CompatError

_COMPARISON = re.compile(r"\s*(python|jax)\s*(<=|>=|==|!=|<|>)\s*([\d.]+)\s*")
_OPERATORS = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}


def holds(condition: str, versions: Mapping[str, str]) -> bool:
    """
    Raises:
      CompatError: the condition is no comparison of `python` or `jax` with a version, nor several joined by `and`.
    """
    if not condition:
        return True
    return all(_compare(part, condition, versions) for part in condition.split(" and "))


def _compare(part: str, condition: str, versions: Mapping[str, str]) -> bool:
    found = _COMPARISON.fullmatch(part)
    if not found:
        raise CompatError(f"condition {condition!r}: expected such as 'python<3.12' or 'jax>=0.11 and jax<0.12'.")
    name, comparison, bound = found.groups()
    wanted = _numbers(bound)
    # Only as many places are compared as the bound has: 3.11.9 is 3.11.
    return _OPERATORS[comparison](_numbers(versions[name])[: len(wanted)], wanted)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))
