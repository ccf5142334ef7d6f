"""What passes on stock JAX has to pass on jaxext, but for what is known; and what is known has to be so."""

from __future__ import annotations

import collections
import dataclasses
import posixpath
from collections.abc import Iterator, Mapping

from .results import FileResult, TestResult
from .suite import Suite


@dataclasses.dataclass(frozen=True)
class Problem:
    """One reason for exit code 1: a test (or a suite) and what is wrong with it."""

    suite: str
    test: str
    what: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """
    Attributes:
      problems: what makes the run fail.
      known: tests that fail on jaxext as known, with the reason.
      tests: tests that either side ran.
      stock: tests that passed on stock JAX.
      jaxext: of these, the ones that passed on jaxext.
      uncollected: files that stock JAX cannot collect, with the error.
      replaced: kernel calls replaced, by kernel.
      fallbacks, missed: counts by "kernel: reason".
    """

    suite: Suite
    problems: tuple[Problem, ...]
    known: Mapping[str, str]
    tests: int
    stock: int
    jaxext: int
    uncollected: Mapping[str, str]
    replaced: Mapping[str, int]
    fallbacks: Mapping[str, int]
    missed: Mapping[str, int]


def compare(
    suite: Suite,
    stock: Mapping[str, FileResult],
    jaxext: Mapping[str, FileResult],
    known: Mapping[str, str],
    *,
    whole: bool,
) -> Comparison:
    """Results by file of the two sides; `whole`: every file of the suite is there, not the quick ones alone."""
    before, after = _by_test(stock), _by_test(jaxext)
    files = {test: file for file, result in stock.items() for test in result.tests}
    passed = [test for test, result in before.items() if result.outcome == "passed"]
    replaced = _sum(after, "replaced")
    wrong = [
        *_differing(passed, after, {test: jaxext[files[test]] for test in passed}, known),
        *_dying(stock, jaxext),
        *_stale(known, before, [*stock] if not whole else None, suite.cwd),
    ]
    if not passed:
        wrong.append(("(all)", "no test passes on stock JAX, so nothing was compared"))
    elif whole and suite.expects_replacements and not replaced:
        wrong.append(("(all)", "no kernel call was replaced, but expects_replacements is set"))
    return Comparison(
        suite=suite,
        problems=tuple(Problem(suite.name, test, what) for test, what in wrong),
        known={test: known[test] for test in passed if test in known},
        tests=len(before.keys() | after.keys()),
        stock=len(passed),
        jaxext=sum(after[test].outcome == "passed" for test in passed if test in after),
        uncollected={file: result.collection for file, result in stock.items() if result.collection},
        replaced=replaced,
        fallbacks=_sum(after, "fallbacks"),
        missed=_sum(after, "missed"),
    )


def _differing(
    passed: list[str], after: Mapping[str, TestResult], files: Mapping[str, FileResult], known: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    for test in passed:
        result = after.get(test) or TestResult("error", error=files[test].collection or "it was not collected")
        if result.outcome == "passed" and test in known:
            yield test, f"passes, but is a known failure ({known[test]}): drop it"
        elif result.outcome != "passed" and test not in known:
            yield test, f"{result.outcome}: {result.error}"


def _dying(stock: Mapping[str, FileResult], jaxext: Mapping[str, FileResult]) -> Iterator[tuple[str, str]]:
    for file, result in jaxext.items():
        if result.at_exit and not stock[file].at_exit:
            yield file, f"between tests or after the last: {result.at_exit}"


def _stale(
    known: Mapping[str, str], before: Mapping[str, TestResult], files: list[str] | None, cwd: str
) -> Iterator[tuple[str, str]]:
    """Known failures that are none; `files`: those that ran, None for all."""
    for test in known:
        file = posixpath.normpath(posixpath.join(cwd, test.partition("::")[0]))
        if test not in before and (files is None or file in files):
            yield test, "a known failure that names no test: correct or drop it"
        elif test in before and before[test].outcome != "passed":
            yield test, f"a known failure that is {before[test].outcome} on stock JAX too: drop it"


def _by_test(results: Mapping[str, FileResult]) -> dict[str, TestResult]:
    return {test: result for file in results.values() for test, result in file.tests.items()}


def _sum(results: Mapping[str, TestResult], what: str) -> dict[str, int]:
    total: collections.Counter[str] = collections.Counter()
    for result in results.values():
        total.update(getattr(result, what))
    return dict(total.most_common())
