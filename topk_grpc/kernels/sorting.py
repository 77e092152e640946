"""Sorting keys with what belongs to them, by radix: a few linear passes, where comparing would take many.

Source: the least-significant-digit radix sort of Knuth, "The Art of Computer Programming", vol. 3, 5.2.5.
"""

from __future__ import annotations

import cython
import numpy as np
from numpy.typing import NDArray

_DIGIT_BITS = 11
_MASK = cython.declare(cython.ulonglong, (1 << 11) - 1)


def pack_keys(
    buckets: cython.const[cython.longlong][::1],
    entries: cython.const[cython.int][::1],
    first: cython.longlong,
    entry_bits: cython.int,
    keys: cython.ulonglong[::1],
    rows: cython.Py_ssize_t,
) -> None:
    """One key for each (bucket, entry), in the same order: the bucket's distance from `first`, then the entry.

    Args:
        buckets, entries: int64 and int32[rows].
        first: the least bucket.
        entry_bits: as many as the largest entry has.
        keys: uint64[rows], written.
        rows: how many.
    """
    if not cython.compiled:
        buckets, entries, keys = memoryview(buckets), memoryview(entries), memoryview(keys)
    i: cython.Py_ssize_t
    with cython.nogil:
        for i in range(rows):
            keys[i] = (cython.cast(cython.ulonglong, buckets[i] - first) << entry_bits) | cython.cast(
                cython.ulonglong, entries[i]
            )


def unpack_keys(
    keys: cython.ulonglong[::1],
    first: cython.longlong,
    entry_bits: cython.int,
    buckets: cython.longlong[::1],
    entries: cython.int[::1],
    rows: cython.Py_ssize_t,
) -> None:
    """Takes the keys of `pack_keys` apart again; buckets and entries are written."""
    if not cython.compiled:
        buckets, entries, keys = memoryview(buckets), memoryview(entries), memoryview(keys)
    i: cython.Py_ssize_t
    one: cython.ulonglong = 1
    mask: cython.ulonglong = (one << entry_bits) - 1
    with cython.nogil:
        for i in range(rows):
            buckets[i] = first + cython.cast(cython.longlong, keys[i] >> entry_bits)
            entries[i] = cython.cast(cython.int, keys[i] & mask)


def sort_by_digit(
    keys: cython.ulonglong[::1],
    values: cython.longlong[::1],
    sorted_keys: cython.ulonglong[::1],
    sorted_values: cython.longlong[::1],
    shift: cython.int,
    places: cython.longlong[::1],
    rows: cython.Py_ssize_t,
) -> None:
    """One pass: sorts rows by one digit of their keys, stably.

    Args:
        keys, values: uint64 and int64[rows].
        sorted_keys, sorted_values: written.
        shift: bits below the digit.
        places: int64[2049], zeros: scratch.
        rows: how many.
    """
    if not cython.compiled:
        keys, values = memoryview(keys), memoryview(values)
        sorted_keys, sorted_values, places = memoryview(sorted_keys), memoryview(sorted_values), memoryview(places)
    i: cython.Py_ssize_t
    digit: cython.Py_ssize_t
    at: cython.Py_ssize_t
    with cython.nogil:
        for i in range(rows):
            places[cython.cast(cython.Py_ssize_t, (keys[i] >> shift) & _MASK) + 1] += 1
        for digit in range(1, 2049):
            places[digit] += places[digit - 1]
        for i in range(rows):
            digit = cython.cast(cython.Py_ssize_t, (keys[i] >> shift) & _MASK)
            at = cython.cast(cython.Py_ssize_t, places[digit])
            places[digit] = at + 1
            sorted_keys[at] = keys[i]
            sorted_values[at] = values[i]


def add_equal(keys: cython.ulonglong[::1], values: cython.longlong[::1], rows: cython.Py_ssize_t) -> int:
    """Adds up the values of equal neighbouring keys, in place.

    Args:
        keys, values: uint64 and int64[rows]; the first of them hold the result.
        rows: how many.

    Returns:
        How many are left.
    """
    if not cython.compiled:
        keys, values = memoryview(keys), memoryview(values)
    i: cython.Py_ssize_t
    last: cython.Py_ssize_t = 0
    if rows == 0:
        return 0
    with cython.nogil:
        for i in range(1, rows):
            if keys[i] == keys[last]:
                values[last] += values[i]
            else:
                last += 1
                keys[last] = keys[i]
                values[last] = values[i]
    return last + 1


def sum_by_key(
    keys: NDArray[np.uint64],
    values: NDArray[np.int64],
    bits: int,
    other_keys: NDArray[np.uint64],
    other_values: NDArray[np.int64],
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """The distinct keys, ascending, and the sums of their values: views of the columns given.

    Args:
        keys: uint64[n], changed.
        values: int64[n], changed.
        bits: how many low bits of the keys are used; the others are 0.
        other_keys, other_values: as long, changed: scratch.
    """
    rows = len(keys)
    for shift in range(0, bits, _DIGIT_BITS):
        sort_by_digit(keys, values, other_keys, other_values, shift, np.zeros(2049, np.int64), rows)
        keys, other_keys, values, other_values = other_keys, keys, other_values, values
    left = add_equal(keys, values, rows)
    return keys[:left], values[:left]
