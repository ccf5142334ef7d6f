"""A progress bar that runs on estimated seconds, so that it moves as time does."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from jaxext.abtest.experiment import Watcher


class ProgressBar(Watcher):
    """Shows phase, bar, elapsed and remaining time on standard error; a context manager."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=32),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=None, left="")
        self._console = console
        self._last = ""

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def phase(self, text: str) -> None:
        self._progress.update(self._task, description=text)
        if not self._console.is_terminal and text.split(",")[0] != self._last:
            # A log has no moving bar; it gets a line for each kind of phase.
            self._last = text.split(",")[0]
            self._console.print(f"{self._last} ...", highlight=False)

    def expect(self, done: float, total: float) -> None:
        minutes, seconds = divmod(int(total - done) + 1, 60)
        self._progress.update(self._task, completed=done, total=total, left=f"about {minutes}:{seconds:02} left")
