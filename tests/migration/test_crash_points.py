"""Power is lost before every file operation of either shard while slots move: one owner, and every play once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.migration.two_shards import NAMES, TwoShards
from tests.shard.cores import take_snapshot
from topk_grpc.engine import cells
from topk_grpc.kernels import compiled

STRIDE = 1 if compiled() else 25
"""Uncompiled kernels are hundreds of times slower: there some of the crashes have to do."""

pytestmark = pytest.mark.timeout(600)


@dataclass
class Crash:
    """What may be found, and where that was."""

    found: TwoShards
    where: str


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "CHUNK_CELLS", 1 << 10)
        yield


def test_every_play_counts_once_wherever_power_is_lost_while_slots_move(capsys: pytest.CaptureFixture[str]) -> None:
    life = TwoShards.new()
    crashes: list[Crash] = []
    seen = set()

    def watch(name: str) -> None:
        def look(operation: str, path: Path) -> None:
            for what, survivor in life.disks[name].survivors():
                key = (name, survivor.digest(), life.topology.epoch, life.sent)
                if key not in seen:
                    seen.add(key)
                    where = f"{name}: before {operation} {path} in step {life.step!r}; what survived: {what}"
                    crashes.append(Crash(life.copy(name, survivor), where))

        life.disks[name].fault = look

    for name in NAMES:
        watch(name)
    for step in life.live():
        life.step = step
    operations = sum(len(disk.operations) for disk in life.disks.values())
    for number, crash in enumerate(crashes[::STRIDE]):
        for abort in (False, True):
            found = crash.found.copy("", next(iter(crash.found.disks.values())))
            where = f"{crash.where}; then {'aborted' if abort else 'gone on with'}"
            found.recover(abort=abort)
            found.send_again()
            found.check(where)
            if number % 3 == 0:
                for core in found.cores.values():
                    take_snapshot(core)
                found.restart()
                found.check(where)
    with capsys.disabled():
        print(
            f"\ncrash points while slots move: {operations} file operations, {len(crashes)} different disks after them"
        )
    assert operations >= 60
    assert len(crashes) >= 150


@pytest.mark.parametrize("name", NAMES)
def test_power_is_lost_again_while_a_shard_starts_with_slots_on_their_way(name: str) -> None:
    """Frozen slots and a held image are found again however often the start is cut off."""
    life = TwoShards.new()
    for step in life.live():
        if step == "snapshot of an image":
            break
    disk = life.disks[name].copy()
    again = life.copy(name, disk)
    crashes: list[Crash] = []

    def look(operation: str, path: Path) -> None:
        for what, survivor in disk.survivors():
            where = f"{name}: before {operation} {path} in a start; what survived: {what}"
            crashes.append(Crash(again.copy(name, survivor), where))

    disk.fault = look
    again.recover(abort=False)
    for number, crash in enumerate(crashes[::STRIDE]):
        crash.found.recover(abort=bool(number % 2))
        crash.found.send_again()
        crash.found.check(crash.where)
    assert len(crashes) >= 12
