"""Play batches as protobuf bytes, read into columns without a message object a play. `encode` writes them.

What is read is what any protobuf writer may produce for protos/topk/v1/play.proto: fields in any order and repeated
(the last one wins), unknown fields and groups (skipped), a known number under another wire type (unknown, too), the
batch in several pieces (merged). One reader serves `PlayBatch` from clients and `ShardBatch` from gateways, since their
field numbers agree; a `Play` simply has no field 5.

Where a play as such is wrong (its id, its time, ...) its row carries a reason and the rest of the batch counts. Where
the bytes are no protobuf message everything is refused: what follows cannot be trusted.

Source: protobuf.dev, "Encoding". Held against protobuf's own codec in tests/kernels/test_wire.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cython
import numpy as np
from numpy.typing import NDArray

from topk_grpc.errors import InvalidArgumentError

MASK64 = cython.declare(cython.ulonglong, 0xFFFFFFFFFFFFFFFF)
_MASK32 = cython.declare(cython.ulonglong, 0xFFFFFFFF)
_COUNT_MAX = cython.declare(cython.longlong, 1 << 55)
_TIME_MAX = cython.declare(cython.longlong, 1 << 60)
_SECONDS_LOW = cython.declare(cython.longlong, 946_684_800)  # 2000-01-01 as seconds
_SECONDS_HIGH = cython.declare(cython.longlong, 4_102_444_800)  # 2100-01-01 as seconds

REASONS = (
    "",
    "EMPTY_SONG_ID",
    "SONG_ID_TOO_LONG",
    "INVALID_UTF8",
    "MISSING_TIME",
    "SECONDS_NOT_MILLISECONDS",
    "ZERO_COUNT",
    "COUNT_TOO_LARGE",
    "TOO_MANY_CHARTS",
    "EMPTY_CHART",
    "CHART_TOO_LONG",
    "TIME_OUT_OF_RANGE",
    "CORRECTION_UNSUPPORTED",
)
"""What the column `reasons` of `PlayColumns` means; 0: the play is valid. The last one depends on the cluster: gateways
set it, reading never does."""

CORRECTION_UNSUPPORTED = REASONS.index("CORRECTION_UNSUPPORTED")

_DEPTH_MAX = cython.declare(cython.int, 100)
_BATCH_DEPTH = cython.declare(cython.int, 1)
_PLAY_DEPTH = cython.declare(cython.int, 2)
_EMPTY_SONG_ID = cython.declare(cython.uchar, 1)
_SONG_ID_TOO_LONG = cython.declare(cython.uchar, 2)
_INVALID_UTF8 = cython.declare(cython.uchar, 3)
_MISSING_TIME = cython.declare(cython.uchar, 4)
_SECONDS = cython.declare(cython.uchar, 5)
_ZERO_COUNT = cython.declare(cython.uchar, 6)
_COUNT_TOO_LARGE = cython.declare(cython.uchar, 7)
_TOO_MANY_CHARTS = cython.declare(cython.uchar, 8)
_EMPTY_CHART = cython.declare(cython.uchar, 9)
_CHART_TOO_LONG = cython.declare(cython.uchar, 10)
_TIME_OUT_OF_RANGE = cython.declare(cython.uchar, 11)


@dataclass(slots=True)
class PlayColumns:
    """A batch, column by column; offsets point into the bytes it was read from.

    Attributes:
        count: plays, called n below.
        producer_start, producer_size: where the producer_id lies.
        sequence, first_sent_ms: the batch's own.
        song_starts, song_sizes: where each song_id lies, int64[n], int32[n].
        times_ms, counts: int64[n]; a count below 0 is a correction, which takes plays back.
        indexes: the field `index` of a ShardPlay, uint32[n]; 0 in a client's batch.
        chart_bounds: play i names charts chart_bounds[i] to chart_bounds[i + 1], int32[n + 1]; each name once.
        chart_starts, chart_sizes: where each chart name lies, int64, int32.
        reasons: what is wrong with each, indexes into `REASONS`, uint8[n].
    """

    count: int
    producer_start: int
    producer_size: int
    sequence: int
    first_sent_ms: int
    song_starts: NDArray[np.int64]
    song_sizes: NDArray[np.int32]
    times_ms: NDArray[np.int64]
    counts: NDArray[np.int64]
    indexes: NDArray[np.uint32]
    chart_bounds: NDArray[np.int32]
    chart_starts: NDArray[np.int64]
    chart_sizes: NDArray[np.int32]
    reasons: NDArray[np.uint8]

    @property
    def charts_used(self) -> int:
        """How many chart names all plays hold together."""
        return int(self.chart_bounds[self.count])


# As in protobuf's own reader a tag and a length take at most five bytes, a value ten, and messages and groups together
# nest at most 100 deep: a batch is the first level below the request, a play the second.


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _signed(value: cython.ulonglong) -> cython.longlong:
    if cython.compiled:
        return cython.cast(cython.longlong, value)
    else:
        return value - (1 << 64) if value >> 63 else value


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _varint_size(
    data: cython.const[cython.uchar][::1], at: cython.Py_ssize_t, end: cython.Py_ssize_t
) -> cython.Py_ssize_t:
    """Bytes of the varint at `at`; 0 if it is cut off or longer than ten."""
    i: cython.Py_ssize_t
    for i in range(10):
        if at + i >= end:
            return 0
        if data[at + i] < 128:
            return i + 1
    return 0


@cython.cfunc
@cython.inline
@cython.nogil
@cython.exceptval(check=False)
def _varint(data: cython.const[cython.uchar][::1], at: cython.Py_ssize_t, size: cython.Py_ssize_t) -> cython.ulonglong:
    value: cython.ulonglong = 0
    byte: cython.ulonglong
    i: cython.Py_ssize_t
    for i in range(size):
        byte = data[at + i]
        value = value | (((byte & 127) << (7 * i)) & MASK64)
    return value


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _skip(
    data: cython.const[cython.uchar][::1],
    tag: cython.ulonglong,
    at: cython.Py_ssize_t,
    end: cython.Py_ssize_t,
    depth: cython.int,
) -> cython.Py_ssize_t:
    """Where the field whose tag was just read ends; -1 if it does not end within `end`."""
    kind: cython.ulonglong = tag & 7
    size: cython.Py_ssize_t
    length: cython.ulonglong
    inner: cython.ulonglong
    if (tag >> 3) == 0 or (tag >> 3) > 536870911:
        return -1
    if kind == 0:
        size = _varint_size(data, at, end)
        return at + size if size else -1
    if kind == 1:
        return at + 8 if at + 8 <= end else -1
    if kind == 5:
        return at + 4 if at + 4 <= end else -1
    if kind == 2:
        size = _varint_size(data, at, end)
        if size == 0 or size > 5:
            return -1
        length = _varint(data, at, size)
        at += size
        if length > cython.cast(cython.ulonglong, end - at):
            return -1
        return at + cython.cast(cython.Py_ssize_t, length)
    if kind == 3:
        if depth >= _DEPTH_MAX:
            return -1
        while True:
            size = _varint_size(data, at, end)
            if size == 0 or size > 5:
                return -1
            inner = _varint(data, at, size)
            at += size
            if (inner & 7) == 4:
                return at if (inner >> 3) == (tag >> 3) else -1
            at = _skip(data, inner, at, end, depth + 1)
            if at < 0:
                return -1
    return -1


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _is_utf8(data: cython.const[cython.uchar][::1], start: cython.Py_ssize_t, size: cython.Py_ssize_t) -> cython.bint:
    """Well-formed UTF-8 as the Unicode Standard's table 3-7 has it."""
    at: cython.Py_ssize_t = start
    end: cython.Py_ssize_t = start + size
    lead: cython.int
    low: cython.int
    high: cython.int
    more: cython.int
    i: cython.Py_ssize_t
    every: cython.uchar = 0
    for i in range(start, end):  # a loop without a branch: mostly everything is ASCII
        every = every | data[i]
    if every < 0x80:
        return True
    while at < end:
        lead = data[at]
        at += 1
        if lead < 0x80:
            continue
        low = 0x80
        high = 0xBF
        if lead < 0xC2 or lead > 0xF4:
            return False
        if lead < 0xE0:
            more = 1
        elif lead < 0xF0:
            more = 2
            if lead == 0xE0:
                low = 0xA0
            elif lead == 0xED:
                high = 0x9F
        else:
            more = 3
            if lead == 0xF0:
                low = 0x90
            elif lead == 0xF4:
                high = 0x8F
        if at + more > end:
            return False
        if data[at] < low or data[at] > high:
            return False
        at += 1
        more -= 1
        while more > 0:
            if data[at] < 0x80 or data[at] > 0xBF:
                return False
            at += 1
            more -= 1
    return True


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
@cython.nogil
@cython.exceptval(check=False)
def _read_play(  # noqa: PLR0914
    data: cython.const[cython.uchar][::1],
    start: cython.Py_ssize_t,
    end: cython.Py_ssize_t,
    row: cython.Py_ssize_t,
    song_starts: cython.longlong[::1],
    song_sizes: cython.int[::1],
    times: cython.longlong[::1],
    counts: cython.longlong[::1],
    indexes: cython.uint[::1],
    chart_bounds: cython.int[::1],
    chart_starts: cython.longlong[::1],
    chart_sizes: cython.int[::1],
    reasons: cython.uchar[::1],
    song_max: cython.Py_ssize_t,
    charts_max: cython.Py_ssize_t,
    chart_max: cython.Py_ssize_t,
) -> cython.bint:
    """Reads and checks one play into row `row`; False if its bytes are no protobuf."""
    at: cython.Py_ssize_t = start
    tag: cython.ulonglong
    size: cython.Py_ssize_t
    length: cython.ulonglong
    song_start: cython.Py_ssize_t = start
    song_size: cython.Py_ssize_t = 0
    time: cython.longlong = 0
    count: cython.longlong = 1
    index: cython.ulonglong = 0
    first: cython.int = chart_bounds[row]
    used: cython.int = first
    i: cython.int
    known: cython.bint
    reason: cython.uchar = 0
    chart_reason: cython.uchar = 0
    while at < end:
        if data[at] < 128:  # tags of known fields take one byte
            tag = data[at]
            at += 1
        else:
            size = _varint_size(data, at, end)
            if size == 0 or size > 5:
                return False
            tag = _varint(data, at, size)
            at += size
        if tag == 10 or tag == 34:
            size = _varint_size(data, at, end)
            if size == 0 or size > 5:
                return False
            length = _varint(data, at, size)
            at += size
            if length > cython.cast(cython.ulonglong, end - at):
                return False
            if tag == 10:
                song_start = at
                song_size = cython.cast(cython.Py_ssize_t, length)
            elif length == 0:
                chart_reason = _EMPTY_CHART
            elif length > cython.cast(cython.ulonglong, chart_max):
                chart_reason = _CHART_TOO_LONG
            elif not _is_utf8(data, at, cython.cast(cython.Py_ssize_t, length)):
                chart_reason = _INVALID_UTF8
            else:
                known = False
                for i in range(first, used):
                    if chart_sizes[i] == cython.cast(cython.int, length) and _same(
                        data, chart_starts[i], at, chart_sizes[i]
                    ):
                        known = True
                        break
                if not known:
                    if used - first >= charts_max:
                        chart_reason = _TOO_MANY_CHARTS
                    else:
                        chart_starts[used] = at
                        chart_sizes[used] = cython.cast(cython.int, length)
                        used += 1
            at += cython.cast(cython.Py_ssize_t, length)
        elif tag == 16 or tag == 24 or tag == 40:
            size = _varint_size(data, at, end)
            if size == 0:
                return False
            length = _varint(data, at, size)
            at += size
            if tag == 16:
                time = _signed(length)
            elif tag == 24:
                count = _signed(length)
            else:
                index = length & _MASK32
        else:
            at = _skip(data, tag, at, end, _PLAY_DEPTH)
            if at < 0:
                return False
    if song_size == 0:
        reason = _EMPTY_SONG_ID
    elif song_size > song_max:
        reason = _SONG_ID_TOO_LONG
    elif not _is_utf8(data, song_start, song_size):
        reason = _INVALID_UTF8
    elif time == 0:
        reason = _MISSING_TIME
    elif time < -_TIME_MAX or time > _TIME_MAX:
        reason = _TIME_OUT_OF_RANGE
    elif _SECONDS_LOW <= time < _SECONDS_HIGH:
        reason = _SECONDS
    elif count == 0:
        reason = _ZERO_COUNT
    elif count > _COUNT_MAX or count < -_COUNT_MAX:
        reason = _COUNT_TOO_LARGE
    else:
        reason = chart_reason
    song_starts[row] = song_start
    song_sizes[row] = cython.cast(cython.int, song_size)
    times[row] = time
    counts[row] = count
    indexes[row] = cython.cast(cython.uint, index)
    reasons[row] = reason
    chart_bounds[row + 1] = used if reason == 0 else first
    return True


def scan_batch(
    data: cython.const[cython.uchar][::1], start: cython.Py_ssize_t, end: cython.Py_ssize_t, found: cython.longlong[::1]
) -> bool:
    """Reads a batch's own fields and counts its plays, so that columns can be made.

    Args:
        data: the bytes.
        start, end: where the batch lies in them.
        found: int64[5], written: plays, producer start, producer size, sequence (as signed), first_sent_ms.

    Returns:
        Whether it is a protobuf message on this level.
    """
    if not cython.compiled:
        data, found = memoryview(data), memoryview(found)
    at: cython.Py_ssize_t = start
    tag: cython.ulonglong
    length: cython.ulonglong
    size: cython.Py_ssize_t
    while at < end:
        size = _varint_size(data, at, end)
        if size == 0 or size > 5:
            return False
        tag = _varint(data, at, size)
        at += size
        if tag == 34 or tag == 10:
            size = _varint_size(data, at, end)
            if size == 0 or size > 5:
                return False
            length = _varint(data, at, size)
            at += size
            if length > cython.cast(cython.ulonglong, end - at):
                return False
            if tag == 34:
                found[0] += 1
            else:
                found[1] = at
                found[2] = cython.cast(cython.longlong, length)
            at += cython.cast(cython.Py_ssize_t, length)
        elif tag == 16 or tag == 24:
            size = _varint_size(data, at, end)
            if size == 0:
                return False
            found[3 if tag == 16 else 4] = _signed(_varint(data, at, size))
            at += size
        else:
            at = _skip(data, tag, at, end, _BATCH_DEPTH)
            if at < 0:
                return False
    return True


def read_plays(
    data: cython.const[cython.uchar][::1],
    start: cython.Py_ssize_t,
    end: cython.Py_ssize_t,
    row: cython.Py_ssize_t,
    song_starts: cython.longlong[::1],
    song_sizes: cython.int[::1],
    times: cython.longlong[::1],
    counts: cython.longlong[::1],
    indexes: cython.uint[::1],
    chart_bounds: cython.int[::1],
    chart_starts: cython.longlong[::1],
    chart_sizes: cython.int[::1],
    reasons: cython.uchar[::1],
    song_max: cython.Py_ssize_t,
    charts_max: cython.Py_ssize_t,
    chart_max: cython.Py_ssize_t,
) -> int:
    """Reads the plays of a batch that `scan_batch` has accepted into columns, from row `row` on.

    Returns:
        The row after the last; -1 - the offset of the play whose bytes are no protobuf.
    """
    if not cython.compiled:
        data = memoryview(data)
        song_starts, song_sizes, times = memoryview(song_starts), memoryview(song_sizes), memoryview(times)
        counts, indexes, reasons = memoryview(counts), memoryview(indexes), memoryview(reasons)
        chart_bounds, chart_starts, chart_sizes = (
            memoryview(chart_bounds),
            memoryview(chart_starts),
            memoryview(chart_sizes),
        )
    at: cython.Py_ssize_t = start
    stop: cython.Py_ssize_t
    tag: cython.ulonglong
    size: cython.Py_ssize_t
    bad: cython.Py_ssize_t = -1
    with cython.nogil:
        while at < end:
            size = _varint_size(data, at, end)
            tag = _varint(data, at, size)
            at += size
            if tag == 34:
                size = _varint_size(data, at, end)
                stop = at + size + cython.cast(cython.Py_ssize_t, _varint(data, at, size))
                if not _read_play(
                    data, at + size, stop, row, song_starts, song_sizes, times, counts, indexes,
                    chart_bounds, chart_starts, chart_sizes, reasons, song_max, charts_max, chart_max,
                ):  # fmt: skip
                    bad = at
                    break
                row += 1
                at = stop
            else:
                at = _skip(data, tag, at, end, _BATCH_DEPTH)
    return -1 - bad if bad >= 0 else row


def find_messages(
    data: cython.const[cython.uchar][::1],
    start: cython.Py_ssize_t,
    end: cython.Py_ssize_t,
    field: cython.ulonglong,
    spans: cython.longlong[:, ::1],
    numbers: cython.longlong[::1],
) -> int:
    """Finds the length-delimited fields number `field` of a message, and the varints of fields 1 to 7.

    Args:
        data: the bytes.
        start, end: where the message lies in them.
        field: the number, as in the .proto.
        spans: int64[m, 2], the first m are written: start and end of each.
        numbers: int64[8], written: the last varint under each of the field numbers 1 to 7.

    Returns:
        How many there are (perhaps more than m); -1: the bytes are no protobuf.
    """
    if not cython.compiled:
        data, spans, numbers = memoryview(data), memoryview(spans), memoryview(numbers)
    at: cython.Py_ssize_t = start
    tag: cython.ulonglong
    length: cython.ulonglong
    size: cython.Py_ssize_t
    found: cython.Py_ssize_t = 0
    room: cython.Py_ssize_t = spans.shape[0]
    while at < end:
        size = _varint_size(data, at, end)
        if size == 0 or size > 5:
            return -1
        tag = _varint(data, at, size)
        at += size
        if tag == ((field << 3) | 2):
            size = _varint_size(data, at, end)
            if size == 0 or size > 5:
                return -1
            length = _varint(data, at, size)
            at += size
            if length > cython.cast(cython.ulonglong, end - at):
                return -1
            if found < room:
                spans[found, 0] = at
                spans[found, 1] = at + cython.cast(cython.Py_ssize_t, length)
            found += 1
            at += cython.cast(cython.Py_ssize_t, length)
        elif (tag & 7) == 0 and 0 < (tag >> 3) < 8:
            size = _varint_size(data, at, end)
            if size == 0:
                return -1
            numbers[cython.cast(cython.Py_ssize_t, tag >> 3)] = _signed(_varint(data, at, size))
            at += size
        else:
            at = _skip(data, tag, at, end, 0)
            if at < 0:
                return -1
    return found


def message_spans(
    data: bytes | memoryview, start: int, end: int, field: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the sub-messages number `field` of a message lie, and its varints.

    Returns:
        int64[m, 2] of starts and ends; int64[8] of the last varint under each field number 1 to 7.

    Raises:
        InvalidArgumentError: the bytes are no protobuf.
    """
    spans = np.empty((64, 2), np.int64)
    numbers = np.zeros(8, np.int64)
    found = find_messages(data, start, end, field, spans, numbers)
    if found > len(spans):
        spans = np.empty((found, 2), np.int64)
        found = find_messages(data, start, end, field, spans, numbers)
    if found < 0:
        raise InvalidArgumentError(
            "the request's bytes are no protobuf message: generate the client from protos/topk/v1"
        )
    return spans[:found], numbers


def decode_batch(
    data: bytes | memoryview,
    spans: Sequence[Sequence[int]] | NDArray[np.int64],
    song_bytes_max: int,
    charts_max: int,
    chart_bytes_max: int,
    plays_max: int,
) -> PlayColumns:
    """Reads a PlayBatch or ShardBatch into columns and checks each play.

    Args:
        data: the bytes of a request.
        spans: start and end of the batch in them; several are merged, as protobuf does.
        song_bytes_max, charts_max, chart_bytes_max: the limits of a play.
        plays_max: the most plays taken.

    Raises:
        InvalidArgumentError: the bytes are no protobuf, or there are more plays than `plays_max`.
    """
    head = np.zeros(5, np.int64)
    for start, end in spans:
        if not scan_batch(data, start, end, head):
            raise InvalidArgumentError(
                "the batch's bytes are no protobuf message: generate the client from protos/topk/v1"
            )
    plays = int(head[0])
    if plays > plays_max:
        raise InvalidArgumentError(f"the batch has {plays} plays, at most {plays_max} are taken: send it in several")
    charts_room = min(plays * charts_max, len(data) // 3) + 1  # a chart takes three bytes at least
    columns = PlayColumns(
        plays, int(head[1]), int(head[2]), int(head[3]) & 0xFFFFFFFFFFFFFFFF, int(head[4]),
        np.empty(plays, np.int64), np.empty(plays, np.int32), np.empty(plays, np.int64), np.empty(plays, np.int64),
        np.empty(plays, np.uint32), np.zeros(plays + 1, np.int32), np.empty(charts_room, np.int64),
        np.empty(charts_room, np.int32), np.empty(plays, np.uint8),
    )  # fmt: skip
    row = 0
    for start, end in spans:
        row = read_plays(
            data, start, end, row, columns.song_starts, columns.song_sizes, columns.times_ms, columns.counts,
            columns.indexes, columns.chart_bounds, columns.chart_starts, columns.chart_sizes, columns.reasons,
            song_bytes_max, charts_max, chart_bytes_max,
        )  # fmt: skip
        if row < 0:
            raise InvalidArgumentError(
                f"the play at byte {-1 - row} of the request is no protobuf message: "
                "generate the client from protos/topk/v1"
            )
    return columns
