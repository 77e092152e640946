"""Random traffic for the tests of windows: what is played, taken back, broken and asked, as hypothesis draws it.

Times are relative to the clock of the test, so that the borders of small tiers are crossed in minutes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from hypothesis import strategies as st

from topk_grpc.model import GlobalWindow, Play, RangeWindow, SessionWindow, SlidingWindow, TumblingWindow, Window

NOW: Final = 1_700_000_000_000
SECOND: Final = 1000
MINUTE: Final = 60 * SECOND
SONGS: Final = ("a", "b", "ab", "é", "日本", "z")
CHARTS: Final = ("US", "rock")
TIERS: Final = (
    "1s:*",
    "1s:10s,5s:60s,20s:*",
    "1s:1s,5s:5m,20s:10m,60s:*",
    "1s:3m,60s:6m,300s:*",
    "1s:5m,20s:20m",  # what is older counts only for all time
)
"""All with ten minutes of slack on top."""


def range_around(plays: Sequence[Play], step: AskAround) -> RangeWindow:
    first, last = (plays[which % len(plays)].played_at_ms // SECOND for which in (step.first, step.last))
    edges = {first + step.seconds[0], last + step.seconds[1]}
    return RangeWindow(min(edges) * SECOND, max(edges) * SECOND + (SECOND if len(edges) == 1 else 0))


def steps_of(tiers: str) -> tuple[tuple[int, int | None], ...]:
    def milliseconds(text: str) -> int:
        return int(text[:-1]) * (MINUTE if text.endswith("m") else SECOND)

    pairs = [one.split(":") for one in tiers.split(",")]
    return tuple((milliseconds(width), None if age == "*" else milliseconds(age)) for width, age in pairs)


def seconds(start: int, end: int) -> st.SearchStrategy[int]:
    return st.integers(start, end).map(lambda second: second * SECOND)


# Relative to the clock: mostly a few instants, so that plays meet; some up to an hour back, some ahead.
AGES: Final = st.one_of(
    st.integers(-5_000, 5_000),
    st.sampled_from([0, 1, 999, 1000, 20_000, 20_999, 21_000, 60_000, 61_000]),
    st.integers(600, 625).map(lambda second: second * SECOND),  # where the first borders of small tiers are
    st.integers(0, 3 * MINUTE),
    st.integers(9 * MINUTE, 22 * MINUTE),
    st.integers(0, 60 * MINUTE),
    st.integers(-300_000, 0),
    st.sampled_from([400 * 24 * 60 * MINUTE, 2 * NOW]),  # a year ago, and long before 1970
)
NAMED: Final = st.lists(st.sampled_from(CHARTS), unique=True, max_size=2).map(tuple)

WINDOWS: Final[st.SearchStrategy[Window]] = st.one_of(
    st.just(GlobalWindow()),
    st.builds(
        TumblingWindow,
        st.sampled_from([1, 5, 7, 20, 60, 300, 1200]).map(lambda size: size * SECOND),
        st.sampled_from([0, 0, 1, 5, 20]).map(lambda offset: offset * SECOND),
    ),
    st.builds(
        lambda slide, many: SlidingWindow(slide * many * SECOND, slide * SECOND),
        st.sampled_from([1, 5, 20, 60]),
        st.sampled_from([1, 2, 3, 10, 30]),
    ),
    st.builds(SlidingWindow, seconds(1, 90) | seconds(600, 1800)),
    st.builds(SessionWindow, st.sampled_from([SECOND, 20 * SECOND, 40 * SECOND, MINUTE])),
    st.builds(SessionWindow, seconds(1, 90) | seconds(300, 900)),
    st.builds(
        lambda back, size: RangeWindow(NOW - back, NOW - back + size),
        seconds(-100, 4000) | seconds(590, 640) | st.integers(-2, 66).map(lambda minute: minute * MINUTE),
        seconds(1, 100) | st.integers(1, 60).map(lambda minute: minute * MINUTE),
    ),
)


@dataclass(frozen=True)
class Send:
    """Plays, by how long before the clock each was."""

    plays: tuple[tuple[str, int, int, tuple[str, ...]], ...]


@dataclass(frozen=True)
class TakeBack:
    """A play that counted is taken back, whole, in part, or more of it than there is."""

    which: int
    count: int
    whole_charts: bool
    later_ms: int


@dataclass(frozen=True)
class Delete:
    song_id: str


@dataclass(frozen=True)
class Pass:
    milliseconds: int


@dataclass(frozen=True)
class Snapshot:
    use_blocks: bool


@dataclass(frozen=True)
class Recover:
    heap_size: int


@dataclass(frozen=True)
class Stand:
    """These windows are kept up to date from here on, and no others."""

    which: tuple[int, ...]


@dataclass(frozen=True)
class Move:
    """Standing windows are moved to the clock."""


@dataclass(frozen=True)
class Ask:
    """Windows, each at the clock, at the newest play (None), or at an instant before the clock."""

    live: bool
    before_ms: int | None
    which: tuple[int, ...]
    chart: str


@dataclass(frozen=True)
class AskAround:
    """A range that begins and ends around plays that counted, by so many seconds."""

    first: int
    last: int
    seconds: tuple[int, int]
    chart: str


Step = Send | TakeBack | Delete | Pass | Snapshot | Recover | Stand | Move | Ask | AskAround

COUNTS: Final = st.one_of(*[st.integers(1, 4)] * 8, st.integers(-3, -1))
PLAYS: Final = st.tuples(st.sampled_from(SONGS), AGES, COUNTS, NAMED)
STEPS: Final[st.SearchStrategy[Step]] = st.one_of(
    *[st.builds(Send, st.lists(PLAYS, min_size=1, max_size=8).map(tuple))] * 3,
    st.builds(TakeBack, st.integers(0, 30), st.integers(1, 4), st.booleans(), st.sampled_from([0, 0, 0, 1000, 5000])),
    st.builds(Pass, st.one_of(st.integers(0, 5_000), st.integers(0, 2 * MINUTE), st.integers(8 * MINUTE, 20 * MINUTE))),
    st.builds(Snapshot, st.booleans()),
    st.builds(Recover, st.sampled_from([1, 3, 50])),
    st.builds(
        AskAround,
        st.integers(0, 30),
        st.integers(0, 30),
        st.tuples(st.integers(-30, 30), st.integers(-30, 30)),
        st.sampled_from(["", "US"]),
    ),
    st.builds(Stand, st.lists(st.integers(0, 7), max_size=4).map(tuple)),
    st.just(Move()),
    *[
        st.builds(
            Ask,
            st.booleans(),
            st.one_of(st.none(), AGES),
            st.lists(st.integers(0, 7), min_size=1, max_size=4).map(tuple),
            st.sampled_from(["", "", "US", "never heard of"]),
        )
    ]
    * 2,
)
