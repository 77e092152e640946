"""Passes over cells and plays: sums of entries, cells of some entries, charts' plays, totals against a limit."""

from __future__ import annotations

import cython


def expand_charts(
    chosen: cython.uchar[::1],
    chart_bounds: cython.int[::1],
    chart_numbers: cython.int[::1],
    songs: cython.int[::1],
    buckets: cython.longlong[::1],
    counts: cython.longlong[::1],
    pair_charts: cython.int[::1],
    pair_songs: cython.int[::1],
    pair_buckets: cython.longlong[::1],
    pair_counts: cython.longlong[::1],
    rows: cython.Py_ssize_t,
) -> int:
    """Turns plays that name charts into one row a (play, chart).

    Args:
        chosen: uint8[rows], 1 where the play counts; the columns after chart_numbers hold only those.
        chart_bounds: int32[rows + 1], play i names chart_numbers[chart_bounds[i]:chart_bounds[i + 1]].
        chart_numbers: int32.
        songs, buckets, counts: of the plays that count, in order.
        pair_charts, pair_songs, pair_buckets, pair_counts: written.
        rows: plays.

    Returns:
        Rows written.
    """
    if not cython.compiled:
        chosen, chart_bounds, chart_numbers = memoryview(chosen), memoryview(chart_bounds), memoryview(chart_numbers)
        songs, buckets, counts = memoryview(songs), memoryview(buckets), memoryview(counts)
        pair_charts, pair_songs = memoryview(pair_charts), memoryview(pair_songs)
        pair_buckets, pair_counts = memoryview(pair_buckets), memoryview(pair_counts)
    i: cython.Py_ssize_t
    j: cython.Py_ssize_t
    play: cython.Py_ssize_t = 0
    out: cython.Py_ssize_t = 0
    with cython.nogil:
        for i in range(rows):
            if chosen[i] == 0:
                continue
            for j in range(chart_bounds[i], chart_bounds[i + 1]):
                pair_charts[out] = chart_numbers[j]
                pair_songs[out] = songs[play]
                pair_buckets[out] = buckets[play]
                pair_counts[out] = counts[play]
                out += 1
            play += 1
    return out


def sum_cells(
    entries: cython.const[cython.int][::1],
    counts: cython.const[cython.longlong][::1],
    sums: cython.longlong[::1],
    cells: cython.Py_ssize_t,
) -> None:
    """Adds cells to their entries' sums.

    Args:
        entries, counts: of each cell.
        sums: int64[entries].
        cells: how many.
    """
    if not cython.compiled:
        entries, counts, sums = memoryview(entries), memoryview(counts), memoryview(sums)
    i: cython.Py_ssize_t
    with cython.nogil:
        for i in range(cells):
            sums[entries[i]] += counts[i]


def select_cells(
    buckets: cython.const[cython.longlong][::1],
    entries: cython.const[cython.int][::1],
    counts: cython.const[cython.longlong][::1],
    numbers: cython.const[cython.int][::1],
    some_buckets: cython.longlong[::1],
    some_entries: cython.int[::1],
    some_counts: cython.longlong[::1],
    cells: cython.Py_ssize_t,
) -> int:
    """The cells of some entries, under other numbers.

    Args:
        buckets, entries, counts: of each cell.
        numbers: int32[entries], the number that each entry gets; -1: it is left out.
        some_buckets, some_entries, some_counts: written; room for all cells.
        cells: how many.

    Returns:
        How many were written.
    """
    if not cython.compiled:
        buckets, entries, counts = memoryview(buckets), memoryview(entries), memoryview(counts)
        numbers, some_buckets = memoryview(numbers), memoryview(some_buckets)
        some_entries, some_counts = memoryview(some_entries), memoryview(some_counts)
    i: cython.Py_ssize_t
    number: cython.int
    out: cython.Py_ssize_t = 0
    with cython.nogil:
        for i in range(cells):
            number = numbers[entries[i]]
            if number >= 0:
                some_buckets[out] = buckets[i]
                some_entries[out] = number
                some_counts[out] = counts[i]
                out += 1
    return out


def reach_limit(
    counts: cython.longlong[::1],
    chosen: cython.uchar[::1],
    total: cython.longlong,
    limit: cython.longlong,
    rows: cython.Py_ssize_t,
) -> int:
    """How far a running total goes with the chosen plays.

    Args:
        counts: of each play, each from 1 to `limit`.
        chosen: uint8[rows], 1 where the play would count; set to 0 where the total would leave the limit.
        total: so far.
        limit: the largest total allowed.
        rows: plays.

    Returns:
        The total after.
    """
    if not cython.compiled:
        counts, chosen = memoryview(counts), memoryview(chosen)
    i: cython.Py_ssize_t
    with cython.nogil:
        for i in range(rows):
            if chosen[i] != 0:
                if counts[i] > limit - total:
                    chosen[i] = 0
                else:
                    total += counts[i]
    return total
