"""Clients that mean harm: each is refused or let go within a bound, the processes stay the same, and others count."""

from __future__ import annotations

import itertools
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.cluster import raw_http2 as raw
from tests.cluster.processes import GLOBAL, Cluster, reason_of, wait_for
from topk_grpc.kernels.encode import batch_header, varint
from topk_grpc.pb.topk.v1 import query_pb2
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.pb.topk.v1.play_pb2 import Play, PlayBatch
from topk_grpc.pb.topk.v1.topk_service_pb2_grpc import TopKServiceStub

pytestmark = pytest.mark.cluster

HANDSHAKE_SECONDS, IDLE_SECONDS, BOUND_SECONDS = 3, 5, 45
CALLS_MAX = 4096 + 10
GROWTH_BYTES_MAX = 400 << 20
STREAM_BYTES_MAX = 100 << 10
SERVICE = "/topk.v1.TopKService/"
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    settings = {
        "TOPK_HANDSHAKE_SECONDS": str(HANDSHAKE_SECONDS),
        "TOPK_STREAM_IDLE_SECONDS": str(IDLE_SECONDS),
        "TOPK_CONNECTION_IDLE_SECONDS": "5",
        "TOPK_WATCHES_MAX": str(CALLS_MAX - 4096),
        "TOPK_CHARTS_MAX": "50",
    }
    cluster = Cluster(tmp_path_factory.mktemp("hostile"), settings=settings)
    try:
        yield cluster.start()
    finally:
        cluster.close()


def resident_bytes(pid: int) -> int:
    words = (Path("/proc") / str(pid) / "status").read_text().split()
    return int(words[words.index("VmRSS:") + 1]) << 10


NAMES = ("gateway", "shard-0", "shard-1")


@pytest.fixture(autouse=True)
def unharmed(hostile: Cluster) -> Iterator[None]:
    """After each test: the same processes, an ordinary client's play counts, and memory is within bounds."""
    pids = {name: hostile.pid(name) for name in NAMES}
    before = {name: resident_bytes(pid) for name, pid in pids.items()}
    yield
    assert_serves(hostile.address)
    assert {name: hostile.pid(name) for name in NAMES} == pids
    for name, pid in pids.items():
        assert resident_bytes(pid) - before[name] < GROWTH_BYTES_MAX, name


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def batch(*plays: Play, producer: str = "", sequence: int = 1) -> pb.RecordPlaysRequest:
    producer = producer or f"hostile-{next(_numbers)}"
    return pb.RecordPlaysRequest(batch=PlayBatch(producer_id=producer, sequence=sequence, plays=plays))


def assert_serves(address: str) -> None:
    """A client that has never been seen records a play, and finds it."""
    song = f"ordinary-{next(_numbers)}"
    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = TopKServiceStub(channel)
        answer = stub.RecordPlays(batch(Play(song_id=song, played_at_ms=now_ms())), timeout=30)
        assert (answer.accepted, answer.duplicate) == (1, False)
        found = stub.GetSongs(pb.GetSongsRequest(window=GLOBAL, song_ids=[song]), timeout=30)
        assert [(one.song_id, one.count) for one in found.songs] == [(song, 1)]


# --- Slow ones --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [b"", raw.PREFACE[:9], raw.PREFACE, raw.PREFACE + raw.frame(raw.SETTINGS)[:5]],
    ids=["nothing", "half-a-preface", "preface", "half-a-frame"],
)
def test_connections_that_never_introduce_themselves_are_closed(hostile: Cluster, said: bytes) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(raw.RawConnection(hostile.address, said)) for _ in range(100)]
        assert_serves(hostile.address)
        for connection in slow:
            connection.wait_closed(BOUND_SECONDS)


def test_half_a_frame_and_never_more_is_closed(hostile: Cluster) -> None:
    """Introduced, a call begun but not to its end: it counts as a connection without a call."""
    with ExitStack() as stack:
        slow = [stack.enter_context(raw.RawConnection(hostile.address)) for _ in range(50)]
        for connection in slow:
            connection.send(connection.begin()[1][:20])
        assert_serves(hostile.address)
        for connection in slow:
            connection.wait_closed(BOUND_SECONDS)


def test_messages_that_trickle_in_byte_by_byte_are_let_go(hostile: Cluster) -> None:
    message = raw.grpc_message(batch(Play(song_id="slow", played_at_ms=now_ms())).SerializeToString(), announced=5000)
    with raw.RawConnection(hostile.address) as connection:
        streams = {connection.open() for _ in range(50)}
        for byte in message:
            with suppress(OSError):
                connection.send(*(raw.frame(raw.DATA, 0, stream, bytes([byte])) for stream in streams))
        assert_serves(hostile.address)
        connection.wait_ended(streams, BOUND_SECONDS)


def test_a_stream_without_batches_ends_with_ok(hostile: Cluster) -> None:
    stub = TopKServiceStub(hostile.channel)
    sent = iter([pb.StreamPlaysRequest(batch=batch(Play(song_id="one", played_at_ms=now_ms())).batch)])

    def first_one_then_nothing() -> Iterator[pb.StreamPlaysRequest]:
        yield next(sent)
        wait_for(call.done, BOUND_SECONDS, "the stream ends")

    call: Any = stub.StreamPlays(first_one_then_nothing(), timeout=BOUND_SECONDS)
    assert [ack.accepted for ack in call] == [1]
    assert call.code() is grpc.StatusCode.OK


# --- Many -------------------------------------------------------------------------------------------------------------


def open_streams(stack: ExitStack, address: str, count: int) -> Iterator[tuple[raw.RawConnection, set[int]]]:
    """Opens streams, 200 on each of many connections, which stay idle after one batch without plays.

    Yields a connection and those of its streams whose batch was acknowledged; the others were refused. One connection
    after the other: of more than a thousand calls that come at once gRPC itself cancels some.
    """
    for _ in range(count // 200):
        connection = stack.enter_context(raw.RawConnection(address))
        streams = {}
        for _ in range(200):
            stream, opening = connection.begin()
            message = raw.grpc_message(batch().SerializeToString())
            streams[stream] = opening + raw.frame(raw.DATA, 0, stream, message)
        connection.send(*streams.values())
        yield connection, connection.wait_answered(set(streams), BOUND_SECONDS)


@pytest.mark.slow
def test_thousands_of_idle_streams_keep_nobody_out(hostile: Cluster) -> None:
    address = hostile.add_gateway({"TOPK_STREAM_IDLE_SECONDS": "30"})
    with ExitStack() as stack:
        before = resident_bytes(hostile.newest_gateway.pid)
        opened = list(open_streams(stack, address, 3000))
        assert sum(len(streams) for _, streams in opened) == 3000
        assert_serves(address)
        assert resident_bytes(hostile.newest_gateway.pid) - before < 3000 * STREAM_BYTES_MAX
        for connection, streams in opened:
            connection.wait_ended(streams, 2 * BOUND_SECONDS)
    assert_serves(address)


@pytest.mark.slow
def test_more_streams_than_there_may_be_are_refused_and_room_comes_back(hostile: Cluster) -> None:
    """Beyond the bound a call, whoever's, is told RESOURCE_EXHAUSTED, until the idle ones have been let go."""
    address = hostile.add_gateway({"TOPK_STREAM_IDLE_SECONDS": "30"})
    with ExitStack() as stack:
        opened = list(open_streams(stack, address, 4400))
        assert sum(len(streams) for _, streams in opened) == CALLS_MAX
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
            TopKServiceStub(channel).ListCharts(pb.ListChartsRequest(), timeout=20)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        for connection, streams in opened:
            connection.wait_ended(streams, 2 * BOUND_SECONDS) if streams else None
    assert_serves(address)


def test_thousands_of_producers_count_each_for_itself(hostile: Cluster) -> None:
    producers = 3000
    at = now_ms()

    def batches() -> Iterator[pb.StreamPlaysRequest]:
        for number in range(producers):
            one = batch(Play(song_id="of-many", played_at_ms=at), producer=f"crowd-{number}")
            yield pb.StreamPlaysRequest(batch=one.batch)

    stub = TopKServiceStub(hostile.channel)
    assert sum(ack.accepted for ack in stub.StreamPlays(batches(), timeout=90)) == producers
    answer = stub.GetSongs(pb.GetSongsRequest(window=GLOBAL, song_ids=["of-many"]), timeout=30)
    assert [one.count for one in answer.songs] == [producers]


def test_more_charts_than_there_may_be_are_rejected_one_by_one(hostile: Cluster) -> None:
    at = now_ms()
    plays = [Play(song_id=f"charted-{n % 7}", played_at_ms=at, charts=[f"chart-{n}"]) for n in range(2000)]
    answer = TopKServiceStub(hostile.channel).RecordPlays(batch(*plays), timeout=60)
    assert 2 * 50 >= answer.accepted >= 50
    assert {one.reason for one in answer.rejected} == {"CHART_LIMIT"}


# --- Large ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [20_000, 100_000, 3_000_000])
def test_oversized_metadata_is_refused(hostile: Cluster, size: int) -> None:
    for _ in range(20):
        with grpc.insecure_channel(hostile.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                TopKServiceStub(channel).ListCharts(
                    pb.ListChartsRequest(), timeout=20, metadata=(("x-large", "y" * size),)
                )
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, caught.value


@pytest.mark.parametrize("method", ["RecordPlays", "StreamPlays"])
def test_a_message_that_inflates_beyond_the_limit_is_refused(hostile: Cluster, method: str) -> None:
    """Some hundred kilobytes on the wire, 128 MB behind them: inflated up to the limit and no further."""
    before = resident_bytes(hostile.pid("gateway"))
    with grpc.insecure_channel(hostile.address, compression=grpc.Compression.Gzip) as channel:
        call: Any = channel.stream_stream(SERVICE + method)
        with pytest.raises(grpc.RpcError) as caught:
            list(call(iter([bytes(128 << 20)]), timeout=60))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert resident_bytes(hostile.pid("gateway")) - before < 64 << 20


def test_gigantic_queries_are_refused(hostile: Cluster) -> None:
    stub = TopKServiceStub(hostile.channel)
    day = query_pb2.Window(tumbling=query_pb2.TumblingWindow(size_ms=86_400_000))
    huge = (1 << 32) - 1
    queries: tuple[tuple[Any, Any], ...] = (
        (stub.GetTopK, pb.GetTopKRequest(window=GLOBAL, k=huge)),
        (stub.GetTopK, pb.GetTopKRequest(window=day, k=10, history_panes=huge)),
        (stub.GetSongs, pb.GetSongsRequest(window=GLOBAL, song_ids=["a"], neighbours=huge)),
        (stub.GetSongs, pb.GetSongsRequest(window=GLOBAL, song_ids=map(str, range(100_000)))),
    )
    for ask, request in queries:
        with pytest.raises(grpc.RpcError) as caught:
            ask(request, timeout=30)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, caught.value
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.WatchTopK(pb.WatchTopKRequest(window=GLOBAL, k=huge), timeout=30))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


# --- Not the protocol -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
        b"POST /topk.v1.TopKService/GetTopK HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        bytes(range(256)) * 40,
        raw.PREFACE + raw.frame(raw.SETTINGS) + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01",
        raw.PREFACE + raw.frame(raw.SETTINGS) + raw.frame(raw.DATA, 0, 7, b"of no stream"),
        raw.PREFACE + raw.frame(raw.SETTINGS) + raw.frame(raw.HEADERS, raw.END_HEADERS, 1, b"\xff" * 100),
        raw.PREFACE + raw.frame(raw.SETTINGS, 0, 0, b"\x00\x04\xff\xff\xff\xff"),
    ],
    ids=["http1", "http1-post", "tls", "bytes", "frame-size", "data-of-no-stream", "hpack", "settings"],
)
def test_what_is_not_the_protocol_is_closed(hostile: Cluster, said: bytes) -> None:
    with ExitStack() as stack:
        connections = [stack.enter_context(raw.RawConnection(hostile.address, said)) for _ in range(20)]
        assert_serves(hostile.address)
        for connection in connections:
            connection.wait_closed(BOUND_SECONDS)


def test_a_flood_of_pings_is_told_to_calm_down(hostile: Cluster) -> None:
    with raw.RawConnection(hostile.address) as connection:
        with suppress(OSError):
            for _ in range(200):
                connection.send(*(raw.frame(raw.PING, 0, 0, bytes(8)) for _ in range(50)))
        said = connection.wait_closed(BOUND_SECONDS)
    assert any(kind == raw.GOAWAY and b"too_many_pings" in payload for kind, payload in said)


def test_a_flood_of_streams_opened_and_reset_leaves_nothing_behind(hostile: Cluster) -> None:
    """CVE-2023-44487, "rapid reset"."""
    with suppress(OSError), raw.RawConnection(hostile.address) as connection:
        for _ in range(100):
            burst = []
            for _ in range(100):
                stream, opening = connection.begin()
                burst += [opening, raw.frame(raw.RST_STREAM, 0, stream, struct.pack(">I", 8))]
            connection.send(*burst)
    assert_serves(hostile.address)


def test_connections_that_come_and_go_leave_nothing_behind(hostile: Cluster) -> None:
    host, _, port = hostile.address.rpartition(":")
    for _ in range(500):
        with suppress(OSError), socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(raw.PREFACE)


# --- Producers and names ----------------------------------------------------------------------------------------------


def test_a_producer_with_sequences_of_any_kind_harms_only_itself(hostile: Cluster) -> None:
    stub = TopKServiceStub(hostile.channel)
    sequences = [5, 4, 3, 5, 200, 5, 136, 135, 1 << 63, 7, (1 << 64) - 1, (1 << 64) - 64, (1 << 64) - 66, 1]
    counted = []
    seen: set[int] = set()
    for sequence in sequences:
        one = batch(Play(song_id="sequences", played_at_ms=now_ms()), producer="astray", sequence=sequence)
        counted.append(not stub.RecordPlays(one, timeout=20).duplicate)
        known = seen and (sequence in seen or sequence < max(seen) - 64)
        assert counted[-1] is not bool(known), sequence
        if not known:
            seen.add(sequence)
    answer = stub.GetSongs(pb.GetSongsRequest(window=GLOBAL, song_ids=["sequences"]), timeout=20)
    assert [song.count for song in answer.songs] == [sum(counted)]


ILL_FORMED = (
    *(b"\x80", b"\xbf", b"\xc0\xaf", b"\xc1\xbf", b"\xc3", b"\xc3(", b"\xe0\x80\x80", b"\xe2\x82", b"\xed\xa0\x80"),
    *(
        b"\xed\xbf\xbf",
        b"\xf0\x80\x80\x80",
        b"\xf0\x9f\x8e",
        b"\xf4\x90\x80\x80",
        b"\xf5\x80\x80\x80",
        b"\xff",
        b"\xfe",
    ),
)


def test_names_that_are_no_utf8_are_rejected_and_the_rest_counts(hostile: Cluster) -> None:
    def field(tag: int, value: bytes) -> bytes:
        return bytes([tag]) + varint(len(value)) + value

    at = b"\x10" + varint(now_ms())
    plays = [field(10, b"x" + bad) + at for bad in ILL_FORMED]
    plays += [field(10, b"named") + at + field(34, bad + b"x") for bad in ILL_FORMED]
    plays.append(field(10, b"well-formed") + at)

    def request(producer: bytes) -> bytes:
        return field(10, batch_header(producer, 1, 0) + b"".join(field(34, play) for play in plays))

    call: Any = hostile.channel.unary_unary(SERVICE + "RecordPlays")
    answer = pb.RecordPlaysResponse.FromString(call(request(b"ill-formed"), timeout=20))
    assert answer.accepted == 1
    assert [(one.index, one.reason) for one in answer.rejected] == [
        (index, "INVALID_UTF8") for index in range(2 * len(ILL_FORMED))
    ]
    for bad in ILL_FORMED:
        with pytest.raises(grpc.RpcError) as caught:
            call(request(b"p" + bad), timeout=20)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "producer_id is not well-formed UTF-8" in str(caught.value.details())


@pytest.mark.parametrize("token", ["garbage", "-", "a-" * 50_000, "x" * 32 + "-1", "x" * 32 + "-" + "9" * 400])
def test_a_watch_resumed_from_garbage_begins_anew(hostile: Cluster, token: str) -> None:
    stub = TopKServiceStub(hostile.channel)
    stub.RecordPlays(batch(Play(song_id="watched", played_at_ms=now_ms())), timeout=20)
    call: Any = stub.WatchTopK(pb.WatchTopKRequest(window=GLOBAL, k=3, resume_token=token), timeout=30)
    first = next(iter(call))
    call.cancel()
    assert first.HasField("snapshot")
    assert first.snapshot.reset


def test_refusals_name_their_reason(hostile: Cluster) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        TopKServiceStub(hostile.channel).RecordPlays(batch(producer="x" * 500), timeout=20)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason_of(caught.value)
