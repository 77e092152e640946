"""Targets: what people and other programs write down: windows, times, tiers, topologies, FORMAT, messages, tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from tests.fuzz.harness import Choices, Target, change, change_json, refusing
from tests.storage.simulated_disk import SimulatedDisk
from topk_grpc.engine.tiers import Tiers, parse_tiers
from topk_grpc.engine.windows import bounds_of
from topk_grpc.errors import CorruptError, InvalidArgumentError, SettingError, VersionError, WindowError
from topk_grpc.gateway.evaluation import Evaluation
from topk_grpc.model import (
    ClusterSettings,
    SessionWindow,
    ShardInfo,
    Topology,
    Window,
    format_duration,
    format_time,
    parse_duration,
    parse_time,
    parse_window,
)
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.rpc import convert, steps
from topk_grpc.storage import DataDirectory
from topk_grpc.storage.checksums import crc32c
from topk_grpc.topology import codec

NOW = 1_700_000_000_000


def texts(data: bytes) -> None:
    """Windows, durations, times and tiers as people write them: what is read can be written and read again."""
    text = data.decode("utf-8", "replace")
    with refusing(WindowError):
        window = parse_window(text)
        assert parse_window(str(window)) == window
        _cut(window, NOW)
    with refusing(WindowError):
        duration = parse_duration(text)
        assert parse_duration(format_duration(duration)) == duration
    with refusing(InvalidArgumentError):
        time = parse_time(text)
        written = format_time(time)
        assert written.endswith(" ms") or parse_time(written) == time
    with refusing(SettingError):
        tiers = parse_tiers(text, 1000)
        assert parse_tiers(str(Tiers(tiers)), 1000) == tiers
        borders = Tiers(tiers).borders(NOW)
        assert len(borders) == len(tiers)


def _cut(window: Window, now_ms: int) -> None:
    for resolution in (1, 1000):
        with refusing(WindowError):
            bounds = bounds_of(window, now_ms, resolution)
            assert bounds is None or (
                bounds.start_ms < bounds.end_ms and bounds.start_ms % resolution == bounds.end_ms % resolution == 0
            )
            assert bounds is None or not isinstance(window, SessionWindow) or bounds.start_ms <= now_ms < bounds.end_ms


def _text_seeds() -> list[bytes]:
    return [
        *(b"global", b"tumbling:1d", b"tumbling:7d@4d", b"sliding:10m/1m", b"sliding:10m", b"session:15m", b"15m"),
        *(b"range:2026-11-01..2026-11-08", b"range:-5..7000", b"2014-06-16T18:28:34.123+02:00", b"1700000000000"),
        *(b"1s:1h,1m:1d,1h:90d,1d:*", b"1s:*", b"1500ms", b"0009-01-01T00:00:00Z"),
    ]


def messages(data: bytes) -> None:
    """Queries, as a gateway reads them, and answers, as a client does."""
    kind, data = data[:1], data[1:]
    message = (
        *(pb.GetTopKRequest, pb.GetSongsRequest, pb.WatchTopKRequest, pb.GetTopKResponse, pb.GetSongsResponse),
        *(pb.StreamPlaysResponse, pb.WatchTopKResponse, pb.ListChartsResponse),
    )[kind[0] % 8 if kind else 0]
    try:
        parsed: Any = message.FromString(data)
    except DecodeError:
        return
    with refusing(InvalidArgumentError):
        if hasattr(parsed, "window") and hasattr(parsed, "k" if message is not pb.GetSongsRequest else "window"):
            window = convert.window_from_pb(parsed.window if parsed.HasField("window") else None)
            assert convert.window_from_pb(convert.window_to_pb(window)) == window
            instant = convert.as_of_from_pb(parsed) if message is not pb.WatchTopKRequest else None
            _cut(window, NOW if instant in (None, "latest") else int(instant))
        elif message is pb.GetTopKResponse:
            convert.answer_from_pb(parsed)
        elif message is pb.GetSongsResponse:
            convert.songs_answer_from_pb(parsed)
        elif message is pb.StreamPlaysResponse:
            convert.ack_from_pb(parsed)
        elif message is pb.ListChartsResponse:
            for chart in parsed.charts:
                convert.chart_from_pb(chart)
        elif parsed.HasField("snapshot"):
            steps.entries_from_snapshot(parsed.snapshot)
            steps.bounds_from_step(parsed)
        elif parsed.HasField("changes"):
            steps.changes_from_pb(parsed.changes)


def _message_seeds() -> list[bytes]:
    windows = [convert.window_to_pb(parse_window(text.decode())) for text in _text_seeds()[:6]]
    asked = [b"\0" + pb.GetTopKRequest(window=window, k=3, chart="de").SerializeToString() for window in windows]
    asked += [b"\2" + pb.WatchTopKRequest(window=windows[0], k=9, resume_token="a-1").SerializeToString()]
    asked += [b"\1" + pb.GetSongsRequest(window=windows[1], song_ids=["a"], neighbours=2).SerializeToString()]
    answer = pb.GetTopKResponse()
    answer.entries.add(rank=1, song_id="a", count=7)
    answer.bounds.start_ms, answer.certificate.total_plays = 5, 9
    ack = pb.StreamPlaysResponse(sequence=3, accepted=1)
    ack.rejected.add(index=3, reason="IN_FUTURE", message="no")
    return [*asked, b"\3" + answer.SerializeToString(), b"\5" + ack.SerializeToString(), b"\6", b"\7"]


def tokens(data: bytes) -> None:
    """What a watcher gives to resume from: a version of ours, or none."""
    token = data.decode("utf-8", "replace")
    number = _EVALUATION.knows(token)
    assert number == -1 or token.partition("-")[2].lstrip("0") == (str(number) if number else "")


async def _never() -> Any:
    raise AssertionError("tokens are read without an evaluation")


_EVALUATION = Evaluation(_never, 1.0, lambda: 1)
_EVALUATION._id = "0123456789abcdef"


def _token_seeds() -> list[bytes]:
    return [b"0123456789abcdef-7", b"0123456789abcdef-", b"-", b"0123456789abcdef-99999999999999999999", b"x-1"]


def topology(data: bytes) -> None:
    """The topology file: any bytes, or a valid one with members changed."""
    raw = data[1:]
    if data[:1] and data[0] & 1:
        raw = json.dumps(change_json(Choices(raw), json.loads(_TOPOLOGY))).encode()
    with refusing(CorruptError, VersionError):
        decoded = codec.decode(raw, "/somewhere")
        assert codec.decode(codec.encode(decoded), "/again") == decoded


_TOPOLOGY = codec.encode(
    Topology("c", 3, ClusterSettings(slots=4), (ShardInfo("a", "x:1"), ShardInfo("b", "", "d")), (0, 1, 1, 0))
)


def _topology_seeds() -> list[bytes]:
    return [b"\0" + _TOPOLOGY, *(b"\1" + bytes(range(start, start + 30)) for start in range(0, 200, 20))]


def format_file(data: bytes) -> None:
    """FORMAT of a data directory: any bytes, changed bytes, or other members under a right checksum."""
    choices = Choices(data)
    match choices.below(3):
        case 0:
            content = choices.rest()
        case 1:
            content = change(choices, _FORMAT)
        case _:
            body = json.dumps(change_json(choices, {"format": 1, "directory_id": "0" * 32})).encode()[1:] + b"\n"
            content = b'{"crc32c": "%08x", ' % crc32c(body) + body
    disk = _DISK.copy()
    disk.write_durably(_PATH / "FORMAT", content)
    with refusing(CorruptError, VersionError):
        directory = DataDirectory.open(_PATH, disk)
        assert len(directory.directory_id) == 32
        directory.close()


def _empty_directory() -> SimulatedDisk:
    disk = SimulatedDisk()
    disk.make_directory(_PATH.parent)
    DataDirectory.open(_PATH, disk).close()
    return disk


_PATH = Path("/data/shard-0")
_DISK = _empty_directory()
_FORMAT = bytes(_DISK.map(_PATH / "FORMAT"))


def _format_seeds() -> list[bytes]:
    return [b"\0" + _FORMAT, b"\0", *(bytes([kind, *range(start, start + 20)]) for kind in (1, 2) for start in (0, 99))]


TARGETS = (
    Target("texts", texts, _text_seeds, 300, 60),
    Target("messages", messages, _message_seeds, 1100, 200),
    Target("tokens", tokens, _token_seeds, 50, 60),
    Target("topology", topology, _topology_seeds, 30, 400),
    Target("format", format_file, _format_seeds, 10, 200),
)
