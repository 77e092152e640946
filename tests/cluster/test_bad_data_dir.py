"""Damaged and foreign data directories: refused with file, place and what to do, or repaired without losing a play.

Each case works on a copy of a directory that a killed cluster left behind. What is refused must not have been changed:
with the file put back, everything is there.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from tests.cluster.processes import Cluster, Server, entries_of, ranked, top_k, wait_for
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.pb.topk.v1.play_pb2 import PlayBatch

pytestmark = pytest.mark.cluster

PLAYED_MS: Final = 1_700_000_000_000
SETTINGS: Final = {"TOPK_SEGMENT_BYTES": str(1 << 16), "TOPK_SNAPSHOT_LOG_BYTES": str(1 << 16)}
"""Small, so that few plays fill several segments and take snapshots."""


def errors_of(shard: Server) -> list[str]:
    """What a process wrote on stderr, but for the warnings that its kernels are not compiled."""
    slow = ("kernels are not compiled", "kernels_uncompiled")
    return [line for line in shard.stderr.splitlines() if not any(word in line for word in slow)]


@dataclass(frozen=True)
class Left:
    """What a killed cluster left, and what had been acknowledged."""

    data_dir: Path
    counts: dict[str, int]


def send(cluster: Cluster, sequence: int, counts: dict[str, int], plays: int) -> None:
    batch = PlayBatch(producer_id="before", sequence=sequence)
    for number in range(plays):
        song_id = f"song {(number * sequence) % 1500:04} of a rather long name"
        counts[song_id] = counts.get(song_id, 0) + 1
        batch.plays.add(song_id=song_id, played_at_ms=PLAYED_MS + sequence)
    cluster.stub.RecordPlays(pb.RecordPlaysRequest(batch=batch), timeout=20)


@pytest.fixture(scope="module")
def lefts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Left]]:
    """`log`: a log of a few groups in one segment; `snapshots`: two snapshots and the log behind the older."""
    root = tmp_path_factory.mktemp("left")
    counts: dict[str, int] = {}
    found = {}
    cluster = Cluster(root, shards=1, settings=SETTINGS)
    try:
        cluster.start()
        for sequence in range(1, 11):
            send(cluster, sequence, counts, 20)
        cluster.kill("everything")
        found["log"] = Left(shutil.copytree(cluster.data_dir, root / "log"), dict(counts))
        cluster.start()
        snapshots = cluster.data_dir / "shard-0" / "snapshots"

        def two_taken() -> bool:
            nonlocal sequence
            sequence += 1
            send(cluster, sequence, counts, 1500)
            first = cluster.data_dir / "shard-0" / "log" / f"{0:020}.log"
            return len(list(snapshots.iterdir())) >= 2 and not first.exists()

        wait_for(two_taken, 60, "two snapshots, and the log before them deleted")
        for _ in range(3):
            sequence += 1
            send(cluster, sequence, counts, 20)
        cluster.kill("everything")
        found["snapshots"] = Left(shutil.copytree(cluster.data_dir, root / "snapshots"), dict(counts))
        yield found
    finally:
        cluster.close()


@dataclass
class Copy:
    """A directory to damage, with its shard."""

    path: Path
    counts: dict[str, int]

    @property
    def shard(self) -> Path:
        return self.path / "shard-0"

    @property
    def segments(self) -> list[Path]:
        return sorted((self.shard / "log").glob("*.log"))

    @property
    def snapshots(self) -> list[Path]:
        return sorted(path for path in (self.shard / "snapshots").iterdir() if path.name.isdigit())

    def role(self, name: str, *arguments: str) -> Server:
        topology = ("--topology", f"file:{self.path / 'topology.json'}")
        listen = () if "--listen" in arguments else ("--listen", "127.0.0.1:0")
        return Server([name, *topology, *listen, *arguments], self.path / name, SETTINGS)

    def start_shard(self, *arguments: str) -> Server:
        return self.role("shard", "--shard-id", "shard-0", "--data-dir", str(self.shard), *arguments)

    def refuse(self, *words: str) -> None:
        """The shard does not start, says why in one line, and has changed nothing."""
        before = self.content()
        shard = self.start_shard()
        try:
            assert shard.wait_end() == 3
        finally:
            shard.kill()
        (line,) = errors_of(shard)
        assert line.startswith("error: ")
        for word in words:
            assert word in line
        assert self.content() == before

    def content(self) -> dict[str, bytes]:
        files = (path for path in self.shard.rglob("*") if path.is_file() and path.name != "LOCK")
        return {str(path): path.read_bytes() for path in files}

    @contextmanager
    def serving(self) -> Iterator[Server]:
        """Shard and gateway run."""
        shard, gateway = self.start_shard(), self.role("gateway")
        try:
            shard.wait_ready()
            address = gateway.wait_ready()
            assert entries_of(top_k(address)) == ranked(self.counts)
            yield shard
        finally:
            gateway.kill()
            shard.kill()


@pytest.fixture
def copy_of(lefts: dict[str, Left], tmp_path: Path) -> Callable[[str], Copy]:
    def copy(name: str) -> Copy:
        left = lefts[name]
        return Copy(shutil.copytree(left.data_dir, tmp_path / name), left.counts)

    return copy


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def written_end(path: Path) -> int:
    """Where the zeros begin that the segment has reserved."""
    return len(path.read_bytes().rstrip(b"\0"))


# --- The log ----------------------------------------------------------------------------------------------------------


def test_flipped_bit_in_the_log_stops_the_start(copy_of: Callable[[str], Copy]) -> None:
    copy = copy_of("log")
    (segment,) = copy.segments
    whole = segment.read_bytes()
    offset = written_end(segment) // 2

    flip(segment, offset)
    copy.refuse(f"{segment} is damaged at byte ", "checksum", "Nothing was changed", "from its last backup")

    segment.write_bytes(whole)
    with copy.serving():
        pass


@pytest.mark.parametrize("size", [30, 1000, "almost"])
def test_truncated_log_stops_the_start(copy_of: Callable[[str], Copy], size: int | str) -> None:
    copy = copy_of("log")
    (segment,) = copy.segments
    whole = segment.read_bytes()
    kept = written_end(segment) - 1 if isinstance(size, str) else size

    segment.write_bytes(whole[:kept])
    copy.refuse(f"{segment} is damaged at byte {kept if kept >= 40 else ''}", "from its last backup")

    if size == "almost":
        segment.write_bytes(whole)
        with copy.serving():
            pass


def test_missing_log_stops_the_start(copy_of: Callable[[str], Copy]) -> None:
    copy = copy_of("log")
    (segment,) = copy.segments

    segment.unlink()
    copy.refuse(f"{segment} is damaged: the log is missing from position 0 on", "from its last backup")


@pytest.mark.parametrize("tail", ["garbage", "part of a group"])
def test_torn_tail_that_was_never_acknowledged_is_cut(copy_of: Callable[[str], Copy], tail: str) -> None:
    copy = copy_of("log")
    (segment,) = copy.segments
    data = bytearray(segment.read_bytes())
    end = written_end(segment)
    # What a group that was under way can leave: anything, or the beginning of what it would have been.
    torn = random.Random(3).randbytes(200) if tail == "garbage" else data[1100:1300]
    data[end : end + 200] = torn
    segment.write_bytes(data)

    with copy.serving() as shard:
        note = shard.event("recovery_note")

    assert note is not None
    assert str(segment) in note["note"] and "had not been acknowledged" in note["note"]


# --- Snapshots --------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_middle(path: Path) -> None:
    flip(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("arrays.npz", flip_middle),
        ("arrays.npz", truncate),
        ("manifest.json", flip_middle),
        ("manifest.json", Path.unlink),
    ],
)
def test_damaged_newest_snapshot_costs_time_but_no_play(
    copy_of: Callable[[str], Copy], name: str, damage: Callable[[Path], None]
) -> None:
    copy = copy_of("snapshots")
    newest = copy.snapshots[-1]

    damage(newest / name)
    with copy.serving() as shard:
        note = shard.event("recovery_note")

    assert note is not None
    assert f"snapshot {newest.name} is damaged" in note["note"]
    assert str(newest) in note["note"]
    assert "using the one before" in note["note"]


def test_two_damaged_snapshots_stop_the_start(copy_of: Callable[[str], Copy]) -> None:
    copy = copy_of("snapshots")
    files = [snapshot / "arrays.npz" for snapshot in copy.snapshots]
    whole = [file.read_bytes() for file in files]

    for file in files:
        flip_middle(file)
    copy.refuse(str(copy.shard), "snapshot", "damaged", "Nothing was changed", "backup")

    for file, content in zip(files, whole, strict=True):
        file.write_bytes(content)
    with copy.serving() as shard:
        assert shard.event("recovery_note") is None


# --- Versions and owners ----------------------------------------------------------------------------------------------


def test_newer_data_format_stops_the_start(copy_of: Callable[[str], Copy]) -> None:
    copy = copy_of("log")
    marker = copy.shard / "FORMAT"
    whole = marker.read_text()

    marker.write_text(whole.replace('"format": 1', '"format": 2'))
    copy.refuse(f"{copy.shard} has data format 2", "reads up to 1", "start the release that wrote it")

    marker.write_text(whole)
    with copy.serving():
        pass


def test_damaged_format_marker_stops_the_start(copy_of: Callable[[str], Copy]) -> None:
    copy = copy_of("log")
    marker = copy.shard / "FORMAT"

    flip(marker, marker.stat().st_size - 5)
    copy.refuse(f"{marker} is damaged", "Restore it from a backup")

    marker.unlink()
    copy.refuse(f"{marker} is missing, but there is data", "Restore FORMAT from a backup")


def test_other_data_directory_is_refused(copy_of: Callable[[str], Copy], tmp_path: Path) -> None:
    copy = copy_of("log")
    own = copy.shard.rename(tmp_path / "aside")

    shard = copy.start_shard()  # an empty directory, where there were plays
    assert shard.wait_end() == 3
    assert "its plays are elsewhere or lost" in shard.stderr and "--data-dir" in shard.stderr

    shutil.rmtree(copy.shard)
    own.rename(copy.shard)
    with copy.serving():
        pass


def test_shard_on_a_port_in_use_is_an_error_at_once(copy_of: Callable[[str], Copy], cluster: Cluster) -> None:
    copy = copy_of("log")

    shard = copy.start_shard("--listen", cluster.address)

    assert shard.wait_end() == 1
    (line,) = errors_of(shard)
    assert line.startswith(f"error: port {cluster.port} of 127.0.0.1 is in use by another process")
    assert "--listen" in line


def test_up_tells_which_file_of_which_shard_is_damaged(copy_of: Callable[[str], Copy]) -> None:
    copy = copy_of("log")
    (segment,) = copy.segments
    flip(segment, written_end(segment) // 2)

    up = Server(["up", "--data-dir", str(copy.path), "--port", "0"], copy.path / "up")
    try:
        assert up.wait_end(60) == 1
    finally:
        up.kill()

    last = up.stderr.splitlines()[-1]
    assert last.startswith("error: shard-0 does not start")
    assert f"{segment} is damaged at byte" in last and "from its last backup" in last
