"""Snapshots and log records that are as they were written and make no sense: said so, nothing changed.

Found by fuzzing (tests/fuzz): most of these once read or wrote outside an array, or ended in an error without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.engine.engine_shard import NOW, append_request
from tests.shard.cores import CLUSTER, PATH, batch, commit, new_disk, numbered, open_core, settings_of, take_snapshot
from tests.storage.simulated_disk import SimulatedDisk
from topk_grpc.errors import CorruptError, InvalidArgumentError
from topk_grpc.model import Play
from topk_grpc.pb.topk.v1 import shard_service_pb2 as pb
from topk_grpc.shard import core as shard_core
from topk_grpc.shard.core import ShardCore
from topk_grpc.storage import Block, DataDirectory, Log, SnapshotStore, recover

Change = Callable[[dict[str, Any], dict[str, Any], list[dict[str, Any]]], object]


@pytest.fixture(scope="module")
def sample() -> SimulatedDisk:
    disk = new_disk()
    core = open_core(PATH, disk, standing_windows="session:1m", tiers="1s:1h,1m:*")
    core.configure(NOW)
    for sequence in range(1, 4):
        commit(core, numbered(sequence), batch(sequence, Play("é", NOW, 2, ("de", "fr")), producer="q"))
    commit(core, batch(1, Play("soon", NOW + 10**9), producer="r"))  # rejected
    core.move_standing(NOW + 4000)
    take_snapshot(core)
    core.close()
    return disk


def rewritten(sample: SimulatedDisk, change: Change) -> SimulatedDisk:
    """The same directory, its newest snapshot followed by one that was changed, and sealed."""
    disk = sample.copy()
    directory = DataDirectory.open(PATH, disk)
    store = SnapshotStore(directory)
    snapshot = store.load([])
    assert snapshot is not None
    meta, arrays = dict(snapshot.meta), {name: np.array(array) for name, array in snapshot.arrays.items()}
    blocks = [{name: np.array(column) for name, column in block.columns.items()} for block in snapshot.blocks]
    change(meta, arrays, blocks)
    numbers = [block.block_id for block in snapshot.blocks]
    renamed = {number: number + 1000 for number in numbers}
    meta["blocks"] = {name: [renamed.get(one, one) for one in ones] for name, ones in meta["blocks"].items()}
    columns = tuple(Block(renamed[number], one) for number, one in zip(numbers, blocks, strict=True))
    store.write(replace(snapshot, meta=meta, arrays=arrays, blocks=columns))
    directory.close()
    return disk


def put(name: str, at: Any, value: int) -> Change:
    return lambda _meta, arrays, _blocks: arrays[name].__setitem__(at, value)


def put_block(name: str, at: int, value: int) -> Change:
    return lambda _meta, _arrays, blocks: blocks[0][name].__setitem__(at, value)


def put_meta(name: str, value: Any) -> Change:
    return lambda meta, _arrays, _blocks: meta.__setitem__(name, value)


def swap(name: str, other: Callable[[Any], Any]) -> Change:
    return lambda _meta, arrays, _blocks: arrays.__setitem__(name, other(arrays[name]))


SENSELESS: dict[str, Change] = {
    "an offset behind the arena": put("songs.starts", 2, 1 << 40),
    "an offset before the arena": put("songs.starts", 0, -5),
    "records that overlap": put("songs.starts", 1, 7),
    "a song that is no utf-8": put("songs.arena", 6, 0xFF),
    "a longer song than there is": put("songs.arena", 5, 0xFF),
    "a song's number": put("songs.arena", 0, 9),
    "a cut arena": swap("songs.arena", lambda array: array[:-1]),
    "no global chart": put("names.arena", 4, 1),
    "a pair of an unknown chart": put("pairs.charts", 0, 77),
    "a pair of an unknown song": put("pairs.songs", 0, -1),
    "fewer songs than charts in pairs": swap("pairs.songs", lambda array: array[:-1]),
    "a count below 0": put("global.counts", 0, -1),
    "totals of other counts": put("global.totals", (0, 0), 3),
    "totals of no chart": swap("charts.totals", lambda array: array[:0]),
    "counts of another type": swap("global.counts", lambda array: array.astype(np.float64)),
    "counts in two dimensions": swap("global.counts", lambda array: array.reshape(1, -1)),
    "fewer counts": swap("charts.counts", lambda array: array[:-1]),
    "marks of different lengths": swap("marks.highest", lambda array: array[:-1]),
    "sessions of an unknown entry": swap(
        "sessions.0", lambda array: np.pad(array, ((0, 0), (0, 9)), constant_values=1)
    ),
    "sessions in two columns": swap("sessions.0", lambda array: array[:2]),
    "no counts": lambda _meta, arrays, _blocks: arrays.pop("global.counts"),
    "a cell of an unknown entry": put_block("entries", 0, 1 << 30),
    "a cell of an entry below 0": put_block("entries", 0, -1),
    "cells out of order": put_block("buckets", 0, 1 << 50),
    "an empty block": lambda _meta, _arrays, blocks: blocks[0].update({k: v[:0] for k, v in blocks[0].items()}),
    "columns of different lengths": lambda _meta, _arrays, blocks: blocks[0].update(counts=blocks[0]["counts"][:-1]),
    "an owned slot that does not exist": put_meta("owned", [-1]),
    "times that are no numbers": put_meta("newest_event_ms", "now"),
    "a time out of all reason": put_meta("oldest_event_ms", -(1 << 70)),
    "no tiers": put_meta("tiers", ""),
    "floors of other tiers": put_meta("tier_floors", [0]),
    "a standing window that cannot stand": put_meta("standing_windows", ["global"]),
    "a standing window finer than the resolution": put_meta("standing_windows", ["session:5ms"]),
    "no producers": put_meta("producers", {}),
    "a producer without a name": put_meta("producers", {"next_number": 5, "known": [["xyz", 1, 0, False, []]]}),
    "a producer's number": put_meta("producers", {"next_number": 1, "known": [["70", 1, 0, False, []]]}),
    "rejects beyond their type": put_meta(
        "producers", {"next_number": 2, "known": [["70", 1, 0, True, [[1, [1 << 60]]]]]}
    ),
    "an identity of something else": put_meta("identity", {"shard": "a"}),
    "no blocks": put_meta("blocks_rolled_up", None),
}


@pytest.mark.parametrize("what", SENSELESS)
def test_snapshot_that_makes_no_sense_stops_the_start(sample: SimulatedDisk, what: str) -> None:
    disk = rewritten(sample, SENSELESS[what])
    before = {path: bytes(disk.map(path)) for path in disk.files(PATH) if path.name != "LOCK"}
    core = ShardCore(settings_of(PATH), CLUSTER, disk)
    with pytest.raises(CorruptError, match=r"as it was written, but makes no sense .+ Restore this data directory"):
        core.recover()
    assert {path: bytes(disk.map(path)) for path in disk.files(PATH) if path.name != "LOCK"} == before


def test_snapshot_rewritten_as_it_was_is_taken(sample: SimulatedDisk) -> None:
    core = ShardCore(settings_of(PATH), CLUSTER, rewritten(sample, lambda *_: None))
    core.recover()
    assert core.state.boards["global"].totals(0) == (3 * 7 + 3 * 2, 7)


RECORDS = {
    "an unknown type": (99, b""),
    "no protobuf": (shard_core.APPEND, b"\xff"),
    "two requests": (shard_core.APPEND, b"\x0a\x00\x0a\x00"),
    "rest of no protobuf": (shard_core.APPEND, b"\x0a\x00\x0b"),
    "no owned slots": (shard_core.OWNED, b"\x08"),
    "expiry of no protobuf": (shard_core.EXPIRE, b"\xff\xff"),
    "a song that is no utf-8": (shard_core.DELETE_SONG, b"\x0a\x01\xff"),
    "tiers that are none": (shard_core.SETTINGS, pb.SettingsRecord(tiers="all").SerializeToString()),
    "a window that cannot stand": (
        shard_core.SETTINGS,
        pb.SettingsRecord(tiers="1s:*", standing_windows=["global"]).SerializeToString(),
    ),
    "slots that do not exist": (
        shard_core.OWNED,
        pb.OwnedRecord(
            slots=[99], cluster_slots=CLUSTER.slots, partitioner="ring", resolution_ms=CLUSTER.resolution_ms
        ).SerializeToString(),
    ),
}


@pytest.mark.parametrize("what", RECORDS)
def test_log_record_that_makes_no_sense_stops_the_start(what: str) -> None:
    disk = new_disk()
    open_core(PATH, disk).close()
    append(disk, *RECORDS[what])
    with pytest.raises(CorruptError, match=r"is whole but makes no sense: .+"):
        ShardCore(settings_of(PATH), CLUSTER, disk).recover()


def append(disk: SimulatedDisk, record_type: int, payload: bytes) -> None:
    directory = DataDirectory.open(PATH, disk)
    recovery = recover(directory, 1 << 16)
    list(recovery.records())
    log: Log = recovery.open_log()
    log.append_group([(record_type, [payload])])
    log.close()
    directory.close()


def test_request_whose_plays_share_an_index_is_refused() -> None:
    """The log names rejected plays by index: replay would have taken out both of them."""
    part = batch(1, Play("a", NOW), Play("b", NOW))
    shared = replace(part, plays=tuple((3, play) for _, play in part.plays))
    core = open_core(PATH, new_disk())
    (answer,) = core.commit([append_request([shared])], NOW)
    assert isinstance(answer, InvalidArgumentError)
    assert "do not ascend" in str(answer)
