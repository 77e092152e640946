"""Plays by time: cells of (bucket, entry, count), in the order of their arrival and, later, sorted for good.

A play's cell is appended to a chunk: three columns, written in order, which costs a play almost nothing. Windows are
answered by adding up the cells within their bounds, chunk by chunk; each chunk and block knows the span of its buckets,
so most are passed over.

A full chunk is never changed again. When a snapshot is taken, the chunks so far and the smaller of the newest blocks
become one block: sorted by bucket, then entry, equal cells added up. A block is immutable: storage writes it once and
maps it from then on. Until it is back from storage its chunks stay in use. A late play simply lies in a later chunk or
block: its bucket says where it counts.

Rejected: a hash table per open bucket. It makes an update of a second random access per play, where sorting a
snapshot's worth of cells costs some 40 ns a cell, off the writer's thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from topk_grpc.kernels.counters import sum_cells
from topk_grpc.kernels.sorting import pack_keys, sum_by_key, unpack_keys

CHUNK_CELLS: Final = 1 << 20
"""20 MB: large enough that the kernel backs the columns with huge pages; only what is filled takes memory."""
BLOCK_CELLS: Final = 1 << 23
"""Blocks larger than this, 160 MB on disk, are never merged again."""


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """Columns of one length n: bucket numbers int64, entries int32, counts int64.

    Attributes:
        first, last: the least and the largest bucket.
        ordered: sorted by bucket, then entry, each pair once.
    """

    buckets: NDArray[np.int64]
    entries: NDArray[np.int32]
    counts: NDArray[np.int64]
    first: int
    last: int
    ordered: bool

    def __len__(self) -> int:
        return len(self.buckets)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the columns."""
        return self.buckets.nbytes + self.entries.nbytes + self.counts.nbytes

    def columns(self) -> Mapping[str, NDArray[np.generic]]:
        """The columns by name, for storage."""
        return {"buckets": self.buckets, "entries": self.entries, "counts": self.counts}

    def within(self, start: int, end: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Entries and counts of the cells whose buckets lie in [start, end)."""
        if start <= self.first and self.last < end:
            return self.entries, self.counts
        if self.ordered:
            low, high = np.searchsorted(self.buckets, [start, end])
            return self.entries[low:high], self.counts[low:high]
        inside = (self.buckets >= start) & (self.buckets < end)
        return self.entries[inside], self.counts[inside]


def ordered_cells(columns: Mapping[str, NDArray[np.generic]]) -> Cells:
    """A block as it comes back from storage; at least one cell."""
    buckets, entries, counts = (columns[name] for name in ("buckets", "entries", "counts"))
    return Cells(buckets, entries, counts, int(buckets[0]), int(buckets[-1]), ordered=True)  # type: ignore[arg-type]


def _view(columns: tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]], used: int) -> Cells:
    buckets, entries, counts = (column[:used] for column in columns)
    return Cells(buckets, entries, counts, int(buckets.min()), int(buckets.max()), ordered=False)  # type: ignore[arg-type]


def merge(parts: list[Cells]) -> Cells:
    """The parts' cells as one ordered whole, equal (bucket, entry) pairs added up; at least one cell."""
    first = min(part.first for part in parts)
    last = max(part.last for part in parts)
    entry_bits = max(int(part.entries.max()) for part in parts).bit_length()
    bits = entry_bits + (last - first).bit_length()
    if bits > 63:  # plays many thousands of years apart
        return _merge_by_columns(parts, first, last)
    rows = sum(len(part) for part in parts)
    keys, counts = np.empty(rows, np.uint64), np.empty(rows, np.int64)
    done = 0
    for part in parts:
        own = slice(done, done + len(part))
        pack_keys(part.buckets, part.entries, first, entry_bits, keys[own], len(part))
        counts[own] = part.counts
        done += len(part)
    keys, counts = sum_by_key(keys, counts, bits)
    buckets, entries = np.empty(len(keys), np.int64), np.empty(len(keys), np.int32)
    unpack_keys(keys, first, entry_bits, buckets, entries, len(keys))
    return Cells(buckets, entries, counts, first, last, ordered=True)


def _merge_by_columns(parts: list[Cells], first: int, last: int) -> Cells:
    buckets = np.concatenate([part.buckets for part in parts])
    entries = np.concatenate([part.entries for part in parts])
    counts = np.concatenate([part.counts for part in parts])
    order = np.lexsort((entries, buckets))
    buckets, entries, counts = buckets[order], entries[order], counts[order]
    heads = np.flatnonzero(np.concatenate(([True], (buckets[1:] != buckets[:-1]) | (entries[1:] != entries[:-1]))))
    return Cells(buckets[heads], entries[heads], np.add.reduceat(counts, heads), first, last, ordered=True)


def choose_merge(chunks: list[Cells], blocks: Mapping[int, Cells]) -> list[int]:
    """The blocks to be merged with the chunks into the next one: from the newest back, while each is small.

    So every cell is merged a logarithmic number of times, and few blocks stand, as in a log-structured merge tree
    (O'Neil et al., "The log-structured merge-tree", Acta Informatica 33, 1996). A block beyond `BLOCK_CELLS` is left
    as it is.
    """
    gathered = sum(len(chunk) for chunk in chunks)
    chosen = []
    for number in sorted(blocks, reverse=True):
        size = len(blocks[number])
        if size > 2 * gathered or size > BLOCK_CELLS:
            break
        chosen.append(number)
        gathered += size
    return chosen


class CellStore:
    """All cells of one board. One writer."""

    def __init__(self) -> None:
        self._open = self._new_chunk()
        self._used = 0
        self._chunks: list[Cells] = []
        self._blocks: dict[int, Cells] = {}

    @staticmethod
    def _new_chunk() -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]:
        return np.empty(CHUNK_CELLS, np.int64), np.empty(CHUNK_CELLS, np.int32), np.empty(CHUNK_CELLS, np.int64)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the chunks; blocks are mapped files."""
        return sum(chunk.memory_bytes for chunk in self._chunks) + 20 * self._used

    def append(self, buckets: NDArray[np.int64], entries: NDArray[np.int32], counts: NDArray[np.int64]) -> None:
        """Adds cells, in any order."""
        done = 0
        while done < len(buckets):
            step = min(len(buckets) - done, CHUNK_CELLS - self._used)
            taken, given = slice(self._used, self._used + step), slice(done, done + step)
            open_buckets, open_entries, open_counts = self._open
            open_buckets[taken], open_entries[taken], open_counts[taken] = buckets[given], entries[given], counts[given]
            self._used += step
            done += step
            if self._used == CHUNK_CELLS:
                self._close_chunk()

    def _close_chunk(self) -> None:
        if self._used:
            self._chunks.append(_view(self._open, self._used))
            self._open = self._new_chunk()
            self._used = 0

    def _all(self) -> Iterator[Cells]:
        yield from self._blocks.values()
        yield from self._chunks
        if self._used:
            yield _view(self._open, self._used)

    def sums(self, start: int, end: int, entries: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Each entry's plays in the buckets [start, end): entries, each once, and their sums.

        Args:
            start, end: bucket numbers.
            entries: how many entries the board has.
        """
        pieces = [cells.within(start, end) for cells in self._all() if cells.first < end and cells.last >= start]
        cells = sum(len(piece) for piece, _ in pieces)
        if 16 * cells < entries:  # sparse: sort the few cells instead of sweeping over all entries
            if not cells:
                return np.empty(0, np.int32), np.empty(0, np.int64)
            some = merge(
                [
                    Cells(np.zeros(len(piece), np.int64), piece, counts, 0, 0, ordered=False)
                    for piece, counts in pieces
                    if len(piece)
                ]
            )
            return some.entries, some.counts
        sums = np.zeros(entries, np.int64)
        for piece, counts in pieces:
            sum_cells(piece, counts, sums, len(piece))
        present = np.flatnonzero(sums).astype(np.int32)
        return present, sums[present]

    # --- Snapshots ----------------------------------------------------------------------------------------------------

    @property
    def blocks(self) -> dict[int, Cells]:
        """The blocks by their number."""
        return self._blocks

    def take_chunks(self) -> list[Cells]:
        """The chunks that a snapshot taken now turns into a block; they stay in use until `replace_chunks`."""
        self._close_chunk()
        return list(self._chunks)

    def replace(self, chunks: int, blocks: Iterable[int], block_id: int, block: Cells) -> None:
        """Uses a block instead of the first `chunks` chunks and the blocks that it was merged from."""
        del self._chunks[:chunks]
        for merged in blocks:
            del self._blocks[merged]
        self._blocks[block_id] = block

    def restore_blocks(self, blocks: Mapping[int, Cells]) -> None:
        """Begins with these blocks."""
        self._blocks = dict(blocks)
