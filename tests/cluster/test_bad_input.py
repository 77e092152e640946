"""Bad input of every kind: refused with a status, a reason and a sentence that helps; nothing counts, all goes on."""

from __future__ import annotations

import itertools
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.cluster.processes import GLOBAL, Cluster, entries_of, reason_of, run_topk, top_k
from topk_grpc.pb.topk.v1 import query_pb2
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.pb.topk.v1.play_pb2 import Play, PlayBatch

pytestmark = pytest.mark.cluster

SERVICE = "/topk.v1.TopKService/"
SHARD_SERVICE = "/topk.v1.ShardService/"
PLAYED_MS = 1_700_000_000_000
DAY = query_pb2.Window(tumbling=query_pb2.TumblingWindow(size_ms=86_400_000))
UNARY_METHODS = ("RecordPlays", "GetTopK", "GetSongs", "ListCharts", "DescribeCluster")
SHARD_METHODS = ("QueryTopK", "QueryCounts", "QueryRanks", "QueryCharts", "DescribeShard")
GARBAGE = (
    b"\xff\xff\xff\xff\x0f garbage",
    b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",  # a field that says it is longer than anything
    b"\x0a\x05abc",  # a field that is cut off
    b"GET / HTTP/1.1\r\n\r\n",
)

_names = itertools.count(1)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def batch(*plays: Play, **fields: Any) -> PlayBatch:
    named: dict[str, Any] = {"producer_id": f"bad-input-{next(_names)}", "sequence": 1} | fields
    return PlayBatch(**named, plays=plays)


def record(cluster: Cluster, *plays: Play, **fields: Any) -> pb.RecordPlaysResponse:
    return cluster.stub.RecordPlays(pb.RecordPlaysRequest(batch=batch(*plays, **fields)), timeout=20)


def unary(channel: grpc.Channel, path: str) -> Any:
    return channel.unary_unary(path)


def streaming(channel: grpc.Channel, path: str) -> Any:
    return channel.stream_stream(path)


def call(cluster: Cluster, method: str, raw: bytes, **options: Any) -> bytes:
    """Sends bytes as they are."""
    answer: bytes = unary(cluster.channel, SERVICE + method)(raw, timeout=20, **options)
    return answer


def stream(cluster: Cluster, *raw: bytes) -> Iterator[bytes]:
    answers: Iterator[bytes] = streaming(cluster.channel, SERVICE + "StreamPlays")(iter(raw), timeout=20)
    return answers


def assert_refused(error: grpc.RpcError, code: grpc.StatusCode, reason: str, *words: str) -> None:
    message = str(error.details())
    assert (error.code(), reason_of(error)) == (code, reason), message
    for word in words:
        assert word in message
    assert "internal error" not in message


@pytest.fixture
def counted(cluster: Cluster) -> Iterator[None]:
    """The cluster holds something, and after the test the same, answers at once, and has logged no fault of its own."""
    assert cluster.server is not None
    record(cluster, *(Play(song_id=f"kept {i}", played_at_ms=PLAYED_MS, count=i + 1) for i in range(20)))
    before, logged = top_k(cluster.address), len(cluster.server.stderr)
    yield
    after = cluster.stub.GetTopK(pb.GetTopKRequest(window=GLOBAL, k=10_000), timeout=5)
    assert entries_of(after) == entries_of(before)
    for total in ("complete", "total_plays", "distinct_songs"):
        assert getattr(after.certificate, total) == getattr(before.certificate, total)
    written = cluster.server.stderr[logged:]
    assert "handler_failed" not in written and "Traceback" not in written
    assert record(cluster, Play(song_id="kept", played_at_ms=PLAYED_MS)).accepted == 1


# --- Plays ------------------------------------------------------------------------------------------------------------

SONG: dict[str, Any] = {"song_id": "a song", "played_at_ms": PLAYED_MS}
BAD_PLAYS: list[tuple[dict[str, Any], str, str]] = [
    (SONG | {"song_id": ""}, "EMPTY_SONG_ID", "give 1 to 128 bytes"),
    (SONG | {"song_id": "é" * 64 + "x"}, "SONG_ID_TOO_LONG", "128 bytes"),
    ({"song_id": "a song"}, "MISSING_TIME", "milliseconds since the Unix epoch"),
    (SONG | {"played_at_ms": PLAYED_MS // 1000}, "SECONDS_NOT_MILLISECONDS", "multiply it by 1,000"),
    (SONG | {"played_at_ms": PLAYED_MS * 1000}, "IN_FUTURE", "clock and unit"),
    (SONG | {"count": 0}, "ZERO_COUNT", "leave it out for 1"),
    (SONG | {"count": -1}, "NEGATIVE_BUCKET", "nothing was taken back"),
    (SONG | {"count": -(1 << 55) - 1}, "COUNT_TOO_LARGE", "-2^55"),
    (SONG | {"count": (1 << 55) + 1}, "COUNT_TOO_LARGE", "2^55"),
    (SONG | {"charts": [f"c{i}" for i in range(9)]}, "TOO_MANY_CHARTS", "8"),
    (SONG | {"charts": [""]}, "EMPTY_CHART", "need not be named"),
    (SONG | {"charts": ["x" * 65]}, "CHART_TOO_LONG", "64 bytes"),
]


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize(("fields", "reason", "words"), BAD_PLAYS, ids=[reason for _, reason, _ in BAD_PLAYS])
def test_bad_play_is_rejected_with_reason(cluster: Cluster, fields: dict[str, Any], reason: str, words: str) -> None:
    response = record(cluster, Play(**fields))

    assert response.accepted == 0
    assert [(play.index, play.reason) for play in response.rejected] == [(0, reason)]
    assert words in response.rejected[0].message


@pytest.mark.usefixtures("counted")
def test_play_six_minutes_ahead_is_rejected(cluster: Cluster) -> None:
    response = record(cluster, Play(song_id="early", played_at_ms=now_ms() + 6 * 60_000))

    assert [(play.index, play.reason) for play in response.rejected] == [(0, "IN_FUTURE")]


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("text", [b"\xff\xfe", b"abc\xc3", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80"])
@pytest.mark.parametrize("field", ["song_id", "chart"])
def test_text_that_is_no_utf8_is_rejected(cluster: Cluster, text: bytes, field: str) -> None:
    # Written by hand: protobuf's own classes refuse to write it.
    song = b"a song" if field == "song_id" else b"another"
    play = b"\x0a" + bytes([len(song)]) + song + Play(played_at_ms=PLAYED_MS).SerializeToString()
    play = play.replace(song, text) if field == "song_id" else play + b"\x22" + bytes([len(text)]) + text
    if field == "song_id":
        play = b"\x0a" + bytes([len(text)]) + play[2:]
    head = batch().SerializeToString()
    raw = head + b"\x22" + bytes([len(play)]) + play

    answer = pb.RecordPlaysResponse.FromString(call(cluster, "RecordPlays", b"\x0a" + bytes([len(raw)]) + raw))

    assert [(each.index, each.reason) for each in answer.rejected] == [(0, "INVALID_UTF8")]
    assert "encode it so" in answer.rejected[0].message
    assert answer.accepted == 0


def test_good_plays_of_a_batch_count_beside_the_bad(cluster: Cluster) -> None:
    chart = "beside the bad"
    plays = []
    for number, (fields, _, _) in enumerate(BAD_PLAYS):
        plays += [Play(song_id=f"good {number}", played_at_ms=PLAYED_MS, charts=[chart]), Play(**fields)]
    plays.append(Play(song_id="x" * 128, played_at_ms=now_ms() + 4 * 60_000, count=7, charts=[chart] * 9))
    plays[-1].charts[1:] = []
    request = pb.RecordPlaysRequest(batch=batch(*plays))

    first = cluster.stub.RecordPlays(request, timeout=20)
    again = cluster.stub.RecordPlays(request, timeout=20)

    assert first.accepted == len(BAD_PLAYS) + 1
    assert not first.duplicate
    expected = [(2 * number + 1, reason) for number, (_, reason, _) in enumerate(BAD_PLAYS)]
    assert [(play.index, play.reason) for play in first.rejected] == expected
    assert again.duplicate
    assert (again.accepted, list(again.rejected)) == (first.accepted, list(first.rejected))
    good = [(f"good {number}", 1) for number in range(len(BAD_PLAYS))]
    entries = [(song_id, count) for _, song_id, count in entries_of(top_k(cluster.address, chart=chart))]
    assert entries == [("x" * 128, 7), *sorted(good)]


# --- Batches ----------------------------------------------------------------------------------------------------------

GOOD = Play(song_id="a song", played_at_ms=PLAYED_MS)
BAD_BATCHES: dict[str, tuple[PlayBatch, str]] = {
    "65,537 plays": (batch(*[GOOD] * 65_537), "at most 65536 are taken: send it in several"),
    "sequence 0": (batch(GOOD, sequence=0), "number the batches of a producer 1, 2, 3"),
    "no producer": (batch(GOOD, producer_id=""), "such as a UUID"),
    "long producer": (batch(GOOD, producer_id="p" * 129), "give 1 to 128 bytes"),
    "negative first send": (batch(GOOD, first_sent_ms=-1), "milliseconds since the Unix epoch"),
}


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("name", BAD_BATCHES)
@pytest.mark.parametrize("method", ["RecordPlays", "StreamPlays"])
def test_bad_batch_is_refused_as_a_whole(cluster: Cluster, method: str, name: str) -> None:
    bad, words = BAD_BATCHES[name]
    raw = pb.RecordPlaysRequest(batch=bad).SerializeToString()

    with pytest.raises(grpc.RpcError) as caught:
        call(cluster, method, raw) if method == "RecordPlays" else list(stream(cluster, raw))

    assert_refused(caught.value, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT", words)


@pytest.mark.usefixtures("counted")
def test_producer_id_that_is_no_utf8_is_refused(cluster: Cluster) -> None:
    raw = b"\x0a\x02\xff\xfe\x10\x01" + b"\x22" + bytes([GOOD.ByteSize()]) + GOOD.SerializeToString()

    with pytest.raises(grpc.RpcError) as caught:
        call(cluster, "RecordPlays", b"\x0a" + bytes([len(raw)]) + raw)

    assert_refused(caught.value, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT", "producer_id", "UTF-8")


@pytest.mark.usefixtures("counted")
def test_old_batch_of_an_unknown_producer_is_refused(cluster: Cluster) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        record(cluster, GOOD, first_sent_ms=now_ms() - 31 * 86_400_000)

    assert_refused(caught.value, grpc.StatusCode.FAILED_PRECONDITION, "PRODUCER_EXPIRED", "Begin a new producer_id")


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("method", ["RecordPlays", "StreamPlays", "GetTopK"])
def test_message_of_9_mib_is_refused(cluster: Cluster, method: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(stream(cluster, bytes(9 << 20))) if method == "StreamPlays" else call(cluster, method, bytes(9 << 20))

    assert_refused(caught.value, grpc.StatusCode.RESOURCE_EXHAUSTED, "", "larger than max (9437184 vs. 8388608)")


# --- Requests that are none -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("method", UNARY_METHODS)
def test_garbage_is_an_invalid_argument(cluster: Cluster, method: str) -> None:
    for raw in GARBAGE:
        with pytest.raises(grpc.RpcError) as caught:
            call(cluster, method, raw)

        assert_refused(caught.value, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT", "proto")


@pytest.mark.parametrize("raw", GARBAGE)
def test_garbage_on_a_stream_ends_it_after_the_acknowledgements_owed(cluster: Cluster, raw: bytes) -> None:
    good = [
        pb.StreamPlaysRequest(batch=batch(GOOD, producer_id=f"before garbage {raw!r}", sequence=sequence))
        for sequence in (1, 2, 3)
    ]
    answers: list[bytes] = []

    with pytest.raises(grpc.RpcError) as caught:
        answers.extend(stream(cluster, *(request.SerializeToString() for request in good), raw))

    assert_refused(caught.value, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT", "proto")
    assert [pb.StreamPlaysResponse.FromString(answer).sequence for answer in answers] == [1, 2, 3]


@pytest.mark.usefixtures("counted")
def test_garbage_to_a_shard_is_an_invalid_argument(cluster: Cluster) -> None:
    described = cluster.wait_whole()
    shard = described.shards[0]
    secret = ("topk-cluster-secret", json.loads((cluster.data_dir / "topology.json").read_text())["secret"])
    meant = (("topk-cluster-id", described.cluster_id), ("topk-shard-id", shard.shard_id), secret)
    with grpc.insecure_channel(shard.address) as channel:
        for method, raw in itertools.product(SHARD_METHODS, GARBAGE):
            with pytest.raises(grpc.RpcError) as caught:
                unary(channel, SHARD_SERVICE + method)(raw, metadata=meant, timeout=20)
            assert_refused(caught.value, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")
        for raw in GARBAGE:
            with pytest.raises(grpc.RpcError) as caught:
                list(streaming(channel, SHARD_SERVICE + "Append")(iter([raw]), metadata=meant, timeout=20))
            assert_refused(caught.value, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")
        with pytest.raises(grpc.RpcError) as caught:
            unary(channel, SHARD_SERVICE + "DescribeShard")(b"", metadata=[secret], timeout=20)
        assert_refused(caught.value, grpc.StatusCode.FAILED_PRECONDITION, "WRONG_SERVER", "read the topology again")


@pytest.mark.usefixtures("counted")
def test_unknown_method_is_unimplemented(cluster: Cluster) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call(cluster, "DropEverything", b"")

    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("names", [1_000, 100_000])
def test_flood_of_metadata_is_refused(cluster: Cluster, names: int) -> None:
    flood = [(f"x-{number}", "flood" * 10) for number in range(names)]
    # Over a connection of its own: it may be closed for it.
    with grpc.insecure_channel(cluster.address) as channel, pytest.raises(grpc.RpcError) as caught:
        unary(channel, SERVICE + "GetTopK")(b"", metadata=flood, timeout=20)

    assert caught.value.code() in {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE}


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize(
    "raw", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET / HTTP/1.1\r\n\r\n", bytes(4096)]
)
def test_what_is_no_http2_is_hung_up_on(cluster: Cluster, raw: bytes) -> None:
    for address in (cluster.address, cluster.wait_whole().shards[0].address):
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            try:
                while connection.recv(4096):
                    pass
            except ConnectionResetError:
                pass


# --- Queries ----------------------------------------------------------------------------------------------------------


def tumbling(size_ms: int, offset_ms: int = 0) -> query_pb2.Window:
    return query_pb2.Window(tumbling=query_pb2.TumblingWindow(size_ms=size_ms, offset_ms=offset_ms))


BAD_QUERIES: dict[str, tuple[pb.GetTopKRequest, str, str]] = {
    "k is 0": (pb.GetTopKRequest(window=GLOBAL), "INVALID_ARGUMENT", "k is 0: ask for 1 to 10000 entries"),
    "k is 10,001": (pb.GetTopKRequest(window=GLOBAL, k=10_001), "INVALID_ARGUMENT", "ask for 1 to 10000 entries"),
    "no window": (pb.GetTopKRequest(k=1), "INVALID_ARGUMENT", "set window.global, tumbling"),
    "unknown window": (
        # Field 15 of Window: a kind that a later release may know.
        pb.GetTopKRequest(window=query_pb2.Window.FromString(b"\x7a\x02\x08\x01"), k=1),
        "INVALID_ARGUMENT",
        "no window that this server knows",
    ),
    "size 1,500 ms": (pb.GetTopKRequest(window=tumbling(1500), k=1), "INVALID_WINDOW", "multiples of 1s"),
    "offset 500 ms": (pb.GetTopKRequest(window=tumbling(1000, 500), k=1), "INVALID_WINDOW", "multiples of 1s"),
    "size 0": (pb.GetTopKRequest(window=tumbling(0), k=1), "INVALID_WINDOW", "above 0"),
    "size below 0": (pb.GetTopKRequest(window=tumbling(-1000), k=1), "INVALID_WINDOW", "above 0"),
    "as_of on global": (
        pb.GetTopKRequest(window=GLOBAL, k=1, as_of=query_pb2.AsOf(time_ms=PLAYED_MS)),
        "INVALID_WINDOW",
        "leave it out, or ask for another window",
    ),
    "latest on global": (
        pb.GetTopKRequest(window=GLOBAL, k=1, as_of=query_pb2.AsOf(latest=query_pb2.Latest())),
        "INVALID_WINDOW",
        "leave it out, or ask for another window",
    ),
    "empty as_of": (
        pb.GetTopKRequest(window=DAY, k=1, as_of=query_pb2.AsOf()),
        "INVALID_ARGUMENT",
        "set time_ms or latest",
    ),
    "as_of out of reason": (
        pb.GetTopKRequest(window=DAY, k=1, as_of=query_pb2.AsOf(time_ms=-(1 << 63))),
        "INVALID_WINDOW",
        "give milliseconds since the Unix epoch",
    ),
}


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("name", BAD_QUERIES)
def test_bad_query_is_refused(cluster: Cluster, name: str) -> None:
    request, reason, words = BAD_QUERIES[name]

    with pytest.raises(grpc.RpcError) as caught:
        cluster.stub.GetTopK(request, timeout=20)

    assert_refused(caught.value, grpc.StatusCode.INVALID_ARGUMENT, reason, words)


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"song_ids": []}, "ask for 1 to 100 at once"),
        ({"song_ids": ["a"] * 101}, "ask for 1 to 100 at once"),
        ({"song_ids": ["a"], "neighbours": 101}, "ask for 0 to 100"),
    ],
)
def test_bad_question_about_songs_is_refused(cluster: Cluster, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        cluster.stub.GetSongs(pb.GetSongsRequest(window=GLOBAL, **fields), timeout=20)

    assert_refused(caught.value, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT", words)


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("top", "-k", "10001"), "ask for 1 to 10000 entries"),
        (("top", "--window", "weekly"), "tumbling:7d@4d"),
        (("top", "--as-of", "2024-01-01"), "leave it out, or ask for another window"),
    ],
)
def test_command_line_says_what_is_wrong_with_a_query(cluster: Cluster, arguments: tuple[str, ...], words: str) -> None:
    done = run_topk(*arguments, "--gateway", cluster.address)

    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert words in done.stderr


# --- Files ------------------------------------------------------------------------------------------------------------

ROWS = b"song,at\ngood,2024-02-29T12:00:00Z\n"
BAD_FILES: dict[str, tuple[bytes, tuple[str, ...], tuple[str, ...]]] = {
    "no such column": (b"title,at\ngood,2024-02-29T12:00:00Z\n", (), ("has no column 'song'", "title, at")),
    "malformed time": (ROWS + b"bad,29.02.2024 noon\n", (), ("row 2, column 'at'", "29.02.2024 noon")),
    "missing time": (ROWS + b"bad,\n", (), ("row 2, column 'at'",)),
    "seconds taken for milliseconds": (
        b"song,at\nbad,1709208000\n",
        ("--time-unit", "ms"),
        ("row 1, column 'at'", "1709208000", "1970"),
    ),
}


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_refused_before_anything_is_sent(cluster: Cluster, tmp_path: Path, name: str) -> None:
    content, options, words = BAD_FILES[name]
    path = tmp_path / "plays.csv"
    path.write_bytes(content)

    done = run_topk(
        *("ingest", str(path), "--song", "song", "--time", "at", *options, "--gateway", cluster.address),
    )

    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert str(path) in line
    for word in words:
        assert word in line


# --- What others hold -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("role", ["up", "gateway"])
def test_port_in_use_is_an_error_at_once(cluster: Cluster, tmp_path: Path, role: str) -> None:
    arguments = {
        "up": ("--data-dir", str(tmp_path / "other"), "--port", str(cluster.port)),
        "gateway": ("--topology", cluster.topology, "--listen", cluster.address),
    }[role]

    done = run_topk(role, *arguments)

    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert str(cluster.port) in line
    assert "another" in line and "port" in line.lower()


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("role", ["up", "shard"])
def test_data_directory_in_use_is_an_error_at_once(cluster: Cluster, role: str) -> None:
    directory = cluster.data_dir if role == "up" else cluster.data_dir / "shard-0"
    arguments = ["--data-dir", str(directory)]
    if role == "up":
        arguments += ["--port", "0"]
    else:
        arguments += ["--topology", cluster.topology, "--shard-id", "shard-0", "--listen", "127.0.0.1:0"]

    done = run_topk(role, *arguments)

    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"{directory} is in use by another process" in line
    holder = cluster.pid("supervisor" if role == "up" else "shard-0")
    assert str(holder) in line


@pytest.mark.usefixtures("counted")
def test_cluster_that_refused_all_of_this_still_answers_the_command_line(cluster: Cluster) -> None:
    done = run_topk("top", "-k", "1", "--json", "--gateway", cluster.address)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["certificate"]["complete"]
