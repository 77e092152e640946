"""What a shard's metrics are read from, and what it counts, with real cores on simulated disks."""

from __future__ import annotations

import asyncio
import errno
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.engine.engine_shard import NOW, append_request
from tests.shard.cores import CLUSTER, abandon, batch, commit, counted, new_disk, numbered, open_core, settings_of
from tests.storage.simulated_disk import fail_on
from topk_grpc import metrics
from topk_grpc.engine import query
from topk_grpc.engine.query import Scope
from topk_grpc.metrics import REGISTRY
from topk_grpc.model import Play, parse_window
from topk_grpc.rpc.lifecycle import StopRequest
from topk_grpc.shard import readings
from topk_grpc.shard import server as shard_server
from topk_grpc.shard.core import ShardCore
from topk_grpc.shard.owner import ShardOwner
from topk_grpc.storage import Recovery


def value(name: str, **labels: str) -> float:
    found = REGISTRY.get_sample_value(name, labels)
    assert found is not None, name
    return found


def test_memory_is_the_sum_of_its_parts(tmp_path: Path) -> None:
    core = open_core(tmp_path, standing_windows="sliding:1h,session:5m")
    core.configure(NOW)
    commit(core, numbered(1, songs=500))
    core.move_standing(NOW + 1000)
    parts = core.state.memory_by_part()
    assert parts.keys() == {"names", "pairs", "producers", "images", "rows", "heaps", "sessions", "cells"}
    assert sum(parts.values()) == core.state.memory_bytes
    assert all(size > 0 for part, size in parts.items() if part != "images")
    core.close()


def test_late_plays_are_those_behind_the_newest_and_only_live_ones(tmp_path: Path) -> None:
    core = open_core(tmp_path)
    state = core.state
    # Loaded history is not late: the first plays have nothing before them, and later ones are newer.
    commit(core, batch(1, Play("a", NOW - 86_400_000)), batch(2, Play("a", NOW)))
    assert state.late_plays == 0
    late = Play("b", NOW - 300_001, 5)
    commit(core, batch(3, late, Play("b", NOW - 300_000, 7), Play("c", NOW + 10_000)))
    assert state.late_plays == 5
    commit(core, batch(3, late))  # a resend counts nowhere
    commit(core, batch(4, Play("b", NOW - 300_001, -5)))  # a correction takes back
    assert state.late_plays == 5
    abandon(core)
    again = open_core(tmp_path)
    assert counted(again, ["a", "b"]) == [2, 7]
    assert again.state.late_plays == 0
    again.close()


def test_slides_count_moves_of_windows_to_other_bounds(tmp_path: Path) -> None:
    core = open_core(tmp_path, standing_windows="sliding:10s,session:5s")
    core.configure(NOW)
    commit(core, numbered(1))
    core.move_standing(NOW)
    slides = core.state.standing.slides
    core.move_standing(NOW)
    assert core.state.standing.slides == slides
    core.move_standing(NOW + 1000)
    assert core.state.standing.slides == slides + 2
    assert len(core.state.standing) == 2
    assert parse_window("sliding:10s") in core.state.standing
    core.close()


def test_heaps_that_are_filled_anew_are_counted(tmp_path: Path) -> None:
    core = open_core(tmp_path, heap_size=2)
    songs = [Play(f"song {number}", NOW, 10 + number) for number in range(5)]
    commit(core, batch(1, *songs))
    board = core.state.boards["global"]
    assert query.top_k(core.state, Scope(), 2)[0].counts == [14, 13]
    assert board.heap_rebuilds == 0
    commit(core, batch(2, *(Play(play.song_id, NOW, -play.count) for play in songs[3:])))
    assert query.top_k(core.state, Scope(), 2)[0].counts == [12, 11]
    assert board.heap_rebuilds == 1
    core.close()


def test_recovery_says_how_far_it_has_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core = open_core(tmp_path)
    for sequence in range(1, 40):
        commit(core, numbered(sequence, songs=100))
    abandon(core)

    again = ShardCore(settings_of(tmp_path), CLUSTER)
    seen = [again.recovered_ratio]
    replay = again._replay_record

    def watched(record_type: int, payload: memoryview, position: int) -> None:
        seen.append(again.recovered_ratio)
        replay(record_type, payload, position)

    monkeypatch.setattr(again, "_replay_record", watched)
    again.recover()
    assert seen == sorted(seen)
    assert seen[:2] == [0, 0]
    assert 0.5 < seen[-1] < 1
    assert again.recovered_ratio == 1
    again.close()


async def test_a_start_tells_that_it_recovers(tmp_path: Path) -> None:
    core = open_core(tmp_path)
    commit(core, numbered(1))
    abandon(core)
    seen: list[float] = []

    class Watched(ShardCore):
        def read(self) -> Recovery:
            seen.append(value("topk_recovering"))
            return super().read()

    again = Watched(settings_of(tmp_path), CLUSTER)
    await shard_server._recover(again, settings_of(tmp_path), StopRequest())
    assert seen == [1]
    assert value("topk_recovering") == 0
    assert value("topk_recovery_ratio") == 1
    assert value("topk_recovery_seconds") > 0
    again.close()


class Held:
    """A job that holds the writer until it is let go."""

    def __init__(self) -> None:
        self.entered, self.leave = threading.Event(), threading.Event()

    def __call__(self, _: ShardCore) -> None:
        self.entered.set()
        assert self.leave.wait(30)


async def until(condition: Any) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_queues_can_be_read_while_the_writer_is_busy() -> None:
    disk = new_disk()
    settings = settings_of(Path("/data/shard-0"))
    core = open_core(Path("/data/shard-0"), disk)
    owner = ShardOwner(core, settings)
    readings.read_from(core, owner, settings)
    held = Held()
    scan = asyncio.create_task(owner.scan("held", held))
    await until(held.entered.is_set)
    waiting = [await owner.append(append_request([numbered(sequence)], sequence)) for sequence in (1, 2, 3)]
    assert value("topk_queue_requests") == 3
    # The directory is on a simulated disk: what the real one says of it is nothing, and the rest is told all the same.
    assert REGISTRY.get_sample_value("topk_disk_free_bytes") is None
    assert REGISTRY.get_sample_value("topk_disk_bytes") is None
    assert value("topk_scans") == 1
    assert value("topk_scans_max") == settings.scan_queue_max
    before = value("topk_group_requests_sum"), value("topk_group_requests_count")
    held.leave.set()
    await asyncio.gather(scan, *waiting)
    assert value("topk_queue_requests") == value("topk_scans") == 0
    # What had gathered was one group.
    assert (value("topk_group_requests_sum"), value("topk_group_requests_count")) == (before[0] + 3, before[1] + 1)
    await owner.close(snapshot=False)


async def test_snapshots_that_fail_are_counted_and_age_goes_on() -> None:
    disk = new_disk()
    settings = settings_of(Path("/data/shard-0"))
    core = open_core(Path("/data/shard-0"), disk)
    owner = ShardOwner(core, settings)
    readings.read_from(core, owner, settings)
    await (await owner.append(append_request([numbered(1)])))
    failed, taken = value("topk_snapshots_failed_total"), value("topk_snapshot_seconds_count")
    owner._snapshot_at -= 1000
    disk.fault = fail_on("create", "arrays.npz", errno.ENOSPC)
    await owner._take_snapshot()
    assert value("topk_snapshots_failed_total") == failed + 1
    assert value("topk_snapshot_seconds_count") == taken
    assert value("topk_snapshot_age_seconds") > 1000
    assert value("topk_snapshot_log_bytes") == core.position > 0
    disk.fault = None
    await owner._take_snapshot()
    assert value("topk_snapshots_failed_total") == failed + 1
    assert value("topk_snapshot_seconds_count") == taken + 1
    assert value("topk_snapshot_age_seconds") < 1000
    assert value("topk_snapshot_log_bytes") == 0
    await owner.close(snapshot=False)


def test_the_log_that_is_kept_shrinks_when_segments_go(tmp_path: Path) -> None:
    core = open_core(tmp_path)
    syncs = value("topk_fdatasync_seconds_count")
    for sequence in range(1, 40):
        commit(core, numbered(sequence, songs=200))
    assert value("topk_fdatasync_seconds_count") == syncs + 39
    assert core.log_bytes == core.position
    for _ in range(3):  # the last two snapshots keep their log
        commit(core, numbered(100 + core.position))
        pending = core.begin_snapshot()
        blocks = core.write_snapshot(pending)
        core.end_snapshot(pending, blocks)
        core.clear_snapshot(pending, blocks)
    assert 0 < core.log_bytes < core.position
    core.close()


def test_a_reading_has_no_value_before_there_is_something_to_read() -> None:
    row = metrics.Metric(("shard",), "topk_test_things", "gauge", "things", ("kind",), "Things.")
    reading = metrics.Reading(row)
    assert [family.samples for family in reading.collect()] == [[]]
    reading.read_from(lambda: {"large": 1.0, "small": 2.0})
    (family,) = reading.collect()
    assert [(sample.labels, sample.value) for sample in family.samples] == [
        ({"kind": "large"}, 1.0),
        ({"kind": "small"}, 2.0),
    ]
