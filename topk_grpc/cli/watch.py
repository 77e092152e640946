"""`topk watch`: a list that keeps itself up to date, as a live table, as lines, or as JSON.

On a terminal the table is drawn anew in place, with an arrow at each song that has moved within the last seconds.
Elsewhere each change is a line, or, with --json, each update an object on a line of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from topk_grpc.changes import Change, ChangeKind, WatchUpdate
from topk_grpc.cli.queries import answer_as_json, certificate_line, entry_as_json, span_text
from topk_grpc.cli.reach import Reach, unreachable
from topk_grpc.errors import TopKError, UnavailableError
from topk_grpc.model import Bounds

_SECONDS: Final = 30.0
_MARKED_SECONDS: Final = 5.0
_STYLES: Final = {"▲": "green", "▼": "red", "n": "bold yellow"}


@dataclass(frozen=True, slots=True)
class Request:
    """What is watched and how it is shown.

    Attributes:
        window, k, chart, latest, allow_partial: as `TopKClient.watch` takes them.
        gateway: as --gateway.
        json: one object an update.
        updates: end after so many; 0: never.
    """

    window: str
    k: int
    chart: str
    latest: bool
    allow_partial: bool
    gateway: Reach
    json: bool
    updates: int

    def title(self, bounds: Bounds | None) -> str:
        """What the list is of."""
        return f"{self.window}: {span_text(bounds)}" + (f", chart {self.chart}" if self.chart else "")


class View(Protocol):
    """Shows a watch."""

    def show(self, update: WatchUpdate) -> None:
        """There is a new list."""

    def interrupted(self, error: TopKError) -> None:
        """Nothing is heard for now; called again with every attempt that fails."""


def run(request: Request) -> None:
    """Watches until Ctrl-C, or for as many updates as were asked for.

    Raises:
        TopKError: the cluster does not answer at the start, or refuses.
    """
    with contextlib.suppress(KeyboardInterrupt):  # that is how a watch ends
        try:
            if request.json:
                asyncio.run(_watch(request, JsonView(request.gateway)))
            elif not sys.stdout.isatty():
                asyncio.run(_watch(request, LineView(request)))
            else:
                view = LiveView(request, time.monotonic)
                with Live(get_renderable=view.render, refresh_per_second=4, console=Console(highlight=False)):
                    asyncio.run(_watch(request, view))
        except BrokenPipeError:
            # Whoever read has seen enough, as `head` does. Nothing may be written at exit either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


async def _watch(request: Request, view: View) -> None:
    seen = 0
    async with request.gateway.client(deadline_seconds=_SECONDS) as client:
        updates = client.watch(
            request.window,
            request.k,
            chart=request.chart or None,
            latest=request.latest,
            allow_partial=request.allow_partial,
            on_interrupted=view.interrupted,
        )
        async with aclosing(updates):
            try:
                async for update in updates:
                    view.show(update)
                    seen += 1
                    if seen == request.updates:
                        return
            except UnavailableError as error:
                raise unreachable(request.gateway, error) from error


def _waiting(gateway: Reach, error: TopKError) -> str:
    return f"gateway {gateway}: {error}; trying again"


class _Notices:
    """Says on stderr that the connection broke, once, and when it is back."""

    def __init__(self, gateway: Reach) -> None:
        self._gateway = gateway
        self._broken = False

    def interrupted(self, error: TopKError) -> None:
        if not self._broken:
            print(_waiting(self._gateway, error), file=sys.stderr, flush=True)  # noqa: T201
        self._broken = True

    def well(self) -> None:
        if self._broken:
            print(f"gateway {self._gateway}: connected again", file=sys.stderr, flush=True)  # noqa: T201
        self._broken = False


# --- JSON -------------------------------------------------------------------------------------------------------------


class JsonView(_Notices):
    """An object a line, as documented in docs/cli.md."""

    def show(self, update: WatchUpdate) -> None:
        """Prints the update."""
        self.well()
        print(json.dumps(update_as_json(update), ensure_ascii=False), flush=True)  # noqa: T201


def update_as_json(update: WatchUpdate) -> Mapping[str, object]:
    """The fields of `topk top --json`, and what has changed."""
    changes = [
        {"kind": change.kind.value, "previous_rank": change.previous_rank, "entry": entry_as_json(change.entry)}
        for change in update.changes
    ]
    return {"number": update.number, "reset": update.reset, **answer_as_json(update.answer), "changes": changes}


# --- Lines ------------------------------------------------------------------------------------------------------------


class LineView(_Notices):
    """A line for each change; before them one with the window, when it is another than that of the line before."""

    def __init__(self, request: Request) -> None:
        super().__init__(request.gateway)
        self._title = request.title
        self._told = ""

    def show(self, update: WatchUpdate) -> None:
        """Prints what has changed."""
        self.well()
        title = self._title(update.answer.bounds)
        lines = [change_line(change) for change in update.changes]
        if title != self._told and (lines or not self._told):
            self._told = title
            lines.insert(0, title)
        if lines:
            print("\n".join(lines), flush=True)  # noqa: T201


def mark_of(change: Change) -> str:
    """How a song moved, in a few characters: `new`, `left`, `▲2`, `▼1`, or nothing where it kept its rank."""
    if change.kind is ChangeKind.ENTERED:
        return "new"
    if change.kind is ChangeKind.LEFT:
        return "left"
    up = (change.previous_rank or change.entry.rank) - change.entry.rank
    return f"▲{up}" if up > 0 else f"▼{-up}" if up < 0 else ""


def change_line(change: Change) -> str:
    """Rank, movement, plays and song; of a song that left, its last rank and plays."""
    entry = change.entry
    return f"{entry.rank:>6}  {mark_of(change):<5}  {entry.count:>12}  {entry.song_id}"


# --- The live table ---------------------------------------------------------------------------------------------------


class LiveView:
    """The table as it is now; `render` may be called from another thread."""

    def __init__(self, request: Request, clock: Callable[[], float]) -> None:
        """Shows nothing yet.

        Args:
            request: what is watched.
            clock: seconds; marks fade by it.
        """
        self._request = request
        self._clock = clock
        self._update: WatchUpdate | None = None
        self._marks: dict[str, tuple[str, float]] = {}
        self._trouble = ""

    def show(self, update: WatchUpdate) -> None:
        """Takes a new list. The first one is not new: there was nothing to move from."""
        now = self._clock()
        listed = {entry.song_id for entry in update.answer.entries}
        marks = {song: mark for song, mark in self._marks.items() if song in listed and mark[1] > now}
        if self._update is not None:
            marks |= {
                change.entry.song_id: (mark_of(change), now + _MARKED_SECONDS)
                for change in update.changes
                if change.kind in (ChangeKind.ENTERED, ChangeKind.MOVED)
            }
        self._marks, self._update, self._trouble = marks, update, ""

    def interrupted(self, error: TopKError) -> None:
        """Shown beneath the table until the next list."""
        self._trouble = _waiting(self._request.gateway, error)

    def render(self) -> RenderableType:
        """What the terminal shows now."""
        update, marks, now = self._update, self._marks, self._clock()
        trouble = [f"[red]{escape(self._trouble)}[/]"] if self._trouble else []
        if update is None:
            return Group(*(trouble or ["[dim]waiting for the first list …[/]"]))
        table = Table()
        table.add_column("rank", justify="right")
        table.add_column("")
        table.add_column("song", overflow="fold")
        table.add_column("plays", justify="right")
        table.add_column("share", justify="right")
        for entry in update.answer.entries:
            mark, until = marks.get(entry.song_id, ("", 0.0))
            shown = f"[{_STYLES[mark[0]]}]{mark}[/]" if mark and until > now else ""
            table.add_row(
                f"{entry.rank:,}", shown, escape(entry.song_id), f"{entry.count:,}", f"{100 * entry.share:.2f} %"
            )
        title = escape(self._request.title(update.answer.bounds))
        return Group(title, table, certificate_line(update.answer.certificate), *trouble)
