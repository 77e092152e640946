"""From a client's batch to one part a shard: who gets which play, equal plays combined, written as protobuf.

Plays are equal when song, time bucket and charts are. They travel as one, with the sum of their counts, the newest of
their times and the index of the first: so a hot song's load on its shard grows with batches, not with plays. Which play
stands for which is kept, so that a shard's reject reaches all the plays it is about.

Corrections (a count below 0) travel one by one: a shard takes each back whole or rejects it, after the plays.
"""

from __future__ import annotations

from dataclasses import dataclass

import cython
import numpy as np
from numpy.typing import NDArray

from topk_grpc.kernels.wire import PlayColumns

MASK64 = cython.declare(cython.ulonglong, 0xFFFFFFFFFFFFFFFF)
_MIX = cython.declare(cython.ulonglong, 0x9E3779B185EBCA87)
_NEAR = cython.declare(cython.longlong, 1 << 32)
_COUNT_MAX = cython.declare(cython.longlong, 1 << 55)


@dataclass(slots=True)
class Split:
    """A batch's parts.

    Attributes:
        parts: the `plays` fields of each shard's ShardBatch, ready to be sent; empty where a shard has none.
        stands_for: for each play the index of the play that it was combined into, its own if it was not, int32[n];
            -1: sent to nobody.
        plays: plays sent, before combining.
    """

    parts: list[memoryview]
    stands_for: NDArray[np.int32]
    plays: int


# _same, _size_of, _put and _unsigned repeat those of wire.py: a C function reaches another module only by way of a .pxd
# file, which the uncompiled form cannot read, and which would be a second place to keep each signature right.


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _floor(value: cython.longlong, step: cython.longlong) -> cython.longlong:
    """value // step rounded down, whatever the sign (C rounds towards zero)."""
    rest: cython.longlong
    if cython.compiled:
        rest = value % step
        return (value - rest) // step - (1 if rest < 0 else 0)
    else:
        return value // step


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _same(
    data: cython.const[cython.uchar][::1], a: cython.Py_ssize_t, b: cython.Py_ssize_t, size: cython.Py_ssize_t
) -> cython.bint:
    i: cython.Py_ssize_t
    for i in range(size):
        if data[a + i] != data[b + i]:
            return False
    return True


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _same_charts(
    data: cython.const[cython.uchar][::1],
    bounds: cython.int[::1],
    starts: cython.longlong[::1],
    sizes: cython.int[::1],
    a: cython.Py_ssize_t,
    b: cython.Py_ssize_t,
) -> cython.bint:
    j: cython.Py_ssize_t
    charts: cython.Py_ssize_t = bounds[a + 1] - bounds[a]
    if charts != bounds[b + 1] - bounds[b]:
        return False
    for j in range(charts):
        if sizes[bounds[a] + j] != sizes[bounds[b] + j]:
            return False
        if not _same(data, starts[bounds[a] + j], starts[bounds[b] + j], sizes[bounds[a] + j]):
            return False
    return True


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _size_of(value: cython.ulonglong) -> cython.Py_ssize_t:
    size: cython.Py_ssize_t = 1
    while value >= 128:
        value = value >> 7
        size += 1
    return size


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _put(out: cython.uchar[::1], at: cython.Py_ssize_t, value: cython.ulonglong) -> cython.Py_ssize_t:
    while value >= 128:
        out[at] = cython.cast(cython.uchar, (value & 127) | 128)
        value = value >> 7
        at += 1
    out[at] = cython.cast(cython.uchar, value)
    return at + 1


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _unsigned(value: cython.longlong) -> cython.ulonglong:
    if cython.compiled:
        return cython.cast(cython.ulonglong, value)
    else:
        return value & 0xFFFFFFFFFFFFFFFF


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _put_string(
    out: cython.uchar[::1],
    at: cython.Py_ssize_t,
    tag: cython.uchar,
    data: cython.const[cython.uchar][::1],
    start: cython.Py_ssize_t,
    size: cython.Py_ssize_t,
) -> cython.Py_ssize_t:
    j: cython.Py_ssize_t
    out[at] = tag
    at = _put(out, at + 1, size)
    for j in range(size):
        out[at + j] = data[start + j]
    return at + size


def combine(
    data: cython.const[cython.uchar][::1],
    song_starts: cython.longlong[::1],
    song_sizes: cython.int[::1],
    times: cython.longlong[::1],
    counts: cython.longlong[::1],
    chart_bounds: cython.int[::1],
    chart_starts: cython.longlong[::1],
    chart_sizes: cython.int[::1],
    reasons: cython.uchar[::1],
    hashes: cython.ulonglong[::1],
    slot_keys: cython.ulonglong[::1],
    owners: cython.int[::1],
    resolution: cython.longlong,
    table: cython.int[::1],
    stands_for: cython.int[::1],
    targets: cython.int[::1],
    bodies: cython.int[::1],
    shard_bytes: cython.longlong[::1],
    rows: cython.Py_ssize_t,
) -> int:
    """Finds equal plays, adds them up in `times` and `counts` of the first, and sizes the parts.

    Args:
        data .. hashes: a batch, as `PlayColumns` and `hash_strings` give it; times and counts are changed.
        slot_keys: uint64[rows]: modulo the slots they are the slot of each play.
        owners: the shard of each slot, int32[slots]; -1: leave those plays out.
        resolution: of a time bucket, in milliseconds.
        table: int32, zeros, a power of two of at least 2 * rows: scratch.
        stands_for: int32[rows], written, as in `Split`.
        targets: int32[rows], written: the shard of each play that is sent.
        bodies: int32[rows], written: bytes of each play's message; 0 where another one stands for it.
        shard_bytes: int64[shards], zeros; written: bytes of each shard's plays.
        rows: plays.

    Returns:
        Plays that go to some shard, before combining.
    """
    if not cython.compiled:
        data, song_starts, song_sizes = memoryview(data), memoryview(song_starts), memoryview(song_sizes)
        times, counts, chart_bounds = memoryview(times), memoryview(counts), memoryview(chart_bounds)
        chart_starts, chart_sizes, reasons = memoryview(chart_starts), memoryview(chart_sizes), memoryview(reasons)
        hashes, slot_keys = memoryview(hashes), memoryview(slot_keys)
        owners, table = memoryview(owners), memoryview(table)
        stands_for, targets = memoryview(stands_for), memoryview(targets)
        bodies, shard_bytes = memoryview(bodies), memoryview(shard_bytes)
    i: cython.Py_ssize_t
    j: cython.Py_ssize_t
    k: cython.int
    other: cython.Py_ssize_t
    at: cython.Py_ssize_t
    body: cython.Py_ssize_t
    sent: cython.Py_ssize_t = 0
    shard: cython.int
    slots: cython.ulonglong = owners.shape[0]
    slot_mask: cython.ulonglong = slots - 1 if slots & (slots - 1) == 0 else 0
    mask: cython.ulonglong = table.shape[0] - 1
    bucket: cython.longlong
    key: cython.ulonglong
    bucket_start: cython.longlong
    ahead: cython.longlong
    base: cython.longlong = 0
    base_bucket: cython.longlong = 0
    with cython.nogil:
        for i in range(rows):
            bodies[i] = 0
            stands_for[i] = -1
            if reasons[i] != 0:
                continue
            # Slots are mostly a power of two: spare the division.
            at = cython.cast(cython.Py_ssize_t, slot_keys[i] & slot_mask if slot_mask else slot_keys[i] % slots)
            shard = owners[at]
            if shard < 0:
                continue
            targets[i] = shard
            sent += 1
            if counts[i] < 0:
                stands_for[i] = cython.cast(cython.int, i)
                continue
            # Plays of a batch mostly lie close together: their distance divides in half the time.
            ahead = times[i] - base
            if 0 <= ahead < _NEAR and resolution < _NEAR:
                bucket = base_bucket + cython.cast(cython.uint, ahead) // cython.cast(cython.uint, resolution)
            else:
                bucket = _floor(times[i], resolution)
                base_bucket = bucket - _NEAR // (2 * resolution)
                base = base_bucket * resolution
            bucket_start = bucket * resolution
            key = hashes[i] ^ ((_unsigned(bucket) * _MIX) & MASK64)
            for j in range(chart_bounds[i], chart_bounds[i + 1]):
                for k in range(chart_sizes[j]):
                    key = ((key ^ data[chart_starts[j] + k]) * _MIX) & MASK64
            key = (key * _MIX) & MASK64
            at = cython.cast(cython.Py_ssize_t, (key >> 32) & mask)
            while True:
                other = table[at] - 1
                if other < 0:
                    table[at] = cython.cast(cython.int, i + 1)
                    stands_for[i] = cython.cast(cython.int, i)
                    break
                if (
                    hashes[other] == hashes[i]
                    and song_sizes[other] == song_sizes[i]
                    and bucket_start <= times[other] < bucket_start + resolution
                    and _same(data, song_starts[other], song_starts[i], song_sizes[i])
                    and _same_charts(data, chart_bounds, chart_starts, chart_sizes, other, i)
                ):
                    if counts[i] > _COUNT_MAX - counts[other]:
                        # Takes the full one's place. With both in the table each such play would pass all before it.
                        table[at] = cython.cast(cython.int, i + 1)
                        stands_for[i] = cython.cast(cython.int, i)
                        break
                    counts[other] += counts[i]
                    if times[i] > times[other]:
                        times[other] = times[i]
                    stands_for[i] = cython.cast(cython.int, other)
                    break
                at = cython.cast(cython.Py_ssize_t, (cython.cast(cython.ulonglong, at) + 1) & mask)
        for i in range(rows):
            if stands_for[i] != i:
                continue
            body = 1 + _size_of(song_sizes[i]) + song_sizes[i] + 1 + _size_of(_unsigned(times[i]))
            if counts[i] != 1:
                body += 1 + _size_of(_unsigned(counts[i]))
            for j in range(chart_bounds[i], chart_bounds[i + 1]):
                body += 1 + _size_of(chart_sizes[j]) + chart_sizes[j]
            if i:
                body += 1 + _size_of(i)
            bodies[i] = cython.cast(cython.int, body)
            shard_bytes[targets[i]] += 1 + _size_of(body) + body
    return sent


def write_parts(
    data: cython.const[cython.uchar][::1],
    song_starts: cython.longlong[::1],
    song_sizes: cython.int[::1],
    times: cython.longlong[::1],
    counts: cython.longlong[::1],
    chart_bounds: cython.int[::1],
    chart_starts: cython.longlong[::1],
    chart_sizes: cython.int[::1],
    targets: cython.int[::1],
    bodies: cython.int[::1],
    ends: cython.longlong[::1],
    out: cython.uchar[::1],
    rows: cython.Py_ssize_t,
) -> None:
    """Writes each shard's plays as field 4 of its ShardBatch.

    Args:
        data .. bodies: as in `combine`.
        ends: int64[shards]: where each shard's region begins in `out`; moved to where it ends.
        out: uint8, as large as all regions.
        rows: plays.
    """
    if not cython.compiled:
        data, song_starts, song_sizes = memoryview(data), memoryview(song_starts), memoryview(song_sizes)
        times, counts, chart_bounds = memoryview(times), memoryview(counts), memoryview(chart_bounds)
        chart_starts, chart_sizes, targets = memoryview(chart_starts), memoryview(chart_sizes), memoryview(targets)
        bodies, ends, out = memoryview(bodies), memoryview(ends), memoryview(out)
    i: cython.Py_ssize_t
    j: cython.Py_ssize_t
    at: cython.Py_ssize_t
    shard: cython.int
    with cython.nogil:
        for i in range(rows):
            if bodies[i] == 0:
                continue
            shard = targets[i]
            at = cython.cast(cython.Py_ssize_t, ends[shard])
            out[at] = 34
            at = _put(out, at + 1, bodies[i])
            at = _put_string(out, at, 10, data, song_starts[i], song_sizes[i])
            out[at] = 16
            at = _put(out, at + 1, _unsigned(times[i]))
            if counts[i] != 1:
                out[at] = 24
                at = _put(out, at + 1, _unsigned(counts[i]))
            for j in range(chart_bounds[i], chart_bounds[i + 1]):
                at = _put_string(out, at, 34, data, chart_starts[j], chart_sizes[j])
            if i:
                out[at] = 40
                at = _put(out, at + 1, i)
            ends[shard] = at


def split_batch(
    data: bytes | memoryview,
    columns: PlayColumns,
    hashes: NDArray[np.uint64],
    slot_keys: NDArray[np.uint64],
    owners: NDArray[np.int32],
    shards: int,
    resolution_ms: int,
) -> Split:
    """Splits a batch by shard. `columns.times_ms` and `columns.counts` are changed where plays are combined.

    Args:
        data: the bytes that the columns point into.
        columns: the batch.
        hashes: of its songs, uint64[n].
        slot_keys: modulo the slots they are the slot of each play, uint64[n]: `hashes`, where the song is hashed.
        owners: the shard of each slot, int32[slots]; -1: leave those plays out.
        shards: how many shards there are.
        resolution_ms: of a time bucket.
    """
    rows = columns.count
    table = np.zeros(1 << max(4, (2 * rows - 1).bit_length()), np.int32)
    stands_for = np.empty(rows, np.int32)
    targets = np.empty(rows, np.int32)
    bodies = np.empty(rows, np.int32)
    shard_bytes = np.zeros(shards, np.int64)
    plays = combine(
        data, columns.song_starts, columns.song_sizes, columns.times_ms, columns.counts,
        columns.chart_bounds, columns.chart_starts, columns.chart_sizes, columns.reasons, hashes, slot_keys, owners,
        resolution_ms, table, stands_for, targets, bodies, shard_bytes, rows,
    )  # fmt: skip
    stops = np.cumsum(shard_bytes)
    starts = stops - shard_bytes
    out = np.empty(int(shard_bytes.sum()), np.uint8)
    write_parts(
        data, columns.song_starts, columns.song_sizes, columns.times_ms, columns.counts,
        columns.chart_bounds, columns.chart_starts, columns.chart_sizes, targets, bodies,
        starts.copy(), out, rows,
    )  # fmt: skip
    view = out.data
    return Split(
        [view[start:stop] for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)], stands_for, plays
    )
