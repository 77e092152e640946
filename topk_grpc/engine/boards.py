"""A board: entries with their counts of all time, the best of each chart in order, and their cells by time.

There are two in a shard. On the global board an entry is a song, under the same number, and there is one chart, 0. On
the chart board an entry is a (chart, song) pair, numbered by a `PairTable`. Everything else is the same, so both are
this class.

An entry's row is int64[2]: its count and its place in its chart's heap, one cache line a play. Standing windows will be
further columns of the same row.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from topk_grpc.engine.cells import CellStore
from topk_grpc.kernels.counters import add_counts
from topk_grpc.kernels.heap import offer, select
from topk_grpc.kernels.strings import StringTable

_IDENTITY: Final = np.empty(0, np.int32)


class Board:
    """Counts, heaps and cells of one kind of entry. One writer.

    Args:
        heap_size: the best entries that each chart keeps in order.
    """

    def __init__(self, heap_size: int) -> None:
        self._heap_size = heap_size
        self._rows: NDArray[np.int64] = np.zeros((1 << 8, 2), np.int64)
        self._entries = 0
        self._totals: NDArray[np.int64] = np.zeros((1, 2), np.int64)
        self._heap_entries: NDArray[np.int32] = np.empty((1, heap_size), np.int32)
        self._heap_keys: NDArray[np.int64] = np.empty((1, heap_size), np.int64)
        self._heap_sizes: NDArray[np.int32] = np.zeros(1, np.int32)
        self.cells = CellStore()

    def __len__(self) -> int:
        return self._entries

    @property
    def charts(self) -> int:
        """Charts that the board has room for so far."""
        return len(self._totals)

    @property
    def memory_bytes(self) -> int:
        """Bytes of all arrays; of the heaps only what is in use."""
        heaps = 12 * int(self._heap_sizes.sum())
        return self._rows.nbytes + self._totals.nbytes + heaps + self.cells.memory_bytes

    def _reserve(self, entries: int, charts: int) -> None:
        if entries > len(self._rows):
            rows = np.zeros((max(entries, 2 * len(self._rows)), 2), np.int64)
            rows[: self._entries] = self._rows[: self._entries]
            self._rows = rows
        self._entries = max(self._entries, entries)
        if charts > self.charts:
            known, room = self.charts, max(charts, 2 * self.charts)
            totals = np.zeros((room, 2), np.int64)
            heap_entries = np.empty((room, self._heap_size), np.int32)
            heap_keys = np.empty((room, self._heap_size), np.int64)
            heap_sizes = np.zeros(room, np.int32)
            totals[:known], heap_sizes[:known] = self._totals, self._heap_sizes
            heap_entries[:known], heap_keys[:known] = self._heap_entries, self._heap_keys
            self._totals, self._heap_sizes = totals, heap_sizes
            self._heap_entries, self._heap_keys = heap_entries, heap_keys

    def add(  # noqa: PLR0917
        self,
        entries: NDArray[np.int32],
        charts: NDArray[np.int32],
        buckets: NDArray[np.int64],
        counts: NDArray[np.int64],
        songs: NDArray[np.int32],
        strings: StringTable,
        known: int,
    ) -> None:
        """Counts plays.

        Args:
            entries, charts, buckets, counts: of each play; the charts' and entries' numbers.
            songs: the song of each entry of the board; empty: the same number.
            strings: the song ids.
            known: how many entries there are now, new ones included.
        """
        if not len(entries):
            return
        self._reserve(known, int(charts.max()) + 1)
        add_counts(self._rows, self._totals, entries, charts, counts, len(entries))
        offer(
            self._heap_entries,
            self._heap_keys,
            self._heap_sizes,
            self._rows,
            songs,
            strings.starts,
            strings.arena,
            charts,
            entries,
            len(entries),
        )
        self.cells.append(buckets, entries, counts)

    # --- Reading ------------------------------------------------------------------------------------------------------

    def totals(self, chart: int) -> tuple[int, int]:
        """Plays and entries of a chart, all time."""
        if chart >= self.charts:
            return 0, 0
        return int(self._totals[chart, 0]), int(self._totals[chart, 1])

    def best(self, chart: int, k: int) -> tuple[NDArray[np.int32], NDArray[np.int64]] | None:
        """Candidates among which the k best of all time of a chart are: its heap; None if k needs all entries."""
        if chart >= self.charts:
            return np.empty(0, np.int32), np.empty(0, np.int64)
        size = int(self._heap_sizes[chart])
        if k > size and size < int(self._totals[chart, 1]):
            return None
        return self._heap_entries[chart, :size], self._heap_keys[chart, :size]

    def count(self, entry: int) -> int:
        """The count of one entry, all time."""
        return int(self._rows[entry, 0])

    def counts(self) -> NDArray[np.int64]:
        """The count of each entry, all time: a copy."""
        return self._rows[: self._entries, 0].copy()

    # --- Snapshots ----------------------------------------------------------------------------------------------------

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """What a snapshot keeps, copied: counts and totals. Heaps are found again from the counts."""
        return {"counts": self.counts(), "totals": self._totals.copy()}

    def restore(
        self,
        arrays: dict[str, NDArray[np.generic]],
        songs: NDArray[np.int32],
        charts: NDArray[np.int32],
        strings: StringTable,
    ) -> None:
        """Begins with what `to_arrays` described.

        Args:
            arrays: from `to_arrays`.
            songs: as in `add`.
            charts: the chart of each entry; empty: all in chart 0.
            strings: the song ids.
        """
        counts = arrays["counts"]
        self._reserve(len(counts), len(arrays["totals"]))
        self._rows[: len(counts), 0] = counts
        self._totals[: len(arrays["totals"])] = arrays["totals"]
        if not len(charts):
            self._restore_heap(0, np.arange(len(counts), dtype=np.int32), songs, strings)
            return
        order = np.argsort(charts, kind="stable").astype(np.int32)
        stops = np.cumsum(np.bincount(charts, minlength=self.charts))
        for chart, stop in enumerate(stops.tolist()):
            start = int(stops[chart - 1]) if chart else 0
            if stop > start:
                self._restore_heap(chart, order[start:stop], songs, strings)

    def _restore_heap(
        self, chart: int, candidates: NDArray[np.int32], songs: NDArray[np.int32], strings: StringTable
    ) -> None:
        entries, counts = select(
            songs, strings.starts, strings.arena, candidates, self._rows[candidates, 0], self._heap_size
        )
        size = len(entries)
        # Worst first is a valid min-heap.
        self._heap_entries[chart, :size] = entries[::-1]
        self._heap_keys[chart, :size] = counts[::-1]
        self._heap_sizes[chart] = size
        self._rows[entries[::-1], 1] = np.arange(1, size + 1)


def global_songs() -> NDArray[np.int32]:
    """The songs of the global board's entries: the same numbers."""
    return _IDENTITY
