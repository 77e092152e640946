"""One watched query: who watches it, the versions of its answer, and the task that makes them. See watch.py."""

from __future__ import annotations

import asyncio
import contextlib
import re
import uuid
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from topk_grpc.changes import diff
from topk_grpc.model import Answer
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.rpc import steps

_VERSIONS_MAX: Final = 256
_MESSAGES_MAX: Final = 16
_PAUSE_LEAST: Final = 0.1  # of the interval, when a newcomer waits
_UNKNOWN: Final = -1
_NUMBER: Final = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True, slots=True)
class _Version:
    number: int
    answer: Answer


class Watcher:
    """One stream."""

    __slots__ = ("failure", "leaving", "round", "wake")

    def __init__(self) -> None:
        self.wake = asyncio.Event()
        self.round = 0  # the first one that it can be told of: it began after the stream did
        self.leaving = False
        self.failure: Exception | None = None

    def leave(self) -> None:
        """Its stream shall come to its end."""
        self.leaving = True
        self.wake.set()


class Evaluation:
    """One query: who watches it, its versions, and the task that makes them."""

    def __init__(self, ask: Callable[[], Awaitable[Answer]], interval_seconds: float, room: Callable[[], int]) -> None:
        """Evaluates nothing yet.

        Args:
            ask: evaluates the query.
            interval_seconds: the pause between two evaluations.
            room: how many entries the versions may have together.
        """
        self._id = uuid.uuid4().hex
        self._ask = ask
        self._interval_seconds = interval_seconds
        self._room = room
        self._versions: deque[_Version] = deque()  # their numbers are consecutive
        self._entries = 0
        self._messages: dict[int | None, pb.WatchTopKResponse] = {}
        self._task: asyncio.Task[None] | None = None
        self._begun = 0  # rounds of evaluating
        self._done = 0  # the last one that has come to its end
        self._hurry = asyncio.Event()
        self._newcomers: set[Watcher] = set()
        self.watchers: set[Watcher] = set()
        self.idle_timer: asyncio.TimerHandle | None = None

    # --- Watchers -----------------------------------------------------------------------------------------------------

    def join(self, watcher: Watcher) -> None:
        """Takes a watcher, and evaluates soon: what was durable before it came shall be in the first list it sees."""
        watcher.round = self._begun + 1
        self.watchers.add(watcher)
        self._newcomers.add(watcher)
        self._hurry.set()
        if self._task is None:
            self._task = asyncio.create_task(self._evaluate(), name="topk watch")

    def leave(self, watcher: Watcher) -> None:
        """Lets go of a watcher, also of one that is gone; the last one stops the evaluating."""
        self.watchers.discard(watcher)
        self._newcomers.discard(watcher)
        if not self.watchers and self._task is not None:
            self._task.cancel()
            self._task = None

    def knows(self, resume_token: str) -> int:
        """The number of the version that a token names, whether or not it is kept; -1 where it names none of ours."""
        own, _, number = resume_token.rpartition("-")
        named = own == self._id and _NUMBER.fullmatch(number)
        return int(number) if named else _UNKNOWN

    def step_for(self, watcher: Watcher, number: int | None) -> pb.WatchTopKResponse | None:
        """The message that brings a watcher to the newest version.

        Args:
            watcher: one that joined.
            number: of the version it has; None: it has nothing.

        Returns:
            None where the newest version may be older than the watcher.
        """
        if self._done < watcher.round:
            return None
        message = self._messages.get(number)
        if message is None:
            if len(self._messages) >= _MESSAGES_MAX:
                self._messages.clear()
            message = self._messages[number] = self._write(number)
        return message

    @property
    def newest_number(self) -> int:
        """The newest version's number, 0 where there is none."""
        return self._versions[-1].number if self._versions else 0

    def _write(self, number: int | None) -> pb.WatchTopKResponse:
        newest = self._versions[-1]
        token = f"{self._id}-{newest.number}"
        first = self._versions[0].number
        if number is None or not first <= number <= newest.number:
            return steps.snapshot_to_pb(newest.number, token, newest.answer, reset=number is not None)
        changes = diff(self._versions[number - first].answer.entries, newest.answer.entries)
        return steps.changes_to_pb(newest.number, token, newest.answer, number, changes)

    # --- Versions -----------------------------------------------------------------------------------------------------

    async def _evaluate(self) -> None:
        try:
            while True:
                self._begun += 1
                self._hurry.clear()
                self._take(await self._ask())
                await asyncio.sleep(_PAUSE_LEAST * self._interval_seconds)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout((1 - _PAUSE_LEAST) * self._interval_seconds):
                        await self._hurry.wait()
        except Exception as error:
            # Each stream ends with it. Whoever comes now begins anew.
            failed, self.watchers, self._newcomers = self.watchers, set(), set()
            self._task = None
            for watcher in failed:
                watcher.failure = error
                watcher.wake.set()

    def _take(self, answer: Answer) -> None:
        """Makes a version of the answer if it differs; wakes whom it concerns."""
        self._done = self._begun
        wake = {watcher for watcher in self._newcomers if watcher.round <= self._done}
        self._newcomers -= wake
        if not self._versions or not _same(self._versions[-1].answer, answer):
            self._versions.append(_Version(self.newest_number + 1, answer))
            self._entries += len(answer.entries)
            self._messages.clear()
            wake = self.watchers
        room = self._room()
        while len(self._versions) > 1 and (len(self._versions) > _VERSIONS_MAX or self._entries > room):
            self._entries -= len(self._versions.popleft().answer.entries)
        for watcher in wake:
            watcher.wake.set()


def _same(one: Answer, other: Answer) -> bool:
    """Whether two answers tell a watcher the same."""
    left, right = one.certificate, other.certificate
    return (
        one.entries == other.entries
        and one.bounds == other.bounds
        and left.total_plays == right.total_plays
        and left.distinct_songs == right.distinct_songs
        and left.finality is right.finality
        and left.complete == right.complete
        and left.missing_shards == right.missing_shards
    )
