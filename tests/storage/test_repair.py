"""Cutting a damaged tail: only there, only where recovery refuses it, whole or not at all, and nothing thrown away."""

from __future__ import annotations

import pytest

from tests.storage.simulated_disk import PowerLossError, SimulatedDisk, crash_at
from tests.storage.workload import GROUP_RECORDS, PATH, Owner, write_log
from topk_grpc.errors import CorruptError, DirectoryInUseError
from topk_grpc.storage import DataDirectory
from topk_grpc.storage.repair import Cut, repair_tail

GROUPS = 12


def damaged(back: int, *, close: bool = False, segment_bytes: int = 4000) -> tuple[SimulatedDisk, bytes]:
    """A log whose last segment has a wrong byte, so many bytes before its end; and the segment."""
    disk = write_log(GROUPS, segment_bytes, close=close)
    segment = [path for path in disk.files(PATH) if path.suffix == ".log"][-1]
    content = bytearray(disk.map(segment))
    written = len(bytes(content).rstrip(b"\0"))
    content[written - back] ^= 0x40
    disk.write_durably(segment, bytes(content))
    return disk, bytes(content)


def repair(disk: SimulatedDisk) -> Cut | None:
    directory = DataDirectory.open(PATH, disk)
    try:
        return repair_tail(directory)
    finally:
        directory.close()


def test_a_damaged_tail_is_cut_where_it_is_damaged_and_kept() -> None:
    disk, content = damaged(back=200)
    with pytest.raises(CorruptError, match="topk audit --repair-tail"):
        Owner(disk)
    disk.end_of_process()
    cut = repair(disk)
    assert cut is not None
    assert bytes(disk.map(cut.kept)) == content[cut.position :].rstrip(b"\0")
    assert cut.cut_bytes == len(bytes(disk.map(cut.kept)))
    assert cut.groups >= 2
    owner = Owner(disk)
    kept = owner.acknowledged
    assert owner.numbers() == list(range(kept))
    assert 0 < kept < GROUPS * GROUP_RECORDS
    # All records behind the cut but the damaged one are known.
    lost = {int.from_bytes(payload[:8], "little") for _, payload in cut.records}
    assert lost <= set(range(kept, GROUPS * GROUP_RECORDS))
    assert len(lost) >= GROUPS * GROUP_RECORDS - kept - 1
    owner.append()
    owner.close()
    assert repair(disk) is None


def test_a_sound_log_and_a_torn_one_are_left_alone() -> None:
    for disk in (write_log(GROUPS), damaged(back=1)[0]):  # the last group of a log that was not closed
        before = disk.digest()
        assert repair(disk) is None
        assert disk.digest() == before


def test_damage_before_the_last_segment_is_not_cut() -> None:
    disk = write_log(GROUPS, 400)
    segments = [path for path in disk.files(PATH) if path.suffix == ".log"]
    assert len(segments) > 2
    content = bytearray(disk.map(segments[0]))
    content[60] ^= 1
    disk.write_durably(segments[0], bytes(content))
    before = disk.digest()
    with pytest.raises(CorruptError, match="not in the last segment"):
        repair(disk)
    assert disk.digest() == before


def test_a_damaged_header_of_the_last_segment_costs_that_segment() -> None:
    disk = write_log(GROUPS, 400)
    last = [path for path in disk.files(PATH) if path.suffix == ".log"][-1]
    content = bytearray(disk.map(last))
    content[3] ^= 1
    disk.write_durably(last, bytes(content))
    with pytest.raises(CorruptError):
        Owner(disk)
    disk.end_of_process()
    cut = repair(disk)
    assert cut is not None
    owner = Owner(disk)
    assert owner.numbers() == list(range(owner.acknowledged))
    owner.append()
    owner.close()


def test_a_directory_that_a_process_has_is_refused() -> None:
    disk, _ = damaged(back=1)
    Owner(disk)
    with pytest.raises(DirectoryInUseError):
        repair(disk)


def test_power_lost_at_any_step_of_a_repair_leaves_it_to_be_done_again() -> None:
    whole, _ = damaged(back=200)
    expected = whole.copy()
    done = repair(expected)
    assert done is not None
    numbers = Owner(expected).numbers()
    repair_steps = 0
    for index in range(1000):
        disk = whole.copy()
        disk.fault = crash_at(index)
        try:
            repair(disk)
            break
        except PowerLossError:
            repair_steps += 1
        for what, survivor in disk.survivors():
            again = repair(survivor)
            assert again is None or again.records == done.records, (index, what)
            assert bytes(survivor.map(done.kept)) == bytes(expected.map(done.kept)), (index, what)
            assert Owner(survivor).numbers() == numbers, (index, what)
    assert repair_steps >= 10
