"""Shard cores in directories, and batches for them. Shared by the tests of this folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.engine.engine_shard import NOW, append_request, outcome_of
from tests.oracle import ModelOutcome, ModelPart
from tests.storage.simulated_disk import SimulatedDisk
from topk_grpc.config import ShardSettings
from topk_grpc.engine import query
from topk_grpc.engine.copies import Room
from topk_grpc.engine.query import Scope
from topk_grpc.model import Bounds, ClusterSettings, Play
from topk_grpc.pb.topk.v1 import shard_service_pb2 as pb
from topk_grpc.shard.core import Identity, ShardCore
from topk_grpc.storage import Files

IDENTITY = Identity("cluster-1", "shard-0")
CLUSTER = ClusterSettings(slots=16)
PATH = Path("/data/shard-0")
"""On a simulated disk."""


def new_disk() -> SimulatedDisk:
    disk = SimulatedDisk()
    disk.make_directory(PATH.parent)
    disk.sync_directory(PATH.parent.parent)
    disk.operations.clear()
    return disk


def settings_of(path: Path, **changes: Any) -> ShardSettings:
    settings = ShardSettings(
        topology="file:/nowhere", shard_id="shard-0", data_dir=str(path), heap_size=10, segment_bytes=1 << 16
    )
    return dataclasses.replace(settings, **changes)


def open_core(
    path: Path,
    files: Files | None = None,
    cluster: ClusterSettings = CLUSTER,
    slots: Iterable[int] | None = None,
    **changes: Any,
) -> ShardCore:
    """A core that has recovered and owns all slots, or those given."""
    core = ShardCore(settings_of(path, **changes), cluster, files)
    core.recover()
    core.own(IDENTITY, list(range(cluster.slots) if slots is None else slots))
    return core


def abandon(core: ShardCore) -> None:
    """As if the process had been killed, but for the locks, which the kernel would give back."""
    core._directory.close()


def batch(sequence: int, *plays: Play, producer: str = "p") -> ModelPart:
    return ModelPart(producer, sequence, NOW, tuple(enumerate(plays)))


def numbered(sequence: int, songs: int = 3, charts: tuple[str, ...] = ("x",)) -> ModelPart:
    """A batch whose songs tell which batches counted: one play of its own song, and of some that all share."""
    shared = [Play(f"shared-{i}", NOW + sequence, 1 + i, charts) for i in range(songs)]
    return batch(sequence, Play(f"batch-{sequence}", NOW + sequence, 1, charts), *shared)


def commit(core: ShardCore, *parts: ModelPart, now_ms: int = NOW) -> list[ModelOutcome | Exception]:
    """One group, one request for each part."""
    answers = core.commit([append_request([part]) for part in parts], now_ms)
    outcomes: list[ModelOutcome | Exception] = []
    for answer in answers:
        if isinstance(answer, Exception):
            outcomes.append(answer)
        else:
            outcomes += map(outcome_of, pb.AppendResponse.FromString(answer).outcomes)
    return outcomes


def take_snapshot(core: ShardCore) -> None:
    pending = core.begin_snapshot(Room(core.snapshot_room()))
    blocks = core.write_snapshot(pending)
    core.end_snapshot(pending, blocks)
    core.clear_snapshot(pending, blocks)


def counted(core: ShardCore, song_ids: Sequence[str], chart: str = "") -> list[int]:
    return query.counts_of(core.state, Scope(chart), song_ids)[0].counts


def check_numbered(core: ShardCore, counted_batches: set[int], highest: int) -> None:
    """Exactly these batches have counted, each once: on both boards, and in the windows."""
    batches = [f"batch-{sequence}" for sequence in range(1, highest + 1)]
    expected = [int(sequence in counted_batches) for sequence in range(1, highest + 1)]
    many = len(counted_batches)
    shared = [f"shared-{i}" for i in range(3)]
    for chart in ("", "x"):
        assert counted(core, batches, chart) == expected
        assert counted(core, shared, chart) == [many, 2 * many, 3 * many]
        every = pane(core, chart)
        assert {song: count for song, count in every.items() if song.startswith("batch-")} == {
            f"batch-{sequence}": 1 for sequence in counted_batches
        }
        assert [every.get(song, 0) for song in shared] == [many, 2 * many, 3 * many]


def pane(core: ShardCore, chart: str = "") -> dict[str, int]:
    """What a wide window holds: computed from cells, not from the counts of all time."""
    ranked, _ = query.top_k(core.state, Scope(chart, Bounds(NOW - 10_000_000, NOW + 10_000_000)), 10_000)
    return dict(zip(ranked.song_ids, ranked.counts, strict=True))
