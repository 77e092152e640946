"""Interned (chart, song) pairs: each distinct pair gets the next small number, its row among the chart entries.

An open-addressing table (linear probing, at most 3/4 full) of int32: 0 is free, else row + 1. The pair itself stands in
the columns `charts` and `songs`, which are what a snapshot keeps; the table is rebuilt from them.
"""

from __future__ import annotations

import cython
import numpy as np
from numpy.typing import NDArray

MASK64 = cython.declare(cython.ulonglong, 0xFFFFFFFFFFFFFFFF)
_MIX = cython.declare(cython.ulonglong, 0x9E3779B185EBCA87)


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _home(chart: cython.int, song: cython.int) -> cython.ulonglong:
    key: cython.ulonglong = (cython.cast(cython.ulonglong, chart) << 32) | cython.cast(cython.ulonglong, song)
    key = (key * _MIX) & MASK64
    return key ^ (key >> 32)


def intern(
    pair_charts: cython.int[::1],
    pair_songs: cython.int[::1],
    table: cython.int[::1],
    charts: cython.int[::1],
    songs: cython.int[::1],
    used: cython.longlong[::1],
    numbers: cython.int[::1],
    rows: cython.Py_ssize_t,
    add: cython.bint,
) -> None:
    """Finds the numbers of pairs, and adds those that are new if `add` is set.

    Args:
        pair_charts, pair_songs: int32[rows], the pairs asked for.
        table, charts, songs: the known pairs, with room for all.
        used: int64[1], pairs known; moved on.
        numbers: int32[rows], written; -1: unknown.
        rows: how many.
        add: whether unknown ones are added.
    """
    if not cython.compiled:
        pair_charts, pair_songs, table = memoryview(pair_charts), memoryview(pair_songs), memoryview(table)
        charts, songs, used, numbers = memoryview(charts), memoryview(songs), memoryview(used), memoryview(numbers)
    i: cython.Py_ssize_t
    at: cython.ulonglong
    mask: cython.ulonglong = table.shape[0] - 1
    row: cython.int
    with cython.nogil:
        for i in range(rows):
            at = _home(pair_charts[i], pair_songs[i]) & mask
            while True:
                row = table[cython.cast(cython.Py_ssize_t, at)] - 1
                if row < 0:
                    if add:
                        row = cython.cast(cython.int, used[0])
                        used[0] += 1
                        charts[row] = pair_charts[i]
                        songs[row] = pair_songs[i]
                        table[cython.cast(cython.Py_ssize_t, at)] = row + 1
                    break
                if songs[row] == pair_songs[i] and charts[row] == pair_charts[i]:
                    break
                at = (at + 1) & mask
            numbers[i] = row


def place(charts: cython.int[::1], songs: cython.int[::1], table: cython.int[::1], rows: cython.Py_ssize_t) -> None:
    """Enters the first `rows` pairs, known to be distinct, into an empty table with room for them."""
    if not cython.compiled:
        charts, songs, table = memoryview(charts), memoryview(songs), memoryview(table)
    i: cython.Py_ssize_t
    at: cython.ulonglong
    mask: cython.ulonglong = table.shape[0] - 1
    with cython.nogil:
        for i in range(rows):
            at = _home(charts[i], songs[i]) & mask
            while table[cython.cast(cython.Py_ssize_t, at)] != 0:
                at = (at + 1) & mask
            table[cython.cast(cython.Py_ssize_t, at)] = cython.cast(cython.int, i + 1)


class PairTable:
    """A growing set of (chart, song) pairs, numbered from 0 in the order of their arrival. One writer."""

    def __init__(self) -> None:
        self._charts: NDArray[np.int32] = np.empty(1 << 8, np.int32)
        self._songs: NDArray[np.int32] = np.empty(1 << 8, np.int32)
        self._table: NDArray[np.int32] = np.zeros(1 << 9, np.int32)
        self._used: NDArray[np.int64] = np.zeros(1, np.int64)

    def __len__(self) -> int:
        return int(self._used[0])

    @property
    def charts(self) -> NDArray[np.int32]:
        """The chart of each pair, int32[n]."""
        return self._charts[: len(self)]

    @property
    def songs(self) -> NDArray[np.int32]:
        """The song of each pair, int32[n]."""
        return self._songs[: len(self)]

    @property
    def memory_bytes(self) -> int:
        """Bytes of all arrays."""
        return self._charts.nbytes + self._songs.nbytes + self._table.nbytes

    def add(self, charts: NDArray[np.int32], songs: NDArray[np.int32]) -> NDArray[np.int32]:
        """The pairs' numbers; new ones are added."""
        wanted = len(self) + len(charts)
        if wanted > len(self._charts):
            room = max(wanted, 2 * len(self._charts))
            for name in ("_charts", "_songs"):
                grown = np.empty(room, np.int32)
                grown[: len(self)] = getattr(self, name)[: len(self)]
                setattr(self, name, grown)
        if 4 * wanted > 3 * len(self._table):
            self._table = np.zeros(1 << (2 * wanted - 1).bit_length(), np.int32)
            place(self._charts, self._songs, self._table, len(self))
        numbers = np.empty(len(charts), np.int32)
        intern(charts, songs, self._table, self._charts, self._songs, self._used, numbers, len(charts), True)
        return numbers

    def find(self, charts: NDArray[np.int32], songs: NDArray[np.int32]) -> NDArray[np.int32]:
        """The pairs' numbers; -1 for unknown ones."""
        numbers = np.empty(len(charts), np.int32)
        intern(charts, songs, self._table, self._charts, self._songs, self._used, numbers, len(charts), False)
        return numbers

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """What a snapshot keeps: views that later additions leave alone."""
        return {"charts": self.charts, "songs": self.songs}

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[np.generic]]) -> PairTable:
        """The table that `to_arrays` described."""
        table = cls()
        if len(arrays["charts"]):
            table._charts = np.array(arrays["charts"], np.int32)
            table._songs = np.array(arrays["songs"], np.int32)
        table._used[0] = len(arrays["charts"])
        table._table = np.zeros(max(1 << 9, 1 << (2 * len(table)).bit_length()), np.int32)
        place(table._charts, table._songs, table._table, len(table))
        return table
