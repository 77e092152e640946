"""Cells of given entries: what corrections and the deletion of a song ask of a board's cells.

Cells lie by time, not by entry, so both look at all cells of the buckets asked for. That is one pass, however many
entries are asked for: a batch may bring 65,536 corrections. Ordered blocks are searched for the buckets; whose cells
they are is looked up in a table of flags, so that only those of the entries asked for cost more than a lookup.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from topk_grpc.engine.cells import Cells, CellStore, merge

_STEP_CELLS: Final = 1 << 20
"""So many cells are looked at together, which bounds what a pass over a large block takes in memory."""
_INT64_MAX: Final = (1 << 63) - 1

Columns = tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]
"""Buckets, entries and counts of cells."""


def span_sums(
    store: CellStore, entries: NDArray[np.int32], starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The plays of entries in spans of buckets.

    Args:
        store: a board's cells.
        entries, starts, ends: what is asked for, place by place: an entry's plays in the buckets [start, end). Spans of
            one entry do not overlap; none is empty.

    Returns:
        The sum of each.
    """
    sums = np.zeros(len(entries), np.int64)
    if len(entries):
        asked = _Spans(entries, starts, ends)
        for cells in store.within(int(asked.starts[0]), int(asked.ends[-1])):
            for columns in _slices(cells, asked.starts, asked.ends):
                asked.add(columns, sums)
    return sums


def cells_of(store: CellStore, entries: NDArray[np.int32]) -> Columns:
    """All cells of some entries, added up by bucket and entry; without those that add up to 0.

    Args:
        store: a board's cells.
        entries: of the board, each once.
    """
    wanted = _flags(entries)
    parts = []
    for cells in store.within(-_INT64_MAX - 1, _INT64_MAX + 1):
        for start in range(0, len(cells), _STEP_CELLS):
            step = slice(start, start + _STEP_CELLS)
            found = np.flatnonzero(wanted[np.minimum(cells.entries[step], len(wanted) - 1)])
            if len(found):
                buckets, counts = cells.buckets[step][found], cells.counts[step][found]
                first, last = int(buckets.min()), int(buckets.max())
                parts.append(Cells(buckets, cells.entries[step][found], counts, first, last, ordered=False))
    if not parts:
        return np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.int64)
    whole = merge(parts)
    return whole.buckets, whole.entries, whole.counts


def _flags(entries: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Which entries are among these; looked up at most at its last place, which is False."""
    flags = np.zeros(int(entries.max(initial=-1)) + 2, bool)
    flags[entries] = True
    return flags


def _slices(cells: Cells, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Iterator[Columns]:
    """Pieces of bounded size that hold every cell of the intervals [start, end), and others where cells are unordered.

    Args:
        cells: a chunk or block.
        starts, ends: ascending; the intervals do not overlap.
    """
    if not cells.ordered:
        for start in range(0, len(cells), _STEP_CELLS):
            step = slice(start, start + _STEP_CELLS)
            yield cells.buckets[step], cells.entries[step], cells.counts[step]
        return
    lows, highs = np.searchsorted(cells.buckets, starts), np.searchsorted(cells.buckets, ends)
    stops = np.cumsum(highs - lows)
    for start in range(0, int(stops[-1]), _STEP_CELLS):
        places = np.arange(start, min(start + _STEP_CELLS, int(stops[-1])))
        interval = np.searchsorted(stops, places, side="right")
        rows = highs[interval] - (stops[interval] - places)
        yield cells.buckets[rows], cells.entries[rows], cells.counts[rows]


class _Spans:
    """The spans of `span_sums`, at least one, in the order in which cells are looked up in them.

    Attributes:
        starts, ends: all of them as intervals of buckets, ascending; those that overlap or touch are one.
    """

    def __init__(self, entries: NDArray[np.int32], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
        self._wanted = _flags(entries)
        self._entries, self._starts = np.unique(entries), np.unique(starts)
        keys = self._keys(entries, starts)
        self._order = np.argsort(keys)
        self._sorted_keys, self._ends = keys[self._order], ends[self._order]
        by_start = np.argsort(starts)
        reach = np.maximum.accumulate(ends[by_start])
        heads = np.flatnonzero(np.concatenate(([True], starts[by_start][1:] > reach[:-1])))
        self.starts, self.ends = starts[by_start][heads], reach[np.append(heads[1:], len(reach)) - 1]

    def _keys(self, entries: NDArray[np.int32], buckets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers in the order of (entry, the last start of any span at or before the bucket)."""
        begun = np.searchsorted(self._starts, buckets, side="right")
        return np.searchsorted(self._entries, entries) * (len(self._starts) + 1) + begun

    def add(self, cells: Columns, sums: NDArray[np.int64]) -> None:
        """Adds each cell to the sum of the span that it lies in."""
        buckets, entries, counts = cells
        found = np.flatnonzero(self._wanted[np.minimum(entries, len(self._wanted) - 1)])
        buckets, counts = buckets[found], counts[found]
        keys = self._keys(entries[found], buckets)
        # The span that starts last before the bucket holds the cell, if it is the same entry's and reaches that far.
        spans = np.searchsorted(self._sorted_keys, keys, side="right") - 1
        starts = len(self._starts) + 1
        inside = (spans >= 0) & (self._sorted_keys[spans] // starts == keys // starts) & (buckets < self._ends[spans])
        np.add.at(sums, self._order[spans[inside]], counts[inside])
