"""Paired speed tests of a train step, with proof that both sides compute the same.

`jaxext.ab(step, *args)` tests in this process; `jaxext ab file.py:factory` (cli/ab.py) in processes of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxext.abtest.result import Result

__all__ = ["ab"]


def ab(
    step: Callable[..., Any],
    *args: Any,
    steps: int = 20,
    repeats: int = 20,
    budget: float | None = None,
    vs: str = "stock",
    contributions: bool = True,
    advance: Callable[[tuple[Any, ...], Any], tuple[Any, ...]] | None = None,
    seed: int = 0,
) -> Result:
    """Test `step(*args)` on jaxext against stock JAX, in this process, interleaved.

    `step`: jitted or plain; its arguments are copied, donation and in-place flax.nnx modules included, and outputs
    are fed back as jaxext.abtest.protocol says. `steps`: how many losses are compared. `repeats`: timed pairs.
    `budget`: seconds after which no new measurement begins. `vs`: what to compare with, "stock" or
    "exclude=attention"; settings of a whole process (memory=, isa=) need the command `jaxext ab`. `contributions`:
    also time without each kernel. `advance(args, outputs)`: the next call's arguments, where feeding back does not fit.

    Returns a Result: `.ratio`, `.interval` (95%), `.losses_agree`, `.agrees`, `.to_dict()`; print it with rich or str.

    Raises:
      ValueError: an argument out of range, or a setting that this process cannot have.
      StepError: the step itself raises.
    """
    from jaxext.abtest import machine
    from jaxext.abtest.experiment import Experiment, Options, Watcher
    from jaxext.abtest.host import LocalHost
    from jaxext.abtest.protocol import check
    from jaxext.abtest.settings import Setting, parse_versus

    name = getattr(step, "__name__", type(step).__name__)
    workload = check((step, args) if advance is None else (step, args, advance), name)
    check_counts(steps=steps, repeats=repeats, budget=budget)
    candidate = Setting(memory=machine.memory())
    reference = parse_versus(vs, candidate.memory)
    if reference.process != candidate.process:
        raise ValueError(
            f"vs={vs!r}: memory and instruction set hold for a whole process. "
            f"Test them with the command: jaxext ab file.py:factory --vs {vs}"
        )
    options = Options(reference, candidate, steps, repeats, budget, contributions, seed=seed)
    return Experiment(name, options, lambda _: LocalHost(workload, seed, cold_traces=False), Watcher()).run()


def check_counts(*, steps: int, repeats: int, budget: float | None, least_repeats: int = 3) -> None:
    """Raise ValueError, naming the argument, where a count makes no sense."""
    for name, value, least in (("steps", steps, 1), ("repeats", repeats, least_repeats)):
        if value < least:
            raise ValueError(f"{name}={value}: expected at least {least}.")
    if budget is not None and not budget > 0:
        raise ValueError(f"budget={budget}: expected a positive number of seconds.")
