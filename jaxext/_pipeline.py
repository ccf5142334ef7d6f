"""`jaxext.pipeline`: an unmodified train step, run over pipeline stages."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from . import _jax_compat as compat
from . import _settings
from ._check import Checked, has_nnx
from .pipelining import arguments, build, filtered, gathering, measuring
from .pipelining.arguments import Call, Options
from .pipelining.build import Built, Request
from .pipelining.plan import PipelinePlan
from .pipelining.simulate import Costs
from .pipelining.transport import connect
from .rewrite import hooks

_JIT_OPTIONS = ("static_argnums", "static_argnames", "donate_argnums", "donate_argnames")


def pipeline(
    train_step: Callable[..., Any] | None = None,
    *,
    num_stages: int | None = None,
    num_microbatches: int | None = None,
    schedule: str = "1f1b",
    num_chunks: int | None = None,
    mesh: Any = None,
    axis: str = "stage",
    devices: Sequence[Any] | None = None,
    batch_argnames: str | Iterable[str] | None = None,
    check: bool = False,
    timeout: float = 300.0,
    **jit_options: Any,
) -> Any:
    """A train step over pipeline stages, with the signature, the results and the state tree of `train_step`.

    The step is not changed: the loss that it differentiates is found, cut into stages of equal cost, and run on
    microbatches in the order of a schedule; the update of each parameter runs where the parameter lives. Losses that
    are sums or means over the examples of the batch can be pipelined, others are refused with the reason.

    Args:
      train_step: a function of arrays, pytrees and flax.nnx objects that differentiates one loss and updates the state;
        plain, or jitted with `jax.jit` or `nnx.jit`. None gives a decorator.
      num_stages: ranks of the pipeline, each with `num_chunks` stages of the loss; by default all of `devices`, or the
        length of the mesh along `axis`.
      num_microbatches: parts of the batch; by default the largest divisor of the batch up to 4 * num_stages.
      schedule: `gpipe`, `1f1b`, `interleaved_1f1b`, `zb_h1`, `zb_v`, `dualpipe_v` or `auto`.
      num_chunks: stages of the loss on each device, for `interleaved_1f1b`; 2 by default.
      mesh: a `jax.sharding.Mesh` with an axis that the stages lie along; each runs on its slice, over whose other axes
        arrays keep the shardings that they have, and constraints in the step their specs.
      axis: the name of that axis.
      devices: where the stages run, in order; by default `jax.devices()`.
      batch_argnames: arguments that hold the examples along the first axis of their arrays; found if not given.
      check: the first step is also run by plain `jax.jit`, and all results are compared.
      timeout: with several processes, seconds that one waits for another: to come to its first step, and then for each
        array. Choose it longer than any healthy pause, such as one for a checkpoint.
      jit_options: `static_argnums`, `static_argnames`, `donate_argnums`, `donate_argnames`, as in `jax.jit`.

    Returns:
      A function as `train_step`. Its results live on the devices of their stages. `.plan(*args)` shows what is done.

    Raises:
      TypeError: `train_step` is not callable, an unknown option, or a mesh that is none.
      ValueError: an unknown schedule, a number of stages or microbatches below 1, a mesh without `axis`, or with
        another number of stages along it, a step jitted with shardings; on the first call also Refusal, where the step
        cannot be pipelined, with the reason, the user's line and the remedy.
      PeerError: a process is late, has failed or is gone; it names the process, the pass and microbatch, the remedy.
      FloatingPointError: under `jax_debug_nans` or `jax_debug_infs`, naming the pass, microbatch and process.
      CheckError: `check`, where results differ.
    """
    places = None if devices is None else tuple(devices)
    request = Request(num_stages, num_microbatches, schedule, num_chunks, places, mesh, axis, timeout)
    request.validate()
    unknown = sorted(set(jit_options) - set(_JIT_OPTIONS))
    if unknown:
        raise TypeError(f"pipeline: unknown option {unknown[0]!r}. The options of jax.jit it takes: {_JIT_OPTIONS}.")
    names = (batch_argnames,) if isinstance(batch_argnames, str) else batch_argnames
    make = functools.partial(_pipelined, request, names, check, jit_options)
    return make if train_step is None else make(train_step)


def _pipelined(request: Request, batch: Any, check: bool, jit_options: dict[str, Any], train_step: Any) -> Any:
    if not callable(train_step):
        raise TypeError(f"pipeline: train_step is {train_step!r}, expected a callable. Decorate a train step.")
    pipelined = Pipelined(train_step, request, batch, jit_options)
    return Checked(pipelined) if check else pipelined


class Pipelined:
    """A train step over pipeline stages; see `jaxext.pipeline`."""

    def __init__(self, step: Callable[..., Any], request: Request, batch: Any, jit_options: dict[str, Any]) -> None:
        functools.update_wrapper(self, step)
        self._step = _plain(step)
        self._signature = inspect.signature(self._step)
        own = compat.jit_options(step)
        for name in ("in_shardings", "out_shardings"):
            if any(isinstance(leaf, jax.sharding.Sharding) for leaf in own.pop(f"{name}_leaves", ())):
                raise ValueError(
                    f"pipeline: train_step is jitted with {name}, but each stage has a mesh of its own. Leave it out, "
                    "and put the arguments where they belong: jax.device_put(array, NamedSharding(mesh, …))."
                )
        is_filtered = filtered.is_filter_jitted(step)
        if is_filtered:
            own = filtered.donated(step, list(self._signature.parameters))
        self._options = Options.of(self._signature, own | jit_options, batch, is_filtered)
        self._request = request
        self._lock = threading.Lock()
        self._built: dict[Any, Built] = {}
        self._costs: Costs | None = None
        self._plain: Callable[..., Any] | None = None
        self._anchor = hooks.Relying()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _settings.is_off():
            return self._undivided(args, kwargs)
        call = arguments.flatten(self._step, self._signature, self._options, args, kwargs)
        built = self._build(call)
        with built.running():
            return call.results(built.executor()(call.leaves), built.output)

    def plan(self, *args: Any, **kwargs: Any) -> PipelinePlan:
        """What is done for arguments like these; nothing is run.

        Raises:
          Refusal: the step cannot be pipelined.
        """
        return self._build(arguments.flatten(self._step, self._signature, self._options, args, kwargs)).plan

    def measure(self, *args: Any, **kwargs: Any) -> tuple[Any, Costs]:
        """One step whose actions run one at a time and are timed: its result, and the seconds of each stage's passes.

        Call it after a step, so that everything is compiled. With several processes all call it alike; the costs are
        those of all, with latency (seconds) and bandwidth (bytes a second) of the slowest link between neighbours.
        `jaxext.pipelining.simulate.simulate(step.plan(*args).schedule, costs).makespan` predicts the loss's seconds.
        """
        call = arguments.flatten(self._step, self._signature, self._options, args, kwargs)
        built = self._build(call)
        stopwatch = measuring.Stopwatch(built.schedule)
        with built.running():
            results = built.executor()(call.leaves, watch=stopwatch)
        return call.results(results, built.output), built.executor().joined(stopwatch.costs(built.counted))

    def replan(self, costs: Costs) -> None:
        """From the next step on, what is done is planned for measured costs, as `measure` gives them.

        With `schedule="auto"` the order is made for them, and never slower by simulation than a schedule known by name;
        other schedules keep theirs, and their plans predict from these costs. What is compiled stays so. With several
        processes all call this alike, with the same costs.

        Raises:
          ValueError: `costs` are of another number of stages, or are no times.
        """
        costs.check(len(self._request.ranks()) * self._request.chunks())
        with self._lock:
            self._costs = costs
            for built in self._built.values():
                built.replan(costs)

    def gather(self, state: Any) -> Any:
        """`state` as NumPy arrays, whole on every process: what a checkpoint of several processes is written from.

        Args:
          state: a pytree of arrays, any of which may live on another process. All processes call this alike.

        Returns:
          The same tree, each array a `numpy.ndarray` of its shape and dtype; typed random keys stay as they are.

        Raises:
          PeerError: another process is gone, or has sent nothing for `timeout` seconds.
        """
        processes = {device.process_index for device in self._request.available()}
        if len(processes) == 1:
            return gathering.local(state)
        return gathering.gather(state, connect(self._request.timeout), processes, self._request.timeout)

    def _build(self, call: Call) -> Built:
        with self._lock:
            found = self._built.get(call.key)
            if found is None:
                found = build.build(self._step, call, self._options, self._request, self._costs)
                self._built[call.key] = found
        return found

    def _undivided(self, args: Any, kwargs: Any) -> Any:
        """The step by plain JAX, on the first device or over the whole mesh."""
        nnx = sys.modules.get("flax.nnx") if has_nnx((args, kwargs)) else None
        plain = self._plain
        if plain is None and (self._options.filtered or filtered.holds_module((args, kwargs))):
            plain = self._plain = sys.modules["equinox"].filter_jit(self._step)
        elif plain is None:
            plain = self._plain = (nnx or jax).jit(self._step, static_argnames=tuple(self._options.static))
        if nnx is None:
            place = self._request.undivided()
            args, kwargs = jax.tree.map(lambda x: place.put([x])[0] if isinstance(x, jax.Array) else x, (args, kwargs))
        return plain(*args, **kwargs)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __repr__(self) -> str:
        return f"<pipelined {compat.user_name(self._step)}>"


def _plain(step: Callable[..., Any]) -> Callable[..., Any]:
    """The function inside a jitted one."""
    if filtered.is_filter_jitted(step):
        return _plain(step.__wrapped__)
    inner = compat.jitted_function(step) if isinstance(step, jax.stages.Wrapped) else None
    if inner is None and isinstance(step, jax.stages.Wrapped):
        inner = getattr(step, "__wrapped__", None)
    return step if inner is None else _plain(getattr(inner, "__wrapped__", inner))
