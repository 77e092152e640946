"""Targets: requests as a shard takes them in and as its log brings them back, and log records of every type."""

from __future__ import annotations

import json
from typing import Any, Final

import numpy as np

from tests.engine.engine_shard import NOW, append_request
from tests.fuzz.harness import Choices, Target, change, refusing
from tests.fuzz.snapshot import use
from tests.fuzz.wire import append_seeds
from tests.shard.cores import CLUSTER, IDENTITY, PATH, batch, new_disk, numbered, open_core
from topk_grpc.engine.admission import Limits, admit, read_request
from topk_grpc.engine.apply import apply, replay
from topk_grpc.engine.state import ShardState
from topk_grpc.engine.tiers import parse_tiers
from topk_grpc.errors import CorruptError, ForeignDirectoryError, InvalidArgumentError, VersionError
from topk_grpc.kernels.encode import varint
from topk_grpc.model import Play, parse_window
from topk_grpc.pb.topk.v1 import shard_service_pb2 as pb
from topk_grpc.shard.core import ShardCore

WINDOWS: Final = [parse_window("session:1m"), parse_window("sliding:10m"), parse_window("tumbling:1h")]
TIERS: Final = parse_tiers("1s:1h,1m:*", CLUSTER.resolution_ms)


def _state() -> ShardState:
    state = ShardState(CLUSTER, 4, TIERS)
    state.own(range(0, CLUSTER.slots - 3))
    state.configure(TIERS, WINDOWS)
    return state


def admission(data: bytes) -> None:
    """AppendRequests of any bytes, admitted and applied: what the log then replays is the same state."""
    choices = Choices(data)
    live, recovered = _state(), _state()
    limits = Limits(now_ms=NOW, charts_max=3)
    while choices:
        how = choices.below(4)
        request = choices.take(choices.below(1 << 16) % 300) if how == 0 else _request(choices)
        with refusing(InvalidArgumentError):
            read = read_request(request)
            decided = admit(live, read, limits)
            apply(live, decided)
            pb.AppendResponse.FromString(decided.response())
            if decided.payload:
                replay(recovered, memoryview(b"".join(decided.payload)))
    assert live.pending_plays == 0
    (one_meta, one), (other_meta, other) = live.to_snapshot(), recovered.to_snapshot()
    assert _comparable(one_meta) == _comparable(other_meta)
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert name.startswith("marks.") or np.array_equal(array, other[name]), name


def _comparable(meta: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in meta.items() if name != "owned"})


def _request(choices: Choices) -> bytes:
    parts = []
    for _ in range(1 + choices.below(2)):
        plays = [
            Play(
                choices.pick("a", "b", "song", "é", "z" * 9),
                NOW + choices.pick(0, 1000, -1000, -61_000, 300_000, -7_200_000, choices.int64() >> 4),
                choices.pick(1, 1, 2, -1, -2, 1 << 54, 1 << 55) or 1,
                choices.pick((), ("x",), ("x", "y"), ("z",), ("w",)),
            )
            for _ in range(choices.below(5))
        ]
        parts.append(batch(1 + choices.below(100), *plays, producer=choices.pick("p", "q")))
    request = append_request(parts)
    return change(choices, request) if choices.below(4) == 3 else request


def records(data: bytes) -> None:
    """Log records of every type with any payload, checksums right: recovered and usable, or said to be damaged."""
    choices = Choices(data)
    core = ShardCore.__new__(ShardCore)
    core._settings, core._directory, core._cluster = _CORE._settings, _CORE._directory, CLUSTER
    core._sessions_due_ms, core.identity = 0, None
    core.state = ShardState(CLUSTER, 4)
    with refusing(CorruptError, VersionError, ForeignDirectoryError):
        while choices:
            kind = choices.below(7)
            valid = choices.pick(_RECORDS[0], _RECORDS[1], _RECORDS[6]) if kind == 1 else _RECORDS[kind]
            payload = choices.take(choices.below(120)) if choices.below(4) == 0 else change(choices, valid)
            core._replay_record(kind, memoryview(payload), 4711)
        use(core)


_CORE: Final = open_core(PATH, new_disk())


def _append_record(part: Any, **rest: Any) -> bytes:
    request = append_request([part])
    return b"\x0a" + varint(len(request)) + request + pb.AppendRecord(admitted_ms=NOW, **rest).SerializeToString()


_VERDICT: Final = pb.Verdict(
    rejected_indexes=[1], rejected_reasons=[pb.REJECT_REASON_IN_FUTURE], skipped_slots=[2]
)  # fmt: skip
_RECORDS: Final = (
    _append_record(numbered(1), verdicts=[_VERDICT]),
    _append_record(batch(2, Play("a", NOW, 1, ("x", "y")), Play("a", NOW, -1, ("x",)))),
    pb.OwnedRecord(
        shard_id=IDENTITY.shard_id, cluster_id=IDENTITY.cluster_id, slots=range(CLUSTER.slots),
        cluster_slots=CLUSTER.slots, partitioner=CLUSTER.partitioner, resolution_ms=CLUSTER.resolution_ms,
    ).SerializeToString(),
    pb.ExpireRecord(before_ms=NOW).SerializeToString(),
    pb.DeleteSongRecord(song_id="shared-1").SerializeToString(),
    pb.SettingsRecord(tiers="1s:1h,1m:*", standing_windows=map(str, WINDOWS)).SerializeToString(),
    _append_record(numbered(3)),
)  # fmt: skip
"""Each under its type where there is such a type."""


def _admission_seeds() -> list[bytes]:
    whole = [b"\0" + len(seed).to_bytes(2, "little") + seed for seed in append_seeds()]
    return [*whole, bytes(range(1, 120)), bytes([1, 0, 3, 1, 2, 0, 1, 1, 1, 0, 2, 9, 0, 0] * 6)]


def _record_seeds() -> list[bytes]:
    every = b"".join(bytes([kind, 1, 0]) for kind in range(7))
    return [every, every[6:] + every, *(bytes([kind, 1, 1, at, 0, 3, 9, 0]) for kind in range(7) for at in (3, 30, 80))]


TARGETS = (
    Target("admission", admission, _admission_seeds, 4, 300),
    Target("records", records, _record_seeds, 5, 200),
)
