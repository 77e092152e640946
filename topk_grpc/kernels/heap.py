"""Counting plays, and the best entries of each chart kept in order meanwhile: an indexed binary min-heap a chart.

An entry stands before another when its count is higher, or the counts are equal and its song_id is smaller as bytes.
The root is the worst of the best: a play's entry is let in only when it beats the root, so that most plays cost one
comparison. A row holds an entry's count in one column and, in the next, where the entry lies in its chart's heap, plus
1; 0 is "not in it". So a play touches one cache line. Heaps keep their own copy of their entries' counts, since a row
may be changed by several plays before anybody looks.

Counts also fall: a bucket leaves a window, a correction takes plays back. An entry of the heap then sinks, and may end
behind entries that are not in it. They cannot be found without looking at all, so each chart keeps a bound: the best
entry that was ever refused or driven out since the heap was last filled, with the count it had. None outside stands
before the bound, as long as those outside that grow are offered again. So the k best of the heap are the k best of all
while the last of them does not stand behind the bound; when it does, the heap is filled anew by selection. While counts
only grow that never happens: whoever is driven out stands behind the root.

Source: J. W. J. Williams, "Algorithm 232: Heapsort", CACM 7 (1964); the index as in Sedgewick & Wayne, "Algorithms",
section 2.4.
"""

from __future__ import annotations

import cython
import numpy as np
from numpy.typing import NDArray

_BLOCK_CHANGES = cython.declare(cython.Py_ssize_t, 256)


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _compare_ids(arena: cython.const[cython.uchar][::1], a: cython.Py_ssize_t, b: cython.Py_ssize_t) -> cython.int:
    """Below, at or above 0 as the string at `a` is smaller, equal or larger; offsets as in `StringTable.starts`."""
    size_a: cython.int = arena[a - 2] | (arena[a - 1] << 8)
    size_b: cython.int = arena[b - 2] | (arena[b - 1] << 8)
    size: cython.int = size_a if size_a < size_b else size_b
    i: cython.int
    for i in range(size):
        if arena[a + i] != arena[b + i]:
            return cython.cast(cython.int, arena[a + i]) - cython.cast(cython.int, arena[b + i])
    return size_a - size_b


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _song(songs: cython.const[cython.int][::1], entry: cython.Py_ssize_t) -> cython.Py_ssize_t:
    """The song of an entry; where `songs` is empty an entry's number is its song's."""
    return songs[entry] if songs.shape[0] else entry


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _before(
    count_a: cython.longlong,
    entry_a: cython.Py_ssize_t,
    count_b: cython.longlong,
    entry_b: cython.Py_ssize_t,
    songs: cython.const[cython.int][::1],
    starts: cython.const[cython.longlong][::1],
    arena: cython.const[cython.uchar][::1],
    backwards: cython.bint,
) -> cython.bint:
    """Whether entry a stands before entry b or, backwards, behind it; they are different entries."""
    if count_a != count_b:
        return (count_a > count_b) != backwards
    return (_compare_ids(arena, starts[_song(songs, entry_a)], starts[_song(songs, entry_b)]) < 0) != backwards


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _sift_down(
    entries: cython.int[:, ::1],
    keys: cython.longlong[:, ::1],
    chart: cython.Py_ssize_t,
    size: cython.Py_ssize_t,
    at: cython.Py_ssize_t,
    rows: cython.longlong[:, ::1],
    place: cython.Py_ssize_t,
    songs: cython.const[cython.int][::1],
    starts: cython.const[cython.longlong][::1],
    arena: cython.const[cython.uchar][::1],
    backwards: cython.bint,
) -> cython.void:
    """Moves the entry at `at` down until both below it stand before it."""
    entry: cython.int = entries[chart, at]
    key: cython.longlong = keys[chart, at]
    child: cython.Py_ssize_t
    indexed: cython.bint = rows.shape[0] > 0
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and _before(
            keys[chart, child],
            entries[chart, child],
            keys[chart, child + 1],
            entries[chart, child + 1],
            songs,
            starts,
            arena,
            backwards,
        ):
            child += 1
        if not _before(key, entry, keys[chart, child], entries[chart, child], songs, starts, arena, backwards):
            break
        entries[chart, at] = entries[chart, child]
        keys[chart, at] = keys[chart, child]
        if indexed:
            rows[entries[chart, at], place] = at + 1
        at = child
    entries[chart, at] = entry
    keys[chart, at] = key
    if indexed:
        rows[entry, place] = at + 1


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _sift_up(
    entries: cython.int[:, ::1],
    keys: cython.longlong[:, ::1],
    chart: cython.Py_ssize_t,
    at: cython.Py_ssize_t,
    rows: cython.longlong[:, ::1],
    place: cython.Py_ssize_t,
    songs: cython.const[cython.int][::1],
    starts: cython.const[cython.longlong][::1],
    arena: cython.const[cython.uchar][::1],
    backwards: cython.bint,
) -> cython.void:
    """Moves the entry at `at` up until it stands before the one above it."""
    entry: cython.int = entries[chart, at]
    key: cython.longlong = keys[chart, at]
    parent: cython.Py_ssize_t
    indexed: cython.bint = rows.shape[0] > 0
    while at > 0:
        parent = (at - 1) >> 1
        if not _before(keys[chart, parent], entries[chart, parent], key, entry, songs, starts, arena, backwards):
            break
        entries[chart, at] = entries[chart, parent]
        keys[chart, at] = keys[chart, parent]
        if indexed:
            rows[entries[chart, at], place] = at + 1
        at = parent
    entries[chart, at] = entry
    keys[chart, at] = key
    if indexed:
        rows[entry, place] = at + 1


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _leave_outside(
    outside: cython.longlong[:, ::1],
    chart: cython.Py_ssize_t,
    count: cython.longlong,
    entry: cython.Py_ssize_t,
    songs: cython.const[cython.int][::1],
    starts: cython.const[cython.longlong][::1],
    arena: cython.const[cython.uchar][::1],
) -> cython.void:
    """Moves the chart's bound so that this entry does not stand before it."""
    bound: cython.Py_ssize_t = cython.cast(cython.Py_ssize_t, outside[chart, 1]) - 1
    if bound < 0 or (
        (count > outside[chart, 0])
        if bound == entry
        else _before(count, entry, outside[chart, 0], bound, songs, starts, arena, False)
    ):
        outside[chart, 0] = count
        outside[chart, 1] = entry + 1


def count_plays(
    rows: cython.longlong[:, ::1],
    column: cython.Py_ssize_t,
    totals: cython.longlong[:, ::1],
    entries: cython.int[:, ::1],
    keys: cython.longlong[:, ::1],
    sizes: cython.int[::1],
    outside: cython.longlong[:, ::1],
    songs: cython.const[cython.int][::1],
    starts: cython.const[cython.longlong][::1],
    arena: cython.const[cython.uchar][::1],
    charts: cython.const[cython.int][::1],
    changed: cython.const[cython.int][::1],
    counts: cython.const[cython.longlong][::1],
    sign: cython.longlong,
    changes: cython.Py_ssize_t,
) -> None:
    """Adds plays to their entries' counts, to their charts' totals, and brings the heaps up to date.

    Goes over the changes in blocks, and over each block twice. The first pass only touches the rows: plain loads that
    do not wait for each other, so that their cache misses overlap. With comparisons between them they mostly do not,
    and a change took half as long again.

    Args:
        rows: int64[entries, columns]; a new row is all zero.
        column: of the counts; the next one holds the places in the heaps.
        totals: int64[charts, 2]: plays, and entries whose count is not 0.
        entries, keys: int32 and int64[charts, heap size], the heaps.
        sizes: int32[charts], entries in each.
        outside: int64[charts, 2], the bound of each chart: a count, and an entry plus 1; 0: nobody is outside.
        songs: int32[entries], the song of each entry; empty: an entry's number is its song's.
        starts, arena: of the song ids, as in `StringTable`.
        charts, changed, counts: chart, entry and plays of each change; an entry may occur several times.
        sign: 1 to add the plays, -1 to take them away.
        changes: how many.
    """
    if not cython.compiled:
        rows, totals, entries, keys = memoryview(rows), memoryview(totals), memoryview(entries), memoryview(keys)
        sizes, outside, songs = memoryview(sizes), memoryview(outside), memoryview(songs)
        starts, arena = memoryview(starts), memoryview(arena)
        charts, changed, counts = memoryview(charts), memoryview(changed), memoryview(counts)
    i: cython.Py_ssize_t
    chart: cython.Py_ssize_t
    entry: cython.Py_ssize_t
    at: cython.Py_ssize_t
    room: cython.Py_ssize_t = entries.shape[1]
    place: cython.Py_ssize_t = column + 1
    before: cython.longlong
    count: cython.longlong
    ahead: cython.Py_ssize_t = 0
    touched: cython.longlong = 0
    with cython.nogil:
        for i in range(changes):
            if i == ahead:
                ahead = min(i + _BLOCK_CHANGES, changes)
                for at in range(i, ahead):
                    touched = touched | rows[changed[at], place]
                if touched < 0:  # never, as no place is: it keeps the compiler from leaving the loads out
                    break
            chart = charts[i]
            entry = changed[i]
            before = rows[entry, column]
            count = before + sign * counts[i]
            rows[entry, column] = count
            totals[chart, 0] += sign * counts[i]
            if before == 0:
                totals[chart, 1] += 1
            if count == 0:
                totals[chart, 1] -= 1
            at = cython.cast(cython.Py_ssize_t, rows[entry, place]) - 1
            if at >= 0:
                before = keys[chart, at]
                keys[chart, at] = count
                if count > before:
                    _sift_down(entries, keys, chart, sizes[chart], at, rows, place, songs, starts, arena, False)
                elif count < before:
                    _sift_up(entries, keys, chart, at, rows, place, songs, starts, arena, False)
            elif count <= 0:
                continue
            elif sizes[chart] < room:
                at = sizes[chart]
                sizes[chart] += 1
                entries[chart, at] = cython.cast(cython.int, entry)
                keys[chart, at] = count
                _sift_up(entries, keys, chart, at, rows, place, songs, starts, arena, False)
            elif _before(count, entry, keys[chart, 0], entries[chart, 0], songs, starts, arena, False):
                _leave_outside(outside, chart, keys[chart, 0], entries[chart, 0], songs, starts, arena)
                rows[entries[chart, 0], place] = 0
                entries[chart, 0] = cython.cast(cython.int, entry)
                keys[chart, 0] = count
                _sift_down(entries, keys, chart, room, 0, rows, place, songs, starts, arena, False)
            else:
                _leave_outside(outside, chart, count, entry, songs, starts, arena)


def select_into(
    entries: cython.int[:, ::1],
    keys: cython.longlong[:, ::1],
    sizes: cython.int[::1],
    songs: cython.const[cython.int][::1],
    starts: cython.const[cython.longlong][::1],
    arena: cython.const[cython.uchar][::1],
    candidates: cython.int[::1],
    counts: cython.longlong[::1],
    offered: cython.Py_ssize_t,
    backwards: cython.bint,
) -> None:
    """Leaves the best of the candidates in the one heap of `entries`, and sorts them, best first.

    Args:
        entries, keys: int32 and int64[1, k].
        sizes: int32[1], 0; written: how many there are.
        songs, starts, arena: as in `count_plays`.
        candidates, counts: entries, each once, and their counts; those with count 0 are passed over.
        offered: how many.
        backwards: leaves the last of the candidates there instead, the last one first.
    """
    if not cython.compiled:
        entries, keys, sizes = memoryview(entries), memoryview(keys), memoryview(sizes)
        songs, starts, arena = memoryview(songs), memoryview(starts), memoryview(arena)
        candidates, counts = memoryview(candidates), memoryview(counts)
    i: cython.Py_ssize_t
    at: cython.Py_ssize_t
    room: cython.Py_ssize_t = entries.shape[1]
    last_entry: cython.int
    last_key: cython.longlong
    none: cython.longlong[:, ::1] = _NO_ROWS
    if not cython.compiled:
        none = memoryview(none)
    with cython.nogil:
        # From the end: there stand the better ones where the candidates are a heap's, and the others then stay outside.
        for i in range(offered - 1, -1, -1):
            if counts[i] <= 0:
                continue
            if sizes[0] < room:
                at = sizes[0]
                sizes[0] += 1
                entries[0, at] = candidates[i]
                keys[0, at] = counts[i]
                _sift_up(entries, keys, 0, at, none, 1, songs, starts, arena, backwards)
            elif _before(counts[i], candidates[i], keys[0, 0], entries[0, 0], songs, starts, arena, backwards):
                entries[0, 0] = candidates[i]
                keys[0, 0] = counts[i]
                _sift_down(entries, keys, 0, room, 0, none, 1, songs, starts, arena, backwards)
        # Heapsort: the root is the worst left, so it goes to the end.
        for i in range(sizes[0] - 1, 0, -1):
            last_entry = entries[0, i]
            last_key = keys[0, i]
            entries[0, i] = entries[0, 0]
            keys[0, i] = keys[0, 0]
            entries[0, 0] = last_entry
            keys[0, 0] = last_key
            _sift_down(entries, keys, 0, i, 0, none, 1, songs, starts, arena, backwards)


def compare_with(
    songs: cython.const[cython.int][::1],
    starts: cython.const[cython.longlong][::1],
    arena: cython.const[cython.uchar][::1],
    candidates: cython.int[::1],
    counts: cython.longlong[::1],
    song_id: cython.const[cython.uchar][::1],
    song_size: cython.int,
    count: cython.longlong,
    sides: cython.schar[::1],
    offered: cython.Py_ssize_t,
) -> None:
    """On which side of a place (song_id, count) each candidate stands.

    Args:
        songs, starts, arena: as in `count_plays`.
        candidates, counts: entries and their counts.
        song_id, song_size, count: the place.
        sides: int8[offered], written: 1 before it, -1 after it, 0 the place itself, or no plays.
        offered: how many.
    """
    if not cython.compiled:
        songs, starts, arena = memoryview(songs), memoryview(starts), memoryview(arena)
        candidates, counts, sides = memoryview(candidates), memoryview(counts), memoryview(sides)
    i: cython.Py_ssize_t
    j: cython.int
    start: cython.Py_ssize_t
    size: cython.int
    order: cython.int
    with cython.nogil:
        for i in range(offered):
            if counts[i] <= 0:
                sides[i] = 0
            elif counts[i] != count:
                sides[i] = 1 if counts[i] > count else -1
            else:
                start = starts[_song(songs, candidates[i])]
                size = arena[start - 2] | (arena[start - 1] << 8)
                order = size - song_size
                for j in range(size if size < song_size else song_size):
                    if arena[start + j] != song_id[j]:
                        order = cython.cast(cython.int, arena[start + j]) - cython.cast(cython.int, song_id[j])
                        break
                sides[i] = -1 if order > 0 else (1 if order < 0 else 0)


_NO_ROWS = np.empty((0, 2), np.int64)


def select(
    songs: NDArray[np.int32],
    starts: NDArray[np.int64],
    arena: NDArray[np.uint8],
    candidates: NDArray[np.int32],
    counts: NDArray[np.int64],
    k: int,
    backwards: bool = False,
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The k best of the candidates, best first: entries and their counts.

    Args:
        songs, starts, arena: as in `count_plays`.
        candidates, counts: entries, each once, and their counts; those with count 0 are passed over.
        k: at least 0.
        backwards: the last k instead, the last one first.
    """
    room = min(k, len(candidates))
    if room == 0:
        return np.empty(0, np.int32), np.empty(0, np.int64)
    entries = np.empty((1, room), np.int32)
    keys = np.empty((1, room), np.int64)
    sizes = np.zeros(1, np.int32)
    select_into(entries, keys, sizes, songs, starts, arena, candidates, counts, len(candidates), backwards)
    return entries[0, : sizes[0]], keys[0, : sizes[0]]
