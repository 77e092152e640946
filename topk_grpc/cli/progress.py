"""Progress bars on stderr, with rate and time left; nothing where stderr is no terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich import progress
from rich.console import Console


class Bar:
    """One thing that takes long."""

    def __init__(self, bars: progress.Progress, task: progress.TaskID) -> None:
        """Made by `Progress.bar`."""
        self._bars = bars
        self._task = task

    def update(self, done: float, count: int, state: str = "") -> None:
        """Says how far it is.

        Args:
            done: in the unit of the bar's total.
            count: rows or plays so far, for the rate.
            state: what it waits for, if anything.
        """
        elapsed = self._bars.tasks[self._bars.task_ids.index(self._task)].elapsed or 0
        rate = f"{count / elapsed:,.0f}/s" if elapsed > 0.2 else ""
        self._bars.update(self._task, completed=done, count=f"{count:,}", rate=rate, state=state)

    def close(self) -> None:
        """Takes the bar away."""
        self._bars.remove_task(self._task)


class Progress:
    """The bars; lines printed meanwhile go above them."""

    def __init__(self, console: Console | None = None) -> None:
        """Prints to stderr by default."""
        self._console = console or Console(stderr=True)
        self._bars = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TextColumn("{task.fields[count]}"),
            progress.TextColumn("{task.fields[rate]}"),
            progress.TimeRemainingColumn(compact=True),
            progress.TextColumn("{task.fields[state]}"),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )

    @property
    def shown(self) -> bool:
        """Whether there is a terminal to show bars on."""
        return self._console.is_terminal

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def bar(self, description: str, total: float | None) -> Bar:
        """Adds a bar; a total of None is one whose end nobody knows."""
        return Bar(self._bars, self._bars.add_task(description, total=total, count="", rate="", state=""))

    def note(self, line: str) -> None:
        """Prints a line above the bars."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
