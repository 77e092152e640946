"""Interned strings: each distinct string gets the next small number, for good.

Three arrays, grown by doubling (the old array stays whole for whoever still reads it, so a snapshot needs no copy of
the arena):

- the arena holds one record after another, never changed: number (4 bytes, little endian), size (2 bytes), the bytes;
- `starts[number]` is where the record's bytes begin in the arena;
- the index is an open-addressing table (linear probing, at most 3/4 full) of uint64: 0 is free, else the top 24 bits of
  the hash above the record's arena offset + 1 in 40 bits. A probe costs one cache line here and one in the arena, where
  the bytes themselves are compared: equal hashes alone prove nothing. Where a string's search begins is not taken from
  the lowest bits of its hash: they are its slot, and a shard that owns few slots would see few of their values.

The index is not stored: it is rebuilt from the arena, read in order.
"""

from __future__ import annotations

import cython
import numpy as np
from numpy.typing import NDArray

from topk_grpc.kernels.hash import hash_columns

_HOME_SHIFT = cython.declare(cython.int, 16)
_BLOCK_ROWS = 256
_TAG_SHIFT = cython.declare(cython.int, 40)
_OFFSET_MASK = cython.declare(cython.ulonglong, (1 << 40) - 1)
_HEADER = cython.declare(cython.Py_ssize_t, 6)


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _matches(
    arena: cython.uchar[::1],
    record: cython.Py_ssize_t,
    data: cython.const[cython.uchar][::1],
    start: cython.Py_ssize_t,
    size: cython.Py_ssize_t,
) -> cython.bint:
    i: cython.Py_ssize_t
    if (arena[record + 4] | (arena[record + 5] << 8)) != size:
        return False
    for i in range(size):
        if arena[record + 6 + i] != data[start + i]:
            return False
    return True


def intern(
    data: cython.const[cython.uchar][::1],
    begins: cython.longlong[::1],
    sizes: cython.int[::1],
    hashes: cython.ulonglong[::1],
    index: cython.ulonglong[::1],
    arena: cython.uchar[::1],
    starts: cython.longlong[::1],
    used: cython.longlong[::1],
    numbers: cython.int[::1],
    slots: cython.ulonglong[::1],
    rows: cython.Py_ssize_t,
    add: cython.bint,
) -> None:
    """Finds the numbers of strings, and adds those that are new if `add` is set.

    Goes over the rows in blocks, and over each block three times. The first two passes only touch what the third will
    read, the index and then the arena: plain loads that do not wait for each other, so that their cache misses overlap.
    Comparing string by string right away waits for one miss after the other, which took twice as long.

    Args:
        data, begins, sizes: string i is data[begins[i]:begins[i] + sizes[i]], at most 65,535 bytes.
        hashes: XXH64 of each.
        index, arena, starts: the table, with room for all.
        used: int64[2], strings and arena bytes in use; moved on.
        numbers: int32[rows], written; -1: unknown.
        slots: uint64[at least 1]: scratch, as many as a block shall have rows.
        rows: how many.
        add: whether unknown ones are added.
    """
    if not cython.compiled:
        slots = memoryview(slots)
        data, begins, sizes, hashes = memoryview(data), memoryview(begins), memoryview(sizes), memoryview(hashes)
        index, arena, starts, used, numbers = (
            memoryview(index),
            memoryview(arena),
            memoryview(starts),
            memoryview(used),
            memoryview(numbers),
        )
    i: cython.Py_ssize_t
    j: cython.Py_ssize_t
    at: cython.ulonglong
    slot: cython.ulonglong
    tag: cython.ulonglong
    mask: cython.ulonglong = index.shape[0] - 1
    record: cython.Py_ssize_t
    number: cython.longlong
    size: cython.Py_ssize_t
    first: cython.Py_ssize_t
    last: cython.Py_ssize_t
    touched: cython.ulonglong
    room: cython.Py_ssize_t = arena.shape[0]
    with cython.nogil:
        first = 0
        while first < rows:
            last = min(first + slots.shape[0], rows)
            for i in range(first, last):
                slots[i - first] = index[cython.cast(cython.Py_ssize_t, (hashes[i] >> _HOME_SHIFT) & mask)]
            touched = 0
            for i in range(first, last):
                if slots[i - first] != 0:
                    record = cython.cast(cython.Py_ssize_t, slots[i - first] & _OFFSET_MASK) - 1
                    # Its first byte and, as records lie across cache lines, the last, if it is the string looked for.
                    touched += arena[record] + arena[min(record + _HEADER + sizes[i], room) - 1]
            slots[0] = touched  # keeps the compiler from leaving the loads out
            for i in range(first, last):
                tag = hashes[i] >> _TAG_SHIFT
                at = (hashes[i] >> _HOME_SHIFT) & mask
                size = sizes[i]
                while True:
                    slot = index[cython.cast(cython.Py_ssize_t, at)]
                    if slot == 0:
                        if not add:
                            numbers[i] = -1
                            break
                        number = used[0]
                        record = cython.cast(cython.Py_ssize_t, used[1])
                        index[cython.cast(cython.Py_ssize_t, at)] = (tag << _TAG_SHIFT) | cython.cast(
                            cython.ulonglong, record + 1
                        )
                        arena[record] = cython.cast(cython.uchar, number & 255)
                        arena[record + 1] = cython.cast(cython.uchar, (number >> 8) & 255)
                        arena[record + 2] = cython.cast(cython.uchar, (number >> 16) & 255)
                        arena[record + 3] = cython.cast(cython.uchar, (number >> 24) & 255)
                        arena[record + 4] = cython.cast(cython.uchar, size & 255)
                        arena[record + 5] = cython.cast(cython.uchar, size >> 8)
                        for j in range(size):
                            arena[record + _HEADER + j] = data[begins[i] + j]
                        starts[cython.cast(cython.Py_ssize_t, number)] = record + _HEADER
                        used[0] = number + 1
                        used[1] = record + _HEADER + size
                        numbers[i] = cython.cast(cython.int, number)
                        break
                    if (slot >> _TAG_SHIFT) == tag:
                        record = cython.cast(cython.Py_ssize_t, slot & _OFFSET_MASK) - 1
                        if _matches(arena, record, data, begins[i], size):
                            numbers[i] = (
                                arena[record]
                                | (arena[record + 1] << 8)
                                | (arena[record + 2] << 16)
                                | (arena[record + 3] << 24)
                            )
                            break
                    at = (at + 1) & mask
            first = last


def place(
    hashes: cython.ulonglong[::1],
    starts: cython.longlong[::1],
    index: cython.ulonglong[::1],
    first: cython.Py_ssize_t,
    rows: cython.Py_ssize_t,
) -> None:
    """Enters the strings `first` to `first + rows`, known to be distinct, into an index with room for them.

    Args:
        hashes: of each of them, uint64[rows].
        starts: of all strings.
        index: written.
        first, rows: which.
    """
    if not cython.compiled:
        hashes, starts, index = memoryview(hashes), memoryview(starts), memoryview(index)
    i: cython.Py_ssize_t
    at: cython.ulonglong
    mask: cython.ulonglong = index.shape[0] - 1
    with cython.nogil:
        for i in range(rows):
            at = (hashes[i] >> _HOME_SHIFT) & mask
            while index[cython.cast(cython.Py_ssize_t, at)] != 0:
                at = (at + 1) & mask
            index[cython.cast(cython.Py_ssize_t, at)] = ((hashes[i] >> _TAG_SHIFT) << _TAG_SHIFT) | cython.cast(
                cython.ulonglong, starts[first + i] - _HEADER + 1
            )


class StringTable:
    """A growing set of strings, numbered from 0 in the order of their arrival. One writer.

    Attributes:
        arena, starts: as the module says; valid up to `arena_used` and `len()`.
    """

    def __init__(self) -> None:
        self.arena: NDArray[np.uint8] = np.empty(1 << 12, np.uint8)
        self.starts: NDArray[np.int64] = np.empty(1 << 8, np.int64)
        self._index: NDArray[np.uint64] = np.zeros(1 << 9, np.uint64)
        self._used: NDArray[np.int64] = np.zeros(2, np.int64)
        self._slots: NDArray[np.uint64] = np.empty(_BLOCK_ROWS, np.uint64)

    def __len__(self) -> int:
        return int(self._used[0])

    @property
    def arena_used(self) -> int:
        """Bytes of the arena in use."""
        return int(self._used[1])

    @property
    def memory_bytes(self) -> int:
        """Bytes of all arrays."""
        return self.arena.nbytes + self.starts.nbytes + self._index.nbytes

    def _reserve(self, strings: int, string_bytes: int) -> None:
        wanted = len(self) + strings
        if wanted > len(self.starts):
            starts = np.empty(max(wanted, 2 * len(self.starts)), np.int64)
            starts[: len(self)] = self.starts[: len(self)]
            self.starts = starts
        room = self.arena_used + string_bytes + 6 * strings
        if room > len(self.arena):
            arena = np.empty(max(room, 2 * len(self.arena)), np.uint8)
            arena[: self.arena_used] = self.arena[: self.arena_used]
            self.arena = arena
        if 4 * wanted > 3 * len(self._index):
            self._rebuild_index(1 << (2 * wanted - 1).bit_length())

    def _rebuild_index(self, capacity: int) -> None:
        self._index = np.zeros(capacity, np.uint64)
        for first in range(0, len(self), 1 << 16):  # in pieces: the scratch columns stay small
            rows = min(1 << 16, len(self) - first)
            starts = self.starts[first : first + rows]
            hashes = np.empty(rows, np.uint64)
            hash_columns(self.arena, starts, self.sizes(first, rows), hashes, rows)
            place(hashes, self.starts, self._index, first, rows)

    def sizes(self, first: int, rows: int) -> NDArray[np.int32]:
        """Bytes of the strings numbered `first` to `first + rows`."""
        starts = self.starts[first : first + rows]
        return self.arena[starts - 2].astype(np.int32) | (self.arena[starts - 1].astype(np.int32) << 8)

    def add(
        self,
        data: bytes | memoryview | NDArray[np.uint8],
        begins: NDArray[np.int64],
        sizes: NDArray[np.int32],
        hashes: NDArray[np.uint64],
    ) -> NDArray[np.int32]:
        """The strings' numbers; new ones are added.

        Args:
            data, begins, sizes: string i is data[begins[i]:begins[i] + sizes[i]].
            hashes: XXH64 of each.
        """
        rows = len(begins)
        self._reserve(rows, int(sizes.sum(dtype=np.int64)))
        numbers = np.empty(rows, np.int32)
        intern(
            data,
            begins,
            sizes,
            hashes,
            self._index,
            self.arena,
            self.starts,
            self._used,
            numbers,
            self._slots,
            rows,
            True,
        )
        return numbers

    def find(
        self,
        data: bytes | memoryview | NDArray[np.uint8],
        begins: NDArray[np.int64],
        sizes: NDArray[np.int32],
        hashes: NDArray[np.uint64],
    ) -> NDArray[np.int32]:
        """The strings' numbers; -1 for unknown ones."""
        rows = len(begins)
        numbers = np.empty(rows, np.int32)
        intern(
            data,
            begins,
            sizes,
            hashes,
            self._index,
            self.arena,
            self.starts,
            self._used,
            numbers,
            self._slots,
            rows,
            False,
        )
        return numbers

    def _columns_of(self, texts: list[str]) -> tuple[bytes, NDArray[np.int64], NDArray[np.int32], NDArray[np.uint64]]:
        encoded = [text.encode() for text in texts]
        sizes = np.array([len(one) for one in encoded], np.int32)
        begins = np.cumsum(sizes, dtype=np.int64) - sizes
        data = b"".join(encoded)
        hashes = np.empty(len(texts), np.uint64)
        hash_columns(data, begins, sizes, hashes, len(texts))
        return data, begins, sizes, hashes

    def add_texts(self, texts: list[str]) -> NDArray[np.int32]:
        """As `add`, from Python strings."""
        return self.add(*self._columns_of(texts))

    def find_texts(self, texts: list[str]) -> NDArray[np.int32]:
        """As `find`, from Python strings."""
        return self.find(*self._columns_of(texts))

    def text(self, number: int) -> str:
        """The string of that number."""
        start = int(self.starts[number])
        size = int(self.arena[start - 2]) | int(self.arena[start - 1]) << 8
        return self.arena[start : start + size].tobytes().decode()

    def texts(self, numbers: NDArray[np.int32]) -> list[str]:
        """The strings of those numbers."""
        starts = self.starts[numbers]
        sizes = self.arena[starts - 2].astype(np.int64) | (self.arena[starts - 1].astype(np.int64) << 8)
        data = self.arena.data
        return [
            str(data[start:stop], "utf-8")
            for start, stop in zip(starts.tolist(), (starts + sizes).tolist(), strict=True)
        ]

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """What a snapshot keeps: views that later additions leave alone."""
        return {"arena": self.arena[: self.arena_used], "starts": self.starts[: len(self)]}

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[np.generic]]) -> StringTable:
        """The table that `to_arrays` described."""
        table = cls()
        table.arena = np.array(arrays["arena"], np.uint8)
        table.starts = np.array(arrays["starts"], np.int64)
        table._used[:] = (len(table.starts), len(table.arena))
        table._rebuild_index(max(1 << 9, 1 << (2 * len(table.starts)).bit_length()))
        return table
