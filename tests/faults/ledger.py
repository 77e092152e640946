"""What was sent and what was acknowledged: the bounds within which every answer has to lie.

A play is a place on a grid, (chart set, time bucket, song), and a count. There are two grids: `now`, second by second
around the run, and `past`, hour by hour on a day some weeks ago. A play that was sent may count or not; one that was
acknowledged counts. So for a question that was asked at one time and answered at another, the count of a song lies
between what was acknowledged before it was asked and what had been sent when it was answered. A correction is the
other way round: sent, it may already have been taken off; acknowledged, it has been.

When all is acknowledged the two bounds are one, and `tally` gives the plays to the oracle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tests.oracle import Tally
from topk_grpc.model import Bounds, Play

Counts = NDArray[np.int64]

SETS: Final[tuple[tuple[str, ...], ...]] = ((), ("US",), ("rock",), ("US", "rock"))
"""The charts that a play may name."""

CHARTS: Final = ("", "US", "rock")
SONGS: Final = 1000
PAST_HOURS: Final = 12
NOW_SONGS: Final = 60
"""Those that are played now; few, so that each has sessions and ties."""

SECOND: Final = 1000
HOUR: Final = 3600 * SECOND
DAY: Final = 24 * HOUR

NAMES: Final = tuple(f"song {number:04}" if number % 7 else f"título {number:04}" for number in range(SONGS))
IDS: Final = {name: number for number, name in enumerate(NAMES)}
_PLACES: Final = np.argsort(np.argsort(np.array([name.encode() for name in NAMES], dtype=object)))
"""The place of each song in the order of names, which decides ties."""


@dataclass(frozen=True)
class Plays:
    """Some plays on one grid, a row each.

    Attributes:
        grid: `now` or `past`.
        sets, buckets, songs: places on it.
        offsets_ms: how far into its bucket each is.
        counts: below 0 for corrections.
    """

    grid: str
    sets: NDArray[np.int64]
    buckets: NDArray[np.int64]
    songs: NDArray[np.int64]
    offsets_ms: NDArray[np.int64]
    counts: Counts

    def __len__(self) -> int:
        return len(self.songs)


@dataclass
class Grid:
    """One array of counts for each thing that can have happened to a play."""

    first_ms: int
    width_ms: int
    buckets: int
    sent: Counts = field(init=False)
    acknowledged: Counts = field(init=False)
    taken_sent: Counts = field(init=False)
    taken_acknowledged: Counts = field(init=False)

    def __post_init__(self) -> None:
        shape = (len(SETS), self.buckets, SONGS if self.width_ms > SECOND else NOW_SONGS)
        self.sent, self.acknowledged = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        self.taken_sent, self.taken_acknowledged = np.zeros(shape, np.int64), np.zeros(shape, np.int64)

    def sum(self, counts: Counts, sets: Sequence[int], bounds: Bounds | None) -> Counts:
        """Of each song over chart sets and time."""
        low, high = 0, self.buckets
        if bounds is not None:
            low = min(max(0, -((self.first_ms - bounds.start_ms) // self.width_ms)), self.buckets)
            high = min(max(low, -((self.first_ms - bounds.end_ms) // self.width_ms)), self.buckets)
        found = np.zeros(SONGS, np.int64)
        for one in sets:
            found[: counts.shape[2]] += counts[one, low:high].sum(axis=0)
        return found


@dataclass(frozen=True)
class Moment:
    """What was so at one time, of each song."""

    sent: Counts
    acknowledged: Counts
    taken_sent: Counts
    taken_acknowledged: Counts


@dataclass(frozen=True)
class Range:
    """How many plays each song may have: `low` to `high`."""

    low: Counts
    high: Counts


class Ledger:
    """Counts everything that is sent.

    Args:
        start_ms: when the run begins.
        seconds: how long it may take.
    """

    def __init__(self, start_ms: int, seconds: float) -> None:
        self.start_ms = start_ms
        first_ms = start_ms - start_ms % SECOND - 600 * SECOND
        past_ms = (start_ms - 40 * DAY) // DAY * DAY
        self.grids = {
            "now": Grid(first_ms, SECOND, int(seconds) + 1800),
            "past": Grid(past_ms, HOUR, PAST_HOURS),
        }
        self.newest_ms = 0
        self.rows_sent = self.rows_acknowledged = 0

    def times_ms(self, plays: Plays) -> NDArray[np.int64]:
        grid = self.grids[plays.grid]
        return grid.first_ms + plays.buckets * grid.width_ms + plays.offsets_ms

    def add_sent(self, plays: Plays) -> None:
        """Call it before a play leaves."""
        grid = self.grids[plays.grid]
        self._add(plays, grid.sent, grid.taken_sent)
        self.newest_ms = max(self.newest_ms, int(self.times_ms(plays).max()))
        self.rows_sent += len(plays)

    def add_acknowledged(self, plays: Plays) -> None:
        """Call it after its acknowledgement has come."""
        grid = self.grids[plays.grid]
        self._add(plays, grid.acknowledged, grid.taken_acknowledged)
        self.rows_acknowledged += len(plays)

    @staticmethod
    def _add(plays: Plays, given: Counts, taken: Counts) -> None:
        for counts, rows in ((given, plays.counts > 0), (taken, plays.counts < 0)):
            if rows.any():
                np.add.at(counts, (plays.sets[rows], plays.buckets[rows], plays.songs[rows]), plays.counts[rows])

    def moment(self, chart: str, bounds: Bounds | None) -> Moment:
        sets = [number for number, named in enumerate(SETS) if not chart or chart in named]

        def total(name: str) -> Counts:
            each = (grid.sum(getattr(grid, name), sets, bounds) for grid in self.grids.values())
            return sum(each, np.zeros(SONGS, np.int64))

        return Moment(total("sent"), total("acknowledged"), total("taken_sent"), total("taken_acknowledged"))

    @property
    def all_acknowledged(self) -> bool:
        return self.rows_sent == self.rows_acknowledged

    @property
    def plays_acknowledged(self) -> int:
        """Those taken back included."""
        return int(sum(grid.acknowledged.sum() + grid.taken_acknowledged.sum() for grid in self.grids.values()))

    def tally(self) -> Tally:
        """Everything that was acknowledged, for the oracle: a play for each place of a grid that has any."""
        plays: list[Play] = []
        for grid in self.grids.values():
            for counts in (grid.acknowledged, grid.taken_acknowledged):
                for at in np.argwhere(counts):
                    charts, bucket, song = at.tolist()
                    at_ms = grid.first_ms + bucket * grid.width_ms
                    plays.append(Play(NAMES[song], at_ms, int(counts[charts, bucket, song]), SETS[charts]))
        return Tally(plays, SECOND)


def between(asked: Moment, answered: Moment) -> Range:
    """What an answer may say."""
    return Range(
        asked.acknowledged + answered.taken_sent,
        answered.sent + asked.taken_acknowledged,
    )


def comes_before(counts: Counts, count: int, song: int) -> NDArray[np.bool_]:
    """For each song whether it stands above a place, if it has so many plays."""
    ahead: NDArray[np.bool_] = (counts > count) | ((counts == count) & (_PLACES[song] > _PLACES))
    return ahead
