"""Reading batches: the kernel against protobuf's own reader, and each reason for rejecting a play.

Where they differ, and are meant to:

- Protobuf refuses a whole request in which any string is not UTF-8. The kernel rejects the play whose song_id or chart
  that is (INVALID_UTF8) and reads the rest; of a producer_id it only says where it lies, and whoever turns it into text
  checks it. So the reader held against the kernel takes strings as bytes, see wire_bytes.py.
- Number 0 is no field number. Protobuf for Python overlooks it within a group that it skips; the kernel refuses it
  everywhere.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels import wire_bytes as wb
from tests.kernels.forms import Kernels, examples
from topk_grpc.errors import InvalidArgumentError
from topk_grpc.pb.topk.v1 import topk_service_pb2

TIME = 1_700_000_000_000
SONG = wb.bytes_field(1, b"song")
AT = wb.number_field(2, TIME)
MASK64 = (1 << 64) - 1


def decode(kernels: Kernels, data: bytes | memoryview, plays_max: int = 65_536) -> Any:
    spans, _ = kernels.wire.message_spans(data, 0, len(data), 1)
    return kernels.wire.decode_batch(data, spans, 128, 8, 64, plays_max)


def reason(kernels: Kernels, *fields: bytes) -> str:
    """Why the play with these fields is rejected; "" if it is not."""
    columns = decode(kernels, wb.request(wb.play(*fields)))
    assert columns.count == 1
    return str(kernels.wire.REASONS[columns.reasons[0]])


def is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def charts_of(columns: Any, data: bytes, row: int) -> list[bytes]:
    span = range(columns.chart_bounds[row], columns.chart_bounds[row + 1])
    return [data[columns.chart_starts[i] : columns.chart_starts[i] + columns.chart_sizes[i]] for i in span]


def naive_reasons(play: Any) -> set[str]:
    """All that is wrong with a play."""
    count = play.count if play.HasField("count") else 1
    names = set(play.charts)
    good = {name for name in names if 0 < len(name) <= 64 and is_utf8(name)}
    wrong = {
        "EMPTY_SONG_ID": not play.song_id,
        "SONG_ID_TOO_LONG": len(play.song_id) > 128,
        "INVALID_UTF8": not is_utf8(play.song_id) or not all(map(is_utf8, names)),
        "MISSING_TIME": play.played_at_ms == 0,
        "TIME_OUT_OF_RANGE": abs(play.played_at_ms) > 1 << 60,
        # 2000 to 2100 in seconds is January and February 1970 in milliseconds.
        "SECONDS_NOT_MILLISECONDS": 946_684_800 <= play.played_at_ms < 4_102_444_800,
        "ZERO_COUNT": count == 0,
        "COUNT_TOO_LARGE": abs(count) > 1 << 55,
        "TOO_MANY_CHARTS": len(good) > 8,
        "EMPTY_CHART": b"" in names,
        "CHART_TOO_LONG": any(len(name) > 64 for name in names),
    }
    return {name for name, is_so in wrong.items() if is_so}


def check_batch(kernels: Kernels, data: bytes, columns: Any, batch: Any) -> None:
    """That the columns say what protobuf's message says."""
    start, size = columns.producer_start, columns.producer_size
    assert data[start : start + size] == batch.producer_id
    assert (columns.sequence, columns.first_sent_ms) == (batch.sequence, batch.first_sent_ms)
    assert columns.count == len(batch.plays)
    assert columns.charts_used == columns.chart_bounds[columns.count]
    for row, play in enumerate(batch.plays):
        start, size = columns.song_starts[row], columns.song_sizes[row]
        assert data[start : start + size] == play.song_id
        assert columns.times_ms[row] == play.played_at_ms
        assert columns.counts[row] == (play.count if play.HasField("count") else 1)
        if play.DESCRIPTOR.name == "ShardPlay":
            assert columns.indexes[row] == play.index
        wrong = naive_reasons(play)
        named = kernels.wire.REASONS[columns.reasons[row]]
        assert named in (wrong or {""})
        assert charts_of(columns, data, row) == ([] if wrong else list(dict.fromkeys(play.charts)))


def check(kernels: Kernels, data: bytes) -> bool:
    """That kernel and protobuf agree about a client's request; says whether they take it."""
    try:
        request = wb.LooseRequest.FromString(data)
    except DecodeError:
        request = None
    if request is None or wb.has_number_zero(request):
        with pytest.raises(InvalidArgumentError):
            decode(kernels, data)
        return False
    check_batch(kernels, data, decode(kernels, data), request.batch)
    return True


def check_append(kernels: Kernels, data: bytes) -> None:
    """The same for a gateway's request, whose batches are read one by one."""
    try:
        request = wb.LooseAppend.FromString(data)
    except DecodeError:
        request = None
    if request is None or wb.has_number_zero(request):
        with pytest.raises(InvalidArgumentError):
            for span in kernels.wire.message_spans(data, 0, len(data), 3)[0]:
                kernels.wire.decode_batch(data, [span], 128, 8, 64, 65_536)
        return
    spans, numbers = kernels.wire.message_spans(data, 0, len(data), 3)
    assert [int(number) & MASK64 for number in numbers[1:3]] == [request.request_id, request.epoch]
    assert len(spans) == len(request.batches)
    for span, batch in zip(spans, request.batches, strict=True):
        check_batch(kernels, data, kernels.wire.decode_batch(data, [span], 128, 8, 64, 65_536), batch)


# --- Against protobuf -------------------------------------------------------------------------------------------------


@examples(400)
@given(data=wb.requests)
def test_whatever_a_writer_may_write_is_read_as_protobuf_reads_it(kernels: Kernels, data: bytes) -> None:
    assert check(kernels, data)


@examples(200)
@given(data=wb.append_requests)
def test_gateways_request_is_read_as_protobuf_reads_it(kernels: Kernels, data: bytes) -> None:
    check_append(kernels, data)


@examples(500)
@given(data=wb.damaged(wb.requests))
def test_damaged_request_is_taken_or_refused_as_protobuf_does(kernels: Kernels, data: bytes) -> None:
    check(kernels, data)


@examples(200)
@given(data=wb.damaged(wb.append_requests))
def test_damaged_gateways_request_is_taken_or_refused_as_protobuf_does(kernels: Kernels, data: bytes) -> None:
    check_append(kernels, data)


@examples(300)
@given(data=st.binary(max_size=40), inside=st.integers(0, 2))
def test_garbage_is_taken_or_refused_as_protobuf_does(kernels: Kernels, data: bytes, inside: int) -> None:
    check(kernels, (data, wb.request(data), wb.request(wb.play(data)))[inside])


RICH = (
    wb.number_field(9, 300)
    + wb.request(
        wb.bytes_field(1, b"producer"),
        wb.number_field(2, 1 << 40),
        wb.play(SONG, AT, wb.number_field(3, 1000), wb.bytes_field(4, b"de"), wb.group(7, wb.number_field(8, 200))),
        wb.number_field(3, TIME),
        wb.tag(12, wb.FIXED32) + b"1234",
        wb.play(SONG, wb.tag(11, wb.FIXED64) + b"12345678", AT, wb.bytes_field(20, b"more"), wb.bytes_field(4, b"fr")),
    )
    + wb.request(wb.number_field(2, 7), wb.play(SONG, AT))
    + wb.group(3, wb.bytes_field(4, b"in a group") + wb.group(4))
)


def test_request_cut_at_every_byte(kernels: Kernels) -> None:
    taken = {size for size in range(len(RICH) + 1) if check(kernels, RICH[:size])}
    assert {0, len(RICH)} <= taken
    assert len(taken) < 10


def test_request_with_every_byte_changed(kernels: Kernels) -> None:
    for at in range(len(RICH)):
        for change in (0x01, 0x04, 0x08, 0x80, 0xFF):
            check(kernels, RICH[:at] + bytes([RICH[at] ^ change]) + RICH[at + 1 :])


@pytest.mark.parametrize("kind", range(8))
@pytest.mark.parametrize("number", [0, 1, 2, 3, 4, 5, 6, 15, 16, (1 << 29) - 1, 1 << 29, 1 << 32])
def test_every_field_number_under_every_wire_type(kernels: Kernels, number: int, kind: int) -> None:
    for content in (b"", b"\x01", b"\x01\x02", b"\x0b\x0c", b"12345678", b"\x02ab", wb.tag(number, wb.GROUP_END)):
        field = wb.tag(number, kind) + content
        for data in (field, wb.request(field), wb.request(wb.play(field)), wb.request(wb.play(SONG, AT, field))):
            check(kernels, data)


@pytest.mark.parametrize("size", range(1, 12))
def test_varints_longer_than_they_need_be(kernels: Kernels, size: int) -> None:
    padded = [
        *(wb.tag(2, wb.VARINT, size) + b"\x05", wb.tag(1, wb.LENGTH, size) + b"\x01a"),
        *(wb.tag(2, wb.VARINT) + wb.varint(5, size), wb.tag(1, wb.LENGTH) + wb.varint(1, size) + b"a"),
        *(wb.tag(9, wb.VARINT) + wb.varint(5, size), wb.tag(9, wb.LENGTH) + wb.varint(1, size) + b"a"),
        wb.tag(9, wb.GROUP) + wb.tag(9, wb.GROUP_END, size),
    ]
    for field in padded:
        for data in (field, wb.request(field), wb.request(wb.play(field))):
            check(kernels, data)
    for data in (wb.tag(1, wb.LENGTH) + wb.varint(0, size), wb.request(wb.tag(4, wb.LENGTH) + wb.varint(0, size))):
        assert check(kernels, data) == (size <= 5)


@pytest.mark.parametrize("last", [0x00, 0x01, 0x02, 0x7E, 0x7F])
def test_bits_beyond_the_64th_are_dropped(kernels: Kernels, last: int) -> None:
    value = b"\xff" * 9 + bytes([last])
    assert check(kernels, wb.request(wb.tag(2, wb.VARINT) + value, wb.play(SONG, wb.tag(2, wb.VARINT) + value)))


@pytest.mark.parametrize("depth", [1, 2, 97, 98, 99, 100, 101, 102, 5000])
def test_groups_nest_as_deep_as_protobuf_lets_them(kernels: Kernels, depth: int) -> None:
    groups = wb.nested_groups(depth)
    assert check(kernels, groups) == (depth <= 100)
    assert check(kernels, wb.request(groups)) == (depth <= 99)
    assert check(kernels, wb.request(wb.play(groups))) == (depth <= 98)


def test_field_number_zero_is_refused_within_groups_too(kernels: Kernels) -> None:
    for field in (wb.number_field(0, 1), wb.bytes_field(0, b"a"), wb.group(0), wb.group(7, wb.number_field(0, 1))):
        data = wb.group(6, field)
        for nested in (data, wb.request(data), wb.request(wb.play(SONG, AT, data))):
            assert not check(kernels, nested)


def test_last_of_repeated_fields_wins(kernels: Kernels) -> None:
    fields = (
        wb.bytes_field(1, b"first"),
        SONG,
        wb.number_field(3, -1),
        wb.number_field(3, 7),
        wb.number_field(2, 1),
        AT,
    )
    data = wb.request(wb.number_field(2, 3), wb.bytes_field(1, b"p"), wb.play(*fields), wb.number_field(2, 4))
    columns = decode(kernels, data)
    assert (columns.sequence, columns.counts[0], columns.times_ms[0], columns.reasons[0]) == (4, 7, TIME, 0)
    assert check(kernels, data)


def test_batch_in_pieces_is_merged(kernels: Kernels) -> None:
    data = (
        wb.request(wb.bytes_field(1, b"p"), wb.number_field(2, 3), wb.play(SONG, AT))
        + wb.number_field(5, 1)
        + wb.request(wb.number_field(3, 9), wb.play(SONG, AT, wb.bytes_field(4, b"de")), wb.play())
    )
    columns = decode(kernels, data)
    assert (columns.count, columns.sequence, columns.first_sent_ms) == (3, 3, 9)
    assert data[columns.producer_start : columns.producer_start + columns.producer_size] == b"p"
    assert check(kernels, data)


def test_sequence_and_index_take_all_their_bits(kernels: Kernels) -> None:
    data = wb.request(wb.number_field(2, MASK64), wb.play(SONG, AT, wb.number_field(5, (1 << 35) - 1)))
    columns = decode(kernels, data)
    assert (columns.sequence, columns.indexes[0]) == (MASK64, (1 << 32) - 1)


def test_more_batches_than_there_was_room_for(kernels: Kernels) -> None:
    data = wb.number_field(1, 5) + b"".join(wb.bytes_field(3, wb.play(SONG, AT) * i) for i in range(150))
    check_append(kernels, data)
    assert len(kernels.wire.message_spans(data, 0, len(data), 3)[0]) == 150


def test_nothing_at_all(kernels: Kernels) -> None:
    assert decode(kernels, b"").count == 0
    assert decode(kernels, wb.request()).count == 0
    assert decode(kernels, memoryview(wb.request())).count == 0


def test_message_within_other_bytes(kernels: Kernels) -> None:
    inner = wb.request(wb.play(SONG, AT), wb.play(SONG, AT))
    data = b"\xff\xff" + inner + b"\xff\xff"
    spans, _ = kernels.wire.message_spans(data, 2, 2 + len(inner), 1)
    columns = kernels.wire.decode_batch(data, spans, 128, 8, 64, 10)
    assert [data[start : start + 4] for start in columns.song_starts] == [b"song", b"song"]


def test_plays_max(kernels: Kernels) -> None:
    data = wb.request(wb.play(SONG, AT), wb.play()) + wb.request(wb.play(SONG, AT))
    assert decode(kernels, data, plays_max=3).count == 3
    with pytest.raises(InvalidArgumentError, match="3 plays, at most 2 are taken: send it in several"):
        decode(kernels, data, plays_max=2)


def test_refusal_says_what_to_do(kernels: Kernels) -> None:
    for data in (b"\x0a", wb.request(b"\x22"), wb.request(wb.play(SONG, AT), wb.play(b"\x0a"))):
        with pytest.raises(InvalidArgumentError, match="generate the client from protos/topk/v1"):
            decode(kernels, data)
    with pytest.raises(InvalidArgumentError, match="the play at byte 3 of the request"):
        decode(kernels, b"\x0a\x03\x22\x01\x0a")


# --- Reasons ----------------------------------------------------------------------------------------------------------


def test_valid_play(kernels: Kernels) -> None:
    assert reason(kernels, SONG, AT) == ""


@pytest.mark.parametrize(
    ("song", "expected"),
    [
        (b"", "EMPTY_SONG_ID"),
        (b"a", ""),
        (b"a" * 128, ""),
        (b"a" * 129, "SONG_ID_TOO_LONG"),
        ("é".encode() * 64, ""),
        ("é".encode() * 64 + b"a", "SONG_ID_TOO_LONG"),
        (b"a" * 100_000, "SONG_ID_TOO_LONG"),
        (b"\x00", ""),
        (b"\xff", "INVALID_UTF8"),
        ("𝄞".encode()[:3], "INVALID_UTF8"),
    ],
)
def test_song_id(kernels: Kernels, song: bytes, expected: str) -> None:
    assert reason(kernels, wb.bytes_field(1, song), AT) == expected


def test_absent_song_id(kernels: Kernels) -> None:
    assert reason(kernels, AT) == "EMPTY_SONG_ID"
    assert reason(kernels) == "EMPTY_SONG_ID"


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        (0, "MISSING_TIME"),
        (1, ""),
        (-1, ""),
        (946_684_799, ""),
        (946_684_800, "SECONDS_NOT_MILLISECONDS"),
        (1_700_000_000, "SECONDS_NOT_MILLISECONDS"),
        (4_102_444_799, "SECONDS_NOT_MILLISECONDS"),
        (4_102_444_800, ""),
        (-(1 << 60), ""),
        (1 << 60, ""),
        (-(1 << 60) - 1, "TIME_OUT_OF_RANGE"),
        ((1 << 60) + 1, "TIME_OUT_OF_RANGE"),
        (wb.INT64_MIN, "TIME_OUT_OF_RANGE"),
        (wb.INT64_MAX, "TIME_OUT_OF_RANGE"),
    ],
)
def test_time(kernels: Kernels, time: int, expected: str) -> None:
    assert reason(kernels, SONG, wb.number_field(2, time)) == expected


def test_absent_time(kernels: Kernels) -> None:
    assert reason(kernels, SONG) == "MISSING_TIME"


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, ""),
        (0, "ZERO_COUNT"),
        (-1, ""),
        (-(2**55), ""),
        (-(2**55) - 1, "COUNT_TOO_LARGE"),
        (wb.INT64_MIN, "COUNT_TOO_LARGE"),
        (2**55, ""),
        (2**55 + 1, "COUNT_TOO_LARGE"),
        (wb.INT64_MAX, "COUNT_TOO_LARGE"),
    ],
)
def test_count(kernels: Kernels, count: int, expected: str) -> None:
    assert reason(kernels, SONG, AT, wb.number_field(3, count)) == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([b"c%d" % i for i in range(8)], ""),
        ([b"c%d" % i for i in range(9)], "TOO_MANY_CHARTS"),
        ([b"c%d" % i for i in range(8)] + [b"c0", b"c7"], ""),
        ([b"c%d" % i for i in range(8)] + [b"c"], "TOO_MANY_CHARTS"),
        ([b""], "EMPTY_CHART"),
        ([b"de", b""], "EMPTY_CHART"),
        ([b"", b"de"], "EMPTY_CHART"),
        ([b"c" * 64], ""),
        ([b"c" * 65], "CHART_TOO_LONG"),
        (["é".encode() * 32], ""),
        (["é".encode() * 32 + b"c"], "CHART_TOO_LONG"),
        ([b"de", b"\xc3"], "INVALID_UTF8"),
    ],
)
def test_charts(kernels: Kernels, names: list[bytes], expected: str) -> None:
    assert reason(kernels, SONG, AT, *(wb.bytes_field(4, name) for name in names)) == expected


def test_chart_named_twice_counts_once(kernels: Kernels) -> None:
    names = (b"de", b"rock", b"de", b"d", b"rock")
    data = wb.request(wb.play(SONG, AT, *(wb.bytes_field(4, name) for name in names)))
    columns = decode(kernels, data)
    assert charts_of(columns, data, 0) == [b"de", b"rock", b"d"]


def test_rejected_play_leaves_the_others_alone(kernels: Kernels) -> None:
    de = wb.bytes_field(4, b"de")
    data = wb.request(
        wb.play(SONG, AT, de), wb.play(SONG, de, de), wb.play(), wb.play(SONG, AT, wb.bytes_field(4, b"fr"))
    )
    columns = decode(kernels, data)
    assert [kernels.wire.REASONS[one] for one in columns.reasons] == ["", "MISSING_TIME", "EMPTY_SONG_ID", ""]
    assert [charts_of(columns, data, row) for row in range(4)] == [[b"de"], [], [], [b"fr"]]


def test_limits_are_those_given(kernels: Kernels) -> None:
    data = wb.request(wb.play(SONG, AT, wb.bytes_field(4, b"de"), wb.bytes_field(4, b"f")))
    spans, _ = kernels.wire.message_spans(data, 0, len(data), 1)
    named = [
        kernels.wire.REASONS[kernels.wire.decode_batch(data, spans, *limits, 1).reasons[0]]
        for limits in ((4, 2, 2), (3, 2, 2), (4, 1, 2), (4, 2, 1), (4, 0, 2))
    ]
    assert named == ["", "SONG_ID_TOO_LONG", "TOO_MANY_CHARTS", "CHART_TOO_LONG", "TOO_MANY_CHARTS"]


# --- UTF-8 ------------------------------------------------------------------------------------------------------------

EDGES = bytes.fromhex("00 7f 80 8f 90 9f a0 bf c0 c1 c2 df e0 e1 ec ed ee ef f0 f1 f3 f4 f5 ff")


def test_utf8_is_told_from_what_is_not(kernels: Kernels) -> None:
    ids = [bytes([first]) for first in range(256)]
    ids += [bytes(pair) for pair in itertools.product(EDGES, repeat=2)]
    ids += [bytes(three) for three in itertools.product(EDGES[8:], bytes.fromhex("7f 80 9f a0 bf c0"), EDGES[1:9])]
    ids += [bytes(four) for four in itertools.product(EDGES[-6:], *[bytes.fromhex("7f 80 8f 90 bf c0")] * 3)]
    data = wb.request(*(wb.play(wb.bytes_field(1, one), AT) for one in ids))
    reasons = [kernels.wire.REASONS[one] for one in decode(kernels, data).reasons]
    assert reasons == ["" if is_utf8(one) else "INVALID_UTF8" for one in ids]


@pytest.mark.parametrize("field", [wb.bytes_field(1, b"bad \xff"), SONG + wb.bytes_field(4, b"bad \xff")])
def test_protobuf_refuses_the_request_where_the_kernel_rejects_the_play(kernels: Kernels, field: bytes) -> None:
    data = wb.request(wb.play(SONG, AT), wb.play(field, AT))
    with pytest.raises(DecodeError):
        topk_service_pb2.StreamPlaysRequest.FromString(data)
    columns = decode(kernels, data)
    assert [kernels.wire.REASONS[one] for one in columns.reasons] == ["", "INVALID_UTF8"]


def test_producer_id_is_left_to_others(kernels: Kernels) -> None:
    data = wb.request(wb.bytes_field(1, b"\xff"), wb.play(SONG, AT))
    with pytest.raises(DecodeError):
        topk_service_pb2.StreamPlaysRequest.FromString(data)
    columns = decode(kernels, data)
    assert (data[columns.producer_start], columns.producer_size, columns.reasons[0]) == (0xFF, 1, 0)


def test_columns_have_the_types_that_other_kernels_take(kernels: Kernels) -> None:
    columns = decode(kernels, wb.request(wb.play(SONG, AT)))
    types = {
        "song_starts": np.int64, "song_sizes": np.int32, "times_ms": np.int64, "counts": np.int64, "indexes": np.uint32,
        "chart_bounds": np.int32, "chart_starts": np.int64, "chart_sizes": np.int32, "reasons": np.uint8,
    }  # fmt: skip
    for name, dtype in types.items():
        assert getattr(columns, name).dtype == dtype, name
