"""Producers' marks, exact per slot: which batches a slot has decided about.

A mark is the highest sequence seen and a bitmap of the 64 below it: bit j stands for sequence highest - 1 - j. A clear
bit has not been seen yet and counts; anything older than the bitmap is a duplicate, which is why no producer may send
a sequence 64 or more above its lowest unacknowledged one.

Marks lie in an open-addressing table keyed by (producer number, slot), so that a producer of small batches pays only
for the slots it has touched.
"""

from __future__ import annotations

import cython
import numpy as np
from numpy.typing import NDArray

MASK64 = cython.declare(cython.ulonglong, 0xFFFFFFFFFFFFFFFF)
_MIX = cython.declare(cython.ulonglong, 0x9E3779B185EBCA87)

UNTOUCHED = 0
APPLY = 1
DUPLICATE = 2
NOT_OWNER = 3

_APPLY = cython.declare(cython.uchar, 1)
_DUPLICATE = cython.declare(cython.uchar, 2)
_NOT_OWNER = cython.declare(cython.uchar, 3)


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _find(keys: cython.ulonglong[::1], key: cython.ulonglong) -> cython.Py_ssize_t:
    """Where the key lies, or would."""
    mask: cython.ulonglong = keys.shape[0] - 1
    at: cython.ulonglong = (key * _MIX) & MASK64
    at = (at ^ (at >> 32)) & mask  # both halves: the producer is in the upper one, the slot in the lower
    while keys[cython.cast(cython.Py_ssize_t, at)] != 0 and keys[cython.cast(cython.Py_ssize_t, at)] != key:
        at = (at + 1) & mask
    return cython.cast(cython.Py_ssize_t, at)


def touch_slots(
    hashes: cython.ulonglong[::1], rows: cython.Py_ssize_t, slots: cython.int[::1], verdicts: cython.uchar[::1]
) -> None:
    """The slot of each play, and which slots a batch touches at all.

    Args:
        hashes: of the songs, uint64[rows].
        rows: plays.
        slots: int32[rows], written.
        verdicts: uint8[slots of the cluster], zeros; APPLY is written where a play lies.
    """
    if not cython.compiled:
        hashes, slots, verdicts = memoryview(hashes), memoryview(slots), memoryview(verdicts)
    i: cython.Py_ssize_t
    total: cython.ulonglong = verdicts.shape[0]
    mask: cython.ulonglong = total - 1 if total & (total - 1) == 0 else 0
    with cython.nogil:
        for i in range(rows):
            # Slots are mostly a power of two: spare the division.
            slots[i] = cython.cast(cython.int, hashes[i] & mask if mask else hashes[i] % total)
            verdicts[slots[i]] = _APPLY


def check_and_set(
    verdicts: cython.uchar[::1],
    owned: cython.uchar[::1],
    producer: cython.ulonglong,
    sequence: cython.ulonglong,
    keys: cython.ulonglong[::1],
    highest: cython.ulonglong[::1],
    bitmaps: cython.ulonglong[::1],
    used: cython.longlong[::1],
) -> int:
    """Decides each touched slot, and sets the marks of those that apply.

    Args:
        verdicts: uint8[slots], as `touch_slots` left it; becomes APPLY, DUPLICATE or NOT_OWNER where touched.
        owned: uint8[slots], 1 where this shard owns the slot.
        producer: its number.
        sequence: the batch's.
        keys, highest, bitmaps: the table, with room for all slots.
        used: int64[1], marks in the table; moved on.

    Returns:
        Bits of what occurred: 1 << APPLY, 1 << DUPLICATE, 1 << NOT_OWNER.
    """
    if not cython.compiled:
        verdicts, owned, keys = memoryview(verdicts), memoryview(owned), memoryview(keys)
        highest, bitmaps, used = memoryview(highest), memoryview(bitmaps), memoryview(used)
    slot: cython.Py_ssize_t
    at: cython.Py_ssize_t
    key: cython.ulonglong
    behind: cython.ulonglong
    one: cython.ulonglong = 1
    occurred: cython.int = 0
    with cython.nogil:
        for slot in range(verdicts.shape[0]):
            if verdicts[slot] == 0:
                continue
            if owned[slot] == 0:
                verdicts[slot] = _NOT_OWNER
                occurred = occurred | 8
                continue
            key = (producer << 32) | cython.cast(cython.ulonglong, slot + 1)
            at = _find(keys, key)
            if keys[at] == 0:
                keys[at] = key
                highest[at] = sequence
                bitmaps[at] = 0
                used[0] += 1
                occurred = occurred | 2
            elif sequence > highest[at]:
                behind = sequence - highest[at]
                if behind > 64:
                    bitmaps[at] = 0
                elif behind == 64:
                    bitmaps[at] = one << 63
                else:
                    bitmaps[at] = ((bitmaps[at] << behind) & MASK64) | (one << (behind - 1))
                highest[at] = sequence
                occurred = occurred | 2
            else:
                behind = highest[at] - sequence
                if behind == 0 or behind > 64 or (bitmaps[at] >> (behind - 1)) & 1:
                    verdicts[slot] = _DUPLICATE
                    occurred = occurred | 4
                else:
                    bitmaps[at] = bitmaps[at] | (one << (behind - 1))
                    occurred = occurred | 2
    return occurred


def enter(
    from_keys: cython.ulonglong[::1],
    from_highest: cython.ulonglong[::1],
    from_bitmaps: cython.ulonglong[::1],
    keys: cython.ulonglong[::1],
    highest: cython.ulonglong[::1],
    bitmaps: cython.ulonglong[::1],
) -> None:
    """Enters marks with distinct keys into a table with room for them."""
    if not cython.compiled:
        from_keys, from_highest, from_bitmaps = (
            memoryview(from_keys),
            memoryview(from_highest),
            memoryview(from_bitmaps),
        )
        keys, highest, bitmaps = memoryview(keys), memoryview(highest), memoryview(bitmaps)
    i: cython.Py_ssize_t
    at: cython.Py_ssize_t
    with cython.nogil:
        for i in range(from_keys.shape[0]):
            at = _find(keys, from_keys[i])
            keys[at] = from_keys[i]
            highest[at] = from_highest[i]
            bitmaps[at] = from_bitmaps[i]


def _slots_of(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64) - 1


class MarkTable:
    """All marks of a shard. One writer."""

    def __init__(self) -> None:
        self._keys: NDArray[np.uint64] = np.zeros(1 << 11, np.uint64)
        self._highest: NDArray[np.uint64] = np.zeros(1 << 11, np.uint64)
        self._bitmaps: NDArray[np.uint64] = np.zeros(1 << 11, np.uint64)
        self._used: NDArray[np.int64] = np.zeros(1, np.int64)

    def __len__(self) -> int:
        return int(self._used[0])

    @property
    def memory_bytes(self) -> int:
        """Bytes of all arrays."""
        return 3 * self._keys.nbytes

    def decide(self, verdicts: NDArray[np.uint8], owned: NDArray[np.uint8], producer: int, sequence: int) -> int:
        """Decides the slots that a batch touches; see `check_and_set`."""
        self._reserve(len(verdicts))
        return check_and_set(verdicts, owned, producer, sequence, self._keys, self._highest, self._bitmaps, self._used)

    def forget(self, producers: NDArray[np.uint64]) -> None:
        """Drops all marks of these producers."""
        keys, highest, bitmaps = self._columns()
        kept = ~np.isin(keys >> np.uint64(32), producers)
        self._rebuild(len(self._keys), keys[kept], highest[kept], bitmaps[kept])

    def of_slots(self, wanted: NDArray[np.bool_]) -> dict[str, NDArray[np.uint64]]:
        """The marks of some slots, by producer, then slot: `producers`, `slots`, `highest`, `bitmaps`.

        Args:
            wanted: bool[slots of the cluster].
        """
        keys, highest, bitmaps = self._columns()
        rows = np.flatnonzero(wanted[_slots_of(keys)])
        rows = rows[np.argsort(keys[rows])]
        return {
            "producers": keys[rows] >> np.uint64(32),
            "slots": _slots_of(keys[rows]).astype(np.uint64),
            "highest": highest[rows],
            "bitmaps": bitmaps[rows],
        }

    def forget_slots(self, wanted: NDArray[np.bool_]) -> NDArray[np.uint64]:
        """Drops all marks of some slots; the producers that have none left, ascending."""
        keys, highest, bitmaps = self._columns()
        dropped = wanted[_slots_of(keys)]
        kept = ~dropped
        self._rebuild(len(self._keys), keys[kept], highest[kept], bitmaps[kept])
        return np.setdiff1d(keys[dropped] >> np.uint64(32), keys[kept] >> np.uint64(32))

    def enter(
        self,
        producers: NDArray[np.uint64],
        slots: NDArray[np.uint64],
        highest: NDArray[np.uint64],
        bitmaps: NDArray[np.uint64],
    ) -> None:
        """Enters marks that are not there yet, each (producer, slot) once."""
        self._reserve(len(producers))
        self._used[0] += len(producers)
        keys = producers << np.uint64(32) | (slots + np.uint64(1))
        enter(keys, highest, bitmaps, self._keys, self._highest, self._bitmaps)

    def _reserve(self, marks: int) -> None:
        wanted = 2 * (len(self) + marks)
        if wanted > len(self._keys):
            self._rebuild(1 << (wanted - 1).bit_length(), *self._columns())

    def _columns(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]:
        present = np.flatnonzero(self._keys)
        return self._keys[present], self._highest[present], self._bitmaps[present]

    def _rebuild(
        self, capacity: int, keys: NDArray[np.uint64], highest: NDArray[np.uint64], bitmaps: NDArray[np.uint64]
    ) -> None:
        self._keys, self._highest, self._bitmaps = (np.zeros(capacity, np.uint64) for _ in range(3))
        self._used[0] = len(keys)
        enter(keys, highest, bitmaps, self._keys, self._highest, self._bitmaps)

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """What a snapshot keeps, copied."""
        return dict(zip(("keys", "highest", "bitmaps"), self._columns(), strict=True))

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[np.generic]]) -> MarkTable:
        """The table that `to_arrays` described."""
        table = cls()
        columns = [np.array(arrays[name], np.uint64) for name in ("keys", "highest", "bitmaps")]
        table._rebuild(max(1 << 11, 1 << (2 * len(columns[0])).bit_length()), *columns)
        return table
