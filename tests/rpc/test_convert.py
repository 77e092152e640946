"""Values to messages and back, over their bytes."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TypeVar

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from topk_grpc import model
from topk_grpc.errors import InvalidArgumentError, WindowError
from topk_grpc.pb.topk.v1 import play_pb2, query_pb2
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.rpc import convert

MessageT = TypeVar("MessageT", bound=Message)

times = st.integers(-(1 << 60), 1 << 60)
counts = st.integers(0, (1 << 63) - 1)
ids = st.text(min_size=1, max_size=8)
windows = st.one_of(
    st.builds(model.GlobalWindow), st.builds(model.TumblingWindow, st.integers(1, 1 << 53), st.integers(0, 1 << 60))
)
bounds = st.none() | st.builds(lambda start, size: model.Bounds(start, start + size), times, st.integers(0, 1 << 50))
entries = st.builds(model.Entry, counts, ids, counts)
some_entries = st.lists(entries, max_size=3).map(tuple)
certificates = st.builds(
    model.Certificate,
    st.booleans(),
    st.lists(ids, max_size=3).map(tuple),
    counts,
    times,
    st.sampled_from(model.Finality),
    counts,
    counts,
)
answers = st.builds(model.Answer, bounds, certificates, some_entries)
standings = st.builds(model.SongStanding, ids, counts, st.none() | counts, some_entries, some_entries)
songs_answers = st.builds(model.SongsAnswer, bounds, certificates, st.lists(standings, max_size=3).map(tuple))
rejected = st.builds(model.Rejected, st.integers(0, 1 << 31), ids, ids)


def reread(message: MessageT) -> MessageT:
    return type(message).FromString(message.SerializeToString())


@given(windows)
def test_windows(window: model.Window) -> None:
    assert convert.window_from_pb(reread(convert.window_to_pb(window))) == window


@pytest.mark.parametrize("message", [None, query_pb2.Window()])
def test_an_absent_window_is_refused(message: query_pb2.Window | None) -> None:
    with pytest.raises(InvalidArgumentError, match="window"):
        convert.window_from_pb(message)


@pytest.mark.parametrize("size_ms", [0, -1, -(1 << 63), 1 << 54])
def test_windows_of_no_size_are_refused(size_ms: int) -> None:
    with pytest.raises(WindowError):
        convert.window_from_pb(query_pb2.Window(tumbling=query_pb2.TumblingWindow(size_ms=size_ms)))


@given(st.none() | st.just("latest") | st.integers(-(1 << 63), (1 << 63) - 1))
def test_instants(as_of: model.AsOf) -> None:
    request = reread(pb.GetTopKRequest(as_of=convert.as_of_to_pb(as_of)))
    assert convert.as_of_from_pb(request) == as_of


def test_instants_that_people_write() -> None:
    expected = query_pb2.AsOf(time_ms=1_402_943_314_000)
    assert convert.as_of_to_pb("2014-06-16T18:28:34Z") == expected
    assert convert.as_of_to_pb(datetime(2014, 6, 16, 18, 28, 34, tzinfo=UTC)) == expected
    with pytest.raises(InvalidArgumentError):
        convert.as_of_to_pb("last tuesday")
    with pytest.raises(InvalidArgumentError):
        convert.as_of_to_pb(1 << 63)


def test_an_empty_instant_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="as_of"):
        convert.as_of_from_pb(pb.GetSongsRequest(as_of=query_pb2.AsOf()))


@given(st.builds(model.Play, ids, times, counts, st.lists(ids, max_size=3).map(tuple)))
def test_plays(play: model.Play) -> None:
    message = reread(convert.play_to_pb(play))
    assert convert.play_from_pb(message) == play
    assert message.HasField("count") is (play.count != 1)


@given(
    st.builds(model.BatchAck, counts, st.integers(0, 1 << 31), st.booleans(), st.lists(rejected, max_size=3).map(tuple))
)
def test_acknowledgements(ack: model.BatchAck) -> None:
    stream, record = convert.ack_to_stream_pb(ack), convert.ack_to_record_pb(ack)
    assert stream.SerializeToString(deterministic=True) == record.SerializeToString(deterministic=True)
    back = convert.ack_from_pb(reread(stream))
    assert (back.sequence, back.accepted, back.duplicate) == (ack.sequence, ack.accepted, ack.duplicate)
    assert [(each.index, each.reason, each.message) for each in back.rejected] == [
        (each.index, each.reason, each.message) for each in ack.rejected
    ]
    assert all(each.sequence == ack.sequence for each in back.rejected)


@given(answers)
def test_answers(answer: model.Answer) -> None:
    assert convert.answer_from_pb(reread(convert.answer_to_pb(answer))) == answer


@given(songs_answers)
def test_songs_answers(answer: model.SongsAnswer) -> None:
    assert convert.songs_answer_from_pb(reread(convert.songs_answer_to_pb(answer))) == answer


@given(st.builds(model.ChartSummary, ids, counts, counts))
def test_charts(chart: model.ChartSummary) -> None:
    assert convert.chart_from_pb(reread(convert.chart_to_pb(chart))) == chart


def test_reversed_bounds_are_refused() -> None:
    with pytest.raises(WindowError):
        convert.bounds_from_pb(query_pb2.WindowBounds(start_ms=2, end_ms=1))


def test_unknown_finality_promises_nothing() -> None:
    message = query_pb2.Certificate.FromString(b"\x28\x63")  # field 5, value 99
    assert convert.certificate_from_pb(message).finality is model.Finality.PRELIMINARY


def test_a_play_without_count_is_one() -> None:
    assert convert.play_from_pb(play_pb2.Play(song_id="a", played_at_ms=1)).count == 1
    assert convert.play_from_pb(play_pb2.Play(song_id="a", played_at_ms=1, count=0)).count == 0
