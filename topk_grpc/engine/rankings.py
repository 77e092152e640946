"""A ranking: one window's counts on a board, its charts' totals, and the best entries of each chart in order.

The counts are a column of the board's rows, the column after it holds the places in the heaps. How the heaps stay right
while counts fall, and when they have to be filled anew, stands in kernels/heap.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from topk_grpc.kernels.heap import count_plays, select
from topk_grpc.kernels.strings import StringTable

Rows = NDArray[np.int64]
Entries = NDArray[np.int32]
Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Names:
    """What entries are called: they are ordered by it where counts are equal.

    Attributes:
        songs: the song of each entry; empty: an entry's number is its song's.
        strings: the song ids.
    """

    songs: NDArray[np.int32]
    strings: StringTable

    def select(self, entries: Entries, counts: Counts, k: int) -> tuple[Entries, Counts]:
        """The k best of some entries, best first."""
        strings = self.strings
        return select(
            self.songs,
            strings.starts,
            strings.arena,
            np.ascontiguousarray(entries),
            np.ascontiguousarray(counts),
            k,
        )

    def id_of(self, entry: int) -> bytes:
        """The song_id of an entry."""
        return self.strings.text(int(self.songs[entry]) if len(self.songs) else entry).encode()


class Ranking:
    """Counts in a column of rows that somebody else owns, and the heaps over them. One writer.

    Args:
        column: of the counts; the next one is this ranking's, too. Both are zero.
        heap_size: the best entries that each chart keeps in order.
    """

    def __init__(self, column: int, heap_size: int) -> None:
        self.column = column
        self._heap_size = heap_size
        self._make_heaps(1)

    def _make_heaps(self, charts: int) -> None:
        self._totals: NDArray[np.int64] = np.zeros((charts, 2), np.int64)
        self._heap_sizes: NDArray[np.int32] = np.zeros(charts, np.int32)
        self._outside: NDArray[np.int64] = np.zeros((charts, 2), np.int64)
        # Not filled: what no heap uses takes no memory.
        self._heap_entries: NDArray[np.int32] = np.empty((charts, self._heap_size), np.int32)
        self._heap_keys: NDArray[np.int64] = np.empty((charts, self._heap_size), np.int64)

    @property
    def charts(self) -> int:
        """Charts that there is room for so far."""
        return len(self._totals)

    @property
    def memory_bytes(self) -> int:
        """Bytes beside the rows; of the heaps only what is in use."""
        return self._totals.nbytes + self._outside.nbytes + 12 * int(self._heap_sizes.sum())

    def reserve(self, charts: int) -> None:
        """Makes room for charts."""
        known = self.charts
        if charts <= known:
            return
        totals, sizes, outside = self._totals, self._heap_sizes, self._outside
        entries, keys = self._heap_entries, self._heap_keys
        self._make_heaps(max(charts, 2 * known))
        self._totals[:known], self._heap_sizes[:known], self._outside[:known] = totals, sizes, outside
        self._heap_entries[:known], self._heap_keys[:known] = entries, keys

    # --- Counting -----------------------------------------------------------------------------------------------------

    def count(  # noqa: PLR0917
        self, rows: Rows, names: Names, charts: NDArray[np.int32], entries: Entries, counts: Counts, sign: int = 1
    ) -> None:
        """Adds plays, or takes them away.

        Args:
            rows: of the board.
            names: of its entries.
            charts, entries, counts: of each change.
            sign: 1 or -1.
        """
        count_plays(
            rows, self.column, self._totals,
            self._heap_entries, self._heap_keys, self._heap_sizes, self._outside,
            names.songs, names.strings.starts, names.strings.arena,
            charts, entries, counts, sign, len(entries),
        )  # fmt: skip

    def clear(self, rows: Rows) -> None:
        """Takes all plays away."""
        rows[:, self.column : self.column + 2] = 0
        self._totals[:] = 0
        self._heap_sizes[:] = 0
        self._outside[:] = 0

    def fill(self, rows: Rows, names: Names, chart: int, candidates: Entries) -> None:
        """Finds a chart's best anew: `candidates` are all its entries."""
        size = int(self._heap_sizes[chart])
        place = self.column + 1
        rows[self._heap_entries[chart, :size], place] = 0
        entries, counts = names.select(candidates, rows[candidates, self.column], self._heap_size + 1)
        self._outside[chart] = 0
        if len(entries) > self._heap_size:
            self._outside[chart] = counts[-1], entries[-1] + 1
            entries, counts = entries[:-1], counts[:-1]
        size = len(entries)
        # Worst first is a valid min-heap.
        self._heap_entries[chart, :size] = entries[::-1]
        self._heap_keys[chart, :size] = counts[::-1]
        self._heap_sizes[chart] = size
        rows[entries[::-1], place] = np.arange(1, size + 1)

    # --- Reading ------------------------------------------------------------------------------------------------------

    def totals(self, chart: int) -> tuple[int, int]:
        """Plays of a chart, and entries that have any."""
        if chart >= self.charts:
            return 0, 0
        return int(self._totals[chart, 0]), int(self._totals[chart, 1])

    def best(self, names: Names, chart: int, k: int) -> tuple[Entries, Counts] | None:
        """The k best of a chart, best first, in O(k); None if the heap does not say for certain."""
        if chart >= self.charts:
            return np.empty(0, np.int32), np.empty(0, np.int64)
        size = int(self._heap_sizes[chart])
        entries, counts = names.select(self._heap_entries[chart, :size], self._heap_keys[chart, :size], k)
        if len(entries) < k:
            return (entries, counts) if len(entries) == self._totals[chart, 1] else None
        bound_count, bound = self._outside[chart].tolist()
        last_count, last = int(counts[-1]), int(entries[-1])
        if not bound or last_count > bound_count or bound - 1 == last:
            return entries, counts
        if last_count < bound_count or names.id_of(bound - 1) < names.id_of(last):
            return None
        return entries, counts

    # --- Snapshots ----------------------------------------------------------------------------------------------------

    def restore_totals(self, totals: NDArray[np.int64]) -> None:
        """Begins with these totals."""
        self._totals[: len(totals)] = totals

    def copy_totals(self) -> NDArray[np.int64]:
        """The totals, int64[charts, 2], as they are now."""
        return self._totals.copy()
