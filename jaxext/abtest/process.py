"""A/B test of a whole program: every run in a process of its own, the sides in random order.

What the program prints is read for its step times and losses: a line such as `step 3 loss 2.31 ms 41.5` (or
`loss: 2.31 ... 41.5 ms`) counts as one step. A program that prints none is compared by its running time alone.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxext.abtest import machine, parity, timing
from jaxext.abtest.experiment import Clock, Watcher
from jaxext.abtest.result import ProgramResult, ProgramSide, Run
from jaxext.abtest.settings import VARIABLES, Setting, label

_NUMBER = r"([-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|nan|inf))"
_LOSS = re.compile(r"\bloss\b\s*[=:]?\s*" + _NUMBER, re.IGNORECASE)
_MILLISECONDS = (re.compile(r"\bms\b\s*[=:]?\s*" + _NUMBER), re.compile(_NUMBER + r"\s*ms\b"))


class ProgramError(RuntimeError):
    """A run ended with an error. `kernels`: on the jaxext side, after stock JAX had run the program."""

    def __init__(self, message: str, kernels: bool) -> None:
        super().__init__(message)
        self.kernels = kernels


def read_line(line: str) -> tuple[float | None, float | None]:
    """(loss, step seconds) that a printed line tells."""
    loss = _LOSS.search(line)
    found = next((match for match in (pattern.search(line) for pattern in _MILLISECONDS) if match), None)
    return float(loss[1]) if loss else None, float(found[1]) / 1e3 if found else None


def command(path: Path, arguments: list[str], setting: Setting) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment that run a program under `setting`."""
    environment = {**os.environ, **setting.environment(), "PYTHONUNBUFFERED": "1"}
    for name in VARIABLES:
        environment.pop(name, None)
    if not setting.kernels and setting.memory == "system":
        return [sys.executable, str(path), *arguments], environment
    if setting.exclude:
        environment["JAXEXT_KERNELS"] = ",".join(f"-{kernel}" for kernel in setting.exclude)
    if setting.precision:
        environment["JAXEXT_PRECISION"] = setting.precision
    # By path: -m would prefer a folder named jaxext in the working directory, such as a checkout without its module.
    run = [sys.executable, str(Path(__file__).parents[1] / "__main__.py"), "run", "--memory", setting.memory]
    return [*run, *([] if setting.kernels else ["--no-kernels"]), str(path), *arguments], environment


def run_program(
    path: Path, arguments: list[str], setting: Setting, name: str, watch: Callable[[str], None] = lambda line: None
) -> Run:
    """Run once to the end; `watch` sees each printed line.

    Raises:
      ProgramError: it ended with a code other than 0.
    """
    line_command, environment = command(path, arguments, setting)
    losses, steps = [], []
    begin = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(line_command, stdout=subprocess.PIPE, stderr=log, env=environment, text=True)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                loss, seconds = read_line(line)
                losses += [] if loss is None else [loss]
                steps += [] if seconds is None else [seconds]
                watch(line.rstrip())
            # wait4 tells this child's own peak memory, which RUSAGE_CHILDREN mixes with the others'.
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()
        wall = time.perf_counter() - begin
        if process.returncode != 0:
            log.seek(0)
            tail = log.read().decode(errors="replace").strip().splitlines()[-8:]
            raise ProgramError(
                f"{path.name} ended with code {process.returncode} on the {name} side:\n" + "\n".join(tail),
                setting.kernels,
            )
    return Run(wall, steps, losses, usage.ru_maxrss * 1024)


def compare_programs(
    path: Path,
    arguments: list[str],
    reference: Setting,
    candidate: Setting,
    *,
    repeats: int,
    budget: float | None,
    seed: int,
    tolerance: float | None = None,
    watcher: Watcher | None = None,
) -> ProgramResult:
    """Run both sides `repeats` times each, interleaved in random order.

    Raises:
      ProgramError: a run failed.
    """
    clock = Clock(budget, watcher or Watcher())
    settings = {label(reference, candidate): reference, label(candidate, reference): candidate}
    load = machine.load_average()
    sides = run_sides(path, arguments, settings, repeats=repeats, seed=seed, clock=clock)
    left, right = sides.values()
    rule = parity.with_loss_tolerance(parity.TOLERANCES["float32"], tolerance)
    name = " ".join([path.name, *arguments])
    notes = busy(load)
    done = len(left.runs)
    if done < repeats:
        notes.insert(0, f"the time budget allowed {done} of {repeats} runs a side")
    return conclude(name, left, right, rule, seed, clock.spent(), notes)


def busy(load: float | None) -> list[str]:
    """The note that qualifies figures measured at this load average."""
    if load is None or load <= 1.5 * machine.threads():
        return []
    return [f"the machine was busy (load {load:.1f} on {machine.threads()} CPUs): figures are noisy"]


def run_sides(
    path: Path, arguments: list[str], settings: dict[str, Setting], *, repeats: int, seed: int, clock: Clock
) -> dict[str, ProgramSide]:
    """Run every side (label -> setting) once a round, in random order; at most `repeats` rounds, at least one.

    Raises:
      ProgramError: a run failed.
    """
    runs: dict[str, list[Run]] = {name: [] for name in settings}
    orders = timing.orders(list(settings), seed)
    for index in range(repeats):
        if index and clock.left() < clock.spent() / index:
            break
        # First in the order given: where the program itself is broken, stock JAX says so.
        for side in settings if index == 0 else next(orders):
            text = f"run {index + 1} of at most {repeats}, {side}"

            def watch(line: str, text: str = text) -> None:
                clock.watcher.phase(f"{text}: {line[:60]}")
                clock.tick()

            watch("starting")
            runs[side].append(run_program(path, arguments, settings[side], side, watch))
            done = sum(map(len, runs.values()))
            clock.plan(clock.spent() / done * (len(settings) * repeats - done))
    return {name: ProgramSide(name, setting, runs[name]) for name, setting in settings.items()}


def pairs(left: list[Run], right: list[Run]) -> list[timing.Pairs]:
    """Each run's step times, paired step by step without the first, which compiles; else all running times as one."""
    steps: list[timing.Pairs] = [
        (one.step_seconds[1:], other.step_seconds[1:])
        for one, other in zip(left, right, strict=True)
        if len(one.step_seconds) == len(other.step_seconds) >= 2
    ]
    return steps or [([run.wall for run in left], [run.wall for run in right])]


def conclude(
    name: str,
    left: ProgramSide,
    right: ProgramSide,
    rule: parity.Tolerance,
    seed: int,
    elapsed: float,
    notes: Sequence[str] = (),
) -> ProgramResult:
    """What the runs of two sides, reference and candidate, tell: speed, and whether their losses agree."""
    found = list(notes)
    losses = left.runs[0].losses, right.runs[0].losses
    if len(losses[0]) != len(losses[1]):
        found.append(f"{left.label} printed {len(losses[0])} losses, {right.label} {len(losses[1])}")
    if len(left.runs) == 1 and left.prints_steps:
        found.append("one run a side: the interval does not tell what differs from process to process (--repeats)")
    if not losses[0]:
        found.append("the program prints no losses, so only its speed is compared")
    both = min(len(losses[0]), len(losses[1]))
    return ProgramResult(
        name=name,
        reference=left,
        candidate=right,
        speed=timing.ratio_over_runs(pairs(left.runs, right.runs), seed),
        wall=timing.paired_ratio([run.wall for run in left.runs], [run.wall for run in right.runs], seed),
        parity=parity.judge(losses[0][:both], losses[1][:both], [], rule, (left.label, right.label)),
        facts={"cpu": machine.cpu_name(), "threads": machine.threads()},
        seed=seed,
        elapsed=elapsed,
        notes=found,
    )
