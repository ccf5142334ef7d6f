"""Schedules by name. They are plain data; nothing here knows of JAX."""

from __future__ import annotations

from collections.abc import Sequence

from ..action import Kind, Schedule
from ..simulate import Costs, simulate
from .fixed import gpipe, interleaved_1f1b, one_f_one_b
from .list_schedule import list_schedule
from .zero_bubble import dualpipe_v, zb_h1, zb_v

NAMES = ("gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zb_v", "dualpipe_v", "auto")


def make(
    name: str, num_ranks: int, num_microbatches: int, *, num_chunks: int = 1, costs: Costs | None = None,
    max_live: Sequence[int] | None = None,
) -> Schedule:  # fmt: skip
    """The schedule of that name.

    num_chunks: stages on each rank, for `interleaved_1f1b`. costs and max_live (by rank, as `list_schedule` has it): of
    `auto`; by default even costs, and the memory of 1F1B.

    Raises:
      ValueError: an unknown name.
    """
    match name:
        case "gpipe":
            return gpipe(num_ranks, num_microbatches)
        case "1f1b":
            return one_f_one_b(num_ranks, num_microbatches)
        case "interleaved_1f1b":
            return interleaved_1f1b(num_ranks, num_microbatches, num_chunks)
        case "zb_h1":
            return zb_h1(num_ranks, num_microbatches)
        case "zb_v":
            return zb_v(num_ranks, num_microbatches)
        case "dualpipe_v":
            return dualpipe_v(num_ranks, num_microbatches)
        case "auto":
            return auto(num_ranks, num_microbatches, costs or Costs.even(num_ranks), max_live)
    raise ValueError(f"schedule {name!r}: expected one of {', '.join(NAMES)}.")


def auto(num_ranks: int, num_microbatches: int, costs: Costs, max_live: Sequence[int] | None = None) -> Schedule:
    """The fastest by simulation, under a limit of memory: two that are list-scheduled from the costs, 1F1B, ZB-H1.

    One stage a rank. `max_live` by rank; by default p, the memory of 1F1B's first rank.
    """
    limits = list(max_live) if max_live is not None else [num_ranks] * num_ranks
    orders = ((Kind.I, Kind.W, Kind.F), (Kind.I, Kind.F, Kind.W))
    made = [list_schedule("auto", num_microbatches, range(num_ranks), costs, limits, order) for order in orders]
    known = [one_f_one_b(num_ranks, num_microbatches), zb_h1(num_ranks, num_microbatches)]
    fitting = [s for s in known if all(p <= limit for p, limit in zip(simulate(s, costs).peak_live, limits))]
    best = min([*made, *fitting], key=lambda schedule: simulate(schedule, costs).makespan)
    return Schedule("auto", best.num_microbatches, best.placement, best.actions)
