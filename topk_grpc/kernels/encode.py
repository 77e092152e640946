"""Play batches written as protobuf bytes, from columns or lists, without a message object a play.

What is written is what protobuf's own writer writes for protos/topk/v1/play.proto: fields in the order of their
numbers, those with their default value left out. `wire` reads it back.

Source: protobuf.dev, "Encoding". Held against protobuf's own codec in tests/kernels/test_wire_write.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import cython
import numpy as np
from numpy.typing import NDArray


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _size_of(value: cython.ulonglong) -> cython.Py_ssize_t:
    """Bytes that a varint takes."""
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
    """Writes a varint; returns where it ends."""
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


def write_plays(
    out: cython.uchar[::1],
    song_data: cython.const[cython.uchar][::1],
    song_offsets: cython.longlong[::1],
    times: cython.longlong[::1],
    counts: cython.longlong[::1],
    chart_data: cython.const[cython.uchar][::1],
    chart_offsets: cython.longlong[::1],
    chart_bounds: cython.longlong[::1],
    rows: cython.Py_ssize_t,
) -> int:
    """Writes plays as field 4 of a batch; see `encode_batch_columns` and `encode_batch`.

    Args:
        out: uint8, large enough: 44 bytes a play, 6 a chart, and the strings.
        song_data, song_offsets: song i is song_data[song_offsets[i]:song_offsets[i + 1]].
        times: int64[rows].
        counts: int64[rows], or of length 0: all 1.
        chart_data, chart_offsets: chart c is chart_data[chart_offsets[c]:chart_offsets[c + 1]].
        chart_bounds: int64[rows + 1]: play i names the charts chart_bounds[i] to chart_bounds[i + 1].
            Of length 0: play i names chart i, or none where that is empty, or none at all without chart_offsets.
        rows: how many.

    Returns:
        How many bytes were written.
    """
    if not cython.compiled:
        out, song_data, song_offsets = memoryview(out), memoryview(song_data), memoryview(song_offsets)
        times, counts, chart_bounds = memoryview(times), memoryview(counts), memoryview(chart_bounds)
        chart_data, chart_offsets = memoryview(chart_data), memoryview(chart_offsets)
    at: cython.Py_ssize_t = 0
    i: cython.Py_ssize_t
    j: cython.Py_ssize_t
    c: cython.Py_ssize_t
    first: cython.Py_ssize_t
    last: cython.Py_ssize_t
    song_size: cython.Py_ssize_t
    chart_size: cython.Py_ssize_t
    body: cython.Py_ssize_t
    time: cython.ulonglong
    count: cython.ulonglong
    has_counts: cython.bint = counts.shape[0] > 0
    has_charts: cython.bint = chart_offsets.shape[0] > 0
    has_bounds: cython.bint = chart_bounds.shape[0] > 0
    with cython.nogil:
        for i in range(rows):
            song_size = cython.cast(cython.Py_ssize_t, song_offsets[i + 1] - song_offsets[i])
            time = _unsigned(times[i])
            count = _unsigned(counts[i]) if has_counts else 1
            first = 0
            last = 0
            if has_bounds:
                first = cython.cast(cython.Py_ssize_t, chart_bounds[i])
                last = cython.cast(cython.Py_ssize_t, chart_bounds[i + 1])
            elif has_charts and chart_offsets[i + 1] > chart_offsets[i]:
                first = i
                last = i + 1
            body = 0
            if song_size:
                body += 1 + _size_of(song_size) + song_size
            if time:
                body += 1 + _size_of(time)
            if count != 1:
                body += 1 + _size_of(count)
            for c in range(first, last):
                chart_size = cython.cast(cython.Py_ssize_t, chart_offsets[c + 1] - chart_offsets[c])
                body += 1 + _size_of(chart_size) + chart_size
            out[at] = 34
            at = _put(out, at + 1, body)
            if song_size:
                out[at] = 10
                at = _put(out, at + 1, song_size)
                for j in range(song_size):
                    out[at + j] = song_data[song_offsets[i] + j]
                at += song_size
            if time:
                out[at] = 16
                at = _put(out, at + 1, time)
            if count != 1:
                out[at] = 24
                at = _put(out, at + 1, count)
            for c in range(first, last):
                chart_size = cython.cast(cython.Py_ssize_t, chart_offsets[c + 1] - chart_offsets[c])
                out[at] = 34
                at = _put(out, at + 1, chart_size)
                for j in range(chart_size):
                    out[at + j] = chart_data[chart_offsets[c] + j]
                at += chart_size
    return at


def varint(value: int) -> bytes:
    """A varint's bytes; a negative value as protobuf's int64 writes it."""
    value &= 0xFFFFFFFFFFFFFFFF
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def batch_header(producer_id: bytes, sequence: int, first_sent_ms: int) -> bytes:
    """The fields 1 to 3 of a PlayBatch or ShardBatch."""
    header = b"\x0a" + varint(len(producer_id)) + producer_id if producer_id else b""
    if sequence:
        header += b"\x10" + varint(sequence)
    if first_sent_ms:
        header += b"\x18" + varint(first_sent_ms)
    return header


_NO_BYTES = np.empty(0, np.uint8)
_NO_NUMBERS = np.empty(0, np.int64)


def encode_batch_columns(
    producer_id: bytes,
    sequence: int,
    first_sent_ms: int,
    song_data: bytes | NDArray[np.uint8],
    song_offsets: NDArray[np.int64],
    played_at_ms: NDArray[np.int64],
    counts: NDArray[np.int64] | None = None,
    chart_data: bytes | NDArray[np.uint8] | None = None,
    chart_offsets: NDArray[np.int64] | None = None,
) -> bytes:
    """The bytes of a StreamPlaysRequest (and RecordPlaysRequest) with one batch, from columns.

    Args:
        producer_id, sequence, first_sent_ms: the batch's own.
        song_data, song_offsets: as Arrow keeps strings: song i is song_data[song_offsets[i]:song_offsets[i + 1]];
            int64[n + 1].
        played_at_ms: int64[n].
        counts: int64[n]; None: all 1.
        chart_data, chart_offsets: at most one chart a play in the same form; an empty name is none.
    """
    if chart_data is None or chart_offsets is None:
        chart_data, chart_offsets = _NO_BYTES, _NO_NUMBERS
    counts = _NO_NUMBERS if counts is None else counts
    return _encode(
        batch_header(producer_id, sequence, first_sent_ms),
        song_data,
        song_offsets,
        played_at_ms,
        counts,
        chart_data,
        chart_offsets,
        _NO_NUMBERS,
    )


def _encode(
    header: bytes,
    song_data: bytes | NDArray[np.uint8],
    song_offsets: NDArray[np.int64],
    played_at_ms: NDArray[np.int64],
    counts: NDArray[np.int64],
    chart_data: bytes | NDArray[np.uint8],
    chart_offsets: NDArray[np.int64],
    chart_bounds: NDArray[np.int64],
) -> bytes:
    rows = len(played_at_ms)
    room = 44 * rows + int(song_offsets[rows] - song_offsets[0])
    if len(chart_offsets):
        charts = len(chart_offsets) - 1
        room += 6 * charts + int(chart_offsets[charts] - chart_offsets[0])
    out = np.empty(room, np.uint8)
    used = write_plays(
        out, song_data, song_offsets, played_at_ms, counts, chart_data, chart_offsets, chart_bounds, rows
    )
    return b"".join((b"\x0a", varint(len(header) + used), header, out[:used].data))


def _offsets(sizes: Iterable[int], count: int) -> NDArray[np.int64]:
    offsets = np.zeros(count + 1, np.int64)
    np.cumsum(np.fromiter(sizes, np.int64, count), out=offsets[1:])
    return offsets


def encode_batch(
    producer_id: bytes,
    sequence: int,
    first_sent_ms: int,
    song_ids: Sequence[str],
    played_at_ms: Sequence[int],
    counts: Sequence[int] | None = None,
    charts: Sequence[Sequence[str]] | None = None,
) -> bytes:
    """The bytes of a StreamPlaysRequest (and RecordPlaysRequest) with one batch, from lists of one length.

    Args:
        producer_id, sequence, first_sent_ms: the batch's own.
        song_ids, played_at_ms: of each play.
        counts: of each play; None: all 1.
        charts: the names of each play's charts; None: none.
    """
    rows = len(song_ids)
    songs = [song_id.encode() for song_id in song_ids]
    chart_data, chart_offsets, chart_bounds = b"", _NO_NUMBERS, _NO_NUMBERS
    if charts is not None:
        names = [name.encode() for named in charts for name in named]
        chart_data = b"".join(names)
        chart_offsets = _offsets(map(len, names), len(names))
        chart_bounds = _offsets(map(len, charts), rows)
    return _encode(
        batch_header(producer_id, sequence, first_sent_ms),
        b"".join(songs),
        _offsets(map(len, songs), rows),
        np.array(played_at_ms, np.int64),
        _NO_NUMBERS if counts is None else np.array(counts, np.int64),
        chart_data,
        chart_offsets,
        chart_bounds,
    )
