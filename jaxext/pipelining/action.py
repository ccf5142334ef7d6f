"""A schedule is data: for each rank, its actions in order. This file knows nothing of JAX.

The text form is a header and one line a rank, one cell an action:

    1f1b microbatches=2 placement=0,1
    rank 0: F0 F0→1 F1 F1→1 B0←1 B0 B1←1 B1
    rank 1: F0←0 F0 B0 B0→0 F1←0 F1 B1 B1→0

`placement` is the rank of each stage. A cell is `<kind><microbatch>[.<chunk>][→<rank>|←<rank>]`:

* kind `F`, `B`, `I` or `W` computes, `D` frees what a microbatch kept (see `Kind`);
* `.1` is the rank's second stage, `.2` its third; the first has no suffix;
* `→` sends to a rank and `←` receives from one: activations with `F`, cotangents with `B`.

CSV has the same cells; the header is its first line.
"""

from __future__ import annotations

import csv
import dataclasses
import enum
import functools
import io
import re
from collections.abc import Sequence


class Kind(enum.StrEnum):
    """F: forward. B: backward, cotangents and gradients at once. I: cotangents of a stage's inputs alone. W: gradients
    of its weights, from what I left. SEND_F and RECV_F move activations, SEND_B and RECV_B cotangents; DELETE frees."""

    F = "F"
    B = "B"
    I = "I"
    W = "W"
    SEND_F = "SEND_F"
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"
    DELETE = "D"


COMPUTE = frozenset({Kind.F, Kind.B, Kind.I, Kind.W})
SENDS, RECEIVES = frozenset({Kind.SEND_F, Kind.SEND_B}), frozenset({Kind.RECV_F, Kind.RECV_B})
MOVES = SENDS | RECEIVES
_CELL = re.compile(r"(?P<kind>[FBIWD])(?P<microbatch>\d+)(?:\.(?P<chunk>\d+))?(?:(?P<way>[→←])(?P<peer>\d+))?")
_HEADER = re.compile(r"(\S+) microbatches=(\d+) placement=(\d+(?:,\d+)*)")
_WAYS = {("F", "→"): Kind.SEND_F, ("F", "←"): Kind.RECV_F, ("B", "→"): Kind.SEND_B, ("B", "←"): Kind.RECV_B}
_LETTERS = {kind: letter for letter, kind in _WAYS.items()}

# What one action makes and others need: kind, stage, microbatch; a B makes what an I makes.
Result = tuple[Kind, int, int]
_RESULTS = {
    Kind.B: (Kind.I, 0),
    Kind.SEND_F: (Kind.F, 0),
    Kind.RECV_F: (Kind.F, -1),
    Kind.SEND_B: (Kind.I, 0),
    Kind.RECV_B: (Kind.I, 1),
}


@dataclasses.dataclass(frozen=True)
class Action:
    """One thing that a rank does. `stage`: of the whole model; of a send or receive, the rank's own stage.

    `peer`: the other rank of a send or receive, else None.
    """

    kind: Kind
    stage: int
    microbatch: int
    peer: int | None = None

    @property
    def result(self) -> Result:
        """What a computation makes, a send takes away, or a receive brings."""
        kind, ahead = _RESULTS.get(self.kind, (self.kind, 0))
        return kind, self.stage + ahead, self.microbatch


def needs(action: Action, num_stages: int) -> list[Result]:
    """What has to be there before a computation, of whichever rank."""
    stage, microbatch = action.stage, action.microbatch
    match action.kind:
        case Kind.F:
            return [(Kind.F, stage - 1, microbatch)] if stage else []
        case Kind.B | Kind.I if stage == num_stages - 1:
            return [(Kind.F, stage, microbatch)]
        case Kind.B | Kind.I:
            return [(Kind.F, stage, microbatch), (Kind.I, stage + 1, microbatch)]
        case Kind.W:
            return [(Kind.I, stage, microbatch)]
    return []


def counterpart(send: Action, rank: int) -> Action:
    """The receive, on the other rank, that ends a send of `rank`."""
    forward = send.kind is Kind.SEND_F
    kind, stage = (Kind.RECV_F, send.stage + 1) if forward else (Kind.RECV_B, send.stage - 1)
    return Action(kind, stage, send.microbatch, rank)


class ScheduleFormatError(ValueError):
    """A text that is no schedule: the line, the cell, and what was expected."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The actions of each rank in order. Whether they make sense is for `validate` to say.

    Attributes:
      name: of the method. num_microbatches: parts of the batch.
      placement: the rank of each stage, by stage. actions: by rank.

    Raises:
      ValueError: a name that a header cannot hold, or ranks without a stage.
    """

    name: str
    num_microbatches: int
    placement: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\S+", self.name):
            raise ValueError(f"name={self.name!r}: expected a word without spaces.")
        if set(self.placement) != set(range(self.num_ranks)):
            raise ValueError(
                f"placement={self.placement}: expected the rank of each stage, and every one of the {self.num_ranks} "
                "ranks that have actions to be there."
            )

    @property
    def num_ranks(self) -> int:
        return len(self.actions)

    @property
    def num_stages(self) -> int:
        return len(self.placement)

    def stages_of(self, rank: int) -> list[int]:
        """The stages on a rank, in the order of the model: its chunks."""
        return [stage for stage, own in enumerate(self.placement) if own == rank]

    @functools.cached_property
    def chunk(self) -> tuple[int, ...]:
        """Of each stage, its number among the stages of its rank."""
        return tuple(self.placement[:stage].count(rank) for stage, rank in enumerate(self.placement))

    def cell(self, action: Action) -> str:
        """The text of one action."""
        letter, way = _LETTERS.get(action.kind, (action.kind.value, ""))
        chunk = self.chunk[action.stage] if action.stage in range(self.num_stages) else "?"
        return f"{letter}{action.microbatch}" + (f".{chunk}" if chunk else "") + (f"{way}{action.peer}" if way else "")

    def to_text(self) -> str:
        """The text form, columns aligned."""
        rows = [[self.cell(action) for action in actions] for actions in self.actions]
        width = max((len(cell) for row in rows for cell in row), default=1)
        lines = [f"rank {rank}: " + " ".join(cell.ljust(width) for cell in row) for rank, row in enumerate(rows)]
        return "\n".join([self._header(), *(line.rstrip() for line in lines)]) + "\n"

    def to_csv(self) -> str:
        """The header and one row a rank, as comma-separated values."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([self._header()])
        writer.writerows([self.cell(action) for action in actions] for actions in self.actions)
        return text.getvalue()

    def _header(self) -> str:
        return f"{self.name} microbatches={self.num_microbatches} placement={','.join(map(str, self.placement))}"

    @classmethod
    def from_text(cls, text: str) -> Schedule:
        """
        Raises:
          ScheduleFormatError: naming the line and cell at fault.
        """
        header, *lines = text.splitlines() or [""]
        rows = []
        for rank, line in enumerate(lines):
            start = f"rank {rank}:"
            if not line.startswith(start):
                raise ScheduleFormatError(f"line {rank + 2}: {line[:30]!r} does not begin with {start!r}.")
            rows.append(line[len(start) :].split())
        return cls._from_rows(header, rows)

    @classmethod
    def from_csv(cls, text: str) -> Schedule:
        """
        Raises:
          ScheduleFormatError: naming the line and cell at fault.
        """
        header, *rows = list(csv.reader(io.StringIO(text))) or [[]]
        return cls._from_rows(header[0] if header else "", rows)

    @classmethod
    def _from_rows(cls, header: str, rows: Sequence[Sequence[str]]) -> Schedule:
        found = _HEADER.fullmatch(header.strip())
        if found is None:
            raise ScheduleFormatError(
                f"line 1: {header[:40]!r} is no header; expected such as '1f1b microbatches=8 placement=0,1,2,3'."
            )
        count, placement = int(found[2]), tuple(map(int, found[3].split(",")))
        if set(placement) != set(range(len(rows))):
            raise ScheduleFormatError(
                f"line 1: placement={found[3]} does not fit the number of lines with a rank's actions, {len(rows)}; "
                "expected one for each rank in it."
            )
        stages = [[stage for stage, own in enumerate(placement) if own == rank] for rank in range(len(rows))]
        actions = tuple(
            tuple(_parse(cell, stages, count, rank, place) for place, cell in enumerate(row))
            for rank, row in enumerate(rows)
        )
        return cls(found[1], count, placement, actions)


def _parse(cell: str, stages: Sequence[Sequence[int]], count: int, rank: int, place: int) -> Action:
    where = f"line {rank + 2}, cell {place + 1}: {cell!r}"
    found = _CELL.fullmatch(cell)
    way = (found["kind"], found["way"]) if found and found["way"] else None
    if found is None or (way is not None and way not in _WAYS):
        raise ScheduleFormatError(f"{where} is no action; expected such as F0, B3, I3, W3.1, D3, F0→1 or B0←1.")
    chunk, microbatch = int(found["chunk"] or 0), int(found["microbatch"])
    peer = int(found["peer"]) if way else None
    if chunk >= len(stages[rank]):
        raise ScheduleFormatError(f"{where} is of stage .{chunk} of rank {rank}, which has {len(stages[rank])}.")
    if microbatch >= count:
        raise ScheduleFormatError(f"{where} is of microbatch {microbatch}; line 1 says that there are {count}.")
    if peer is not None and peer >= len(stages):
        raise ScheduleFormatError(f"{where} is a move to or from rank {peer}; there are {len(stages)} ranks.")
    return Action(_WAYS[way] if way else Kind(found["kind"]), stages[rank][chunk], microbatch, peer)
