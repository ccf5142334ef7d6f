"""A schedule is data: for each rank, its actions in order. This file knows nothing of JAX.

Text form: a header, then one line a rank, one cell an action. A cell is the kind and the microbatch, `F0`, `B3`, `I3`,
`W3`, with `.1` behind it for the rank's second stage; sends and receives name what they move and the other rank:
`F0→1` sends the activations of microbatch 0 to rank 1, `B0←1` receives its cotangents from there; `D0` frees what
microbatch 0 kept.
"""

from __future__ import annotations

import csv
import dataclasses
import enum
import io
import re
from collections.abc import Iterable, Sequence


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


COMPUTE = (Kind.F, Kind.B, Kind.I, Kind.W)
SENDS, RECEIVES = (Kind.SEND_F, Kind.SEND_B), (Kind.RECV_F, Kind.RECV_B)
_CELL = re.compile(r"(?P<kind>[FBIWD])(?P<microbatch>\d+)(?:\.(?P<chunk>\d+))?(?:(?P<way>[→←])(?P<peer>\d+))?")
_MOVES = {("F", "→"): Kind.SEND_F, ("F", "←"): Kind.RECV_F, ("B", "→"): Kind.SEND_B, ("B", "←"): Kind.RECV_B}
_LETTERS = {kind: letter for letter, kind in _MOVES.items()}


@dataclasses.dataclass(frozen=True)
class Action:
    """One thing that a rank does. `stage`: of the whole model; of a send or receive, the rank's own stage.

    `peer`: the other rank of a send or receive, else None.
    """

    kind: Kind
    stage: int
    microbatch: int
    peer: int | None = None


class ScheduleFormatError(ValueError):
    """A text that is no schedule: the line, the cell, and what was expected."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The actions of each rank in order.

    Attributes:
      name: of the method. num_microbatches: parts of the batch.
      placement: the rank of each stage, by stage. actions: by rank.
    """

    name: str
    num_microbatches: int
    placement: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]

    @property
    def num_ranks(self) -> int:
        return len(self.actions)

    @property
    def num_stages(self) -> int:
        return len(self.placement)

    def stages_of(self, rank: int) -> list[int]:
        """The stages on a rank, in the order of the model: its chunks."""
        return [stage for stage, own in enumerate(self.placement) if own == rank]

    def cell(self, action: Action, rank: int) -> str:
        """The text of one action."""
        chunk = self.stages_of(rank).index(action.stage)
        letter, way = _LETTERS.get(action.kind, (action.kind.value, ""))
        peer = f"{way}{action.peer}" if way else ""
        return f"{letter}{action.microbatch}" + (f".{chunk}" if chunk else "") + peer

    def to_text(self) -> str:
        """The text form, columns aligned."""
        rows = [[self.cell(action, rank) for action in actions] for rank, actions in enumerate(self.actions)]
        width = max((len(cell) for row in rows for cell in row), default=1)
        lines = [self._header()]
        lines += [
            f"rank {rank}: " + " ".join(cell.ljust(width) for cell in row).rstrip() for rank, row in enumerate(rows)
        ]
        return "\n".join(lines) + "\n"

    def _header(self) -> str:
        return f"{self.name} microbatches={self.num_microbatches} placement={','.join(map(str, self.placement))}"

    @classmethod
    def from_text(cls, text: str) -> Schedule:
        """
        Raises:
          ScheduleFormatError: naming the line and cell at fault.
        """
        header, *lines = [line for line in text.splitlines() if line.strip()] or [""]
        rows = []
        for number, line in enumerate(lines):
            start = f"rank {number}:"
            if not line.startswith(start):
                raise ScheduleFormatError(f"line {number + 2}: {line[:30]!r} does not begin with {start!r}.")
            rows.append(line[len(start) :].split())
        return cls._from_rows(header, rows)

    def to_csv(self) -> str:
        """The header and one row a rank, as comma-separated values."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([self._header()])
        writer.writerows([self.cell(action, rank) for action in row] for rank, row in enumerate(self.actions))
        return text.getvalue()

    @classmethod
    def from_csv(cls, text: str) -> Schedule:
        """
        Raises:
          ScheduleFormatError: naming the line and cell at fault.
        """
        (header, *_), *rows = list(csv.reader(io.StringIO(text))) or [[""]]
        return cls._from_rows(header, rows)

    @classmethod
    def _from_rows(cls, header: str, rows: Sequence[Iterable[str]]) -> Schedule:
        found = re.fullmatch(r"(\S+) microbatches=(\d+) placement=(\d+(?:,\d+)*)", header.strip())
        if found is None:
            raise ScheduleFormatError(
                f"line 1: {header[:40]!r} is no header; expected 'name microbatches=8 placement=0,1,2,3'."
            )
        placement = tuple(map(int, found[3].split(",")))
        if len(rows) != max(placement) + 1:
            raise ScheduleFormatError(f"{len(rows)} ranks have a line, the placement has {max(placement) + 1}.")
        actions = []
        for rank, row in enumerate(rows):
            stages = [stage for stage, own in enumerate(placement) if own == rank]
            actions.append(tuple(_parse(cell, stages, rank, place) for place, cell in enumerate(row)))
        return cls(found[1], int(found[2]), placement, tuple(actions))


def _parse(cell: str, stages: Sequence[int], rank: int, place: int) -> Action:
    found = _CELL.fullmatch(cell)
    chunk = int(found["chunk"] or 0) if found else 0
    way = (found["kind"], found["way"]) if found and found["way"] else None
    if found is None or chunk >= len(stages) or (way is not None and way not in _MOVES):
        raise ScheduleFormatError(
            f"rank {rank}, cell {place}: {cell!r} is no action of a rank with {len(stages)} stages; "
            "expected such as F0, B3, W3.1 or F0→1."
        )
    kind = _MOVES[way] if way else Kind(found["kind"])
    peer = int(found["peer"]) if found["peer"] else None
    return Action(kind, stages[chunk], int(found["microbatch"]), peer)
