"""An account of a shard's state: digests by which two ways of counting are compared, slot by slot.

Theory of operation. `Copied` takes from the state what can change (as a snapshot does), between two groups; `account`
then works on the copies, on any thread. A digest is a sum of hashes, modulo 2^64: it does not depend on the order in
which entries are numbered, so that a recount may number them in another one. What is hashed are names, by their XXH64,
and counts, never numbers of entries. Entries go by the slot of their song's hash under every partitioner, also where
plays are placed otherwise: here slots only say whereabouts two accounts differ.

Two accounts that are equal agree on: the plays of every (chart, song), the totals of every chart, the best of each
chart and their order, every producer's marks, and what the standing windows hold. Of sessions those are compared that
began well within the finest buckets: what an older one began with, only the state knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from topk_grpc.engine.boards import Board
from topk_grpc.engine.state import CHARTS, GLOBAL, ShardState
from topk_grpc.kernels.hash import hash_strings

Numbers = NDArray[np.uint64]

BEST_COUNT: Final = 100
"""How many of each chart's best are compared."""

BEST_CHARTS: Final = 1000
"""In how many charts, those with the most plays: they are looked up while writes wait."""

_MULTIPLIER: Final = np.uint64(0x9E3779B97F4A7C15)
_SHIFTS: Final = (np.uint64(30), np.uint64(27), np.uint64(31))


def mix(*columns: NDArray[np.generic] | int) -> Numbers:
    """A hash of each row; the columns' order counts. The rounds are those of splitmix64 (Steele et al., 2014)."""
    mixed = np.zeros(1, np.uint64)
    for column in columns:
        values = np.asarray(column)
        mixed = mixed ^ (values if values.dtype == np.uint64 else values.astype(np.int64).view(np.uint64))
        with np.errstate(over="ignore"):
            for shift in _SHIFTS:
                mixed = (mixed ^ (mixed >> shift)) * _MULTIPLIER
    return mixed


def sum_of(values: Numbers) -> int:
    """Modulo 2^64."""
    return int(values.sum(dtype=np.uint64))


def by_slot(values: Numbers, slots: NDArray[np.int64], count: int) -> Numbers:
    """The sum of each slot's values, modulo 2^64."""
    sums = np.zeros(count, np.uint64)
    np.add.at(sums, slots, values)
    return sums


@dataclass(frozen=True, slots=True)
class WindowAccount:
    """What a standing window holds on one board.

    Attributes:
        start, end: its buckets; for sessions `start` is the first bucket that is known for certain, for all of them.
        digest: of (chart, song, count), for sessions with their first and last bucket.
        plays: all together.
    """

    start: int
    end: int
    digest: int
    plays: int


@dataclass(frozen=True, slots=True)
class Account:
    """What a state comes to. Arrays have one element for each slot.

    Attributes:
        newest_event_ms, oldest_event_ms: times of plays; the oldest is None without any.
        entries: digests of (chart, song, count).
        plays: in the global chart.
        marks: digests of (producer, slot, highest sequence, bitmap).
        producers: a digest of (producer, last seen, permanent).
        charts: a digest of (chart, plays, songs).
        best: a digest of (chart, rank, song, count).
        windows: by their text and the board's name.
    """

    newest_event_ms: int
    oldest_event_ms: int | None
    entries: Numbers
    plays: NDArray[np.int64]
    marks: Numbers
    producers: int
    charts: int
    best: int
    windows: Mapping[tuple[str, str], WindowAccount]


@dataclass(frozen=True, slots=True, eq=False)
class EntryTable:
    """(chart, song) pairs with their counts: columns of one length.

    Attributes:
        charts, songs: hashes of the names.
        slots: of the songs.
        counts: plays.
    """

    charts: Numbers
    songs: Numbers
    slots: NDArray[np.int64]
    counts: NDArray[np.int64]

    def digests(self, slots: int) -> Numbers:
        """Of each slot; entries without plays are no entries."""
        return by_slot(mix(self.charts, self.songs, self.counts) * (self.counts != 0), self.slots, slots)


@dataclass(slots=True, eq=False)
class Copied:
    """What of a state can change, copied; taken by `copy_state`."""

    slots: int
    newest_event_ms: int
    oldest_event_ms: int | None
    arena: NDArray[np.uint8]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int32]
    chart_names: list[str]
    chart_hashes: Numbers
    charts: NDArray[np.int32]
    songs: NDArray[np.int32]
    counts: dict[str, NDArray[np.int64]]
    totals: dict[str, NDArray[np.int64]]
    marks: dict[str, NDArray[np.generic]]
    producers: list[tuple[bytes, int, int, bool]]
    best: list[tuple[int, NDArray[np.int32], NDArray[np.int64]]]
    windows: dict[tuple[str, str], tuple[int, int, NDArray[np.int64]]] = field(default_factory=dict)
    sessions: dict[tuple[str, str], tuple[int, int, int, NDArray[np.int64]]] = field(default_factory=dict)


def copy_state(state: ShardState) -> Copied:
    """Copies what `account` needs and what can change. Takes as long as that copy."""
    songs, names = state.songs, state.charts
    meta, marks = state.producers.to_snapshot()
    count = len(songs)
    copied = Copied(
        slots=state.settings.slots,
        newest_event_ms=state.newest_event_ms,
        oldest_event_ms=state.oldest_event_ms,
        arena=songs.arena[: songs.arena_used],
        starts=songs.starts[:count],
        sizes=songs.sizes(0, count),
        chart_names=names.texts(np.arange(len(names), dtype=np.int32)),
        chart_hashes=hash_strings(
            names.arena[: names.arena_used], names.starts[: len(names)], names.sizes(0, len(names))
        ),
        charts=state.pairs.charts,
        songs=state.pairs.songs,
        counts={name: board.counts() for name, board in state.boards.items()},
        totals={name: board.all_time.copy_totals() for name, board in state.boards.items()},
        marks=marks,
        producers=[
            (bytes.fromhex(name), number, last_seen_ms, permanent)
            for name, number, last_seen_ms, permanent, _ in meta["known"]
        ],
        best=[],
    )
    for name, board in state.boards.items():
        copied.best += _best(board, copied.chart_hashes, in_charts=name == CHARTS)
        for window in state.standing:
            key = (str(window), name)
            if (span := board.spans.get(window)) is not None and span.start != span.end:
                copied.windows[key] = span.start, span.end, board.counts(span.ranking)
            sessions = board.sessions.get(window)
            if sessions is not None and sessions.end is not None:
                told, columns = sessions.to_snapshot(len(board))
                certain = state.past.finest + sessions.gap + 1
                copied.sessions[key] = certain, sessions.end, told["low"], columns
    return copied


def _best(board: Board, hashes: Numbers, *, in_charts: bool) -> list[tuple[int, NDArray[np.int32], NDArray[np.int64]]]:
    charts = best_charts(board.all_time.copy_totals(), hashes, in_charts=in_charts)
    found = ((chart, board.best(board.all_time, chart, BEST_COUNT, fill=True)) for chart in charts)
    return [(chart, *best) for chart, best in found if best is not None]


def best_charts(totals: NDArray[np.int64], hashes: Numbers, *, in_charts: bool) -> list[int]:
    """The charts whose best are compared; totals are int64[charts, 2]: plays and songs."""
    if not in_charts:
        return [0] if len(totals) and totals[0, 1] else []
    held = np.flatnonzero(totals[: len(hashes), 1])
    order = np.lexsort((hashes[held], -totals[held, 0]))[:BEST_CHARTS]
    return held[order].tolist()  # type: ignore[no-any-return]


def account(copied: Copied) -> Account:
    """The account of a state that was copied."""
    hashes = hash_strings(copied.arena, copied.starts, copied.sizes)
    tables = {
        GLOBAL: table_of(copied.counts[GLOBAL], hashes, copied.chart_hashes, copied.slots),
        CHARTS: table_of(copied.counts[CHARTS], hashes, copied.chart_hashes, copied.slots, copied.charts, copied.songs),
    }
    windows = {}
    for key, (start, end, counts) in copied.windows.items():
        windows[key] = window_account(start, end, tables[key[1]], counts)
    for key, (certain, end, low, columns) in copied.sessions.items():
        starts, lasts, plays = columns[:3, : len(tables[key[1]].counts)]
        held = np.flatnonzero((plays > 0) & (lasts >= low) & (starts >= certain))
        windows[key] = session_account(certain, end, tables[key[1]], held, starts[held], lasts[held], plays[held])
    numbers = {number: name for name, number, _, _ in copied.producers}
    return make_account(
        copied.slots,
        (copied.newest_event_ms, copied.oldest_event_ms),
        tables,
        _marks(copied, numbers),
        [(name, last_seen_ms, permanent) for name, _, last_seen_ms, permanent in copied.producers],
        _charts(copied),
        [
            (
                int(copied.chart_hashes[chart]),
                hashes[copied.songs[entries] if chart else entries],
                counts,
            )
            for chart, entries, counts in copied.best
        ],
        windows,
    )


def make_account(  # noqa: PLR0917
    slots: int,
    times_ms: tuple[int, int | None],
    tables: Mapping[str, EntryTable],
    marks: Numbers,
    producers: Sequence[tuple[bytes, int, bool]],
    charts: Sequence[tuple[int, int, int]],
    best: Sequence[tuple[int, Numbers, NDArray[np.int64]]],
    windows: Mapping[tuple[str, str], WindowAccount],
) -> Account:
    """Puts digests together, of whichever way things were counted."""
    songs = tables[GLOBAL]
    plays = np.zeros(slots, np.int64)
    np.add.at(plays, songs.slots, songs.counts)
    names = [hash_of(name) for name, _, _ in producers]
    seen = [last_seen_ms for _, last_seen_ms, _ in producers]
    permanent = [permanent for _, _, permanent in producers]
    with np.errstate(over="ignore"):
        entries = tables[GLOBAL].digests(slots) + tables[CHARTS].digests(slots)
    return Account(
        newest_event_ms=times_ms[0],
        oldest_event_ms=times_ms[1],
        entries=entries,
        plays=plays,
        marks=marks,
        producers=sum_of(mix(np.array(names, np.uint64), np.array(seen, np.int64), np.array(permanent, np.int64))),
        charts=sum_of(
            mix(*(np.array(column, kind) for column, kind in zip(zip(*charts, strict=True), _KINDS, strict=True)))
        )
        if charts
        else 0,
        best=sum(
            sum_of(mix(np.uint64(chart).reshape(1), np.arange(len(names)), names, counts))
            for chart, names, counts in best
        )
        & (1 << 64) - 1,
        windows=windows,
    )


_KINDS: Final = (np.uint64, np.int64, np.int64)


def table_of(  # noqa: PLR0917
    counts: NDArray[np.int64],
    song_hashes: Numbers,
    chart_hashes: Numbers,
    slots: int,
    charts: NDArray[np.int32] | None = None,
    songs: NDArray[np.int32] | None = None,
) -> EntryTable:
    """Entries by their names' hashes; without `charts` and `songs` the entries are the songs, in the global chart."""
    names = song_hashes[: len(counts)] if songs is None else song_hashes[songs[: len(counts)]]
    charted = np.full(len(counts), chart_hashes[0]) if charts is None else chart_hashes[charts[: len(counts)]]
    return EntryTable(charted, names, (names % np.uint64(slots)).astype(np.int64), counts)


def window_account(start: int, end: int, table: EntryTable, counts: NDArray[np.int64]) -> WindowAccount:
    """Of a window that counts plays."""
    held = np.flatnonzero(counts)
    digest = sum_of(mix(table.charts[held], table.songs[held], counts[held]))
    return WindowAccount(start, end, digest, int(counts.sum()))


def session_account(  # noqa: PLR0917
    certain: int,
    end: int,
    table: EntryTable,
    entries: NDArray[np.intp],
    starts: NDArray[np.int64],
    lasts: NDArray[np.int64],
    plays: NDArray[np.int64],
) -> WindowAccount:
    """Of open sessions."""
    digest = sum_of(mix(table.charts[entries], table.songs[entries], plays, starts, lasts))
    return WindowAccount(certain, end, digest, int(plays.sum()))


def hash_of(name: bytes) -> int:
    """XXH64 of one name."""
    return int(hash_strings(name or b"\0", np.zeros(1, np.int64), np.array([len(name)], np.int32))[0])


def _marks(copied: Copied, names: Mapping[int, bytes]) -> Numbers:
    keys, highest, bitmaps = (copied.marks[name].astype(np.uint64) for name in ("keys", "highest", "bitmaps"))
    numbers, which = np.unique(keys >> np.uint64(32), return_inverse=True)
    hashes = np.array([hash_of(names.get(number, b"")) for number in numbers.tolist()], np.uint64)
    slots = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64) - 1
    return digest_marks(hashes[which], slots, highest, bitmaps, copied.slots)


def digest_marks(
    producers: Numbers, slots: NDArray[np.int64], highest: Numbers, bitmaps: Numbers, count: int
) -> Numbers:
    """The digest of each slot's marks; producers are the hashes of their ids."""
    return by_slot(mix(producers, slots, highest, bitmaps), slots, count)


def _charts(copied: Copied) -> list[tuple[int, int, int]]:
    return [
        (int(copied.chart_hashes[chart]), *totals[chart].tolist())
        for name, totals in copied.totals.items()
        for chart in np.flatnonzero(totals.any(axis=1)).tolist()
        if (name == GLOBAL) == (chart == 0)
    ]


def listed(copied: Copied, slots: Sequence[int], limit: int) -> dict[tuple[str, str], int]:
    """The entries of some slots by (chart, song), at most so many."""
    hashes = hash_strings(copied.arena, copied.starts, copied.sizes)
    wanted = np.isin(hashes % np.uint64(copied.slots), np.array(slots, np.uint64))
    counts = copied.counts[GLOBAL]
    songs = np.flatnonzero(wanted[: len(counts)] & (counts != 0))[:limit]
    found = {("", _text(copied, song)): int(counts[song]) for song in songs.tolist()}
    counts = copied.counts[CHARTS]
    pairs = np.flatnonzero(wanted[copied.songs[: len(counts)]] & (counts != 0))[: limit - len(found)]
    for pair in pairs.tolist():
        chart = copied.chart_names[int(copied.charts[pair])]
        found[chart, _text(copied, int(copied.songs[pair]))] = int(counts[pair])
    return found


def _text(copied: Copied, song: int) -> str:
    start = int(copied.starts[song])
    return copied.arena[start : start + int(copied.sizes[song])].tobytes().decode()
