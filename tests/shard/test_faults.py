"""A shard's core on a disk that fails: full, failing to sync, and losing power before each single operation."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.oracle import ModelOutcome
from tests.shard.cores import PATH, abandon, check_numbered, commit, new_disk, numbered, open_core, take_snapshot
from tests.storage.simulated_disk import PowerLossError, SimulatedDisk, crash_at, fail_on
from topk_grpc.errors import DiskFullError, StorageError, WriteFailedError
from topk_grpc.shard.core import ShardCore


def duplicates(outcomes: Sequence[object]) -> list[bool]:
    assert all(isinstance(outcome, ModelOutcome) for outcome in outcomes), outcomes
    return [outcome.duplicate for outcome in outcomes if isinstance(outcome, ModelOutcome)]


def test_a_full_disk_refuses_a_group_and_the_resend_counts() -> None:
    disk = new_disk()
    core = open_core(PATH, disk)
    commit(core, numbered(1))
    before = core.state.to_snapshot()[0]
    position = core.position
    disk.fault = fail_on("reserve", "", errno.ENOSPC, times=1000)
    large = [numbered(sequence, songs=1000) for sequence in range(2, 6)]  # does not fit the present segment
    for _ in range(3):
        outcomes = commit(core, *large)
        assert len(outcomes) == 4
        assert all(isinstance(outcome, DiskFullError) for outcome in outcomes)
    assert core.state.to_snapshot()[0] == before
    assert core.state.pending_plays == 0
    assert core.position == position
    assert duplicates(commit(core, numbered(6))) == [False]  # there is room left for a small one
    check_numbered(core, {1, 6}, 6)
    disk.fault = None
    assert duplicates(commit(core, *large)) == [False] * 4
    assert duplicates(commit(core, *large)) == [True] * 4
    abandon(core)
    core = open_core(PATH, disk)
    assert duplicates(commit(core, *large)) == [True] * 4
    core.close()


@pytest.mark.parametrize("operation", ["write", "sync"])
def test_a_failed_write_answers_nobody_and_the_log_is_used_no_more(operation: str) -> None:
    disk = new_disk()
    core = open_core(PATH, disk)
    commit(core, numbered(1))
    disk.fault = fail_on(operation, "", errno.EIO)
    with pytest.raises(WriteFailedError, match="end this process"):
        commit(core, numbered(2))
    with pytest.raises(WriteFailedError, match="cannot be used any more"):
        commit(core, numbered(3))
    with pytest.raises(WriteFailedError):
        core.expire_producers(1 << 50)
    # Whatever of it reached the disk: after a restart the resend counts once.
    for what, survivor in disk.survivors():
        again = open_core(PATH, survivor)
        (duplicate,) = duplicates(commit(again, numbered(2)))
        assert not (duplicate and operation == "write"), what
        check_numbered(again, {1, 2}, 3)
        again.close()


def test_a_failed_snapshot_costs_nothing_and_the_next_one_succeeds() -> None:
    disk = new_disk()
    core = open_core(PATH, disk)
    sequence = 0
    operations_before = 0
    for operation in ("create", "reserve", "write", "sync", "make_directory", "rename", "sync_directory", "remove"):
        for nth in range(12):
            sequence += 1
            commit(core, numbered(sequence))
            left = nth

            def fault(present: str, path: Path, operation: str = operation) -> None:
                nonlocal left
                if present == operation and "log" not in path.parts:
                    left -= 1
                    if left == -1:
                        raise OSError(errno.EIO, "injected", str(path))

            disk.fault = fault
            failed = False
            try:
                take_snapshot(core)
            except StorageError:
                failed = True
            disk.fault = None
            if left >= 0:
                break  # there are no more operations of this kind in a snapshot
            check_numbered(core, set(range(1, sequence + 1)), sequence)
            if failed and nth % 2:
                take_snapshot(core)  # at the same position
            if nth % 3 == 2:
                check_numbered(core, set(range(1, sequence + 1)), sequence)
                abandon(core)
                core = open_core(PATH, disk.copy())
                disk = core._directory.files  # type: ignore[assignment]
            check_numbered(core, set(range(1, sequence + 1)), sequence)
            operations_before += 1
    assert operations_before > 10
    take_snapshot(core)
    core.close()
    core = open_core(PATH, disk)
    check_numbered(core, set(range(1, sequence + 1)), sequence)
    core.close()


def life(disk: SimulatedDisk, acknowledged: list[int]) -> None:
    """Two starts with groups of two batches, snapshots with groups in their middle, and an expiry."""
    for _ in range(2):
        core = open_core(PATH, disk)
        for step in range(3):
            take_group(core, acknowledged)
            pending = core.begin_snapshot()
            take_group(core, acknowledged)
            written = core.write_snapshot(pending)
            if step == 1:
                take_group(core, acknowledged)
            core.end_snapshot(pending, written)
            core.clear_snapshot(pending, written)
        core.expire_producers(0)
        core.close()


def take_group(core: ShardCore, acknowledged: list[int]) -> None:
    first = max(acknowledged, default=0) + 1
    outcomes = commit(core, numbered(first), numbered(first + 1))
    assert duplicates(outcomes) == [False, False]
    acknowledged += [first, first + 1]


def test_power_lost_before_any_operation_loses_no_acknowledged_batch_and_counts_no_resend_twice() -> None:
    whole = new_disk()
    life(whole, [])
    # All kinds of operations, those on the log more often.
    on_log = [index for index, operation in enumerate(whole.operations) if "/log/" in operation]
    kept: set[bool] = set()
    for turn, index in enumerate(sorted({*on_log[::3], *range(0, len(whole.operations), 23)})):
        disk = new_disk()
        disk.fault = crash_at(index)
        acknowledged: list[int] = []
        with pytest.raises(PowerLossError):
            life(disk, acknowledged)
        highest = max(acknowledged, default=0)
        for number, (what, survivor) in enumerate(disk.survivors()):
            if number % 4 != turn % 4:
                continue
            core = open_core(PATH, survivor)
            # What was under way is resent; so is what had been acknowledged, by a client that did not hear of it.
            under_way = duplicates(commit(core, numbered(highest + 1), numbered(highest + 2)))
            assert under_way in ([True, True], [False, False]), (index, what)
            kept.add(under_way[0])
            assert duplicates(commit(core, *map(numbered, acknowledged))) == [True] * highest, (index, what)
            check_numbered(core, set(range(1, highest + 3)), highest + 3)
            core.close()
    assert kept == {True, False}
