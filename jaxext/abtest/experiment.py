"""The course of one A/B test: start, compile, compare, time, take apart. Nothing is printed here."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxext._settings import KERNELS
from jaxext.abtest import contributions, machine, parity, timing
from jaxext.abtest.host import Compilation, LocalHost
from jaxext.abtest.remote import RemoteHost
from jaxext.abtest.result import Result, Row, SideResult
from jaxext.abtest.settings import Setting, label

Host = LocalHost | RemoteHost
STOCK_SYSTEM = Setting(kernels=False, memory="system")
# A timed sample lasts at least this long, so that the clock and the scheduler do not show.
SAMPLE_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Options:
    """`steps` whose losses are compared, timed `repeats` (pairs), `budget` in seconds (None: as long as it takes).

    `contributions`: take the result apart kernel by kernel. `memory_row`: measure memory reuse in processes of its
    own. `tolerance` replaces that of the losses.
    """

    reference: Setting
    candidate: Setting
    steps: int = parity.FIRST_STEPS
    repeats: int = 20
    budget: float | None = None
    contributions: bool = True
    memory_row: bool = False
    seed: int = 0
    tolerance: float | None = None


class Watcher:
    """What an experiment tells while it runs; this one is silent."""

    def phase(self, text: str) -> None:
        """A new phase begins."""

    def expect(self, done: float, total: float) -> None:
        """`done` of `total` seconds, both estimates, have passed."""


class Clock:
    """The time budget: how much is spent and what is planned."""

    def __init__(self, budget: float | None, watcher: Watcher) -> None:
        self._begin = time.monotonic()
        self._budget = budget
        self.watcher = watcher
        self._planned = budget or 60.0

    def spent(self) -> float:
        return time.monotonic() - self._begin

    def left(self) -> float:
        return float("inf") if self._budget is None else self._budget - self.spent()

    def plan(self, remaining: float) -> None:
        """About `remaining` seconds of work are ahead."""
        planned = self.spent() + remaining
        self._planned = planned if self._budget is None else min(planned, self._budget)

    def tick(self) -> None:
        spent = self.spent()
        # An estimate that was too short must not look like the end.
        self.watcher.expect(spent, max(self._planned, 1.05 * spent + 1.0))


class Experiment:
    """Runs `options` on hosts that `start(setting)` makes, one for each kind of process that the sides need."""

    def __init__(self, name: str, options: Options, start: Callable[[Setting], Host], watcher: Watcher) -> None:
        self._name = name
        self._options = options
        self._start = start
        self._watcher = watcher
        self._clock = Clock(options.budget, watcher)
        self._hosts: dict[tuple[str, str], Host] = {}
        self._settings = {"reference": options.reference, "candidate": options.candidate}
        self._compiled: dict[str, Compilation] = {}
        self._losses: dict[str, list[float]] = {}
        self._step_seconds: dict[str, float] = {}
        self._leaves: list[parity.LeafError] = []
        self._notes: list[str] = []
        if options.memory_row:
            self._settings["system"] = STOCK_SYSTEM

    def run(self) -> Result:
        """Measure all there is to measure.

        Raises:
          TargetError, StepError: see RemoteHost and LocalHost.
        """
        try:
            return self._run()
        finally:
            for host in self._hosts.values():
                host.stop()

    def host(self, side: str) -> Host:
        """The host in which `side` lives."""
        setting = self._settings[side]
        if setting.process not in self._hosts:
            self._hosts[setting.process] = self._start(setting)
        return self._hosts[setting.process]

    def _run(self) -> Result:
        self._phase("starting")
        hosts = {side: self.host(side) for side in self._settings}
        self._notes += filter(None, [host.wait() for host in self._hosts.values()])
        facts = self._facts(hosts)
        peaks = hosts["candidate"].peaks(0.2)
        self._open_sides()
        self._phase("reading what jaxext replaces")
        replacements = hosts["candidate"].explain()
        self._compare_leaves()
        inner = self._steps_per_sample()
        kernels = self._kernels(replacements)
        seconds, memory = self._time_sides(inner, kernels)
        rows = self._contributions(kernels, inner)
        # Measured twice, because a peak is what the machine reaches when nothing else runs.
        peaks = {kind: max(rate, peaks[kind]) for kind, rate in hosts["candidate"].peaks(0.2).items()}
        sides = {name: self._side_result(name, seconds[name], peaks) for name in ("reference", "candidate")}
        self._phase("finishing")
        return Result(
            name=self._name,
            reference=sides["reference"],
            candidate=sides["candidate"],
            speed=timing.paired_ratio(seconds["reference"], seconds["candidate"], self._options.seed),
            parity=self._judge(sides),
            contributions=rows,
            memory=memory,
            replacements=replacements,
            facts=facts,
            peaks=peaks,
            wiring=hosts["reference"].describe_wiring(),
            seed=self._options.seed,
            elapsed=self._clock.spent(),
            notes=self._notes,
        )

    def _phase(self, text: str) -> None:
        self._watcher.phase(text)
        self._clock.tick()

    def _facts(self, hosts: dict[str, Host]) -> dict[str, Any]:
        facts = {side: hosts[side].facts() for side in ("reference", "candidate")}
        shared = facts["candidate"]
        for key in sorted(shared.keys() | facts["reference"].keys()):
            pair = facts["reference"].get(key), shared.get(key)
            if pair[0] != pair[1]:
                self._notes.append(f"{key} differs between the sides: {pair[0]} and {pair[1]}")
        load = machine.load_average()
        if load is not None and load > 1.5 * machine.threads():
            self._notes.append(f"the machine was busy (load {load:.1f} on {machine.threads()} CPUs): figures are noisy")
        return shared

    def _open_sides(self) -> None:
        pair = ("reference", "candidate")
        self._phase("tracing")
        if self.host(pair[0]) is self.host(pair[1]):
            traces = self.host(pair[0]).trace_seconds([self._settings[side] for side in pair])
        else:
            traces = [self.host(side).trace_seconds([self._settings[side]])[0] for side in pair]
        for side in self._settings:
            self._phase(f"compiling {self.label(side)}")
            self._compiled[side] = self.host(side).open(side, self._settings[side])
        for side, seconds in zip(pair, traces, strict=True):
            self._compiled[side] = dataclasses.replace(self._compiled[side], trace_seconds=seconds)

    def label(self, side: str) -> str:
        """What reports call a side."""
        other = "reference" if side == "candidate" else "candidate"
        return label(self._settings[side], self._settings[other])

    def step(self, side: str, count: int = 1) -> float:
        """Make `count` steps; seconds for one."""
        seconds, losses = self.host(side).run(side, count)
        self._losses.setdefault(side, []).extend(losses)
        self._clock.tick()
        return seconds / count

    def warm(self, side: str) -> float:
        """Make the steps that may still compile; seconds for the last."""
        seconds = self.step(side)
        return self.step(side) if self.host(side).warm_steps() > 1 else seconds

    def _compare_leaves(self) -> None:
        """The first steps warm all sides up and are compared leaf by leaf; they are not timed."""
        reference = self.host("reference")
        limit, step, begin = min(self._options.steps, parity.FIRST_STEPS), 0, time.monotonic()
        while step < limit:
            self._phase(f"comparing every leaf, step {step + 1}")
            # The probe needs to know what is state, which the first step of the reference shows.
            for side in ("reference", "candidate"):
                self._step_seconds[side] = self.step(side)
            if step == 0:
                reference.open_probe("probe", of="reference")
            reference.run("probe")
            self._leaves += self._compare_now(reference)
            step += 1
            # Two steps are a must (the second starts from a changed state); more, while they cost little.
            if step >= 2 and time.monotonic() - begin > 0.1 * min(self._clock.left(), 300.0):
                break
        reference.close("probe")
        if "system" in self._settings:
            self._step_seconds["system"] = self.warm("system")

    def _compare_now(self, reference: Host) -> list[parity.LeafError]:
        candidate = self.host("candidate")
        if candidate is reference:
            return reference.compare("reference", "candidate", "probe")
        with tempfile.TemporaryDirectory() as folder:
            candidate.save("candidate", folder)
            reference.adopt("candidate", folder)
            return reference.compare("reference", "candidate", "probe")

    def _steps_per_sample(self) -> int:
        fastest = min(self._step_seconds.values())
        return max(1, min(100, int(SAMPLE_SECONDS / max(fastest, 1e-6)) + 1))

    def _kernels(self, replacements: dict[str, Any]) -> list[str]:
        if not (self._options.contributions and self._options.candidate.kernels):
            return []
        used = {entry["kernel"] for entry in replacements.get("replaced", [])}
        return [kernel for kernel in KERNELS if kernel in used]

    def _time_sides(self, inner: int, kernels: list[str]) -> tuple[dict[str, list[float]], list[Row]]:
        """Interleaved rounds of both sides; the first ones include stock with system memory where that is a row."""
        options, left = self._options, self._clock.left()
        later = sum(self._contribution_seconds(inner) for _ in kernels)
        share = left - later if later < 0.5 * left else 0.5 * left
        deadline = time.monotonic() + share
        pair_seconds = inner * (self._step_seconds["reference"] + self._step_seconds["candidate"])
        done = len(self._losses.get("candidate", []))
        rounds = max(options.repeats, -(-(options.steps - done) // inner))
        self._clock.plan(min(rounds * pair_seconds, share) + later)
        with_system = max(3, rounds // 4) if "system" in self._settings else 0

        def measure(sides: list[str], count: int, seed: int, until: float, least: int) -> dict[str, list[float]]:
            def after(index: int) -> None:
                self._phase(f"timing, round {offset + index + 1} of at most {rounds}")

            return timing.measure_rounds(
                sides,
                lambda side: self.step(side, inner),
                rounds=count,
                seed=seed,
                out_of_time=lambda: time.monotonic() > until,
                least=least,
                after=after,
            )

        offset = 0
        self._phase(f"timing, round 1 of at most {rounds}")
        three = measure([*self._settings], with_system, options.seed, time.monotonic() + 0.4 * share, 2)
        offset = len(three["reference"])
        pair = measure(["reference", "candidate"], rounds - offset, options.seed + 1, deadline, max(0, 3 - offset))
        seconds = {side: three[side] + pair[side] for side in ("reference", "candidate")}
        if len(seconds["reference"]) < rounds:
            self._notes.append(f"the time budget allowed {len(seconds['reference'])} of {rounds} timed rounds")
        return seconds, self._memory_rows(three) if with_system else []

    def _memory_rows(self, seconds: dict[str, list[float]]) -> list[Row]:
        def row(name: str, reference: str, candidate: str) -> Row:
            ratio = timing.paired_ratio(seconds[reference], seconds[candidate], self._options.seed)
            middle = [sorted(seconds[side])[len(seconds[side]) // 2] for side in (reference, candidate)]
            return Row(name, ratio, middle[0], middle[1])

        return [
            row("memory reuse alone (stock: system memory against reuse)", "system", "reference"),
            row("all together (stock with system memory against jaxext with reuse)", "system", "candidate"),
        ]

    def _contribution_seconds(self, inner: int) -> float:
        compiled, step = self._compiled["candidate"], self._step_seconds
        making = compiled.lower_seconds + compiled.compile_seconds + 2 * (compiled.trace_seconds or 0.0)
        return making + (1 + contributions.LEAST_ROUNDS * 2) * inner * max(step["candidate"], 0.7 * step["reference"])

    def _contributions(self, kernels: list[str], inner: int) -> list[Row]:
        rows = []
        for index, kernel in enumerate(kernels):
            waiting = len(kernels) - index
            if self._clock.left() < self._contribution_seconds(inner):
                rows.append(Row(kernel, None, note="not measured: the time budget was spent"))
                continue
            self._clock.plan(min(waiting * self._contribution_seconds(inner), self._clock.left()))
            self._phase(f"without {kernel}")
            until = time.monotonic() + self._clock.left() / waiting
            rows.append(contributions.measure(self, kernel, inner, until))
        return rows

    def open_side(self, side: str, setting: Setting) -> None:
        """Add a side to those that can step."""
        self._settings[side] = setting
        self.host(side).open(side, setting)

    def close_side(self, side: str) -> None:
        self.host(side).close(side)
        del self._settings[side]

    @property
    def options(self) -> Options:
        return self._options

    def _side_result(self, side: str, seconds: list[float], peaks: dict[str, float]) -> SideResult:
        compiled = self._compiled[side]
        flops = self._compiled["reference"].flops
        kind = "bf16" if "bfloat16" in self._compiled["reference"].dtypes else "f32"
        share = None
        if flops and peaks.get(kind):
            share = flops / sorted(seconds)[len(seconds) // 2] / peaks[kind]
        return SideResult(self.label(side), self._settings[side], seconds, compiled, share)

    def _judge(self, sides: dict[str, SideResult]) -> parity.Parity:
        names = (sides["reference"].label, sides["candidate"].label)
        rule = parity.with_loss_tolerance(self.host("reference").rule(), self._options.tolerance)
        losses = [self._losses.get(side, []) for side in ("reference", "candidate")]
        both = min(len(losses[0]), len(losses[1]))
        found = parity.judge(losses[0][:both], losses[1][:both], self._leaves, rule, names)
        if len(losses[0]) < self._options.steps and losses[0]:
            self._notes.append(f"the time budget allowed {len(losses[0])} of {self._options.steps} compared steps")
        return found


def remote_starter(path: Path, factory: str, seed: int) -> Callable[[Setting], Host]:
    """A `start` for Experiment that gives each kind of setting a process of its own."""
    return lambda setting: RemoteHost(path, factory, setting, seed)
