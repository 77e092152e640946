"""`topk audit` on real shards: while they serve, stopped, with a state that was touched, with a log that is damaged."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.processes import READY_SECONDS, Cluster, Server, environment, run_topk, wait_for
from topk_grpc.kernels import compiled
from topk_grpc.pb.topk.v1 import play_pb2
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb

pytestmark = pytest.mark.cluster

NOW = 1_700_000_000_000
SETTINGS = {
    "TOPK_SNAPSHOT_LOG_BYTES": str(1 << 17 if compiled() else 1 << 18),  # an audit has to be faster than two snapshots
    "TOPK_SEGMENT_BYTES": str(1 << 16),
    "TOPK_STANDING_WINDOWS": "tumbling:1h,session:15m",
    "TOPK_LOG_LEVEL": "info",
}

TAMPERED = """
import sys
from topk_grpc.cli.main import main
from topk_grpc.shard.core import ShardCore

configure = ShardCore.configure

def touched(core, now_ms):
    configure(core, now_ms)
    core.state.boards["global"]._rows[core.state.songs.find_texts(["song-7"])[0], 0] += 3

ShardCore.configure = touched
main()
"""


def record(cluster: Cluster, sequence: int, plays: int = 200, producer: str = "p") -> None:
    batch = play_pb2.PlayBatch(producer_id=producer, sequence=sequence)
    for at in range(plays):
        number = (sequence * 37 + at * at) % 500
        batch.plays.add(song_id=f"song-{number}", played_at_ms=NOW + sequence * 1000 + at, charts=["x", "y"][: at % 3])
    cluster.stub.RecordPlays(pb.RecordPlaysRequest(batch=batch), timeout=30, wait_for_ready=True)


def ready_in(log: Path) -> Callable[[], bool]:
    return lambda: '"ready"' in log.read_text()


def audit(*arguments: str) -> tuple[int, dict[str, Any]]:
    done = run_topk("audit", "--json", *arguments)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    it = Cluster(tmp_path, 2, SETTINGS)
    try:
        yield it.start()
    finally:
        it.close()


def test_a_cluster_is_audited_while_plays_arrive_and_snapshots_are_taken_and_when_it_has_stopped(
    cluster: Cluster,
) -> None:
    for sequence in range(1, 150):
        record(cluster, sequence)
    wait_for(lambda: all(map(cluster.snapshots, ("shard-0", "shard-1"))), 120, "there are snapshots to count from")
    stop = threading.Event()
    sent: list[int] = []

    def go_on() -> None:
        while not stop.is_set():
            sent.append(150 + len(sent))
            record(cluster, sent[-1])

    sending = threading.Thread(target=go_on)
    sending.start()
    try:
        for _ in range(3):
            before = len(sent)
            code, told = audit("--data-dir", str(cluster.data_dir))
            assert code == 0, told
            assert told["ok"]
            assert all(shard["live"] and len(shard["counts"]) == 2 for shard in told["shards"])
            plays = sum(shard["plays"] for shard in told["shards"])
            assert 200 * (149 + max(before - 1, 0)) <= plays <= 200 * (149 + len(sent))
    finally:
        stop.set()
        sending.join()
    assert cluster.server is not None
    assert '"snapshot_taken"' in cluster.server.stderr
    cluster.stop()
    code, told = audit("--data-dir", str(cluster.data_dir))
    assert code == 0, told
    assert sum(shard["plays"] for shard in told["shards"]) == 200 * (149 + len(sent))
    assert not any(shard["live"] for shard in told["shards"])
    done = run_topk("audit", "--data-dir", str(cluster.data_dir / "shard-1"))
    assert done.returncode == 0
    assert "shard-1: ok: " in done.stdout
    assert "what a start would serve" in done.stdout


def test_a_shard_whose_state_was_touched_is_found_out_and_the_song_is_named(cluster: Cluster, tmp_path: Path) -> None:
    for sequence in range(1, 60):
        record(cluster, sequence)
    cluster.stop()
    servers = []
    try:
        for shard_id in ("shard-0", "shard-1"):
            data_dir = str(cluster.data_dir / shard_id)
            arguments = ["shard", "--topology", cluster.topology, "--shard-id", shard_id, "--data-dir", data_dir]
            log = tmp_path / shard_id
            with log.with_suffix(".err").open("wb") as err:
                process = subprocess.Popen(
                    [sys.executable, "-c", TAMPERED, *arguments],
                    stdin=subprocess.DEVNULL, stdout=err, stderr=err, env=environment() | SETTINGS,
                )  # fmt: skip
            servers.append(process)
            wait_for(ready_in(log.with_suffix(".err")), READY_SECONDS, f"{shard_id} is ready")
        code, told = audit("--data-dir", str(cluster.data_dir))
        assert code == 1
        wrong = [shard for shard in told["shards"] if not shard["ok"]]
        assert wrong, told
        said = "\n".join(difference for shard in wrong for difference in shard["differences"])
        assert "the plays of 1 slots differ" in said
        assert "'song-7' in the global chart: the shard serves" in said
        done = run_topk("audit", "--data-dir", str(cluster.data_dir), "--shard-id", wrong[0]["shard_id"])
        assert done.returncode == 1
        assert "differences from what it serves" in done.stdout
    finally:
        for process in servers:
            process.kill()
            process.wait(10)


def test_a_damaged_tail_stops_the_start_and_is_cut_on_demand_and_resends_bring_it_back(
    cluster: Cluster, tmp_path: Path
) -> None:
    for sequence in range(1, 20):
        record(cluster, sequence, producer="resends")
    cluster.kill("everything")
    shard = cluster.data_dir / "shard-0"
    (segment,) = (shard / "log").glob("*.log")
    content = bytearray(segment.read_bytes())
    at = content.index(b"resends", len(bytes(content).rstrip(b"\0")) // 2)
    content[at] ^= 1
    segment.write_bytes(bytes(content))

    arguments = ["shard", "--topology", cluster.topology, "--shard-id", "shard-0", "--data-dir", str(shard)]
    server = Server(arguments, tmp_path / "alone")
    assert server.wait_end() == 3  # starting again cannot help
    assert "topk audit --repair-tail" in server.stderr
    code, told = audit("--data-dir", str(cluster.data_dir))
    assert code == 1
    assert "repair-tail" in told["shards"][0]["error"]
    assert told["shards"][1]["ok"]

    code, told = audit("--data-dir", str(cluster.data_dir), "--repair-tail")
    assert code == 0
    cut = told["shards"][0]["cut"]
    assert told["shards"][1]["cut"] is None
    assert Path(cut["kept"]).read_bytes() == bytes(content).rstrip(b"\0")[-cut["cut_bytes"] :]
    assert {one["producer_id"] for one in cut["batches"]} <= {"resends"}
    lost = {one["sequence"] for one in cut["batches"]}
    assert lost
    assert max(lost) == 19
    cluster.start()
    for sequence in range(1, 20):  # those that are left count once
        record(cluster, sequence, producer="resends")
    code, told = audit("--data-dir", str(cluster.data_dir))
    assert code == 0
    assert sum(one["plays"] for one in told["shards"]) == 19 * 200
    done = run_topk("audit", "--data-dir", str(cluster.data_dir), "--repair-tail")
    assert done.returncode == 1
    assert "in use by another process" in done.stderr


def test_what_is_no_data_directory_is_said_in_a_line(tmp_path: Path) -> None:
    done = run_topk("audit", "--data-dir", str(tmp_path / "nowhere"))
    assert done.returncode == 1
    assert "is no data directory" in done.stderr
    assert run_topk("audit").returncode == 2
    assert not (tmp_path / "nowhere").exists()
