"""Writing batches: what protobuf reads from the bytes is what went in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.forms import Kernels, examples
from tests.kernels.wire_bytes import INT64_MAX, INT64_MIN
from topk_grpc.pb.topk.v1 import play_pb2, topk_service_pb2

texts = st.one_of(st.text(max_size=20), st.sampled_from(["", "a" * 127, "b" * 128, "é" * 64, "c" * 20_000]))
int64s = st.one_of(
    st.integers(INT64_MIN, INT64_MAX), st.sampled_from([0, 1, -1, 127, 128, INT64_MIN, INT64_MAX, 1_700_000_000_000])
)
heads = st.tuples(st.text(max_size=10), st.one_of(st.integers(0, 300), st.just((1 << 64) - 1)), int64s)
chart_lists = st.lists(st.sampled_from(["de", "fr", "é", "", "c" * 200]), max_size=3)
plays = st.lists(st.tuples(texts, int64s, int64s, chart_lists), max_size=12)
Head = tuple[str, int, int]
Plays = list[tuple[str, int, int, list[str]]]


def message(head: Head, plays: list[play_pb2.Play]) -> topk_service_pb2.StreamPlaysRequest:
    producer_id, sequence, first_sent_ms = head
    return topk_service_pb2.StreamPlaysRequest(
        batch=play_pb2.PlayBatch(producer_id=producer_id, sequence=sequence, first_sent_ms=first_sent_ms, plays=plays)
    )


def proto_play(song: str, time: int, count: int, charts: list[str]) -> play_pb2.Play:
    """A count of 1 is what an absent one means, so it is not written."""
    return play_pb2.Play(song_id=song, played_at_ms=time, count=None if count == 1 else count, charts=charts)


def columns_of(texts: list[str], before: bytes = b"") -> tuple[bytes, Any]:
    """Strings as Arrow keeps them, perhaps a slice of a longer column."""
    encoded = [text.encode() for text in texts]
    offsets = np.cumsum([len(before), *(len(one) for one in encoded)], dtype=np.int64)
    return before + b"".join(encoded), offsets


@examples(150)
@given(head=heads, plays=plays, with_counts=st.booleans(), with_charts=st.booleans())
def test_lists(kernels: Kernels, head: Head, plays: Plays, with_counts: bool, with_charts: bool) -> None:
    songs, times, counts, charts = (list(column) for column in zip(*plays, strict=True)) if plays else ([], [], [], [])
    data = kernels.encode.encode_batch(
        head[0].encode(), *head[1:], songs, times, counts if with_counts else None, charts if with_charts else None
    )
    expected = [
        proto_play(song, time, count if with_counts else 1, names if with_charts else [])
        for song, time, count, names in plays
    ]
    assert topk_service_pb2.StreamPlaysRequest.FromString(data) == message(head, expected)
    assert data == message(head, expected).SerializeToString()


@examples(150)
@given(head=heads, plays=plays, with_counts=st.booleans(), with_charts=st.booleans(), before=st.binary(max_size=3))
def test_columns(
    kernels: Kernels, head: Head, plays: Plays, with_counts: bool, with_charts: bool, before: bytes
) -> None:
    chart = [names[0] if names else "" for _, _, _, names in plays]  # at most one a play; an empty name is none
    song_data, song_offsets = columns_of([song for song, _, _, _ in plays], before)
    times = np.array([time for _, time, _, _ in plays], np.int64)
    counts = np.array([count for _, _, count, _ in plays], np.int64)
    chart_columns = columns_of(chart, before) if with_charts else (None, None)
    data = kernels.encode.encode_batch_columns(
        head[0].encode(), *head[1:], song_data, song_offsets, times, counts if with_counts else None, *chart_columns
    )
    expected = [
        proto_play(song, time, count if with_counts else 1, [name] if with_charts and name else [])
        for (song, time, count, _), name in zip(plays, chart, strict=True)
    ]
    assert topk_service_pb2.StreamPlaysRequest.FromString(data) == message(head, expected)
    assert data == message(head, expected).SerializeToString()


def test_columns_from_arrays_of_bytes(kernels: Kernels) -> None:
    song_data, song_offsets = columns_of(["one", "", "three"])
    chart_data, chart_offsets = columns_of(["", "de", "fr"])
    as_arrays = [np.frombuffer(data, np.uint8) for data in (song_data, chart_data)]
    times = np.array([1, -1, 0], np.int64)
    data = kernels.encode.encode_batch_columns(
        b"p", 1, 2, as_arrays[0], song_offsets, times, None, as_arrays[1], chart_offsets
    )
    lists = kernels.encode.encode_batch(b"p", 1, 2, ["one", "", "three"], [1, -1, 0], None, [[], ["de"], ["fr"]])
    assert data == lists


def test_room_is_enough_for_the_longest_numbers(kernels: Kernels) -> None:
    rows = 300
    song_data, song_offsets = columns_of(["a" * 128] * rows)
    chart_data, chart_offsets = columns_of(["b" * 128] * rows)
    least = np.full(rows, INT64_MIN, np.int64)
    data = kernels.encode.encode_batch_columns(
        b"p", 1, 2, song_data, song_offsets, least, least, chart_data, chart_offsets
    )
    batch = topk_service_pb2.StreamPlaysRequest.FromString(data).batch
    assert list(batch.plays) == [proto_play("a" * 128, INT64_MIN, INT64_MIN, ["b" * 128])] * rows


def test_no_plays(kernels: Kernels) -> None:
    empty = topk_service_pb2.StreamPlaysRequest(batch=play_pb2.PlayBatch()).SerializeToString()
    assert kernels.encode.encode_batch(b"", 0, 0, [], []) == empty
    nothing = np.zeros(1, np.int64)
    assert kernels.encode.encode_batch_columns(b"", 0, 0, b"", nothing, nothing[1:]) == empty


def test_what_is_written_is_read_back(kernels: Kernels) -> None:
    rows = kernels.sized(8192)
    songs = [f"song {i % 100}" for i in range(rows)]
    data = kernels.encode.encode_batch(b"producer", 7, 8, songs, range(1, rows + 1), None, [["de"]] * rows)
    spans, _ = kernels.wire.message_spans(data, 0, len(data), 1)
    columns = kernels.wire.decode_batch(data, spans, 128, 8, 64, rows)
    assert (columns.count, columns.sequence, columns.first_sent_ms, columns.charts_used) == (rows, 7, 8, rows)
    assert columns.times_ms.tolist() == list(range(1, rows + 1))
    assert not columns.reasons.any()


@pytest.mark.parametrize("value", [0, 1, 127, 128, 1 << 35, (1 << 63) - 1, -1, INT64_MIN, (1 << 64) - 1])
def test_varint(kernels: Kernels, value: int) -> None:
    assert b"\x10" + kernels.encode.varint(value) == (
        play_pb2.PlayBatch(sequence=value % (1 << 64)).SerializeToString() or b"\x10\x00"
    )
