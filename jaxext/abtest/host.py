"""One process in which sides live: each has its own state and steps through the same program under its setting."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
import traceback
from typing import Any

import jax

import jaxext
from jaxext.abtest import counting, machine, parity, saved, state
from jaxext.abtest.protocol import Workload
from jaxext.abtest.settings import Setting


class StepError(RuntimeError):
    """The step raised. `kernels`: it did so on the jaxext side, and stock JAX had run it."""

    def __init__(self, message: str, kernels: bool) -> None:
        super().__init__(message)
        self.kernels = kernels


@dataclasses.dataclass(frozen=True)
class Compilation:
    """What making a side ready took (seconds) and what its program needs (bytes, floating-point operations).

    `temporary_bytes`: XLA's peak of temporary buffers. `trace_seconds`: from cold caches, None where not measured.
    """

    lower_seconds: float
    compile_seconds: float
    trace_seconds: float | None = None
    temporary_bytes: int | None = None
    argument_bytes: int | None = None
    flops: float | None = None
    dtypes: tuple[str, ...] = ()


@dataclasses.dataclass
class _Side:
    function: Any
    setting: Setting
    start: tuple[Any, ...]
    args: tuple[Any, ...]
    compilation: Compilation
    outputs: Any = None
    steps: int = 0


@dataclasses.dataclass
class _Adopted:
    leaves: state.Leaves
    steps: int


def jitted(workload: Workload) -> Any:
    """The step as the user jitted it; a plain function is compiled as jax.jit (or nnx.jit) would."""
    if hasattr(workload.step, "lower"):
        return workload.step
    if state.has_modules(workload.args):
        from flax import nnx

        return nnx.jit(workload.step)
    return jax.jit(workload.step)


def _where(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    users = [f for f in frames if "/jaxext/" not in f.filename]
    return f" ({users[-1].filename}:{users[-1].lineno})" if users else ""


def _jaxpr(traced: Any) -> Any:
    """The program of a traced jax.jit or nnx.jit function; None where it is not to be had."""
    closed = getattr(getattr(traced, "traced", traced), "jaxpr", None)
    return getattr(closed, "jaxpr", closed)


def _products(jaxpr: Any) -> tuple[str, ...]:
    return tuple(sorted(counting.product_dtypes(jaxpr)))


class LocalHost:
    """Sides in this process. `cold_traces`: measure trace times from empty caches, which empties JAX's caches."""

    def __init__(self, workload: Workload, seed: int, cold_traces: bool) -> None:
        self._workload = workload
        self._function = jitted(workload)
        # Never handed to the step, which may donate or change what it gets.
        self._start = workload.args
        self._probe_start: tuple[Any, ...] | None = None
        self._sides: dict[str, _Side] = {}
        self._adopted: dict[str, _Adopted] = {}
        self._in_place = state.modules_in(workload.args)
        self._wiring: state.Wiring | None = None
        self._seed = seed
        self._cold_traces = cold_traces
        self._rule = parity.tolerance_for(())

    # Making sides ready

    def open(self, name: str, setting: Setting) -> Compilation:
        """Trace, lower and compile one side on a copy of the arguments.

        Raises:
          StepError: tracing or compiling raised.
        """
        args = state.copy_args(self._start)
        with self._reporting(setting):
            function = self._under(setting)
            compilation = self._compile(function, setting, args)
        self._sides[name] = _Side(function, setting, self._start, args, compilation)
        if len(self._sides) == 1:
            self._rule = parity.tolerance_for(compilation.dtypes)
        return compilation

    def trace_seconds(self, settings: list[Setting]) -> list[float | None]:
        """Seconds that tracing takes under each setting, from empty caches; None where that is not measured."""
        if not self._cold_traces:
            return [None] * len(settings)
        found: list[float | None] = []
        # The first trace of a process imports and initialises much, so it is thrown away; the last, of the side that
        # is opened first, stays in the cache.
        for setting in [settings[0], *reversed(settings)]:
            jax.clear_caches()
            args = state.copy_args(self._start)
            with self._reporting(setting), self._scope(setting):
                function = self._under(setting)
                begin = time.perf_counter()
                function.trace(*args)
                found.append(time.perf_counter() - begin)
        return found[:0:-1]

    def _under(self, setting: Setting) -> Any:
        if not setting.kernels:
            return self._function
        return jaxext.accelerate(self._function, exclude=setting.exclude, precision=setting.precision or None)

    def _scope(self, setting: Setting) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if setting.kernels else jaxext.disabled()

    @contextlib.contextmanager
    def _reporting(self, setting: Setting):
        try:
            yield
        except Exception as error:
            first = str(error).strip().splitlines() or [""]
            what = f"{type(error).__name__}: {first[0]}{_where(error)}"
            if setting.kernels:
                text = f"the step runs on stock JAX but fails under jaxext: {what}"
            else:
                text = (
                    f"the step of {self._workload.name} fails on stock JAX: {what}. "
                    "Call step(*args) yourself until it runs, then test it again."
                )
            raise StepError(text, setting.kernels) from error

    def _compile(self, function: Any, setting: Setting, args: tuple[Any, ...]) -> Compilation:
        with self._scope(setting):
            traced = function.trace(*args)
            begin = time.perf_counter()
            lowered = traced.lower()
            lowered_at = time.perf_counter()
            compiled = lowered.compile()
            done = time.perf_counter()
        analysis = compiled.memory_analysis()
        jaxpr = _jaxpr(traced)
        return Compilation(
            lower_seconds=lowered_at - begin,
            compile_seconds=done - lowered_at,
            temporary_bytes=getattr(analysis, "temp_size_in_bytes", None),
            argument_bytes=getattr(analysis, "argument_size_in_bytes", None),
            flops=counting.count_flops(jaxpr) if jaxpr is not None and not setting.kernels else None,
            dtypes=_products(jaxpr) if jaxpr is not None else (),
        )

    def arithmetic(self) -> tuple[float | None, tuple[str, ...]]:
        """Operations of one step on stock JAX (count_flops; None: unknown), and the dtypes of its products."""
        stock = Setting(kernels=False)
        with self._reporting(stock), self._scope(stock):
            jaxpr = _jaxpr(self._function.trace(*state.copy_args(self._start)))
        return (None, ()) if jaxpr is None else (counting.count_flops(jaxpr), _products(jaxpr))

    def open_probe(self, name: str, of: str) -> None:
        """A side like `of` that starts from a state disturbed by one unit roundoff, to learn stock's own error."""
        side = self._sides[of]
        if self._probe_start is None:
            start = list(self._start)
            disturb = parity.disturber(self._rule, self._seed)
            stateful = self.wiring.state or tuple(range(len(start)))
            # All of them in one copy, so that references between modules stay shared.
            changed = state.copy_args(tuple(start[index] for index in stateful), disturb)
            for index, argument in zip(stateful, changed, strict=True):
                start[index] = argument
            self._probe_start = tuple(start)
        start = self._probe_start
        self._sides[name] = _Side(side.function, side.setting, start, state.copy_args(start), side.compilation)

    def close(self, name: str) -> None:
        """Forget a side's state."""
        self._sides.pop(name, None)
        gc.collect()

    # Stepping

    @property
    def wiring(self) -> state.Wiring:
        if self._wiring is None:
            raise RuntimeError("no side has made a step yet")
        return self._wiring

    def warm_steps(self) -> int:
        """Steps until a side is compiled for good: a Python number in the state comes back as an array."""
        numbers = (leaf for index in self.wiring.state for leaf in jax.tree.leaves(self._start[index]))
        return 2 if any(isinstance(leaf, int | float) for leaf in numbers) else 1

    def describe_wiring(self) -> str:
        return self.wiring.describe()

    def run(self, name: str, steps: int = 1) -> tuple[float, list[float]]:
        """Make `steps` steps; seconds for all of them, and their losses (empty where the step has none).

        Raises:
          StepError: the step raised.
        """
        side = self._sides[name]
        with self._reporting(side.setting):
            seconds, losses = 0.0, []
            for _ in range(steps):
                args = self._following(side)
                with self._scope(side.setting):
                    begin = time.perf_counter()
                    outputs = jax.block_until_ready(side.function(*args))
                    for index in self._in_place:
                        jax.block_until_ready([x for x in jax.tree.leaves(args[index]) if isinstance(x, jax.Array)])
                    seconds += time.perf_counter() - begin
                side.args, side.outputs = args, outputs
                side.steps += 1
                if self._wiring is None:
                    self._wiring = state.wire(self._workload.step, self._start, outputs)
                loss = state.loss_of(self.wiring, outputs)
                losses += [] if loss is None else [loss]
        return seconds, losses

    def _following(self, side: _Side) -> tuple[Any, ...]:
        if side.outputs is None:
            return side.args
        if self._workload.advance is not None:
            return tuple(self._workload.advance(side.args, side.outputs))
        args = list(state.next_args(self.wiring, side.args, side.outputs))
        for index, argument in enumerate(args):
            if index not in self.wiring.state and state.is_deleted(argument):
                args[index] = state.copy_args((side.start[index],))[0]
        return tuple(args)

    # Comparing

    def save(self, name: str, folder: str) -> None:
        """Write a side's leaves to `folder`."""
        side = self._sides[name]
        saved.save_leaves(folder, self._leaves(side), side.steps)

    def adopt(self, name: str, folder: str) -> None:
        """Take the leaves in `folder` as those of a side `name`."""
        self._adopted[name] = _Adopted(*saved.load_leaves(folder))

    def _leaves(self, side: _Side | _Adopted) -> state.Leaves:
        if isinstance(side, _Adopted):
            return side.leaves
        args = state.next_args(self.wiring, side.args, side.outputs)
        return state.leaves(self.wiring, args, side.outputs)

    def compare(self, reference: str, candidate: str, probe: str) -> list[parity.LeafError]:
        """Compare all leaves of two sides after equally many steps, against the probe's error."""
        sides = [self._adopted.get(name) or self._sides[name] for name in (reference, candidate, probe)]
        if len({side.steps for side in sides}) != 1 or self._probe_start is None:
            raise RuntimeError("sides can be compared after equally many steps only")
        starts = (state.leaves(self.wiring, self._start), state.leaves(self.wiring, self._probe_start))
        leaves = (self._leaves(sides[0]), self._leaves(sides[1]), self._leaves(sides[2]))
        return parity.compare_leaves(sides[0].steps, leaves, starts, self._rule)

    def rule(self) -> parity.Tolerance:
        return self._rule

    def explain(self) -> dict[str, Any]:
        """jaxext's own account of the step: what it replaced, missed and left to stock JAX."""
        with self._reporting(Setting()):
            return jaxext.explain(self._function)(*state.copy_args(self._start)).to_dict()

    def facts(self) -> dict[str, Any]:
        return machine.facts()

    def peaks(self, seconds: float) -> dict[str, float]:
        return machine.peaks(seconds)

    def wait(self) -> str:
        """This process is ready; "" as its memory setting is the user's."""
        return ""

    def peak_rss(self) -> int:
        return machine.peak_rss()

    def stop(self) -> None:
        """Forget all sides."""
        self._sides.clear()
        self._adopted.clear()
        gc.collect()
