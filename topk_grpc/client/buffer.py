"""The plays of the batch that is being filled.

`add` may be called from any thread: the blocking client appends from the caller's thread, without a trip to the event
loop for each play. `take` and all that follows belongs to the loop.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Final

from topk_grpc.errors import InvalidArgumentError
from topk_grpc.model import to_epoch_ms

BATCH_BYTES_MAX: Final = 4 << 20
"""A batch is closed at this size whatever its number of plays: half the message that gateways take by default."""

PLAY_BYTES_MAX: Final = 64 << 10
"""A play larger than this is refused here: no cluster counts it, and its whole batch could become too large to send."""

_TEXT_MAX: Final = PLAY_BYTES_MAX // 4
_INT64_LEAST: Final = -(1 << 63)
_INT64_MOST: Final = (1 << 63) - 1


class Added(Enum):
    """What became of a play."""

    QUIET = "it is in the buffer, nothing else to do"
    FIRST = "it is the first one of a batch: time starts to run"
    FULL = "it has filled the batch"
    REFUSED = "the batch was full: it has to be sent first"


@dataclass(slots=True)
class Rows:
    """Plays by column: lists, since a tuple for each play would keep the garbage collector busy."""

    song_ids: list[str] = field(default_factory=list)
    played_at_ms: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    charts: list[tuple[str, ...]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.song_ids)


class PlayBuffer:
    """Fills one batch after the other."""

    def __init__(self, plays_max: int) -> None:
        """Makes an empty buffer.

        Args:
            plays_max: a batch is full at this many plays, or at BATCH_BYTES_MAX.
        """
        self._plays_max = plays_max
        self._lock = threading.Lock()
        self._rows = Rows()
        self._size_bytes = 0
        self._full = False
        self._closed = False
        self.generation = 0
        """How many batches were taken: tells whether a play seen in the buffer has left it."""

    def __len__(self) -> int:
        """How many plays wait."""
        return len(self._rows)

    @property
    def full(self) -> bool:
        """Whether the next play will be refused."""
        return self._full

    def add(self, song_id: str, played_at_ms: int, count: int, charts: tuple[str, ...]) -> Added:
        """Appends a play that `check_play` has passed; from any thread.

        Raises:
            InvalidArgumentError: the buffer is closed.
        """
        size_bytes = 24 + (len(song_id) if song_id.isascii() else 4 * len(song_id))
        if charts:
            size_bytes += sum(2 + 4 * len(chart) for chart in charts)
        with self._lock:
            if self._closed:
                raise InvalidArgumentError("the client is closed: make a new one")
            if self._full:
                return Added.REFUSED
            rows = self._rows
            song_ids = rows.song_ids
            song_ids.append(song_id)
            rows.played_at_ms.append(played_at_ms)
            rows.counts.append(count)
            rows.charts.append(charts)
            self._size_bytes += size_bytes
            if len(song_ids) >= self._plays_max or self._size_bytes >= BATCH_BYTES_MAX:
                self._full = True
                return Added.FULL
            return Added.FIRST if len(song_ids) == 1 else Added.QUIET

    def take(self) -> Rows:
        """Empties the buffer."""
        with self._lock:
            rows, self._rows = self._rows, Rows()
            self._size_bytes = 0
            self._full = False
            self.generation += 1
            return rows

    def close(self) -> None:
        """Takes no more plays. Under the lock: a play of another thread is in before, and flushed, or refused."""
        with self._lock:
            self._closed = True


def check_play(
    song_id: str, played_at: int | datetime, count: int, charts: Sequence[str]
) -> tuple[int, int, tuple[str, ...]]:
    """Finds what cannot be encoded at all, where the caller still stands beside it; the rest is the cluster's to judge.

    Returns:
        Epoch milliseconds, count and charts as `PlayBuffer.add` takes them.

    Raises:
        InvalidArgumentError: a wrong type, a number beyond 64 bits, text that is no Unicode, or far too much of it.
    """
    if type(played_at) is int and type(count) is int and type(song_id) is str and not charts:
        # The common play, in half the time.
        in_range = _INT64_LEAST <= played_at <= _INT64_MOST and _INT64_LEAST <= count <= _INT64_MOST
        if in_range and song_id.isascii() and len(song_id) <= _TEXT_MAX:
            return played_at, count, ()
    try:
        played_at_ms = to_epoch_ms(played_at) if isinstance(played_at, datetime) else operator.index(played_at)
        count = operator.index(count)
    except TypeError as error:
        raise InvalidArgumentError(
            f"played_at {played_at!r}, count {count!r}: a time is whole milliseconds since the epoch or a datetime, "
            "a count is a whole number"
        ) from error
    if not (_INT64_LEAST <= played_at_ms <= _INT64_MOST and _INT64_LEAST <= count <= _INT64_MOST):
        raise InvalidArgumentError(f"played_at {played_at_ms} and count {count} have to fit 64 signed bits")
    _check_text(song_id, "song_id")
    if not charts:
        return played_at_ms, count, ()
    if isinstance(charts, str):
        raise InvalidArgumentError(f"charts is the text {charts!r}: give a sequence, as in charts=[{charts!r}]")
    charts = tuple(charts)
    for chart in charts:
        _check_text(chart, "chart")
    if sum(map(len, charts)) + 2 * len(charts) > _TEXT_MAX:
        raise InvalidArgumentError(f"a play names {len(charts)} charts: no cluster takes more than 8, of 64 bytes each")
    return played_at_ms, count, charts


def _check_text(text: str, name: str) -> None:
    if not isinstance(text, str):
        raise InvalidArgumentError(f"{name} is {text!r}: it has to be a str")
    if len(text) > _TEXT_MAX:
        raise InvalidArgumentError(f"{name} has {len(text)} characters: no cluster takes more than 128 bytes")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgumentError(f"{name} {text!r} cannot be written as UTF-8: {error}") from error
