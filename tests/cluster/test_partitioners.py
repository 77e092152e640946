"""Real clusters of each partitioner: the same plays, the same answers; and round_robin when processes die and join."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.cluster.processes import READY_SECONDS, Cluster, entries_of, ranked, run_topk, top_k, wait_for
from topk_grpc import TopKClient
from topk_grpc.cli.main import Partitioner
from topk_grpc.pb.topk.v1 import play_pb2, query_pb2
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.ring import PARTITIONERS
from topk_grpc.topology import open_store
from topk_grpc.topology.store import TopologyStore

pytestmark = pytest.mark.cluster

SPREAD: Final = "round_robin"
HOUR: Final = 3_600_000
NOW: Final = 1_700_000_000_000 // HOUR * HOUR
BATCHES: Final = 60
WINDOWS: Final = (
    query_pb2.Window(**{"global": query_pb2.GlobalWindow()}),  # type: ignore[arg-type]  # a keyword of Python
    query_pb2.Window(tumbling=query_pb2.TumblingWindow(size_ms=HOUR)),
    query_pb2.Window(sliding=query_pb2.SlidingWindow(size_ms=2 * HOUR, slide_ms=HOUR // 2)),
    query_pb2.Window(sliding=query_pb2.SlidingWindow(size_ms=HOUR)),
    query_pb2.Window(range=query_pb2.RangeWindow(start_ms=NOW - HOUR, end_ms=NOW + HOUR // 2)),
)


def batch(sequence: int, producer: str = "p") -> play_pb2.PlayBatch:
    """Skewed, over two hours, with a chart."""
    chance = random.Random(sequence)
    message = play_pb2.PlayBatch(producer_id=producer, sequence=sequence)
    for _ in range(100):
        song_id = f"song-{int(300 * chance.random() ** 3):03d}"
        charts = ["x"] if chance.random() < 0.3 else []
        message.plays.add(song_id=song_id, played_at_ms=NOW + chance.randrange(-HOUR, HOUR), charts=charts)
    return message


def send(cluster: Cluster, sequence: int, producer: str = "p") -> pb.RecordPlaysResponse:
    request = pb.RecordPlaysRequest(batch=batch(sequence, producer))
    return cluster.stub.RecordPlays(request, timeout=30, wait_for_ready=True)


def counts_of(*sequences: int, chart: str = "") -> Counter[str]:
    plays = (play for sequence in sequences for play in batch(sequence).plays)
    return Counter(play.song_id for play in plays if not chart or chart in play.charts)


@contextlib.contextmanager
def running(root: Path, partitioner: str, shards: int = 3) -> Iterator[Cluster]:
    root.mkdir(exist_ok=True)
    cluster = Cluster(root, shards, options=("--partitioner", partitioner, "--slots", "256"))
    try:
        yield cluster.start()
    finally:
        cluster.close()


def test_the_command_line_knows_every_partitioner() -> None:
    assert [one.value for one in Partitioner] == list(PARTITIONERS)


def test_the_same_plays_give_the_same_answers_byte_for_byte(tmp_path: Path) -> None:
    answers: dict[str, list[bytes]] = {}
    for partitioner in PARTITIONERS:
        with running(tmp_path / partitioner, partitioner) as cluster:
            assert all(send(cluster, sequence).accepted == 100 for sequence in range(1, BATCHES + 1))
            described = cluster.wait_whole()
            assert (described.partitioner, described.slots) == (partitioner, 256)
            assert all(shard.total_plays for shard in described.shards)
            found = answers[partitioner] = []
            for window in WINDOWS:
                for chart in ("", "x"):
                    for k in (1, 7, 100, 10_000):
                        request = pb.GetTopKRequest(window=window, k=k, chart=chart)
                        if window.WhichOneof("kind") != "global":
                            request.as_of.time_ms = NOW + HOUR // 3 - 1000  # the tier of its age has minutes
                        answer = cluster.stub.GetTopK(request, timeout=30)
                        answer.certificate.ClearField("distinct_songs")
                        found.append(answer.SerializeToString(deterministic=True))
            whole = top_k(cluster.address)
            assert entries_of(whole) == ranked(counts_of(*range(1, BATCHES + 1)))
    assert answers["ring"] == answers["modulo"] == answers[SPREAD]


def test_after_kills_every_batch_counts_once_and_the_audit_agrees(tmp_path: Path) -> None:
    with running(tmp_path / "killed", SPREAD) as cluster:
        for sequence in range(1, BATCHES + 1):
            if sequence % 12 == 0:
                cluster.kill(random.Random(sequence).choice(["shard-0", "shard-1", "shard-2", "gateway"]))
            assert send_until_it_is_in(cluster, sequence).accepted == 100
        cluster.kill("everything")
        cluster.start()
        # Nothing of a producer's last 64 batches counts again.
        for sequence in range(1, BATCHES + 1):
            assert send(cluster, sequence).accepted == 100
        everything = range(1, BATCHES + 1)
        for chart in ("", "x"):
            assert entries_of(top_k(cluster.address, chart=chart)) == ranked(counts_of(*everything, chart=chart))
        audited = run_topk("audit", "--json", "--data-dir", str(cluster.data_dir))
        assert audited.returncode == 0, audited.stdout
        shards = json.loads(audited.stdout)["shards"]
        assert sum(shard["plays"] for shard in shards) == 100 * BATCHES
        refused = run_topk("rank", "song-001", "--gateway", cluster.address)
        assert refused.returncode == 1
        assert "--partitioner ring" in refused.stderr
        shown = run_topk("top", "-k", "1", "--gateway", cluster.address)
        assert f"{100 * BATCHES:,} plays; exact" in " ".join(shown.stdout.split())


def send_until_it_is_in(cluster: Cluster, sequence: int) -> pb.RecordPlaysResponse:
    def sent() -> pb.RecordPlaysResponse | None:
        with contextlib.suppress(Exception):
            return send(cluster, sequence)
        return None

    answer: pb.RecordPlaysResponse = wait_for(sent, READY_SECONDS, f"batch {sequence} is acknowledged")
    return answer


def test_a_data_directory_keeps_its_partitioner_and_slots(tmp_path: Path) -> None:
    with running(tmp_path / "kept", SPREAD, 1) as cluster:
        send(cluster, 1)
        cluster.stop()
        for options in (("--partitioner", "ring"), ("--slots", "1024")):
            refused = run_topk("up", "--data-dir", str(cluster.data_dir), "--port", "0", *options)
            assert refused.returncode != 0
            assert [line for line in refused.stderr.splitlines() if options[0] in line and "was made with" in line]
            assert "Traceback" not in refused.stderr
        cluster.start()
        assert entries_of(top_k(cluster.address)) == ranked(counts_of(1))
    new = ("up", "--data-dir", str(tmp_path / "new"), "--port", "0")
    assert run_topk(*new, "--partitioner", "random").returncode == 2
    few = run_topk(*new, "--shards", "3", "--slots", "2")
    assert few.returncode == 1
    assert "3 shards cannot share 2 slots" in few.stderr


# --- A shard joins ----------------------------------------------------------------------------------------------------


async def has_joined(store: TopologyStore) -> bool:
    """Whether shard-2 has its slots, and nothing is under way."""
    topology = await store.read()
    return len(topology.slots_of("shard-2")) >= 256 // 3 and not topology.migrations


async def test_a_shard_that_joins_takes_slots_and_no_plays_and_every_batch_counts_once(tmp_path: Path) -> None:
    with running(tmp_path / "grown", SPREAD, 2) as cluster:
        store = open_store(cluster.topology)
        try:
            for sequence in range(1, BATCHES + 1):
                await asyncio.to_thread(send, cluster, sequence)
            added = await asyncio.to_thread(
                run_topk, "cluster", "add", "shard-2", "--no-wait", "--gateway", cluster.address
            )
            assert added.returncode == 0, added.stderr
            live: Counter[str] = Counter()
            async with TopKClient(cluster.address, batch_plays=50, deadline_seconds=60) as client:
                async with asyncio.timeout(60):
                    while not await has_joined(store):
                        for number in range(100):
                            song_id = f"song-{number % 17:03d}"
                            await client.record(song_id, NOW)
                            live[song_id] += 1
                        await client.flush()
                        answer = await client.top_k("global", 10)
                        truth = ranked(counts_of(*range(1, BATCHES + 1)) + live, 10)
                        assert [(entry.rank, entry.song_id, entry.count) for entry in answer.entries] == truth
                assert client.stats.plays_accepted == live.total()
            before = {shard.shard_id: shard.total_plays for shard in cluster.wait_whole().shards}
            assert sum(before.values()) == 100 * BATCHES + live.total()
            assert before["shard-2"] < live.total()  # nothing of what was counted before
            for sequence in range(1, BATCHES + 1):  # their marks are where their slots are
                assert (await asyncio.to_thread(send, cluster, sequence)).duplicate
            for sequence in range(BATCHES + 1, BATCHES + 31):
                assert (await asyncio.to_thread(send, cluster, sequence)).accepted == 100
            after = {shard.shard_id: shard.total_plays for shard in cluster.wait_whole().shards}
            assert after["shard-2"] > before["shard-2"]
            total = counts_of(*range(1, BATCHES + 31)) + live
            assert entries_of(await asyncio.to_thread(top_k, cluster.address)) == ranked(total)
        finally:
            await store.close()
        for command, refusal in (("drain", "draining a shard"), ("remove", "removing a shard that has started")):
            refused = await asyncio.to_thread(run_topk, "cluster", command, "shard-2", "--gateway", cluster.address)
            assert refused.returncode == 1
            assert refusal in refused.stderr
