"""Counting anew: what a shard's state must come to, from a snapshot's cells and the log, without the state's own ways.

Theory of operation. The state keeps counts, totals, heaps and windows up to date as plays arrive. This keeps rows of
(chart, song, bucket, count) instead, as they come, and adds them up when asked: totals by summing, the best by sorting,
windows by summing what lies within, sessions by looking for the last pause. Marks are kept in a dictionary. It shares
with the state how names are numbered and how a request is read, and nothing else; in particular it reads from a
snapshot the cells, not the counts, which are compared with them.

Only where the last tier drops plays for good can cells not say everything: what a snapshot counts beyond its cells is
taken as one more row without a time.

Slots that move come and go as the records of the log say: the rows of an image are added when its migration is
committed, and those of slots that were given away are taken out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from topk_grpc.engine.account import (
    BEST_COUNT,
    Account,
    EntryTable,
    Numbers,
    WindowAccount,
    best_charts,
    by_slot,
    hash_of,
    make_account,
    mix,
    session_account,
    table_of,
    window_account,
)
from topk_grpc.engine.admission import Part, read_request
from topk_grpc.engine.slots_image import SlotsImage, read_image
from topk_grpc.engine.state import CHARTS, GLOBAL
from topk_grpc.errors import InvalidArgumentError
from topk_grpc.kernels.hash import hash_strings
from topk_grpc.kernels.strings import StringTable
from topk_grpc.kernels.wire import message_spans
from topk_grpc.model import ClusterSettings, SessionWindow, parse_window
from topk_grpc.pb.topk.v1 import shard_service_pb2 as pb
from topk_grpc.ring.partitioners import partitioner_of

_NO_TIME: Final = -(1 << 62)
_ROWS_MAX: Final = 1 << 24
"""Rows that are gathered before equal ones are added up."""

Rows = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
"""Keys, chart << 32 | song; buckets; counts."""


class Recount:
    """One count, from a snapshot or from nothing.

    Args:
        settings: the cluster's.

    Attributes:
        differences: what a snapshot says twice, and differently: a sentence each.
    """

    def __init__(self, settings: ClusterSettings) -> None:
        self._settings = settings
        self._songs, self._charts = StringTable(), StringTable()
        self._charts.add_texts([""])
        self._rows: list[Rows] = []
        self._gathered = 0
        self._marks: dict[tuple[int, int], tuple[int, int]] = {}
        self._producers: dict[bytes, tuple[int, int, bool]] = {}
        self._next_number = 0
        self._times_ms: tuple[int, int | None] = (0, None)
        self._held: dict[int, tuple[tuple[int, ...], bytes]] = {}
        self.differences: list[str] = []

    # --- What there is ------------------------------------------------------------------------------------------------

    def begin(
        self,
        meta: Mapping[str, Any],
        arrays: Mapping[str, NDArray[np.generic]],
        blocks: Mapping[str, Sequence[Mapping[str, NDArray[np.generic]]]],
    ) -> None:
        """Begins with a snapshot of the shard: its meta, its arrays, and each board's blocks."""
        self._songs = StringTable.from_arrays({"arena": arrays["songs.arena"], "starts": arrays["songs.starts"]})
        self._charts = StringTable.from_arrays({"arena": arrays["names.arena"], "starts": arrays["names.starts"]})
        self._times_ms = meta["newest_event_ms"], meta["oldest_event_ms"]
        pair_keys = arrays["pairs.charts"].astype(np.int64) << 32 | arrays["pairs.songs"].astype(np.int64)
        for board in (GLOBAL, CHARTS):
            counted = arrays[f"{board}.counts"].astype(np.int64)
            sums = np.zeros(len(counted), np.int64)
            for columns in blocks[board]:
                entries, counts = columns["entries"].astype(np.int64), columns["counts"].astype(np.int64)
                keys = entries if board == GLOBAL else pair_keys[entries]
                self._add(keys, columns["buckets"].astype(np.int64), counts)
                np.add.at(sums, entries, counts)
            beyond = counted - sums
            held = np.flatnonzero(beyond)
            if len(held) and _keeps_all(meta):
                self.differences.append(
                    f"the snapshot counts {len(held)} entries of the board {board!r} otherwise than its cells do"
                )
            elif len(held):
                keys = held if board == GLOBAL else pair_keys[held]
                self._add(keys, np.full(len(held), _NO_TIME, np.int64), beyond[held])
        for name, number, last_seen_ms, permanent, _ in meta["producers"]["known"]:
            self._producers[bytes.fromhex(name)] = (number, last_seen_ms, permanent)
            self._next_number = max(self._next_number, number + 1)
        marks = [arrays[f"marks.{name}"].astype(np.uint64).tolist() for name in ("keys", "highest", "bitmaps")]
        for key, highest, bitmap in zip(*marks, strict=True):
            self._marks[key >> 32, (key & 0xFFFFFFFF) - 1] = highest, bitmap
        held_then = meta["ownership"]["held"] if "ownership" in meta else ()  # snapshots knew no moves before
        for migration_id, _, slots, _ in held_then:
            self.hold(migration_id, slots, arrays[f"images.{migration_id}"].tobytes())

    def use(self, settings: ClusterSettings) -> None:
        """Counts under these settings, which the log begins with."""
        self._settings = settings

    def append(self, payload: memoryview) -> None:
        """Counts an AppendRecord of the log, as its verdicts say.

        Raises:
            InvalidArgumentError: it is none.
        """
        spans, _ = message_spans(payload, 0, len(payload), 1)
        if len(spans) != 1:
            raise InvalidArgumentError("a log record of type append does not hold one request")
        start, end = spans[0].tolist()
        request = bytes(payload[start:end])
        rest = pb.AppendRecord.FromString(bytes(payload[end:]))
        verdicts = {verdict.batch: verdict for verdict in rest.verdicts}
        for index, part in enumerate(read_request(request).parts):
            verdict = verdicts.get(index, pb.Verdict())
            if not verdict.refusal:
                self._count(request, part, verdict, rest.admitted_ms)

    def delete_song(self, song_id: str) -> None:
        """Forgets all plays of a song."""
        song = int(self._songs.find_texts([song_id])[0])
        self._rows = [
            tuple(column[keys & 0xFFFFFFFF != song] for column in (keys, buckets, counts))
            for keys, buckets, counts in self._rows
        ]

    def forget_idle(self, before_ms: int) -> None:
        """Forgets the producers last seen before that time, permanent ones excepted."""
        idle = {
            name for name, (_, seen_ms, permanent) in self._producers.items() if not permanent and seen_ms < before_ms
        }
        numbers = {self._producers.pop(name)[0] for name in idle}
        self._marks = {key: mark for key, mark in self._marks.items() if key[0] not in numbers}

    # --- Slots that move ----------------------------------------------------------------------------------------------

    def hold(self, migration_id: int, slots: Sequence[int], image: bytes = b"") -> None:
        """Takes note of slots on their way: here, with their image, or away from here, without one."""
        self._held[migration_id] = tuple(slots), image

    def settle(self, migration_id: int, *, committed: bool) -> None:
        """Counts an image, or forgets slots that were given away, if the migration was committed.

        Raises:
            InvalidArgumentError: there is no such migration here, or what is held is no image.
        """
        if migration_id not in self._held:
            raise InvalidArgumentError(f"migration {migration_id} ends, and has never begun")
        slots, image = self._held.pop(migration_id)
        if committed and image:
            self._take_in(read_image(image))
        elif committed:
            self._forget_slots(slots)

    def _take_in(self, image: SlotsImage) -> None:
        if image.oldest_event_ms is not None:
            self._note_times(image.oldest_event_ms, image.newest_event_ms)
        songs = self._songs.add(image.song_ids, image.song_starts, image.song_sizes, image.song_hashes).astype(np.int64)
        charts = np.zeros(1 + len(image.charts), np.int64)
        if image.charts:
            charts[1:] = self._charts.add_texts(list(image.charts))
        for board in image.boards.values():
            keys, cells = charts[board.charts] << 32 | songs[board.songs], board.cells
            self._add(keys[cells.entries], cells.buckets.astype(np.int64), cells.counts.astype(np.int64))
            beyond = board.counts.copy()
            np.subtract.at(beyond, cells.entries, cells.counts)
            held = np.flatnonzero(beyond)
            self._add(keys[held], np.full(len(held), _NO_TIME, np.int64), beyond[held])
        numbers = [self._know(one.producer_id, one.last_seen_ms, one.permanent) for one in image.producers]
        marks = image.marks
        columns = (marks.producers, marks.slots, marks.highest, marks.bitmaps)
        for producer, slot, highest, bitmap in zip(*(column.tolist() for column in columns), strict=True):
            self._marks[numbers[producer], slot] = highest, bitmap

    def _forget_slots(self, slots: Sequence[int]) -> None:
        if partitioner_of(self._settings.partitioner).whole_songs:
            gone = np.isin(self._hashes(self._songs) % np.uint64(self._settings.slots), slots)
            self._rows = [
                tuple(column[~gone[keys & 0xFFFFFFFF]] for column in (keys, buckets, counts))
                for keys, buckets, counts in self._rows
            ]
        marked = {number for number, slot in self._marks if slot in slots}
        self._marks = {key: mark for key, mark in self._marks.items() if key[1] not in slots}
        nowhere = marked - {number for number, _ in self._marks}
        self._producers = {name: one for name, one in self._producers.items() if one[0] not in nowhere}

    # --- Plays --------------------------------------------------------------------------------------------------------

    def _note_times(self, first_ms: int, last_ms: int) -> None:
        newest, oldest = self._times_ms
        self._times_ms = (last_ms, first_ms) if oldest is None else (max(newest, last_ms), min(oldest, first_ms))

    def _know(self, name: bytes, seen_ms: int, permanent: bool) -> int:
        """Takes note of a producer; returns its number."""
        number, before_ms, was_permanent = self._producers.get(name, (self._next_number, 0, False))
        self._next_number = max(self._next_number, number + 1)
        self._producers[name] = number, max(before_ms, seen_ms), was_permanent or permanent
        return number

    def _count(self, request: bytes, part: Part, verdict: pb.Verdict, admitted_ms: int) -> None:
        columns = part.columns
        keys = part.slot_keys(request, self._settings)
        slots = (keys % np.uint64(self._settings.slots)).astype(np.int64)
        taken = ~np.isin(slots, np.array(verdict.skipped_slots, np.int64))
        touched = np.unique(slots[taken]).tolist()
        if touched:
            self._mark(
                part.producer_id(request),
                touched,
                columns.sequence,
                max(admitted_ms, columns.first_sent_ms),
                not columns.first_sent_ms,
            )
        taken &= ~np.isin(columns.indexes, np.array(verdict.rejected_indexes, np.uint32))
        rows = np.flatnonzero(taken)
        if not len(rows):
            return
        times = columns.times_ms[rows]
        self._note_times(int(times.min()), int(times.max()))
        songs = self._songs.add(request, columns.song_starts[rows], columns.song_sizes[rows], part.hashes[rows])
        buckets, counts = times // self._settings.resolution_ms, columns.counts[rows]
        self._add(songs.astype(np.int64), buckets, counts)
        if columns.charts_used:
            many = np.diff(columns.chart_bounds)
            named = np.repeat(taken, many)
            starts, sizes = columns.chart_starts[: len(named)][named], columns.chart_sizes[: len(named)][named]
            charts = self._charts.add(request, starts, sizes, hash_strings(request, starts, sizes))
            of = np.repeat(np.arange(len(rows)), many[rows])
            self._add(charts.astype(np.int64) << 32 | songs[of].astype(np.int64), buckets[of], counts[of])

    def _mark(self, name: bytes, slots: Sequence[int], sequence: int, seen_ms: int, permanent: bool) -> None:
        number = self._know(name, seen_ms, permanent)
        for slot in slots:
            mark = self._marks.get((number, slot))
            if mark is None:
                self._marks[number, slot] = sequence, 0
                continue
            highest, bitmap = mark
            if sequence > highest:
                bitmap = (
                    ((bitmap << 1 | 1) << sequence - highest - 1) & (1 << 64) - 1 if sequence - highest <= 64 else 0
                )
                highest = sequence
            else:
                bitmap |= 1 << highest - sequence - 1
            self._marks[number, slot] = highest, bitmap

    def _add(self, keys: NDArray[np.int64], buckets: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        self._rows.append((keys, buckets, counts))
        self._gathered += len(keys)
        if self._gathered > _ROWS_MAX:
            self._rows = [_added_up(self._rows)]
            self._gathered = len(self._rows[0][0]) // 2  # so that what is left over is not sorted again each time

    # --- What it comes to ---------------------------------------------------------------------------------------------

    def account(self, windows: Mapping[tuple[str, str], WindowAccount]) -> Account:
        """What has been counted comes to this.

        Args:
            windows: the standing windows to be counted, by text and board; of each only where it stands is looked at.
        """
        rows = self._rows = [_added_up(self._rows)]
        keys, counts = _sums(rows[0][0], rows[0][2])
        tables = {board: self._table(*_of_board(board, keys, counts)) for board in (GLOBAL, CHARTS)}
        totals = self._totals(keys, counts)
        hashes = self._hashes(self._charts)
        return make_account(
            self._settings.slots,
            self._times_ms,
            tables,
            self._marks_by_slot(),
            [(name, seen_ms, permanent) for name, (_, seen_ms, permanent) in self._producers.items()],
            [(int(hashes[chart]), *totals[chart].tolist()) for chart in np.flatnonzero(totals.any(axis=1)).tolist()],
            self._best(keys, counts, totals, hashes),
            {key: self._window(key, asked) for key, asked in windows.items()},
        )

    def listed(self, slots: Sequence[int]) -> dict[tuple[str, str], int]:
        """The entries of some slots by (chart, song)."""
        rows = _added_up(self._rows)
        keys, counts = _sums(rows[0], rows[2])
        wanted = np.isin(self._hashes(self._songs)[keys & 0xFFFFFFFF] % np.uint64(self._settings.slots), slots)
        charts, songs = (keys[wanted] >> 32).astype(np.int32), (keys[wanted] & 0xFFFFFFFF).astype(np.int32)
        names = zip(self._charts.texts(charts), self._songs.texts(songs), strict=True)
        return dict(zip(names, counts[wanted].tolist(), strict=True))

    @staticmethod
    def _hashes(table: StringTable) -> Numbers:
        return hash_strings(table.arena[: table.arena_used], table.starts[: len(table)], table.sizes(0, len(table)))

    def _table(self, keys: NDArray[np.int64], counts: NDArray[np.int64]) -> EntryTable:
        charts, songs = (keys >> 32).astype(np.int32), (keys & 0xFFFFFFFF).astype(np.int32)
        hashes = self._hashes(self._songs), self._hashes(self._charts)
        return table_of(counts, *hashes, self._settings.slots, charts, songs)

    def _totals(self, keys: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Plays and songs of each chart, int64[charts, 2]."""
        totals = np.zeros((len(self._charts), 2), np.int64)
        np.add.at(totals[:, 0], keys >> 32, counts)
        totals[:, 1] = np.bincount(keys >> 32, minlength=len(totals))
        return totals

    def _marks_by_slot(self) -> Numbers:
        names = {number: hash_of(name) for name, (number, _, _) in self._producers.items()}
        owners = np.array([names.get(number, 0) for number, _ in self._marks], np.uint64)
        slots = np.array([slot for _, slot in self._marks], np.int64)
        highest, bitmaps = (np.array([mark[at] for mark in self._marks.values()], np.uint64) for at in (0, 1))
        return by_slot(mix(owners, slots, highest, bitmaps), slots, self._settings.slots)

    def _best(
        self, keys: NDArray[np.int64], counts: NDArray[np.int64], totals: NDArray[np.int64], hashes: Numbers
    ) -> list[tuple[int, Numbers, NDArray[np.int64]]]:
        song_hashes = self._hashes(self._songs)
        found = []
        in_charts = totals.copy()
        in_charts[0] = 0
        for chart in best_charts(totals, hashes, in_charts=False) + best_charts(in_charts, hashes, in_charts=True):
            own = slice(*np.searchsorted(keys, [chart << 32, (chart + 1) << 32]))
            some, plays = keys[own] & 0xFFFFFFFF, counts[own]
            if len(plays) > BEST_COUNT:  # those that may be among the best, then in order
                least = np.partition(plays, len(plays) - BEST_COUNT)[len(plays) - BEST_COUNT]
                some, plays = some[plays >= least], plays[plays >= least]
            names = [text.encode() for text in self._songs.texts(some.astype(np.int32))]
            order = sorted(range(len(names)), key=lambda at: (-int(plays[at]), names[at]))[:BEST_COUNT]
            found.append((int(hashes[chart]), song_hashes[some[order]], plays[order]))
        return found

    def _window(self, key: tuple[str, str], asked: WindowAccount) -> WindowAccount:
        text, board = key
        window = parse_window(text)
        keys, buckets, counts = _of_board(board, *self._rows[0])
        inside = (buckets >= asked.start) & (buckets < asked.end)
        if not isinstance(window, SessionWindow):
            keys, counts = _sums(keys[inside], counts[inside])
            return window_account(asked.start, asked.end, self._table(keys, counts), counts)
        gap = window.gap_ms // self._settings.resolution_ms
        inside = (buckets >= asked.start - gap - 1) & (buckets < asked.end)
        keys, starts, lasts, counts = _last_sessions(keys[inside], buckets[inside], counts[inside], gap)
        held = np.flatnonzero((lasts >= asked.end - 1 - gap) & (starts >= asked.start))
        table = self._table(keys, counts)
        return session_account(asked.start, asked.end, table, held, starts[held], lasts[held], counts[held])


def _keeps_all(meta: Mapping[str, Any]) -> bool:
    """Whether no tier ever dropped plays."""
    return str(meta["tiers"]).endswith("*") and meta["tier_floors"][-1] <= -(1 << 63)


def _of_board(board: str, keys: NDArray[np.int64], *columns: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
    own = keys < 1 << 32 if board == GLOBAL else keys >= 1 << 32
    return tuple(column[own] for column in (keys, *columns))


def _sums(keys: NDArray[np.int64], counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each key once, ascending, with its sum; none of them 0."""
    if not len(keys):
        return keys, counts
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    heads = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
    keys, counts = keys[heads], np.add.reduceat(counts, heads)
    return keys[counts != 0], counts[counts != 0]


def _added_up(rows: Sequence[Rows]) -> Rows:
    """One row for each key and bucket, by key, then bucket; none of them 0."""
    if not rows:
        nothing = np.zeros(0, np.int64)
        return nothing, nothing, nothing
    keys, buckets, counts = (np.concatenate([one[at] for one in rows]) for at in range(3))
    if not len(keys):
        return keys, buckets, counts
    order = np.lexsort((buckets, keys))
    keys, buckets, counts = keys[order], buckets[order], counts[order]
    heads = np.flatnonzero(np.concatenate(([True], (keys[1:] != keys[:-1]) | (buckets[1:] != buckets[:-1]))))
    keys, buckets, counts = keys[heads], buckets[heads], np.add.reduceat(counts, heads)
    held = counts != 0
    return keys[held], buckets[held], counts[held]


def _last_sessions(
    keys: NDArray[np.int64], buckets: NDArray[np.int64], counts: NDArray[np.int64], gap: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The last session of each key in rows as `_added_up` makes them: keys, first buckets, last buckets, plays."""
    if not len(keys):
        return keys, buckets, buckets, counts
    begins = np.concatenate(([True], (keys[1:] != keys[:-1]) | (buckets[1:] - buckets[:-1] > gap)))
    heads = np.flatnonzero(begins)
    plays = np.add.reduceat(counts, heads)
    tails = np.append(heads[1:], len(keys)) - 1
    last = np.concatenate((keys[heads][1:] != keys[heads][:-1], [True]))
    return keys[heads][last], buckets[heads][last], buckets[tails][last], plays[last]
