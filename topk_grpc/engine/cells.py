"""Plays by time: cells of (bucket, entry, count), in the order of their arrival and, later, sorted for good.

A play's cell is appended to a chunk: three columns, written in order, which costs a play almost nothing. Windows are
answered by adding up the cells within their bounds, chunk by chunk; each chunk and block knows the span of its buckets,
so most are passed over.

A full chunk is never changed again. When a snapshot is taken, the chunks so far and the smaller of the newest blocks
become one block: sorted by bucket, then entry, equal cells added up, cells of an age that a coarser tier keeps brought
into its buckets. A block is immutable: storage writes it once and maps it from then on. When all of it has grown old
enough for the next tier it is merged once more. Until a block is back from storage what it was merged from stays in
use. A late play simply lies in a later chunk or block: its bucket says where it counts.

Rejected: a hash table per open bucket. It makes an update of a second random access per play, where sorting a
snapshot's worth of cells costs some 20 ns a cell, off the writer's thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from topk_grpc.engine.slot_index import SlotIndex
from topk_grpc.engine.tiers import RollUp
from topk_grpc.kernels.counters import select_cells, sum_cells
from topk_grpc.kernels.sorting import pack_keys, sum_by_key, unpack_keys

CHUNK_CELLS: Final = 1 << 20
"""20 MB: large enough that the kernel backs the columns with huge pages; only what is filled takes memory."""
BLOCK_CELLS: Final = 1 << 23
"""Blocks larger than this, 160 MB on disk, are never merged again."""

_SCAN_ROWS: Final = 8  # picked out one by one a cell costs about so many times what it costs in passing
_STEP_CELLS: Final = 1 << 20
"""So many cells are looked at together where some are picked out, which bounds what that takes in memory."""


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

    def overlaps(self, start: int, end: int) -> bool:
        """Whether it may hold cells whose buckets lie in [start, end)."""
        return self.first < end and start <= self.last

    def within(self, start: int, end: int) -> Cells:
        """The cells whose buckets lie in [start, end)."""
        if start <= self.first and self.last < end:
            return self
        if self.ordered:
            rows: slice | NDArray[np.bool_] = slice(*np.searchsorted(self.buckets, [start, end]))
        else:
            rows = (self.buckets >= start) & (self.buckets < end)
        return self.take(rows, max(start, self.first), min(end - 1, self.last))

    def take(self, rows: slice | NDArray[np.bool_], first: int, last: int) -> Cells:
        """Some of the cells; first and last may be wider than these need."""
        return Cells(self.buckets[rows], self.entries[rows], self.counts[rows], first, last, self.ordered)


def ordered_cells(columns: Mapping[str, NDArray[np.generic]]) -> Cells:
    """A block as it comes back from storage; at least one cell."""
    buckets, entries, counts = (columns[name] for name in ("buckets", "entries", "counts"))
    return Cells(buckets, entries, counts, int(buckets[0]), int(buckets[-1]), ordered=True)  # type: ignore[arg-type]


def no_cells() -> Cells:
    """None at all."""
    return Cells(np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.int64), 0, 0, ordered=True)


def merge(parts: list[Cells], roll_up: RollUp | None = None) -> Cells:
    """The parts' cells as one ordered whole, equal (bucket, entry) pairs added up.

    Done span by span, so that beside the result it takes memory for some millions of cells, whatever there is to merge:
    to touch fresh memory costs more than sorting what lies in it.

    Args:
        parts: at least one, none of them empty.
        roll_up: brings cells to the buckets that their age is kept in.

    Returns:
        Cells, maybe none: what cancels out, or is not kept any more, is left out.
    """
    if roll_up is not None:
        parts = [_rolled(part, roll_up) for part in parts]
    rows = sum(len(part) for part in parts)
    buckets, entries, counts = np.empty(rows, np.int64), np.empty(rows, np.int32), np.empty(rows, np.int64)
    scratch = _Scratch()
    done = 0
    for start, end in _spans(parts):
        merged = _merge_span([part.within(start, end) for part in parts if part.overlaps(start, end)], scratch)
        kept = merged.counts != 0
        if roll_up is not None:
            kept &= merged.buckets >= roll_up.first_kept
        if not kept.all():
            merged = merged.take(kept, merged.first, merged.last)
        own = slice(done, done + len(merged))
        buckets[own], entries[own], counts[own] = merged.buckets, merged.entries, merged.counts
        done = own.stop
    first, last = (int(buckets[0]), int(buckets[done - 1])) if done else (0, 0)
    return Cells(buckets[:done], entries[:done], counts[:done], first, last, ordered=True)


class _Scratch:
    """Columns that are used again and again: keys and values, twice each."""

    def __init__(self) -> None:
        self._columns: list[NDArray[Any]] = []

    def columns(self, rows: int) -> list[NDArray[Any]]:
        """uint64, int64, uint64 and int64[rows]; what they held before is gone."""
        if not self._columns or len(self._columns[0]) < rows:
            self._columns = [np.empty(rows, dtype) for dtype in (np.uint64, np.int64, np.uint64, np.int64)]
        return [column[:rows] for column in self._columns]


def _spans(parts: list[Cells]) -> list[tuple[int, int]]:
    """Spans of buckets, in order, that hold some `_STEP_CELLS` each; as many as can be picked out in passing."""
    first, last = min(part.first for part in parts), max(part.last for part in parts)
    whole = [(first, last + 1)]
    if last >= np.iinfo(np.int64).max:
        return whole
    marks: list[tuple[int, int]] = []
    for part in parts:
        if part.ordered:
            marks += [(bucket, _STEP_CELLS) for bucket in part.buckets[::_STEP_CELLS].tolist()]
        else:
            marks.append((part.first, len(part)))
    starts, gathered = [first], 0
    for bucket, rows in sorted(marks):
        if gathered >= _STEP_CELLS and bucket > starts[-1]:
            starts.append(bucket)
            gathered = 0
        gathered += rows
    spans = list(pairwise([*starts, last + 1]))
    # Of a part in no order all is looked through for each span that it reaches into.
    loose = [part for part in parts if not part.ordered]
    looked_through = sum(len(part) for start, end in spans for part in loose if part.overlaps(start, end))
    return spans if looked_through <= 3 * sum(map(len, loose)) else whole


def _merge_span(parts: list[Cells], scratch: _Scratch) -> Cells:
    """Merges cells of one span. The result lies in `scratch`, and may hold counts of 0."""
    first, last = min(part.first for part in parts), max(part.last for part in parts)
    entry_bits = max(int(part.entries.max(initial=0)) for part in parts).bit_length()
    bits = entry_bits + (last - first).bit_length()
    if bits > 63:  # plays many thousands of years apart
        return Cells(*_sum_by_columns(parts), first, last, ordered=True)
    rows = sum(len(part) for part in parts)
    keys, values, other_keys, other_values = scratch.columns(rows)
    done = 0
    for part in parts:
        own = slice(done, done + len(part))
        pack_keys(part.buckets, part.entries, first, entry_bits, keys[own], len(part))
        values[own] = part.counts
        done += len(part)
    keys, counts = sum_by_key(keys, values, bits, other_keys, other_values)
    buckets, entries = np.empty(len(keys), np.int64), np.empty(len(keys), np.int32)
    unpack_keys(keys, first, entry_bits, buckets, entries, len(keys))
    return Cells(buckets, entries, counts, first, last, ordered=True)


def _rolled(part: Cells, roll_up: RollUp) -> Cells:
    if part.first >= max(roll_up.borders):
        return part
    buckets = roll_up.of(part.buckets)
    return Cells(buckets, part.entries, part.counts, int(buckets.min()), part.last, ordered=False)


def _sum_by_columns(parts: list[Cells]) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]:
    buckets = np.concatenate([part.buckets for part in parts])
    entries = np.concatenate([part.entries for part in parts])
    counts = np.concatenate([part.counts for part in parts])
    order = np.lexsort((entries, buckets))
    buckets, entries, counts = buckets[order], entries[order], counts[order]
    heads = np.flatnonzero(np.concatenate(([True], (buckets[1:] != buckets[:-1]) | (entries[1:] != entries[:-1]))))
    return buckets[heads], entries[heads], np.add.reduceat(counts, heads)


@dataclass(frozen=True, slots=True)
class Merge:
    """One block to be written.

    Attributes:
        chunks: that it takes in.
        blocks: that it takes in, by number.
    """

    chunks: list[Cells]
    blocks: dict[int, Cells]

    def cells(self, roll_up: RollUp) -> Cells:
        """Of the block; maybe none."""
        return merge([*self.blocks.values(), *self.chunks], roll_up)


def choose_merges(
    chunks: list[Cells], blocks: Mapping[int, Cells], done: Mapping[int, Sequence[int]], roll_up: RollUp
) -> list[Merge]:
    """What a snapshot merges: the chunks with the smaller of the newest blocks, and what is due to be rolled up.

    So every cell is merged a logarithmic number of times, and few blocks stand, as in a log-structured merge tree
    (O'Neil et al., "The log-structured merge-tree", Acta Informatica 33, 1996), and once more for each tier. A block
    beyond `BLOCK_CELLS` is merged again only to be rolled up.

    Args:
        chunks: all that are closed.
        blocks: those that stand, by number.
        done: the borders when each was merged.
        roll_up: what merging does now.
    """
    aged = {number: block for number, block in blocks.items() if block.last < roll_up.borders[0]}
    due = {number: block for number, block in aged.items() if roll_up.is_due(block.last, done.get(number, ()))}
    fresh = {number: block for number, block in blocks.items() if number not in aged}
    rest = {number: block for number, block in aged.items() if number not in due}
    merges = []
    if chunks:
        merges.append(Merge(chunks, _smaller(sum(map(len, chunks)), fresh)))
    if due:
        merges.append(Merge([], due | _smaller(sum(map(len, due.values())), rest)))
    return merges


def _smaller(gathered: int, blocks: Mapping[int, Cells]) -> dict[int, Cells]:
    """From the newest back, as long as each is at most twice what has been gathered."""
    chosen = {}
    for number in sorted(blocks, reverse=True):
        size = len(blocks[number])
        if size > 2 * gathered or size > BLOCK_CELLS:
            break
        chosen[number] = blocks[number]
        gathered += size
    return chosen


def _numbered(cells: Cells, rows: NDArray[np.int32], numbers: NDArray[np.int32]) -> Cells:
    """The cells in these rows under other numbers; those of entries whose number is -1 are left out."""
    entries = numbers[cells.entries[rows]]
    kept = entries >= 0
    rows, entries = rows[kept], entries[kept]
    buckets = cells.buckets[rows]
    first, last = (int(buckets.min()), int(buckets.max())) if len(buckets) else (0, 0)
    return Cells(buckets, entries, cells.counts[rows], first, last, ordered=False)


class CellStore:
    """All cells of one board. One writer.

    Attributes:
        done: the borders of the tiers when each block was merged.
    """

    def __init__(self) -> None:
        self._open = self._new_chunk()
        self._used = 0
        self._first = self._last = 0
        self._chunks: list[Cells] = []
        self._blocks: dict[int, Cells] = {}
        self._indexes: dict[int, tuple[Cells, SlotIndex]] = {}  # by identity of the cells
        self.done: dict[int, tuple[int, ...]] = {}

    @staticmethod
    def _new_chunk() -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]:
        return np.empty(CHUNK_CELLS, np.int64), np.empty(CHUNK_CELLS, np.int32), np.empty(CHUNK_CELLS, np.int64)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the chunks; blocks are mapped files."""
        return sum(chunk.memory_bytes for chunk in list(self._chunks)) + 20 * self._used

    def append(self, buckets: NDArray[np.int64], entries: NDArray[np.int32], counts: NDArray[np.int64]) -> None:
        """Adds cells, in any order."""
        done = 0
        if len(buckets):
            first, last = int(buckets.min()), int(buckets.max())
        while done < len(buckets):
            # The spans of the chunks on both sides may turn out too wide by what fell into the other: no harm.
            self._first, self._last = (min(self._first, first), max(self._last, last)) if self._used else (first, last)
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
            self._chunks.append(self._open_cells())
            self._open = self._new_chunk()
            self._used = 0

    def _open_cells(self) -> Cells:
        buckets, entries, counts = (column[: self._used] for column in self._open)
        return Cells(buckets, entries, counts, self._first, self._last, ordered=False)  # type: ignore[arg-type]

    def _all(self) -> Iterator[Cells]:
        yield from self._blocks.values()
        yield from self._chunks
        if self._used:
            yield self._open_cells()

    @property
    def first(self) -> int:
        """No cell lies in an earlier bucket; 0 without any."""
        return min((cells.first for cells in self._all()), default=0)

    def within(self, start: int, end: int) -> Iterator[Cells]:
        """All cells of the buckets [start, end), in pieces that are not empty."""
        for cells in self._all():
            if start < end and cells.first < end and cells.last >= start and len(piece := cells.within(start, end)):
                yield piece

    def of_entries(self, numbers: NDArray[np.int32], slots: Sequence[int] = ()) -> Iterator[Cells]:
        """All cells of some entries, in pieces, as they lie.

        Args:
            numbers: int32[entries]: for each entry of the board the number that its cells get; -1: leave them out.
            slots: those that the entries belong to, where these are known: cells that are indexed by slot are found
                without looking at all of them.
        """
        for cells in list(self._all()):
            _, index = self._indexes.get(id(cells), (None, None))
            rows = None if index is None or not len(slots) else index.rows(slots)
            if rows is None or len(rows) * _SCAN_ROWS > len(cells):
                yield from self._scan(cells, numbers)
            elif len(piece := _numbered(cells, rows, numbers)):
                yield piece

    @staticmethod
    def _scan(cells: Cells, numbers: NDArray[np.int32]) -> Iterator[Cells]:
        room = np.empty(_STEP_CELLS, np.int64), np.empty(_STEP_CELLS, np.int32), np.empty(_STEP_CELLS, np.int64)
        for start in range(0, len(cells), _STEP_CELLS):
            step = slice(start, start + _STEP_CELLS)
            buckets, entries, counts = cells.buckets[step], cells.entries[step], cells.counts[step]
            found = select_cells(buckets, entries, counts, numbers, *room, len(buckets))
            if found:
                some = room[0][:found].copy()
                owners, plays = room[1][:found].copy(), room[2][:found].copy()
                yield Cells(some, owners, plays, int(some.min()), int(some.max()), ordered=False)

    # --- By slot ------------------------------------------------------------------------------------------------------

    def unindexed(self) -> list[Cells]:
        """The closed chunks and the blocks that have no index yet."""
        return [cells for cells in (*self._blocks.values(), *self._chunks) if id(cells) not in self._indexes]

    def use_indexes(self, made: Sequence[tuple[Cells, SlotIndex]]) -> None:
        """Finds the cells of slots by these indexes; those of chunks and blocks that are gone are let go."""
        known = [*self._indexes.values(), *made]
        present = {id(cells) for cells in (*self._blocks.values(), *self._chunks)}
        self._indexes = {id(cells): (cells, index) for cells, index in known if id(cells) in present}

    def forget_indexes(self) -> None:
        """Lets go of all indexes."""
        self._indexes = {}

    def sums(self, start: int, end: int, entries: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Each entry's plays in the buckets [start, end): entries, ascending, each once, and their sums, none 0.

        Args:
            start, end: bucket numbers.
            entries: how many entries the board has.
        """
        pieces = list(self.within(start, end))
        cells = sum(map(len, pieces))
        if 16 * cells < entries:  # sparse: sort the few cells instead of sweeping over all entries
            if not cells:
                return np.empty(0, np.int32), np.empty(0, np.int64)
            as_one = (
                Cells(np.zeros(len(one), np.int64), one.entries, one.counts, 0, 0, ordered=False) for one in pieces
            )
            some = merge(list(as_one))
            return some.entries, some.counts
        sums = np.zeros(entries, np.int64)
        for piece in pieces:
            sum_cells(piece.entries, piece.counts, sums, len(piece))
        present = np.flatnonzero(sums).astype(np.int32)
        return present, sums[present]

    # --- Snapshots ----------------------------------------------------------------------------------------------------

    @property
    def blocks(self) -> dict[int, Cells]:
        """The blocks by their number."""
        return self._blocks

    def take_chunks(self) -> list[Cells]:
        """The chunks that a snapshot taken now turns into a block; they stay in use until `replace`."""
        self._close_chunk()
        return list(self._chunks)

    def replace(self, merged: Merge, number: int, block: Cells | None, done: Sequence[int]) -> None:
        """Uses a block, or nothing where all has cancelled out, for the first chunks and the blocks that it took in.

        Args:
            merged: what it was merged from.
            number: the block's.
            block: None: nothing was left.
            done: the borders when it was merged.
        """
        del self._chunks[: len(merged.chunks)]
        for taken in merged.blocks:
            del self._blocks[taken]
            self.done.pop(taken, None)
        if block is not None:
            self._blocks[number] = block
            self.done[number] = tuple(done)

    def restore_blocks(self, blocks: Mapping[int, Cells], done: Mapping[int, Sequence[int]]) -> None:
        """Begins with these blocks."""
        self._blocks = dict(blocks)
        self.done = {number: tuple(borders) for number, borders in done.items() if number in blocks}
