"""Schedules by name. They are plain data; nothing here knows of JAX.

In what they say of bubbles and memory, p is the number of ranks, m of microbatches, v of stages on a rank; F, I and W
are the times of a forward pass, of cotangents and of weight gradients of one microbatch, and B = I + W.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..action import Schedule
from ..simulate import Costs
from .auto import auto
from .dualpipe_v import dualpipe_v
from .gpipe import gpipe
from .interleaved_1f1b import interleaved_1f1b
from .one_f_one_b import one_f_one_b
from .zb_h1 import zb_h1
from .zb_v import zb_v

NAMES = ("gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zb_v", "dualpipe_v", "auto")
_ONE_STAGE = {"gpipe": gpipe, "1f1b": one_f_one_b, "zb_h1": zb_h1}
_V = {"zb_v": zb_v, "dualpipe_v": dualpipe_v}


def make(
    name: str, num_ranks: int, num_microbatches: int, *, num_chunks: int | None = None, costs: Costs | None = None,
    max_live: Sequence[int] | None = None,
) -> Schedule:  # fmt: skip
    """The schedule of that name.

    num_chunks: stages on each rank; free for `interleaved_1f1b` (2 if not given) and `auto` (1), else the schedule's.
    costs, max_live: of `auto`, which see; the others do not depend on them.

    Raises:
      ValueError: an unknown name, a number below 1, a number of chunks that the schedule cannot have.
    """
    if name not in NAMES:
        raise ValueError(f"schedule {name!r}: expected one of {', '.join(NAMES)}.")
    chunks = num_chunks if num_chunks is not None else 2 if name in _V or name == "interleaved_1f1b" else 1
    for argument, value in (("num_ranks", num_ranks), ("num_microbatches", num_microbatches), ("num_chunks", chunks)):
        if value < 1:
            raise ValueError(f"{argument}={value}: expected at least 1.")
    if name == "interleaved_1f1b":
        return interleaved_1f1b(num_ranks, num_microbatches, chunks)
    if name == "auto":
        return auto(num_ranks, num_microbatches, chunks, costs, max_live)
    expected = 2 if name in _V else 1
    if chunks != expected:
        raise ValueError(
            f"num_chunks={chunks}: {name} has {expected} on each rank. Leave it out, or take interleaved_1f1b or auto."
        )
    return (_V | _ONE_STAGE)[name](num_ranks, num_microbatches)
