"""What some slots come to: by this a source, an image and a target are held against each other when slots move.

Digests are made as in account.py: sums of hashes of names and counts, which do not depend on how anything is numbered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from topk_grpc.engine.account import EntryTable, Numbers, digest_marks, hash_of
from topk_grpc.engine.deletion import entries_of
from topk_grpc.engine.slots_image import SlotsImage
from topk_grpc.engine.state import CHARTS, GLOBAL, ShardState
from topk_grpc.kernels.hash import hash_strings
from topk_grpc.ring.partitioners import partitioner_of


@dataclass(frozen=True, slots=True)
class SlotTotals:
    """Totals of slots, place by place.

    Attributes:
        slots: ascending.
        plays: of all time in the global chart.
        entries: (chart, song) pairs with plays, the global chart included.
        digests: of (chart, song, plays).
        marks: digests of (producer, slot, highest sequence, bitmap).
    """

    slots: tuple[int, ...]
    plays: tuple[int, ...]
    entries: tuple[int, ...]
    digests: tuple[int, ...]
    marks: tuple[int, ...]


def chosen_slots(state: ShardState, slots: Sequence[int]) -> NDArray[np.bool_]:
    """Which slots of the cluster are among these, bool[slots]."""
    wanted = np.zeros(state.settings.slots, np.bool_)
    wanted[list(slots)] = True
    return wanted


def chosen_songs(state: ShardState, wanted: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which songs belong to the slots, bool[songs]; none where the slot is not the song's."""
    if not partitioner_of(state.settings.partitioner).whole_songs:
        return np.zeros(len(state.songs), np.bool_)
    return wanted[state.slots_of_songs()]


def slot_totals(state: ShardState, slots: Sequence[int]) -> SlotTotals:
    """The totals of some slots of a state."""
    wanted = chosen_slots(state, slots)
    songs = chosen_songs(state, wanted)
    entries = entries_of(state, songs)
    of_songs = np.zeros(len(songs), np.uint64)
    of_songs[songs] = _song_hashes(state, np.flatnonzero(songs))
    names = state.charts
    chart_hashes = hash_strings(names.arena, names.starts[: len(names)], names.sizes(0, len(names)))
    tables = []
    for board, some in entries.items():
        named = state.pairs.songs[some] if board == CHARTS else some
        charts = state.pairs.charts[some] if board == CHARTS else np.zeros(len(some), np.int32)
        counts = state.boards[board].counts_of(some)
        tables.append(_table(chart_hashes[charts], of_songs[named], counts, len(wanted)))
    marks = state.producers.marks.of_slots(wanted)
    numbers, which = np.unique(marks["producers"], return_inverse=True)
    hashes = np.array([hash_of(name) for name, _ in state.producers.with_marks(numbers)], np.uint64)
    return _totals(
        sorted(set(slots)), len(wanted), tables,
        digest_marks(hashes[which], marks["slots"].astype(np.int64), marks["highest"], marks["bitmaps"], len(wanted)),
    )  # fmt: skip


def _song_hashes(state: ShardState, songs: NDArray[np.intp]) -> Numbers:
    starts = state.songs.starts[songs]
    sizes = state.songs.arena[starts - 2].astype(np.int32) | state.songs.arena[starts - 1].astype(np.int32) << 8
    return hash_strings(state.songs.arena, starts, sizes)


def image_totals(image: SlotsImage) -> SlotTotals:
    """The totals of an image's slots."""
    count = image.settings.slots
    chart_hashes = np.array([hash_of(name.encode()) for name in ("", *image.charts)], np.uint64)
    tables = [
        _table(chart_hashes[board.charts], image.song_hashes[board.songs], board.counts, count)
        for board in (image.boards[GLOBAL], image.boards[CHARTS])
    ]
    hashes = np.array([hash_of(one.producer_id) for one in image.producers], np.uint64)
    marks = image.marks
    return _totals(
        image.slots, count, tables,
        digest_marks(hashes[marks.producers], marks.slots.astype(np.int64), marks.highest, marks.bitmaps, count),
    )  # fmt: skip


def _table(charts: Numbers, songs: Numbers, counts: NDArray[np.int64], slots: int) -> EntryTable:
    return EntryTable(charts, songs, (songs % np.uint64(slots)).astype(np.int64), counts)


def _totals(slots: Sequence[int], count: int, tables: Sequence[EntryTable], marks: Numbers) -> SlotTotals:
    plays, entries, digests = (np.zeros(count, kind) for kind in (np.int64, np.int64, np.uint64))
    np.add.at(plays, tables[0].slots, tables[0].counts)
    for table in tables:
        entries += np.bincount(table.slots, minlength=count)
        with np.errstate(over="ignore"):
            digests += table.digests(count)
    columns = (tuple(column[list(slots)].tolist()) for column in (plays, entries, digests, marks))
    return SlotTotals(tuple(slots), *columns)
