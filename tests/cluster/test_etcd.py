"""A cluster whose topology is in etcd, as processes: etcd goes away and comes back, and nobody has to do anything."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.cluster.processes import Server, entries_of, free_port, ranked, run_topk, top_k, wait_for
from tests.faults.proxy import TO_CLIENT, TO_SERVER, Proxy, Trouble
from tests.security.certificates import Authority
from tests.topology.etcd_server import EtcdServer, Tls, needs_etcd
from topk_grpc.config import GatewaySettings
from topk_grpc.migration.calls import GrpcShardCalls
from topk_grpc.migration.mover import Mover
from topk_grpc.model import ClusterSettings, ShardInfo, Topology
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.pb.topk.v1.play_pb2 import PlayBatch
from topk_grpc.pb.topk.v1.topk_service_pb2_grpc import TopKServiceStub
from topk_grpc.ring import plan_owners
from topk_grpc.rpc.shard_channels import ShardChannels
from topk_grpc.topology import StoreAccess, open_store

pytestmark = [needs_etcd, pytest.mark.cluster]

SECRET = "the secret of the cluster"
SHARDS = ("shard-0", "shard-1")
SONGS = [f"song {number}" for number in range(50)]
NOW = int(time.time() * 1000)


class EtcdCluster:
    """etcd, two shards and two gateways. What is sent is also counted here."""

    def __init__(self, root: Path, etcd: EtcdServer | None = None, access: StoreAccess | None = None) -> None:
        self._root = root
        self._access = access or StoreAccess()
        self._started = 0
        self.servers: list[Server] = []
        self._sequence = 0
        self.counts: Counter[str] = Counter()
        self.etcd = etcd or EtcdServer(root / "etcd").start()
        self.url = self.etcd.url("clusters/one")
        self.shards: dict[str, Server] = {}
        self.gateways: list[str] = []

    def start(self) -> EtcdCluster:
        asyncio.run(self._create())
        for shard_id in SHARDS:
            self.start_shard(shard_id)
        gateways = [self.start_gateway() for _ in range(2)]
        for shard in self.shards.values():
            shard.wait_ready()
        self.gateways = [gateway.wait_ready() for gateway in gateways]
        return self

    async def _create(self) -> None:
        settings = ClusterSettings(slots=64)
        infos = tuple(map(ShardInfo, SHARDS))
        owners = plan_owners("ring", SHARDS, settings.slots)
        store = open_store(self.url, self._access)
        await store.compare_and_set(Topology("one", 1, settings, infos, owners, SECRET))
        await store.close()

    def topology(self) -> Topology:
        async def read() -> Topology:
            store = open_store(self.url, self._access)
            try:
                return await store.read()
            finally:
                await store.close()

        return asyncio.run(read())

    def _start(self, *arguments: str, url: str, settings: Mapping[str, str]) -> Server:
        self._started += 1
        log = self._root / f"{arguments[0]}-{self._started}"
        self.servers.append(Server([*arguments, "--topology", url], log, self._variables() | dict(settings)))
        return self.servers[-1]

    def _variables(self) -> dict[str, str]:
        given = {name: getattr(self._access, name) for name in ("ca", "cert", "key", "user", "password_file")}
        return {f"TOPK_ETCD_{name.upper()}": value for name, value in given.items() if value}

    def start_shard(self, shard_id: str, **settings: str) -> Server:
        arguments = ("shard", "--shard-id", shard_id, "--data-dir", str(self._root / shard_id))
        self.shards[shard_id] = self._start(*arguments, url=self.url, settings=settings)
        return self.shards[shard_id]

    def start_gateway(self, url: str = "", **settings: str) -> Server:
        return self._start("gateway", "--listen", "127.0.0.1:0", url=url or self.url, settings=settings)

    def send(self, gateway: str, seconds: float = 30) -> None:
        """A batch that has to be acknowledged, sent once more where that failed."""
        self._sequence += 1
        batch = PlayBatch(producer_id="producer", sequence=self._sequence)
        for number, song in enumerate(SONGS):
            if (number + self._sequence) % 3:
                batch.plays.add(song_id=song, played_at_ms=NOW)
                self.counts[song] += 1
        deadline = time.monotonic() + seconds
        with grpc.insecure_channel(gateway) as channel:
            while True:
                try:
                    TopKServiceStub(channel).RecordPlays(pb.RecordPlaysRequest(batch=batch), timeout=20)
                    return
                except grpc.RpcError:
                    if time.monotonic() > deadline:
                        raise

    def check(self) -> None:
        """Every gateway counts every play once."""
        for gateway in self.gateways:
            assert entries_of(top_k(gateway)) == ranked(self.counts)

    def audit(self) -> int:
        """The plays of all shards, each of which has to serve what is on its disk."""
        plays = 0
        for shard_id in SHARDS:
            done = run_topk("audit", "--data-dir", str(self._root / shard_id), "--topology", self.url, "--json")
            assert done.returncode == 0, done.stdout + done.stderr
            (told,) = json.loads(done.stdout)["shards"]
            assert told["live"]
            plays += told["plays"]
        return plays

    def close(self) -> None:
        for server in self.servers:
            server.kill()
        self.etcd.kill()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[EtcdCluster]:
    it = EtcdCluster(tmp_path)
    try:
        yield it.start()
    finally:
        it.close()


def test_a_cluster_logs_in_to_etcd_and_keeps_the_password_to_itself(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ca")
    password = "the password of the user"
    (tmp_path / "password").write_text(f"{password}\n")
    pair = authority.issue("client")
    access = StoreAccess(str(authority.path), str(pair.cert), str(pair.key), "topk", str(tmp_path / "password"))
    etcd = EtcdServer(tmp_path / "etcd", Tls(authority.path, authority.issue("etcd")))
    cluster = EtcdCluster(tmp_path, etcd, access)
    try:
        etcd.start().ask_for_passwords("topk", password, "clusters/one/")
        cluster.start()
        for _ in range(2):
            for gateway in cluster.gateways:
                cluster.send(gateway)
            cluster.check()
            etcd.kill()
            etcd.start()  # it has forgotten who has logged in
        cluster.shards["shard-1"].stop()
        cluster.start_shard("shard-1").wait_ready()
        cluster.send(cluster.gateways[0])
        cluster.check()
        for server in cluster.servers:
            shown = server.stderr
            if server.process.poll() is None:
                shown += Path(f"/proc/{server.pid}/cmdline").read_text()
            assert password not in shown
            assert SECRET not in shown
    finally:
        cluster.close()


def says_that_it_waits(server: Server) -> dict[str, Any]:
    line: dict[str, Any] = wait_for(lambda: server.event("waiting_for_topology_store"), 20, "it says that it waits")
    return line


def test_while_etcd_is_away_a_cluster_goes_on_and_then_heals_by_itself(cluster: EtcdCluster) -> None:
    first, second = cluster.gateways
    cluster.send(first)
    cluster.check()
    before = cluster.topology()

    cluster.etcd.kill()
    for gateway in (first, second, first):
        cluster.send(gateway)
    cluster.check()

    # Whoever starts now waits, and says what for.
    cluster.shards["shard-0"].kill()
    port = free_port()
    shard, third = cluster.start_shard("shard-0"), cluster.start_gateway(TOPK_HEALTH_PORT=str(port))
    for server in (shard, third):
        assert cluster.etcd.address in says_that_it_waits(server)["reason"]
    assert _health(port) == {"liveness": True, "readiness": False}
    assert shard.event("ready") is None
    assert third.event("ready") is None

    cluster.etcd.start()
    address = shard.wait_ready()
    cluster.gateways.append(third.wait_ready())
    assert _health(port) == {"liveness": True, "readiness": True}
    for each in cluster.gateways:
        cluster.send(each)
    cluster.check()
    assert cluster.audit() == sum(cluster.counts.values())

    # It is somewhere else now, and owns what it did.
    after = cluster.topology()
    assert after.owners == before.owners
    infos = before.shard("shard-0"), after.shard("shard-0")
    assert infos[0] is not None
    assert infos[1] == replace(infos[0], address=address)
    assert address != infos[0].address
    assert all(SECRET not in server.stderr for server in (shard, third))


def _health(port: int) -> dict[str, bool]:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answers = {
            name: stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10, wait_for_ready=True).status
            for name in ("liveness", "readiness")
        }
    return {name: status == health_pb2.HealthCheckResponse.SERVING for name, status in answers.items()}


def test_who_waits_for_etcd_can_be_stopped_and_gives_up_in_the_end(tmp_path: Path) -> None:
    url = f"etcd://127.0.0.1:{free_port()}/clusters/one"
    data = ("--shard-id", "shard-0", "--data-dir", str(tmp_path / "data"))
    roles = {"shard": ("shard", "--topology", url, *data), "gateway": ("gateway", "--topology", url)}
    for role, arguments in roles.items():
        server = Server(arguments, tmp_path / role)
        try:
            says_that_it_waits(server)
            server.process.terminate()
            assert server.wait_end(10) == 0
            assert server.event("stopped") is not None
        finally:
            server.kill()
        impatient = Server(arguments, tmp_path / f"{role}-impatient", {"TOPK_TOPOLOGY_WAIT_SECONDS": "0.5"})
        assert impatient.wait_end(20) == 1
        last = impatient.stderr.splitlines()[-1]
        assert last.startswith("error: the topology store was waited for 0.5 s (--topology-wait-seconds): etcd at")


async def test_a_gateway_that_is_cut_off_from_etcd_follows_slots_that_have_moved(cluster: EtcdCluster) -> None:
    proxy = Proxy(lambda: int(cluster.etcd.address.rpartition(":")[2]))
    gateway = cluster.start_gateway(url=f"etcd://127.0.0.1:{await proxy.start()}/clusters/one")
    try:
        stale = await asyncio.to_thread(gateway.wait_ready)
        await asyncio.to_thread(cluster.send, stale)
        cluster.gateways.append(stale)
        proxy.trouble = Trouble(cut=frozenset({TO_SERVER, TO_CLIENT}))  # nobody is told
        await _drain(cluster.url, "shard-0")
        after = await asyncio.to_thread(cluster.topology)
        assert after.slots_of("shard-0") == ()
        assert gateway.event("topology_changed") is None

        for _ in range(2):
            began = time.monotonic()
            await asyncio.to_thread(cluster.send, stale)
            assert time.monotonic() - began < 2  # the shard named the new owner: the store was not waited for
        await asyncio.to_thread(cluster.check)
        assert gateway.event("slots_rerouted") is not None
        assert gateway.event("topology_changed") is None

        proxy.reset()
        proxy.trouble = Trouble()
        await asyncio.to_thread(wait_for, lambda: gateway.event("topology_changed"), 30, "it hears of the moves")
        assert gateway.event("topology_changed")["epoch"] == after.epoch  # type: ignore[index]
        await asyncio.to_thread(cluster.send, stale)
        await asyncio.to_thread(cluster.check)
    finally:
        await proxy.close()


async def _drain(url: str, shard_id: str) -> None:
    """What `topk cluster drain` brings about."""
    store = open_store(url)
    present = await store.read()
    shards = tuple(replace(each, draining=each.shard_id == shard_id) for each in present.shards)
    await store.compare_and_set(replace(present, epoch=present.epoch + 1, shards=shards))
    channels = ShardChannels(GatewaySettings(topology=url), present.cluster_id, present.secret)
    calls = GrpcShardCalls(channels)
    mover = Mover(store, calls)
    async with asyncio.timeout(60):
        while await mover.step():
            pass
    await calls.close()
    await store.close()
