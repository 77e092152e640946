"""Backups and restores on a simulated disk: whole or not there, wherever interrupted; nothing damaged is copied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.storage.simulated_disk import PowerLossError, SimulatedDisk, crash_at
from tests.storage.workload import GROUP_RECORDS, PATH, Owner, new_disk
from topk_grpc.errors import CorruptError, DirectoryInUseError, StorageError, TopKError, VersionError
from topk_grpc.storage import DataDirectory
from topk_grpc.storage.archive import Archive
from topk_grpc.storage.backup import copy_shard
from topk_grpc.storage.checksums import encode_self_checked
from topk_grpc.storage.restore import plan_shard, restore_shard

TARGET = Path("/backup")
BACK = Path("/restored/shard-0")


def back_up(disk: SimulatedDisk, *, keep: int = 0) -> int:
    archive = Archive.open(TARGET, disk, make=True)
    with archive.held():
        look = DataDirectory.look(PATH, disk)
        number = archive.commit(
            {"created_ms": 1, "shards": {"s": copy_shard(look, "s", archive, live=True)}, "files": {}}
        )
        if keep:
            archive.prune(keep)
    return number


def restore(
    disk: SimulatedDisk, number: int | None = None, snapshot: int | None = None, path: Path = BACK
) -> list[int]:
    """Restores, and says what the owner finds."""
    archive = Archive.open(TARGET, disk, make=False)
    plan = plan_shard(archive, number or archive.numbers()[-1], "s", snapshot)
    restore_shard(archive, plan, disk, path)
    owner = Owner(disk, path)
    found = owner.numbers()
    assert owner.recovery.notes == []
    owner.append()
    owner.take_snapshot()
    owner.close()
    return found


def lived(groups: int, every: int = 3) -> tuple[SimulatedDisk, Owner]:
    disk = new_disk()
    owner = Owner(disk)
    for step in range(groups):
        owner.append()
        if step % every == every - 1:
            owner.take_snapshot()
    return disk, owner


@pytest.mark.parametrize("groups", [0, 1, 3, 4, 10, 15])
def test_a_backup_of_a_live_directory_is_restored_to_what_was_acknowledged(groups: int) -> None:
    disk, owner = lived(groups)
    back_up(disk)
    assert restore(disk) == list(range(owner.acknowledged))


def test_what_has_not_changed_is_not_copied_again() -> None:
    disk, owner = lived(14)
    back_up(disk)
    before = set(disk.names(TARGET / "objects"))
    disk.operations.clear()
    back_up(disk)
    assert set(disk.names(TARGET / "objects")) == before
    assert not [operation for operation in disk.operations if "objects/" in operation]
    owner.append()
    back_up(disk)
    new = set(disk.names(TARGET / "objects")) - before
    assert new
    assert all("~log~" in name for name in new)


def test_each_backup_is_restored_as_it_was_and_an_older_snapshot_with_the_log_of_later_ones() -> None:
    disk, owner = lived(4)
    ends = {}
    for _ in range(6):
        ends[back_up(disk)] = owner.acknowledged
        owner.append()
        owner.append()
        owner.take_snapshot()
    for number, acknowledged in ends.items():
        assert restore(disk, number, path=Path(f"/as-it-was-{number}/s")) == list(range(acknowledged))
    archive = Archive.open(TARGET, disk, make=False)
    snapshots = {one["number"] for n in archive.numbers() for one in archive.read(n)["shards"]["s"]["snapshots"]}
    assert len(snapshots) >= 6
    for snapshot in snapshots:  # each, up to the end of the last backup
        found = restore(disk, snapshot=snapshot, path=Path(f"/with-later-log-{snapshot}/s"))
        assert found == list(range(max(ends.values())))
    with pytest.raises(StorageError, match="no backup up to 6 has snapshot 77"):
        restore(disk, snapshot=77)


def test_a_gap_in_the_archived_log_is_said() -> None:
    disk, owner = lived(4)
    back_up(disk)
    for _ in range(20):  # so long that the log between two backups is deleted
        owner.append()
        owner.take_snapshot()
    back_up(disk)
    with pytest.raises(StorageError, match="is in no backup: it was deleted between two of them"):
        restore(disk, snapshot=1)
    assert restore(disk, 1, snapshot=1) == list(range(4 * GROUP_RECORDS))


def test_old_backups_are_removed_with_what_only_they_had() -> None:
    disk, owner = lived(5)
    for _ in range(5):
        back_up(disk, keep=2)
        for _ in range(4):
            owner.append()
            owner.take_snapshot()
    archive = Archive.open(TARGET, disk, make=False)
    assert archive.numbers() == [4, 5]
    for number in archive.numbers():
        restore(disk, number, path=Path(f"/kept-{number}/s"))
    named = sum(len(plan_shard(archive, number, "s").objects()) for number in (4, 5))
    assert len(disk.names(TARGET / "objects")) <= named


def crash_everywhere(
    make: Callable[[], SimulatedDisk], act: Callable[[SimulatedDisk], Any]
) -> list[tuple[str, SimulatedDisk]]:
    """The disks that may be found when power is lost before each operation of `act`; each once."""
    found: list[tuple[str, SimulatedDisk]] = []
    seen = set()
    for index in range(10_000):
        disk = make()
        disk.fault = crash_at(index)
        try:
            act(disk)
            assert index > 10
            return found
        except PowerLossError:
            for what, survivor in disk.survivors():
                if survivor.digest() not in seen:
                    seen.add(survivor.digest())
                    found.append((f"before operation {index}, {what}", survivor))
    raise AssertionError("it never ended")


def test_a_backup_interrupted_at_any_step_is_whole_or_not_there_and_the_next_one_succeeds() -> None:
    disk, owner = lived(8)
    back_up(disk)
    first = owner.acknowledged
    owner.append()
    owner.take_snapshot()
    second = owner.acknowledged
    whole = disk.copy()
    for make in (whole.copy, lambda: without_backups(whole)):
        counts = set()
        for where, survivor in crash_everywhere(make, back_up):
            try:
                numbers = Archive.open(TARGET, survivor, make=False).numbers()
            except StorageError:
                numbers = []
            counts.add(len(numbers))
            expected = {1: first, 2: second} if make == whole.copy else {1: second}
            for number in numbers:
                found = restore(survivor, number, path=Path(f"/restored-{number}/s"))
                assert found == list(range(expected[number])), where
            next_one = back_up(survivor)
            assert restore(survivor, next_one, path=Path("/next/s")) == list(range(second)), where
        assert counts == ({1, 2} if make == whole.copy else {0, 1})


def without_backups(disk: SimulatedDisk) -> SimulatedDisk:
    """The same disk before its first backup."""
    copy = disk.copy()
    copy.root.entries.pop("backup")
    return copy


def test_a_restore_interrupted_at_any_step_is_whole_or_refused_and_the_next_one_succeeds() -> None:
    disk, owner = lived(8)
    back_up(disk)
    whole = disk.copy()
    outcomes = set()
    for where, survivor in crash_everywhere(whole.copy, restore_only):
        copy = survivor.copy()
        try:
            again = Owner(copy, BACK)
        except TopKError as error:
            assert "restore" in str(error).lower(), where
            outcomes.add("refused")
        else:
            # A directory that nobody has begun to restore into is a new one.
            assert again.numbers() in ([], list(range(owner.acknowledged))), where
            outcomes.add("whole" if again.numbers() else "nothing")
            if not again.numbers():
                assert again.directory.is_new
        try:
            assert restore(survivor) == list(range(owner.acknowledged)), where
        except StorageError as error:
            assert "is not empty" in str(error)  # it is whole already
            assert Owner(survivor, BACK).numbers() == list(range(owner.acknowledged)), where
    assert outcomes == {"nothing", "refused", "whole"}


def restore_only(disk: SimulatedDisk) -> None:
    archive = Archive.open(TARGET, disk, make=False)
    restore_shard(archive, plan_shard(archive, archive.numbers()[-1], "s"), disk, BACK)


def test_a_damaged_backup_is_refused_before_anything_is_written() -> None:
    disk, _ = lived(8)
    back_up(disk)
    for name in disk.names(TARGET / "objects"):
        copy = disk.copy()
        content = bytearray(copy.map(TARGET / "objects" / name))
        content[len(content) // 2] ^= 1
        copy.write_durably(TARGET / "objects" / name, bytes(content))
        with pytest.raises(CorruptError, match="the backup is damaged"):
            restore(copy)
        assert "restored" not in copy.names(Path("/"))
    copy = disk.copy()
    copy.write_durably(TARGET / "backups/000001.json", b"{}")
    with pytest.raises(CorruptError, match="use another backup"):
        restore(copy)


def test_a_damaged_directory_is_not_backed_up_and_a_damaged_snapshot_is_left_out() -> None:
    disk, owner = lived(8)
    owner.append()
    segment = [path for path in disk.files(PATH) if path.suffix == ".log"][-2]
    content = bytearray(disk.map(segment))
    content[50] ^= 1
    broken = disk.copy()
    broken.write_durably(segment, bytes(content))
    with pytest.raises(CorruptError):
        back_up(broken)
    newest = [path for path in disk.files(PATH) if path.name == "arrays.npz"][-1]
    content = bytearray(disk.map(newest))
    content[70] ^= 1
    disk.write_durably(newest, bytes(content))
    number = back_up(disk)
    told = Archive.open(TARGET, disk, make=False).read(number)["shards"]["s"]
    assert len(told["snapshots"]) == 1
    assert "is damaged and was left out" in told["notes"][0]
    assert restore(disk) == list(range(owner.acknowledged))


def test_places_that_hold_something_else_are_refused() -> None:
    disk, _ = lived(2)
    with pytest.raises(StorageError, match="holds no backups"):
        Archive.open(PATH, disk, make=True)
    back_up(disk)
    disk.write_durably(TARGET.parent / "LOST", b"")
    with pytest.raises(StorageError, match="is not empty"):
        restore(disk, path=PATH)
    with Archive.open(TARGET, disk, make=False).held(), pytest.raises(DirectoryInUseError):
        back_up(disk)
    disk.write_durably(TARGET / "BACKUP", encode_self_checked({"format": 2}))
    with pytest.raises(VersionError, match="backup format 2"):
        back_up(disk)
