"""XXH64, seed 0: where a song belongs.

Source: the xxHash specification (github.com/Cyan4973/xxHash, doc/xxhash_spec.md, version 0.1.1). Products are masked
to 64 bits, so that the compiled form (machine words) and the uncompiled one (Python integers) agree.
"""

from __future__ import annotations

import cython
import numpy as np
from numpy.typing import NDArray

MASK64 = cython.declare(cython.ulonglong, 0xFFFFFFFFFFFFFFFF)
P1 = cython.declare(cython.ulonglong, 0x9E3779B185EBCA87)
P2 = cython.declare(cython.ulonglong, 0xC2B2AE3D27D4EB4F)
P3 = cython.declare(cython.ulonglong, 0x165667B19E3779F9)
P4 = cython.declare(cython.ulonglong, 0x85EBCA77C2B2AE63)
P5 = cython.declare(cython.ulonglong, 0x27D4EB2F165667C5)


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _rotate(value: cython.ulonglong, bits: cython.int) -> cython.ulonglong:
    return ((value << bits) | (value >> (64 - bits))) & MASK64


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _load64(data: cython.const[cython.uchar][::1], at: cython.Py_ssize_t) -> cython.ulonglong:
    value: cython.ulonglong = 0
    i: cython.Py_ssize_t
    byte: cython.ulonglong
    for i in range(8):
        byte = data[at + i]
        value = value | (byte << (8 * i))
    return value


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _load32(data: cython.const[cython.uchar][::1], at: cython.Py_ssize_t) -> cython.ulonglong:
    value: cython.ulonglong = 0
    i: cython.Py_ssize_t
    byte: cython.ulonglong
    for i in range(4):
        byte = data[at + i]
        value = value | (byte << (8 * i))
    return value


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _round(lane: cython.ulonglong, word: cython.ulonglong) -> cython.ulonglong:
    return (_rotate((lane + ((word * P2) & MASK64)) & MASK64, 31) * P1) & MASK64


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _xxh64(
    data: cython.const[cython.uchar][::1], start: cython.Py_ssize_t, size: cython.Py_ssize_t
) -> cython.ulonglong:
    at: cython.Py_ssize_t = start
    end: cython.Py_ssize_t = start + size
    digest: cython.ulonglong
    a: cython.ulonglong
    b: cython.ulonglong
    c: cython.ulonglong
    d: cython.ulonglong
    byte: cython.ulonglong
    if size >= 32:
        a = (P1 + P2) & MASK64
        b = P2
        c = 0
        d = (0 - P1) & MASK64
        while at + 32 <= end:
            a = _round(a, _load64(data, at))
            b = _round(b, _load64(data, at + 8))
            c = _round(c, _load64(data, at + 16))
            d = _round(d, _load64(data, at + 24))
            at += 32
        digest = (_rotate(a, 1) + _rotate(b, 7) + _rotate(c, 12) + _rotate(d, 18)) & MASK64
        digest = (((digest ^ _round(0, a)) * P1) + P4) & MASK64
        digest = (((digest ^ _round(0, b)) * P1) + P4) & MASK64
        digest = (((digest ^ _round(0, c)) * P1) + P4) & MASK64
        digest = (((digest ^ _round(0, d)) * P1) + P4) & MASK64
    else:
        digest = P5
    digest = (digest + size) & MASK64
    while at + 8 <= end:
        digest = (((_rotate(digest ^ _round(0, _load64(data, at)), 27) * P1) & MASK64) + P4) & MASK64
        at += 8
    if at + 4 <= end:
        digest = (((_rotate(digest ^ ((_load32(data, at) * P1) & MASK64), 23) * P2) & MASK64) + P3) & MASK64
        at += 4
    while at < end:
        byte = data[at]
        digest = (_rotate(digest ^ ((byte * P5) & MASK64), 11) * P1) & MASK64
        at += 1
    digest = ((digest ^ (digest >> 33)) * P2) & MASK64
    digest = ((digest ^ (digest >> 29)) * P3) & MASK64
    return digest ^ (digest >> 32)


def xxh64(data: cython.const[cython.uchar][::1]) -> int:
    """The hash of one string.

    Args:
        data: its bytes, UTF-8 for a song.

    Returns:
        0 .. 2^64 - 1.
    """
    size: cython.Py_ssize_t = len(data)
    return _xxh64(data, 0, size)


def hash_columns(
    data: cython.const[cython.uchar][::1],
    starts: cython.longlong[::1],
    sizes: cython.int[::1],
    hashes: cython.ulonglong[::1],
    count: cython.Py_ssize_t,
) -> None:
    """Hashes many strings that lie in one buffer.

    Args:
        data: the buffer.
        starts: where each begins, int64[count].
        sizes: bytes of each, int32[count].
        hashes: uint64[count], written.
        count: how many.
    """
    if not cython.compiled:
        starts, sizes, hashes = memoryview(starts), memoryview(sizes), memoryview(hashes)
        data = memoryview(data)
    i: cython.Py_ssize_t
    with cython.nogil:
        for i in range(count):
            hashes[i] = _xxh64(data, starts[i], sizes[i])


def hash_strings(
    data: bytes | NDArray[np.uint8], starts: NDArray[np.int64], sizes: NDArray[np.int32]
) -> NDArray[np.uint64]:
    """The hashes of the strings that `starts` and `sizes` cut out of `data`."""
    hashes = np.empty(len(starts), np.uint64)
    hash_columns(data, starts, sizes, hashes, len(starts))
    return hashes
