"""What only a real kernel can show: kill -9 between and inside appends, and a disk that is really full."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.storage.workload import GROUP_RECORDS, Owner
from topk_grpc.errors import DiskFullError
from topk_grpc.storage import DataDirectory, OsFiles, Snapshot, recover

APPEND = """
import sys
from pathlib import Path
from tests.storage.workload import Owner
from topk_grpc.storage import OsFiles
owner = Owner(OsFiles(), Path(sys.argv[1]), 4096)
print("recovered", owner.acknowledged, flush=True)
for step in range(100_000):
    owner.append()
    print("acknowledged", owner.acknowledged, flush=True)
    if step % 20 == 19:
        owner.take_snapshot()
"""


def test_kill_9_again_and_again_loses_no_acknowledged_group(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    acknowledged = 0
    for lines in (1, 7, 30, 3, 55):
        with subprocess.Popen(
            [sys.executable, "-c", APPEND, str(tmp_path / "data")], stdout=subprocess.PIPE, cwd=root, text=True
        ) as process:
            assert process.stdout is not None
            word, number = process.stdout.readline().split()
            assert word == "recovered"
            assert acknowledged <= int(number) <= acknowledged + GROUP_RECORDS
            for _ in range(lines):
                word, number = process.stdout.readline().split()
            os.kill(process.pid, signal.SIGKILL)
            rest = [line.split() for line in process.stdout.read().splitlines()]
            acknowledged = int([number, *(line[1] for line in rest if len(line) == 2)][-1])
            process.wait()
    owner = Owner(OsFiles(), tmp_path / "data", 4096)
    assert acknowledged <= owner.acknowledged <= acknowledged + GROUP_RECORDS
    assert owner.numbers() == list(range(owner.acknowledged))
    owner.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(path)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a tmpfs")
def test_a_full_disk_is_survived_and_used_again_when_there_is_room(small_disk: Path) -> None:
    directory = DataDirectory.open(small_disk / "data")
    recovery = recover(directory, 64 << 10)
    assert list(recovery.records()) == []
    log = recovery.open_log()
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(100 << 10))
    payloads = []
    with pytest.raises(DiskFullError, match=r"Nothing was written\. Free disk space"):
        for number in range(1000):
            log.append_group([(1, [payload := number.to_bytes(4, "little") * 1000])])
            payloads.append(payload)
    assert len(payloads) > 80
    with pytest.raises(DiskFullError, match="no play is lost"):
        recovery.snapshots.write(Snapshot(log.position, {}, {}))
    with pytest.raises(DiskFullError):
        log.append_group([(1, [bytes(4000)])])
    ballast.unlink()
    for _ in range(5):
        log.append_group([(1, [b"room"])])
        payloads.append(b"room")
    recovery.snapshots.write(Snapshot(log.position, {}, {}))
    log.close()
    directory.close()

    (small_disk / "data/snapshots/000002/manifest.json").unlink()  # so that all of the log is read
    directory = DataDirectory.open(small_disk / "data")
    recovery = recover(directory, 64 << 10)
    assert [bytes(payload) for _, payload, _ in recovery.records()] == payloads
    recovery.open_log().close()
    directory.close()


def test_a_log_that_is_cut_by_its_shard_stays_readable(tmp_path: Path) -> None:
    """Behind its groups a segment has room, which goes when the shard begins the next one."""
    path = tmp_path / "segment"
    file = OsFiles().create(path)
    file.reserve(1 << 20)
    file.write(0, [b"groups"])
    data = OsFiles().map(path, changing=True)
    file.truncate(6)
    file.close()
    assert (bytes(data[:6]), bytes(data[1 << 19 :])) == (b"groups", bytes(1 << 19))
