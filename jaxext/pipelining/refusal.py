"""Why a step is not pipelined."""


class Refusal(ValueError):
    """A step, or a part of it, cannot be pipelined with the same results; says why, where, and what would help.

    Attributes:
      reason: what stands in the way. where: the user's line, "" where none is known. remedy: what to change.
    """

    def __init__(self, reason: str, remedy: str = "", where: str = "") -> None:
        self.reason, self.remedy, self.where = reason, remedy, where
        place = f" (at {where})" if where else ""
        super().__init__(f"pipeline: {reason}{place}. {remedy}".strip())
