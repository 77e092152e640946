"""A small owner of a data directory, as a shard is one: it numbers what it appends and can say what must be there."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from tests.storage.simulated_disk import SimulatedDisk
from topk_grpc.storage import Block, DataDirectory, Files, Log, Recovery, Snapshot, recover

PATH = Path("/data/shard-0")
SEGMENT_BYTES = 400
RECORD_TYPE = 7
GROUP_RECORDS = 3


class Owner:
    """State: the numbers appended so far, the oldest in an array, then in blocks, the newest in an array again."""

    def __init__(self, files: Files, path: Path = PATH, segment_bytes: int = SEGMENT_BYTES) -> None:
        self.acknowledged = 0
        self.under_way = 0
        self.directory = DataDirectory.open(path, files)
        self.recovery: Recovery = recover(self.directory, segment_bytes)
        self.old: list[int] = []
        self.blocks: tuple[Block, ...] = ()
        self.new: list[int] = []
        self.next_block_id = 0
        snapshot = self.recovery.snapshot
        if snapshot is not None:
            self.old = snapshot.arrays["old"].tolist()
            self.blocks = snapshot.blocks
            self.new = snapshot.arrays["new"].tolist()
            self.next_block_id = snapshot.meta["next_block_id"]
        for record_type, payload, _ in self.recovery.records():
            assert record_type == RECORD_TYPE
            number = struct.unpack_from("<q", payload)[0]
            assert bytes(payload[8:]) == padding(number)
            self.new.append(number)
        self.log: Log = self.recovery.open_log()
        self.acknowledged = len(self.numbers())

    def numbers(self) -> list[int]:
        return [*self.old, *(n for block in self.blocks for n in block.columns["numbers"].tolist()), *self.new]

    def append(self) -> None:
        """One group."""
        numbers = range(self.acknowledged, self.acknowledged + GROUP_RECORDS)
        self.under_way = GROUP_RECORDS
        self.log.append_group([(RECORD_TYPE, [struct.pack("<q", n), padding(n)]) for n in numbers])
        self.acknowledged, self.under_way = numbers.stop, 0
        self.new.extend(numbers)

    def take_snapshot(self) -> None:
        """The newest numbers become a block; all but two blocks are dissolved."""
        blocks = (*self.blocks, Block(self.next_block_id, {"numbers": np.array(self.new, np.int64)}))
        self.next_block_id += 1
        self.new = []
        for block in blocks[:-2]:
            self.old.extend(block.columns["numbers"].tolist())
        self.blocks = blocks[-2:]
        self.blocks = self.recovery.snapshots.write(
            Snapshot(
                self.log.position,
                {"next_block_id": self.next_block_id},
                {"old": np.array(self.old, np.int64), "new": np.array(self.new, np.int64)},
                self.blocks,
            )
        )
        self.log.delete_before(self.recovery.snapshots.kept_position())

    def close(self) -> None:
        self.log.close()
        self.directory.close()


def padding(number: int) -> bytes:
    return bytes((number * 7 + i) % 256 for i in range(number % 13))


def new_disk() -> SimulatedDisk:
    disk = SimulatedDisk()
    disk.make_directory(PATH.parent)
    disk.sync_directory(PATH.parent.parent)
    disk.operations.clear()
    return disk


def write_log(groups: int, segment_bytes: int = SEGMENT_BYTES, *, close: bool = True) -> SimulatedDisk:
    """A disk with a log of so many groups, without snapshots."""
    disk = new_disk()
    owner = Owner(disk, segment_bytes=segment_bytes)
    for _ in range(groups):
        owner.append()
    if close:
        owner.close()
    return disk.copy()
