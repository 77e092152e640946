"""kill -9 of every process in the middle of an ingest, and then every count against an oracle."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import grpc
import pytest

from tests.cluster.processes import (
    GLOBAL,
    TOPK,
    Cluster,
    Server,
    entries_of,
    environment,
    ranked,
    run_topk,
    top_k,
    wait_for,
)
from topk_grpc import TopKClient
from topk_grpc.kernels import compiled
from topk_grpc.model import ClusterSettings, ShardInfo, Topology
from topk_grpc.pb.topk.v1 import query_pb2
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.pb.topk.v1.play_pb2 import PlayBatch
from topk_grpc.pb.topk.v1.topk_service_pb2_grpc import TopKServiceStub
from topk_grpc.ring.plan import plan_owners
from topk_grpc.topology import open_store

pytestmark = pytest.mark.cluster

VICTIMS: Final = ("shard-0", "shard-1", "gateway", "supervisor", "everything")
"""`supervisor` dies alone, and its children with it by themselves; `everything` is all of them at one moment."""

DAY_MS: Final = 86_400_000
FIRST_MS: Final = 1_700_000_000_000 // DAY_MS * DAY_MS


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster to be killed; each test counts in a chart of its own."""
    cluster = Cluster(tmp_path_factory.mktemp("victim"))
    try:
        yield cluster.start()
    finally:
        cluster.close()


def assert_counts(address: str, chart: str, counts: dict[str, int]) -> None:
    """All of the chart, and its totals."""
    answer = top_k(address, chart=chart)
    assert entries_of(answer) == ranked(counts)
    assert answer.certificate.complete
    assert answer.certificate.total_plays == sum(counts.values())
    assert answer.certificate.distinct_songs == len(counts)


def kill_and_restart(cluster: Cluster, name: str) -> None:
    cluster.kill(name)
    if name in {"supervisor", "everything"}:
        cluster.start()


# --- The client library -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VICTIMS)
async def test_client_goes_on_after_a_kill_and_every_play_counts_once(victim: Cluster, name: str) -> None:
    chart = f"client {name}"
    counts: Counter[str] = Counter()
    days = (Counter[str](), Counter[str]())
    killing: asyncio.Task[None] | None = None

    async with TopKClient(victim.address, batch_plays=300, batches_in_flight=24, deadline_seconds=60) as client:
        for number in range(60_000):
            song_id = f"song {number * number % 4999}"
            day = number % 2
            await client.record(song_id, FIRST_MS + day * DAY_MS + number, charts=[chart])
            counts[song_id] += 1
            days[day][song_id] += 1
            if killing is None and client.stats.batches_acknowledged >= 60:
                killing = asyncio.create_task(asyncio.to_thread(kill_and_restart, victim, name))
        before_the_end = client.stats.batches_acknowledged
        await client.flush()
        stats = client.stats

    assert killing is not None and before_the_end < 200
    await killing
    assert stats.batches_acknowledged == 200
    assert stats.plays_accepted == 60_000
    assert (stats.reconnects > 0) == (name not in {"shard-0", "shard-1"})  # shards are the gateway's to wait for
    await asyncio.to_thread(victim.wait_whole)
    assert_counts(victim.address, chart, counts)
    for day, expected in enumerate(days):
        window = query_pb2.Window(tumbling=query_pb2.TumblingWindow(size_ms=DAY_MS))
        request = pb.GetTopKRequest(window=window, k=10_000, chart=chart)
        request.as_of.time_ms = FIRST_MS + day * DAY_MS
        assert entries_of(victim.stub.GetTopK(request, timeout=30)) == ranked(expected)


# --- topk ingest ------------------------------------------------------------------------------------------------------

ROWS: Final = 500_000 if compiled() else 30_000


@dataclass(frozen=True)
class File:
    path: Path
    counts: dict[str, int]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> File:
    """Large enough to be killed in the middle; with a column of charts for each test."""
    path = tmp_path_factory.mktemp("plays") / "plays.csv"
    header = ",".join(["song", "at", *(f"chart of {name}" for name in (*VICTIMS, "ingest"))])
    charts = ",".join(f"ingest {name}" for name in (*VICTIMS, "ingest"))
    counts: Counter[str] = Counter()
    with path.open("w") as rows:
        rows.write(header + "\n")
        for number in range(ROWS):
            song_id = f"song {number * number % 9973}"
            counts[song_id] += 1
            rows.write(f"{song_id},{FIRST_MS + number},{charts}\n")
    return File(path, dict(counts))


def ingest_arguments(file: File, cluster: Cluster, name: str) -> list[str]:
    # Another chart column is another mapping, and so another producer: the file counts again, in its own chart.
    mapping = ["--song", "song", "--time", "at", "--chart", f"chart of {name}"]
    return ["ingest", str(file.path), *mapping, "--gateway", cluster.address, "--json"]


def plays_so_far(cluster: Cluster, chart: str) -> int:
    request = pb.GetTopKRequest(window=GLOBAL, k=1, chart=chart)
    return cluster.stub.GetTopK(request, timeout=20, wait_for_ready=True).certificate.total_plays


def wait_for_first_plays(cluster: Cluster, chart: str, ingest: subprocess.Popen[bytes], log: Path) -> int:
    def counted() -> int:
        assert ingest.poll() is None, f"the ingest ended: {log.read_text()}"
        return plays_so_far(cluster, chart)

    return int(wait_for(counted, 60, "the first plays are counted"))


def start_ingest(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen([*TOPK, *arguments], stdout=output, stderr=output, env=environment())


@pytest.mark.parametrize("name", VICTIMS)
def test_ingest_goes_on_after_a_kill_and_every_row_counts_once(
    victim: Cluster, file: File, tmp_path: Path, name: str
) -> None:
    arguments = ingest_arguments(file, victim, name)
    log = tmp_path / "ingest"
    ingest = start_ingest(arguments, log)
    try:
        counted = wait_for_first_plays(victim, f"ingest {name}", ingest, log)
        victim.kill(name)
        assert counted < ROWS and ingest.poll() is None, "the kill came too late: give the file more rows"
        if name in {"supervisor", "everything"}:
            victim.start()
        code = ingest.wait(80)
    finally:
        ingest.kill()
        ingest.wait()

    assert code == 0, log.read_text()
    victim.wait_whole()
    assert_counts(victim.address, f"ingest {name}", file.counts)


def test_ingest_killed_with_the_whole_cluster_resumes(victim: Cluster, file: File, tmp_path: Path) -> None:
    arguments = ingest_arguments(file, victim, "ingest")
    log = tmp_path / "ingest"
    ingest = start_ingest(arguments, log)
    try:
        counted = wait_for_first_plays(victim, "ingest ingest", ingest, log)
    finally:
        ingest.kill()
        ingest.wait()
    assert counted < ROWS
    victim.kill("everything")
    victim.start()
    assert 0 < plays_so_far(victim, "ingest ingest") < ROWS

    for _ in range(2):
        done = run_topk(*arguments)
        assert done.returncode == 0, done.stderr
        assert_counts(victim.address, "ingest ingest", file.counts)


# --- Kill after kill --------------------------------------------------------------------------------------------------


class Roles:
    """Shards and gateways without a supervisor, so that a killed one is back at once."""

    def __init__(self, root: Path, shards: int, gateways: int) -> None:
        self.root = root
        self.topology = f"file:{root / 'topology.json'}"
        ids = tuple(f"shard-{number}" for number in range(shards))
        asyncio.run(self._create(ids))
        self.shards = {shard_id: self._start_shard(shard_id) for shard_id in ids}
        self._gateways = [
            Server(["gateway", "--topology", self.topology, "--listen", "127.0.0.1:0"], root / f"gateway-{number}")
            for number in range(gateways)
        ]

    async def _create(self, ids: Sequence[str]) -> None:
        store = open_store(self.topology)
        settings = ClusterSettings()
        owners = plan_owners(settings.partitioner, ids, settings.slots)
        await store.compare_and_set(Topology("kills", 1, settings, tuple(map(ShardInfo, ids)), owners, "secret"))
        await store.close()

    def _start_shard(self, shard_id: str) -> Server:
        place = ("--shard-id", shard_id, "--data-dir", str(self.root / shard_id))
        # Small, so that kills meet snapshots and new segments too.
        settings = {"TOPK_SEGMENT_BYTES": str(1 << 18), "TOPK_SNAPSHOT_LOG_BYTES": str(1 << 19)}
        return Server(["shard", "--topology", self.topology, *place], self.root / shard_id, settings)

    def wait_ready(self) -> list[str]:
        """The gateways' addresses."""
        for shard in self.shards.values():
            shard.wait_ready()
        return [gateway.wait_ready() for gateway in self._gateways]

    def kill_and_restart(self, shard_id: str) -> None:
        self.shards[shard_id].kill()
        self.shards[shard_id] = self._start_shard(shard_id)

    def close(self) -> None:
        for server in (*self.shards.values(), *self._gateways):
            server.kill()


@dataclass
class Producer:
    """Batches by hand: each goes to any gateway until it is acknowledged, and now and then once more to another."""

    number: int
    stubs: Sequence[TopKServiceStub]
    chance: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    batches: int = 0
    retries: int = 0
    resends: int = 0
    last: pb.RecordPlaysRequest = field(default_factory=pb.RecordPlaysRequest)

    async def run(self, until: float) -> None:
        while time.monotonic() < until:
            self.batches += 1
            batch = PlayBatch(producer_id=f"producer {self.number}", sequence=self.batches)
            for _ in range(self.chance.randrange(1, 400)):
                song_id = f"song {int(self.chance.paretovariate(0.7)) % 3000}"
                batch.plays.add(
                    song_id=song_id, played_at_ms=FIRST_MS + self.chance.randrange(DAY_MS), charts=["kills"]
                )
                self.counts[song_id] += 1
            request = pb.RecordPlaysRequest(batch=batch)
            await self._send(request, time.monotonic() + 60)
            if self.chance.random() < 0.3:
                self.resends += 1
                # Whether it says `duplicate` is open: a gateway that wrote to a killed shard twice cannot know.
                again = await self._send(request, time.monotonic() + 60)
                assert again.accepted == len(batch.plays)
            self.last = request

    async def _send(self, request: pb.RecordPlaysRequest, deadline: float) -> pb.RecordPlaysResponse:
        while True:
            stub = self.chance.choice(self.stubs)
            try:
                return await asyncio.to_thread(stub.RecordPlays, request, timeout=self.chance.choice((0.3, 20)))
            except grpc.RpcError as error:
                # A deadline of 0.3 s leaves batches behind of which nobody knows whether they count.
                retriable = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
                assert error.code() in retriable, error
                assert time.monotonic() < deadline, error
                self.retries += 1
            await asyncio.sleep(0.02)


async def kill_random_shards(roles: Roles, chance: random.Random, until: float) -> int:
    kills = 0
    while time.monotonic() < until:
        await asyncio.to_thread(roles.kill_and_restart, chance.choice(sorted(roles.shards)))
        kills += 1
        await asyncio.sleep(chance.uniform(0.05, 1.5))  # now and then in the middle of a recovery
    return kills


async def test_kill_after_kill_under_load_loses_and_doubles_nothing(tmp_path: Path) -> None:
    seed = int(os.environ.get("TOPK_TEST_SEED", "0")) or random.randrange(1 << 32)
    seconds = float(os.environ.get("TOPK_TEST_SECONDS", "10"))
    print(f"TOPK_TEST_SEED={seed}")
    chance = random.Random(seed)
    roles = await asyncio.to_thread(Roles, tmp_path, 2, 2)
    channels: list[grpc.Channel] = []
    try:
        addresses = await asyncio.to_thread(roles.wait_ready)
        channels = [grpc.insecure_channel(address, options=[("grpc.enable_retries", 0)]) for address in addresses]
        stubs = [TopKServiceStub(channel) for channel in channels]
        producers = [Producer(number, stubs, random.Random(chance.random())) for number in range(3)]
        streamed: Counter[str] = Counter()

        async def stream(until: float) -> None:
            async with TopKClient(addresses, batch_plays=500, deadline_seconds=60) as client:
                while time.monotonic() < until:
                    song_id = f"song {chance.randrange(3000)}"
                    await client.record(song_id, FIRST_MS + chance.randrange(DAY_MS), charts=["kills"])
                    streamed[song_id] += 1
                await client.flush()

        until = time.monotonic() + seconds
        killing = asyncio.create_task(kill_random_shards(roles, chance, until))
        await asyncio.gather(killing, stream(until), *(producer.run(until) for producer in producers))
        kills = killing.result()

        await asyncio.to_thread(roles.wait_ready)
        batches, retries, resends = (
            sum(getattr(producer, name) for producer in producers) for name in ("batches", "retries", "resends")
        )
        snapshots = sum(shard.err.read_text().count('"snapshot_taken"') for shard in roles.shards.values())
        print(f"{kills} kills, {snapshots} snapshots, {batches} batches, {retries} retries, {resends} resends")
        counts = sum((producer.counts for producer in producers), streamed)
        for producer, stub in itertools.product(producers, stubs):
            again = await asyncio.to_thread(stub.RecordPlays, producer.last, timeout=20)
            assert again.duplicate
        for address in addresses:
            await asyncio.to_thread(assert_counts, address, "kills", counts)
            await asyncio.to_thread(assert_counts, address, "", counts)
        first, second = [await asyncio.to_thread(top_k, address) for address in addresses]
        assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)
        assert kills >= 3 and retries > 0 and resends > 0
    finally:
        for channel in channels:
            channel.close()
        await asyncio.to_thread(roles.close)
