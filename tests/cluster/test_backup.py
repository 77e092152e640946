"""`topk backup` of a cluster that runs, the loss of its directory, `topk restore`, and resends: each play once."""

from __future__ import annotations

import json
import shutil
import signal
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.processes import Cluster, entries_of, environment, ranked, run_topk, top_k
from topk_grpc.pb.topk.v1 import play_pb2
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb

pytestmark = pytest.mark.cluster

NOW = 1_700_000_000_000
SETTINGS = {"TOPK_SNAPSHOT_SECONDS": "1", "TOPK_SEGMENT_BYTES": str(1 << 16)}
BATCHES = 90

KILLED = """
import os, signal, sys
from topk_grpc.storage.files import OsFiles

left = int(sys.argv.pop(1))

def before(method):
    def call(*arguments, **options):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return method(*arguments, **options)
    return call

for name in ("create", "rename", "remove", "make_directory", "sync_directory"):
    setattr(OsFiles, name, before(getattr(OsFiles, name)))
from topk_grpc.cli.main import main
main()
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    it = Cluster(tmp_path, 2, SETTINGS)
    try:
        yield it.start()
    finally:
        it.close()


def batch(sequence: int) -> play_pb2.PlayBatch:
    made = play_pb2.PlayBatch(producer_id=f"p{sequence % 3}", sequence=1 + sequence // 3)
    for at in range(150):
        number = (sequence * 31 + at * at) % 400
        made.plays.add(song_id=f"song-{number}", played_at_ms=NOW + sequence * 1000 + at, charts=["x"][: at % 2])
    return made


def send(cluster: Cluster, sequences: range) -> list[bool]:
    """Whether each was a duplicate."""
    found = []
    for sequence in sequences:
        request = pb.RecordPlaysRequest(batch=batch(sequence))
        found.append(cluster.stub.RecordPlays(request, timeout=30, wait_for_ready=True).duplicate)
    return found


def truth(sequences: range, chart: str = "") -> list[tuple[int, str, int]]:
    plays = (play for sequence in sequences for play in batch(sequence).plays if not chart or chart in play.charts)
    return ranked(Counter(play.song_id for play in plays))


def topk(*arguments: str) -> dict[str, Any]:
    done = run_topk(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def check(cluster: Cluster, sequences: range) -> None:
    for chart in ("", "x"):
        assert entries_of(top_k(cluster.address, chart=chart)) == truth(sequences, chart)
    told = topk("audit", "--data-dir", str(cluster.data_dir))
    assert told["ok"]


def test_a_lost_directory_is_restored_and_resends_bring_everything_back_once(cluster: Cluster, tmp_path: Path) -> None:
    target = tmp_path / "backups"
    send(cluster, range(30))
    first = topk("backup", "--data-dir", str(cluster.data_dir), "--to", str(target))
    send(cluster, range(30, 60))
    second = topk("backup", "--data-dir", str(cluster.data_dir), "--to", str(target))
    assert (first["backup"], second["backup"]) == (1, 2)
    send(cluster, range(60, BATCHES))
    cluster.kill("everything")
    shutil.rmtree(cluster.data_dir)

    assert topk("restore", str(target), "--check")["ok"]
    topk("restore", str(target), "--data-dir", str(cluster.data_dir))
    secret = cluster.data_dir / "topology.json"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    kept = [path for path in (target / "objects").iterdir() if path.name.startswith("topology")]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in kept)
    cluster.start()
    check(cluster, range(60))
    assert send(cluster, range(BATCHES)) == [True] * 60 + [False] * 30
    check(cluster, range(BATCHES))

    # An older point in time, elsewhere; and once more, which is refused.
    elsewhere = tmp_path / "elsewhere"
    topk("restore", str(target), "--backup", "1", "--data-dir", str(elsewhere))
    told = topk("audit", "--data-dir", str(elsewhere))
    assert sum(shard["plays"] for shard in told["shards"]) == 30 * 150
    refused = run_topk("restore", str(target), "--data-dir", str(elsewhere))
    assert refused.returncode == 1
    assert "is not empty" in refused.stderr


def test_one_shard_is_restored_into_a_running_cluster_also_from_an_older_snapshot(
    cluster: Cluster, tmp_path: Path
) -> None:
    target = tmp_path / "backups"
    for start in range(0, BATCHES, 10):
        send(cluster, range(start, start + 10))
        topk("backup", "--data-dir", str(cluster.data_dir), "--to", str(target))
    listed = topk("restore", str(target), "--list")["backups"]
    assert len(listed) == 9
    snapshots = [one["number"] for backup in listed for one in backup["shards"]["shard-1"]["snapshots"]]
    assert snapshots
    cluster.kill("everything")
    lost = cluster.data_dir / "shard-1"
    for chosen in (None, snapshots[-1], snapshots[-2] if len(snapshots) > 1 else None):
        shutil.rmtree(lost)
        arguments = ["restore", str(target), "--shard-id", "shard-1", "--data-dir", str(lost)]
        topk(*arguments, *(["--snapshot", str(chosen)] if chosen is not None else []))
        cluster.start()
        check(cluster, range(BATCHES))
        cluster.kill("everything")


def test_a_restore_that_was_interrupted_is_told_of_and_begins_anew(cluster: Cluster, tmp_path: Path) -> None:
    target, half = tmp_path / "backups", tmp_path / "half"
    send(cluster, range(9))
    topk("backup", "--data-dir", str(cluster.data_dir), "--to", str(target))
    topk("restore", str(target), "--data-dir", str(half))
    # As it is when the process is killed before the end.
    (half / "topology.json").unlink()
    (half / "shard-1" / "FORMAT").unlink()
    for path in (half, half / "shard-1"):
        (path / "RESTORING").write_text("")
    up = run_topk("up", "--data-dir", str(half), "--port", "0")
    assert up.returncode == 1
    assert "run `topk restore` again" in up.stderr
    topk("restore", str(target), "--data-dir", str(half))
    assert topk("audit", "--data-dir", str(half))["ok"]
    empty = run_topk("restore", str(tmp_path), "--data-dir", str(tmp_path / "new"))
    assert empty.returncode == 1
    assert "holds no backups" in empty.stderr


def killed_after(operations: int, *arguments: str) -> bool:
    """Runs a command that is killed after so many file operations; whether it was."""
    command = [sys.executable, "-c", KILLED, str(operations), *arguments]
    code = subprocess.run(command, check=False, capture_output=True, timeout=60, env=environment()).returncode
    assert code in {0, -signal.SIGKILL}
    return code != 0


def test_a_backup_and_a_restore_killed_on_the_way_are_whole_or_said_not_to_be(cluster: Cluster, tmp_path: Path) -> None:
    target = tmp_path / "backups"
    send(cluster, range(9))
    cluster.stop()
    back_up = ["backup", "--data-dir", str(cluster.data_dir), "--to", str(target)]
    for operations in (2, 7, 20, 45):
        killed_after(operations, *back_up)
        listed = run_topk("restore", str(target), "--list", "--json")
        if listed.returncode == 0:
            assert all(len(one["shards"]) == 2 for one in json.loads(listed.stdout)["backups"])
        else:
            assert "holds no backups" in listed.stderr
    last = topk(*back_up)["backup"]
    assert topk("restore", str(target), "--check")["backup"] == last
    for operations in (1, 4, 12, 30, 60):
        half = tmp_path / f"half-{operations}"
        restore = ["restore", str(target), "--data-dir", str(half)]
        if killed_after(operations, *restore):
            assert run_topk("audit", "--data-dir", str(half)).returncode == 1
            topk(*restore)
        told = topk("audit", "--data-dir", str(half))
        assert sum(shard["plays"] for shard in told["shards"]) == 9 * 150
