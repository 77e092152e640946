"""Targets: the bytes of play batches, in every message that carries them, read, split and written.

The oracle is protobuf's own reader, with strings taken as bytes (tests/kernels/wire_bytes.py): what it takes the kernel
takes, with the same values; what it refuses the kernel refuses. What is wrong with a play as such is found naively.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any, Final

import numpy as np
from google.protobuf.message import DecodeError

from tests.fuzz.harness import Choices, Target, refusing
from tests.kernels import wire_bytes as wb
from topk_grpc.config import GatewaySettings
from topk_grpc.engine.admission import read_request
from topk_grpc.errors import InvalidArgumentError
from topk_grpc.gateway.recorder import Recorder
from topk_grpc.kernels import encode, split, wire
from topk_grpc.kernels.hash import hash_strings
from topk_grpc.pb.topk.v1 import play_pb2, shard_service_pb2, topk_service_pb2

TIME = 1_700_000_000_000
COUNT_MAX = 1 << 55
MASK64 = (1 << 64) - 1
SONG_MAX, CHARTS_MAX, CHART_MAX, PLAYS_MAX = 12, 3, 6, 6
"""Limits that short inputs reach."""


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _reasons(play: Any, count: int) -> set[str]:
    """All that is wrong with a play."""
    names = set(play.charts)
    time = play.played_at_ms
    wrong = set()
    if not play.song_id:
        wrong.add("EMPTY_SONG_ID")
    if len(play.song_id) > SONG_MAX:
        wrong.add("SONG_ID_TOO_LONG")
    if not _is_utf8(play.song_id) or not all(map(_is_utf8, names)):
        wrong.add("INVALID_UTF8")
    if time == 0:
        wrong.add("MISSING_TIME")
    if abs(time) > 1 << 60:
        wrong.add("TIME_OUT_OF_RANGE")
    if 946_684_800 <= time < 4_102_444_800:
        wrong.add("SECONDS_NOT_MILLISECONDS")
    if count == 0:
        wrong.add("ZERO_COUNT")
    if abs(count) > COUNT_MAX:
        wrong.add("COUNT_TOO_LARGE")
    if len({name for name in names if 0 < len(name) <= CHART_MAX and _is_utf8(name)}) > CHARTS_MAX:
        wrong.add("TOO_MANY_CHARTS")
    if b"" in names:
        wrong.add("EMPTY_CHART")
    if any(len(name) > CHART_MAX for name in names):
        wrong.add("CHART_TOO_LONG")
    return wrong


def _check_columns(data: bytes, columns: wire.PlayColumns, batch: Any, *, indexed: bool) -> None:
    start = columns.producer_start
    assert data[start : start + columns.producer_size] == batch.producer_id
    assert (columns.sequence, columns.first_sent_ms) == (batch.sequence, batch.first_sent_ms)
    plays = batch.plays
    assert columns.count == len(plays)
    starts, sizes = columns.song_starts.tolist(), columns.song_sizes.tolist()
    times, counts, reasons = columns.times_ms.tolist(), columns.counts.tolist(), columns.reasons.tolist()
    indexes, bounds = columns.indexes.tolist(), columns.chart_bounds.tolist()
    chart_starts, chart_sizes = columns.chart_starts.tolist(), columns.chart_sizes.tolist()
    for row, play in enumerate(plays):
        assert data[starts[row] : starts[row] + sizes[row]] == play.song_id
        assert times[row] == play.played_at_ms
        count = play.count if play.HasField("count") else 1
        assert counts[row] == count
        assert not indexed or indexes[row] == play.index
        wrong = _reasons(play, count)
        assert wire.REASONS[reasons[row]] in (wrong or {""})
        charts = [data[chart_starts[i] : chart_starts[i] + chart_sizes[i]] for i in range(bounds[row], bounds[row + 1])]
        assert charts == ([] if wrong else list(dict.fromkeys(play.charts)))


def _decode(data: bytes, spans: Any) -> wire.PlayColumns:
    return wire.decode_batch(data, spans, SONG_MAX, CHARTS_MAX, CHART_MAX, PLAYS_MAX)


def _parse(message: Any, data: bytes) -> Any:
    """What protobuf reads; None where it refuses, or overlooks a field number 0 (see tests/kernels/test_wire.py)."""
    try:
        parsed = message.FromString(data)
    except DecodeError:
        return None
    return None if _MAYBE_ZERO.search(data) and wb.has_number_zero(parsed) else parsed


_MAYBE_ZERO: Final = re.compile(
    rb"[%s].*[\x00-\x07\x80-\x87]" % b"".join(b"\\x%02x" % byte for byte in range(256) if byte & 7 == 3), re.DOTALL
)
"""Such a field lies in a group: behind a byte that begins one. Looking for it costs more than all the rest."""


def request(data: bytes) -> None:
    """A client's StreamPlaysRequest or RecordPlaysRequest, which have the same bytes."""
    expected = _parse(wb.LooseRequest, data)
    try:
        columns = _decode(data, wire.message_spans(data, 0, len(data), 1)[0])
    except InvalidArgumentError:
        assert expected is None or len(expected.batch.plays) > PLAYS_MAX
        columns = None
    if columns is not None:
        assert expected is not None
        _check_columns(data, columns, expected.batch, indexed=False)


def gateway(data: bytes) -> None:
    """A client's batch as the gateway takes it in: the producer's id, too, is checked before it goes to the shards."""
    with refusing(InvalidArgumentError):
        _, batch = _GATEWAY._read(data)
        header = play_pb2.PlayBatch.FromString(batch.header)
        assert header.producer_id
        assert header.sequence == batch.sequence > 0
        assert _parse(wb.LooseRequest, data) is not None


_GATEWAY = Recorder.__new__(Recorder)
_GATEWAY._settings = GatewaySettings(topology="file:/nowhere")


def append(data: bytes) -> None:
    """A gateway's AppendRequest."""
    expected = _parse(wb.LooseAppend, data)
    try:
        spans, numbers = wire.message_spans(data, 0, len(data), 3)
        columns = [_decode(data, [span]) for span in spans.tolist()]
    except InvalidArgumentError:
        assert expected is None or any(len(batch.plays) > PLAYS_MAX for batch in expected.batches)
    else:
        assert expected is not None
        assert [int(number) & MASK64 for number in numbers[1:3]] == [expected.request_id, expected.epoch]
        assert len(columns) == len(expected.batches)
        for one, batch in zip(columns, expected.batches, strict=True):
            _check_columns(data, one, batch, indexed=True)
    try:
        read = read_request(data)
    except InvalidArgumentError:
        return
    assert expected is not None
    assert [part.columns.count for part in read.parts] == [len(batch.plays) for batch in expected.batches]


def split_batches(data: bytes) -> None:
    """A batch split by shard: every valid play once, equal ones combined."""
    head, data = data[:3].ljust(3, b"\0"), data[3:]
    shards, slots = 1 + head[0] % 3, (1, 3, 8)[head[1] % 3]
    resolution = (1, 7, 1000, 3_600_000)[head[2] % 4]
    owners = [(slot * 7 + head[0]) % (shards + 1) - 1 for slot in range(slots)]
    expected = _parse(wb.LooseRequest, data)
    if expected is None or len(expected.batch.plays) > PLAYS_MAX:
        return
    columns = _decode(data, wire.message_spans(data, 0, len(data), 1)[0])
    hashes = hash_strings(data, columns.song_starts, columns.song_sizes)
    if head[0] & 128:
        hashes &= np.uint64(slots - 1)  # many collide
    where = [owners[int(one) % slots] for one in hashes]
    valid = [
        reason == 0 and owner >= 0 for reason, owner in zip(columns.reasons.tolist(), where, strict=True)
    ]  # fmt: skip
    made = split.split_batch(data, columns, hashes, hashes, np.array(owners, np.int32), shards, resolution)
    stands_for = made.stands_for.tolist()
    assert [one >= 0 for one in stands_for] == valid
    assert made.plays == sum(valid)
    plays = expected.batch.plays
    members = defaultdict(list)
    for index, first in enumerate(stands_for):
        if first >= 0:
            members[first].append(index)
    for shard, part in enumerate(made.parts):
        sent = shard_service_pb2.ShardBatch.FromString(bytes(part)).plays
        firsts = [first for first in members if where[first] == shard]
        assert [one.index for one in sent] == sorted(firsts)
        for one in sent:
            combined = [plays[index] for index in members[one.index]]
            counts = [play.count if play.HasField("count") else 1 for play in combined]
            charts = list(dict.fromkeys(name.decode() for name in combined[0].charts))
            assert len(combined) == 1 or min(counts) > 0
            assert len({play.song_id for play in combined}) == 1
            assert len({play.played_at_ms // resolution for play in combined}) == 1
            assert all(list(dict.fromkeys(name.decode() for name in play.charts)) == charts for play in combined)
            assert one.song_id == combined[0].song_id.decode()
            assert list(one.charts) == charts
            assert one.played_at_ms == max(play.played_at_ms for play in combined)
            assert (one.count if one.HasField("count") else 1) == sum(counts) <= COUNT_MAX


def round_trip(data: bytes) -> None:
    """A batch written by the client's encoder: the bytes that protobuf writes, and read back as it was."""
    choices = Choices(data)
    sequence, first_sent_ms = choices.number() & MASK64, choices.int64()
    producer = choices.text()
    rows = choices.below(6)
    songs = [choices.text() for _ in range(rows)]
    times = [choices.int64() for _ in range(rows)]
    counts = [choices.int64() for _ in range(rows)] if choices.below(2) else None
    charts = [[choices.text() for _ in range(choices.below(4))] for _ in range(rows)] if choices.below(2) else None
    written = encode.encode_batch(producer.encode(), sequence, first_sent_ms, songs, times, counts, charts)
    message = topk_service_pb2.StreamPlaysRequest()
    message.batch.producer_id, message.batch.sequence = producer, sequence
    message.batch.first_sent_ms = first_sent_ms
    for row in range(rows):
        play = message.batch.plays.add(song_id=songs[row], played_at_ms=times[row])
        play.charts.extend(charts[row] if charts else ())
        if counts and counts[row] != 1:
            play.count = counts[row]
    assert written == message.SerializeToString(deterministic=True)
    request(written)


# --- Seeds ------------------------------------------------------------------------------------------------------------

_PLAYS = (
    wb.play(wb.bytes_field(1, b"song"), wb.number_field(2, TIME)),
    wb.play(wb.bytes_field(1, b"song"), wb.number_field(2, TIME + 5), wb.number_field(3, 9), wb.bytes_field(4, b"de")),
    wb.play(
        *(wb.bytes_field(1, "é".encode()), wb.number_field(2, TIME), wb.number_field(3, -2)),
        *(wb.bytes_field(4, b"de"), wb.bytes_field(4, b"fr"), wb.bytes_field(4, b"de"), wb.number_field(5, 7)),
    ),
    wb.play(wb.group(7, wb.number_field(8, 200)), wb.tag(11, wb.FIXED64) + b"12345678", wb.bytes_field(1, b"\xff")),
)
_HEADER = (wb.bytes_field(1, b"p"), wb.number_field(2, 1 << 40), wb.number_field(3, TIME))


def request_seeds() -> list[bytes]:
    return [
        wb.request(*_HEADER, *_PLAYS),
        wb.request(*_HEADER, *_PLAYS[:2]) + wb.request(wb.number_field(2, 7), _PLAYS[2]),
        wb.number_field(9, 300) + wb.request(*_PLAYS[:1]) + wb.group(3, wb.bytes_field(4, b"x") + wb.group(4)),
        wb.request(wb.nested_groups(30)),
        wb.request(*_HEADER, *(_PLAYS[0] for _ in range(PLAYS_MAX + 1))),
    ]


def append_seeds() -> list[bytes]:
    numbers = wb.number_field(1, 3) + wb.number_field(2, 1 << 50)
    part = wb.bytes_field(3, b"".join((*_HEADER, *_PLAYS[:3])))
    return [numbers + part, numbers + part + wb.bytes_field(3, b"".join((*_HEADER, _PLAYS[1]))), part + numbers]


def _split_seeds() -> list[bytes]:
    return [bytes([kind, kind, kind]) + seed for kind, seed in enumerate(request_seeds())]


def _round_trip_seeds() -> list[bytes]:
    return [bytes(range(40)), bytes([1, 9, 5, 20, 2, 65, 66, 5, 3, 97, 98, 99] * 6), bytes(200)]


TARGETS = (
    Target("request", request, request_seeds, 5500, 200),
    Target("append", append, append_seeds, 1500, 250),
    Target("gateway", gateway, request_seeds, 750, 200),
    Target("split", split_batches, _split_seeds, 200, 200),
    Target("round_trip", round_trip, _round_trip_seeds, 50, 120),
)
