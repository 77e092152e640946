"""Power is lost before each single file operation; whatever the disk may then hold, no acknowledged group is lost."""

from __future__ import annotations

from tests.storage.simulated_disk import PowerLossError, SimulatedDisk, crash_at
from tests.storage.workload import GROUP_RECORDS, Owner, new_disk


def work(disk: SimulatedDisk, owners: list[Owner]) -> None:
    """A life with everything in it: first start, segment rolls, snapshots, deletion of the log, an ordinary restart."""
    for _ in range(2):
        owner = Owner.__new__(Owner)
        owners.append(owner)  # also known when power is lost inside its start
        owner.acknowledged = owner.under_way = 0
        if len(owners) > 1:
            owner.acknowledged = owners[-2].acknowledged
        start(owner, disk)
        for step in range(9):
            owner.append()
            if step % 3 == 2:
                owner.take_snapshot()
        owner.close()


def start(owner: Owner, disk: SimulatedDisk) -> None:
    expected = owner.acknowledged
    try:
        owner.__init__(disk)  # type: ignore[misc]
    except PowerLossError:
        owner.acknowledged = expected
        raise
    assert owner.acknowledged == expected


def lose_power_at(operation_index: int) -> tuple[SimulatedDisk, Owner] | None:
    """Runs until power is lost; None if all was done before."""
    disk = new_disk()
    disk.fault = crash_at(operation_index)
    owners: list[Owner] = []
    try:
        work(disk, owners)
    except PowerLossError:
        return disk, owners[-1]
    return None


def check_recovers(disk: SimulatedDisk, acknowledged: int, under_way: int, where: str) -> int:
    """Every acknowledged group is there, the one under way wholly or not at all, and life goes on."""
    owner = Owner(disk)
    found = owner.numbers()
    assert found in (list(range(acknowledged)), list(range(acknowledged + under_way))), where
    owner.append()
    owner.take_snapshot()
    owner.append()
    owner.close()
    again = Owner(disk)
    assert again.numbers() == list(range(len(found) + 2 * GROUP_RECORDS)), where
    assert again.recovery.notes == [], where
    return len(found)


def operation_count() -> int:
    disk = new_disk()
    work(disk, [])
    return len(disk.operations)


def test_work_uses_every_operation_that_changes_the_disk() -> None:
    disk = new_disk()
    work(disk, [])
    assert {operation.split()[0] for operation in disk.operations} == {
        *("create", "rename", "remove", "make_directory", "sync_directory"),
        *("reserve", "write", "truncate", "sync", "lock"),
    }


def test_no_acknowledged_group_is_lost_wherever_power_is_lost() -> None:
    kept_under_way = dropped_under_way = 0
    seen = set()
    for index in range(operation_count()):
        lost = lose_power_at(index)
        assert lost is not None
        disk, owner = lost
        for what, survivor in disk.survivors():
            if (key := (survivor.digest(), owner.acknowledged, owner.under_way)) in seen:
                continue
            seen.add(key)
            where = f"power lost before operation {index}, after {disk.operations[-1:]}; what survived: {what}"
            found = check_recovers(survivor, owner.acknowledged, owner.under_way, where)
            if owner.under_way:
                kept_under_way += found > owner.acknowledged
                dropped_under_way += found == owner.acknowledged
    assert lose_power_at(operation_count()) is None
    assert kept_under_way > 0
    assert dropped_under_way > 0


def test_no_acknowledged_group_is_lost_when_power_is_lost_again_in_recovery() -> None:
    seen = set()
    for index in range(0, operation_count(), 5):
        lost = lose_power_at(index)
        assert lost is not None
        disk, owner = lost
        for what, survivor in list(disk.survivors())[index % 2 :: 2]:
            for again in range(1000):
                second = survivor.copy()
                second.fault = crash_at(again)
                try:
                    Owner(second)
                    break
                except PowerLossError:
                    for what_again, third in second.survivors():
                        if (key := (third.digest(), owner.acknowledged, owner.under_way)) in seen:
                            continue
                        seen.add(key)
                        where = f"power lost at {index} ({what}), then at {again} of recovery ({what_again})"
                        check_recovers(third, owner.acknowledged, owner.under_way, where)
