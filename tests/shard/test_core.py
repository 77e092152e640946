"""A shard's core in a real directory: groups, crashes, snapshots, and directories that are not its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.engine_shard import NOW
from tests.shard.cores import (
    CLUSTER,
    IDENTITY,
    abandon,
    batch,
    check_numbered,
    commit,
    counted,
    numbered,
    open_core,
    pane,
    settings_of,
    take_snapshot,
)
from topk_grpc.errors import CorruptError, DirectoryInUseError, ForeignDirectoryError, InvalidArgumentError
from topk_grpc.model import ClusterSettings, Play
from topk_grpc.shard.core import Identity, ShardCore
from topk_grpc.storage import DataDirectory, recover


def test_a_group_is_one_write_and_every_request_has_its_answer(tmp_path: Path) -> None:
    core = open_core(tmp_path)
    before = core.position
    core_answers = core.commit([], NOW)
    assert (core_answers, core.position) == ([], before)
    outcomes = commit(core, *(numbered(sequence) for sequence in range(1, 6)), numbered(3))
    assert [outcome.duplicate for outcome in outcomes if not isinstance(outcome, Exception)] == [False] * 5 + [True]
    assert core.position > before
    check_numbered(core, set(range(1, 6)), 6)
    position = core.position
    assert commit(core, numbered(2))[0] == outcomes[5]
    assert core.position == position  # what changes nothing is not written
    core.close()


def test_a_request_that_makes_no_sense_is_refused_alone(tmp_path: Path) -> None:
    core = open_core(tmp_path)
    outcomes = commit(core, numbered(1), batch(2, Play("", NOW)), numbered(3))
    assert isinstance(outcomes[1], InvalidArgumentError)
    check_numbered(core, {1, 3}, 3)
    abandon(core)
    core = open_core(tmp_path)
    check_numbered(core, {1, 3}, 3)
    core.close()


@pytest.mark.parametrize("snapshots", [(), (2,), (2, 5), (1, 2, 3, 4, 5, 6)])
@pytest.mark.parametrize("clean", [True, False])
def test_recovery_finds_every_group_and_a_resend_is_a_duplicate(
    tmp_path: Path, snapshots: tuple[int, ...], clean: bool
) -> None:
    core = open_core(tmp_path)
    for sequence in range(1, 7):
        commit(core, numbered(sequence))
        if sequence in snapshots:
            take_snapshot(core)
    for _ in range(3):
        core.close() if clean else abandon(core)
        core = open_core(tmp_path)
        check_numbered(core, set(range(1, 7)), 9)
        assert core.identity == IDENTITY
        assert all(
            outcome.duplicate
            for outcome in commit(core, *map(numbered, range(1, 7)))
            if not isinstance(outcome, Exception)
        )
        check_numbered(core, set(range(1, 7)), 9)
        if snapshots:
            take_snapshot(core)
    assert [getattr(outcome, "duplicate", None) for outcome in commit(core, numbered(7))] == [False]
    check_numbered(core, set(range(1, 8)), 9)
    core.close()


def test_snapshots_beside_commits_and_groups_on_many_segments(tmp_path: Path) -> None:
    """Each snapshot is written while the next groups are taken through, and used later still."""
    core = open_core(tmp_path)
    sequence = 0
    for round_ in range(8):
        pending = core.begin_snapshot()
        for _ in range(3):
            sequence += 1
            # Large enough that a segment of 64 KiB is full after a few.
            commit(
                core, numbered(sequence), batch(sequence, Play("filler" * 20, NOW), producer="q" * 100 + str(sequence))
            )
            commit(core, batch(sequence, *(Play(f"{sequence}-{i:0100}", NOW + i) for i in range(200)), producer="r"))
        written = core.write_snapshot(pending)
        sequence += 1
        commit(core, numbered(sequence))
        core.end_snapshot(pending, written)
        core.clear_snapshot(pending, written)
        check_numbered(core, set(range(1, sequence + 1)), sequence)
        if round_ % 3 == 2:
            abandon(core)
            core = open_core(tmp_path)
            check_numbered(core, set(range(1, sequence + 1)), sequence)
    segments = sorted(path.name for path in (tmp_path / "log").iterdir())
    assert int(segments[0].partition(".")[0]) > 0 or len(segments) < 4  # the old log was deleted
    core.close()
    assert len(list((tmp_path / "snapshots").iterdir())) == 2


def test_a_recovered_heap_may_have_another_size(tmp_path: Path) -> None:
    from topk_grpc.engine import query
    from topk_grpc.engine.query import Scope

    core = open_core(tmp_path, heap_size=3)
    commit(core, batch(1, *(Play(f"s{i:02}", NOW, 1 + i % 7, ("x",)) for i in range(40))))
    expected = {chart: query.top_k(core.state, Scope(chart), 25) for chart in ("", "x")}
    take_snapshot(core)
    core.close()
    for heap_size in (1, 20, 100):
        core = open_core(tmp_path, heap_size=heap_size)
        for chart in ("", "x"):
            assert query.top_k(core.state, Scope(chart), 25) == expected[chart]
            assert query.scans(core.state, Scope(chart), 25) == (heap_size < 25)
        core.close()


def test_a_damaged_newest_snapshot_is_passed_over_and_the_next_one_takes_its_place(tmp_path: Path) -> None:
    core = open_core(tmp_path)
    for sequence in range(1, 5):
        commit(core, numbered(sequence))
        take_snapshot(core)
    core.close()
    newest = max((tmp_path / "snapshots").iterdir())
    damaged = newest / "arrays.npz"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    core = ShardCore(settings_of(tmp_path), CLUSTER)
    (note,) = core.recover()
    assert newest.name in note
    check_numbered(core, {1, 2, 3, 4}, 5)
    take_snapshot(core)  # at the position of the damaged one, or close to it: its blocks must not be confused
    commit(core, numbered(5))
    take_snapshot(core)
    check_numbered(core, {1, 2, 3, 4, 5}, 5)
    core.close()
    core = open_core(tmp_path)
    check_numbered(core, {1, 2, 3, 4, 5}, 5)
    core.close()


def test_a_damaged_block_of_the_newest_snapshot_falls_back_as_well(tmp_path: Path) -> None:
    core = open_core(tmp_path)
    commit(core, numbered(1))
    take_snapshot(core)
    before = set((tmp_path / "blocks").iterdir())
    commit(core, batch(2, *(Play(f"many-{i}", NOW) for i in range(50))))
    take_snapshot(core)
    abandon(core)
    (damaged, *_) = sorted(set((tmp_path / "blocks").iterdir()) - before)
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 255
    damaged.write_bytes(content)
    core = ShardCore(settings_of(tmp_path), CLUSTER)
    assert len(core.recover()) == 1
    assert sum(pane(core).values()) == 7 + 50
    core.close()


def test_old_snapshots_gone_and_the_log_cut_is_said_and_changes_nothing(tmp_path: Path) -> None:
    core = open_core(tmp_path)
    for sequence in range(1, 60):
        commit(
            core,
            numbered(sequence),
            batch(sequence, *(Play(f"{sequence}-{i:0100}", NOW) for i in range(40)), producer="r"),
        )
        if sequence % 10 == 0:
            take_snapshot(core)
    core.close()
    for path in (tmp_path / "snapshots").glob("*/manifest.json"):
        path.write_bytes(b"{}")
    core = ShardCore(settings_of(tmp_path), CLUSTER)
    with pytest.raises(CorruptError, match="no snapshot is whole"):
        core.recover()


def test_a_record_that_makes_no_sense_stops_the_start(tmp_path: Path) -> None:
    for number, record in enumerate(((1, [b"\x0a\x02\xff\xff"]), (1, [b""]), (77, [b""]))):
        path = tmp_path / f"other-{number}"
        directory = DataDirectory.open(path)
        recovery = recover(directory, 1 << 16)
        list(recovery.records())
        log = recovery.open_log()
        log.append_group([record])
        log.close()
        directory.close()
        core = ShardCore(settings_of(path), CLUSTER)
        with pytest.raises(CorruptError, match="makes no sense"):
            core.recover()


def test_expiry_of_producers_is_durable(tmp_path: Path) -> None:
    ttl = 60.0
    core = open_core(tmp_path, producer_ttl_seconds=ttl)
    commit(core, numbered(1))
    later = NOW + 60_001
    commit(core, batch(1, Play("a", NOW), producer="other"), now_ms=later)
    assert core.expire_producers(NOW + 60_000) == 0
    position = core.position
    assert core.expire_producers(later) == 1
    assert core.position > position
    assert core.expire_producers(later) == 0
    for _ in range(2):
        (outcome,) = commit(core, numbered(1), now_ms=later)
        assert not isinstance(outcome, Exception)
        assert outcome.expired
        abandon(core)
        core = open_core(tmp_path, producer_ttl_seconds=ttl)
        check_numbered(core, {1}, 1)
    core.close()


# --- Whose directory it is --------------------------------------------------------------------------------------------


def test_ownership_is_remembered_and_a_second_claim_changes_nothing(tmp_path: Path) -> None:
    core = open_core(tmp_path, slots=[1, 4, 9])
    position = core.position
    core.own(IDENTITY, [2, 3])
    assert core.position == position
    for _ in range(2):
        assert core.state.owned.nonzero()[0].tolist() == [1, 4, 9]
        assert core.state.slots_bitmap == bytes([0b10010, 0b10])
        take_snapshot(core)
        core.close()
        core = open_core(tmp_path)
    core.close()


@pytest.mark.parametrize("snapshot", [True, False])
@pytest.mark.parametrize("other", [Identity("cluster-1", "shard-1"), Identity("cluster-2", "shard-0")])
def test_another_shards_directory_is_refused(tmp_path: Path, other: Identity, snapshot: bool) -> None:
    core = open_core(tmp_path)
    commit(core, numbered(1))
    if snapshot:
        take_snapshot(core)
    core.close()
    core = ShardCore(settings_of(tmp_path), CLUSTER)
    core.recover()
    position = core.position
    with pytest.raises(ForeignDirectoryError, match="holds the plays of shard-0 of cluster cluster-1"):
        core.own(other, [0])
    assert core.position == position
    core.close()


@pytest.mark.parametrize("snapshot", [True, False])
@pytest.mark.parametrize(
    "other", [ClusterSettings(slots=8), ClusterSettings(slots=16, resolution_ms=1), ClusterSettings(16, "modulo")]
)
def test_changed_cluster_settings_are_refused(tmp_path: Path, other: ClusterSettings, snapshot: bool) -> None:
    core = open_core(tmp_path)
    commit(core, numbered(1))
    if snapshot:
        take_snapshot(core)
    core.close()
    core = ShardCore(settings_of(tmp_path), other)
    with pytest.raises(ForeignDirectoryError):
        core.recover()


def test_a_directory_is_one_process_alone(tmp_path: Path) -> None:
    core = open_core(tmp_path)
    with pytest.raises(DirectoryInUseError, match="in use by another process"):
        open_core(tmp_path)
    core.close()
    open_core(tmp_path).close()


def test_nothing_is_done_before_recovery(tmp_path: Path) -> None:
    core = ShardCore(settings_of(tmp_path), CLUSTER)
    with pytest.raises(RuntimeError, match="has not recovered"):
        core.commit([b""], NOW)
    core.close()


# --- kill -9 ----------------------------------------------------------------------------------------------------------

COMMITS = """
import sys
from pathlib import Path
from tests.shard.cores import commit, numbered, open_core, take_snapshot
core = open_core(Path(sys.argv[1]))
first = int(sys.argv[2])
print("ready", flush=True)
for sequence in range(first, first + 100_000, 2):
    outcomes = commit(core, numbered(sequence), numbered(sequence + 1))
    assert not any(outcome.duplicate for outcome in outcomes[1:])
    print(sequence, sequence + 1, flush=True)
    if sequence % 14 == 1:
        take_snapshot(core)
"""


def test_after_kill_9_what_was_acknowledged_is_there_and_what_is_resent_counts_once(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    path = tmp_path / "data"
    acknowledged: set[int] = set()
    highest = 0
    for lines in (1, 12, 40):
        arguments = [sys.executable, "-c", COMMITS, str(path), str(highest + 1)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=root, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            for _ in range(lines):
                acknowledged.update(map(int, process.stdout.readline().split()))
            os.kill(process.pid, signal.SIGKILL)
            for line in process.stdout.read().splitlines(keepends=True):
                if line.endswith("\n"):
                    acknowledged.update(map(int, line.split()))
            process.wait()
        highest = max(acknowledged)
        core = open_core(path)
        under_way = {highest + 1, highest + 2}  # nobody was told: it may have counted, wholly or not at all
        there = {sequence for sequence in under_way if counted(core, [f"batch-{sequence}"]) == [1]}
        assert there in (set(), under_way)
        check_numbered(core, acknowledged | there, highest + 2)
        for sequence in sorted(acknowledged)[-20:] + sorted(under_way):
            (outcome,) = commit(core, numbered(sequence))
            assert not isinstance(outcome, Exception)
            assert outcome.duplicate == (sequence in acknowledged | there)
        acknowledged |= under_way
        highest += 2
        check_numbered(core, acknowledged, highest)
        core.close()
