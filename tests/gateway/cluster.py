"""A cluster within a test: real shards in directories and a real gateway, each behind gRPC on the loopback interface.

What processes would do to each other is done to the servers: a shard is killed and comes back at another port, a line
between gateway and shard is cut, or carries requests and loses the answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import grpc

from tests.engine.engine_shard import NOW
from tests.oracle import slot_of
from topk_grpc.config import GatewaySettings, ShardSettings
from topk_grpc.engine import query
from topk_grpc.engine.query import Scope
from topk_grpc.gateway.admin import ClusterAdminService
from topk_grpc.gateway.description import ClusterDescriber
from topk_grpc.gateway.links import ShardLinks
from topk_grpc.gateway.queries import Queries
from topk_grpc.gateway.recorder import Recorder
from topk_grpc.gateway.routing import RoutingWatch
from topk_grpc.gateway.scatter import Scatter, ShardQueries
from topk_grpc.gateway.service import TopKService
from topk_grpc.model import ClusterSettings, Play, ShardInfo, Topology
from topk_grpc.pb.topk.v1 import admin_service_pb2_grpc as admin_grpc
from topk_grpc.pb.topk.v1 import play_pb2
from topk_grpc.pb.topk.v1 import shard_service_pb2_grpc as shard_grpc
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.pb.topk.v1 import topk_service_pb2_grpc as pb_grpc
from topk_grpc.ring import plan_owners
from topk_grpc.rpc.server import add_raw_handlers, bind, create_server
from topk_grpc.rpc.shard_channels import ShardChannels
from topk_grpc.shard import owner as owner_module
from topk_grpc.shard.core import Identity, ShardCore
from topk_grpc.shard.owner import ShardOwner
from topk_grpc.shard.registration import register
from topk_grpc.shard.service import ShardService
from topk_grpc.topology.store import TopologyStore, open_store

CLUSTER_ID = "cluster-1"
SLOTS = 16


class ShardServer:
    """One shard; `line` stands between it and the gateway."""

    def __init__(self, shard_id: str, path: Path, store: TopologyStore, **changes: Any) -> None:
        self.shard_id, self._store = shard_id, store
        settings = ShardSettings(topology="file:/nowhere", shard_id=shard_id, data_dir=str(path), heap_size=20)
        self.settings = dataclasses.replace(settings, **changes)
        self.line = Line()
        self.drain = asyncio.Event()

    async def start(self) -> Self:
        topology = await self._store.read()
        self.core = ShardCore(self.settings, topology.settings)
        self.core.recover()
        identity = Identity(topology.cluster_id, self.shard_id)
        self.core.own(identity, topology.slots_of(self.shard_id))
        self.owner = ShardOwner(self.core, self.settings)
        self.drain = asyncio.Event()
        self.service = ShardService(identity, self.drain)
        self.service.open(self.owner)
        self.server = create_server(32 << 20)
        shard_grpc.add_ShardServiceServicer_to_server(self.service, self.server)
        add_raw_handlers(self.server, "topk.v1.ShardService", stream_stream={"Append": self.service.append})
        self.address = await bind(self.server, "127.0.0.1:0")
        await self.server.start()
        await self.line.open(self.address)
        await self.register()
        return self

    async def register(self) -> None:
        await register(self._store, self.shard_id, self.line.address, self.core.directory_id, self.settings.data_dir)

    async def kill(self) -> None:
        """Gone in the middle of whatever it does, but for a group that is on its way to the disk just now."""
        await self.line.close()
        self.owner._loop_task.cancel()
        await asyncio.gather(self.owner._loop_task, return_exceptions=True)
        self.owner._writer.shutdown()
        self.owner._snapshots.shutdown()
        self.core._directory.close()
        await self.server.stop(None)

    async def stop(self) -> None:
        """As on SIGTERM."""
        self.drain.set()
        await self.server.stop(10)
        await self.owner.close(snapshot=True)
        await self.line.close()

    def counted(self, song_ids: Sequence[str], chart: str = "") -> list[int]:
        return query.counts_of(self.core.state, Scope(chart), song_ids)[0].counts


class Line:
    """A TCP relay at an address of its own."""

    def __init__(self) -> None:
        self._target = ""
        self._server: asyncio.Server | None = None
        self._relays: set[asyncio.Task[None]] = set()
        self.lose_answers = False
        self.requests_bytes = 0
        self.connections = 0
        self._silent = 0
        self.address = ""

    async def open(self, target: str) -> None:
        """Also again, at another port."""
        await self.close()
        self._target = target
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._relays.add(task)
        self.connections += 1
        number = self.connections
        host, port = self._target.split(":")
        far_writer: asyncio.StreamWriter | None = None
        try:
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
            ways = (
                asyncio.ensure_future(self._relay(number, reader, far_writer, to_shard=True)),
                asyncio.ensure_future(self._relay(number, far_reader, writer, to_shard=False)),
            )
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._relays.discard(task)
            for end in (writer, far_writer):
                if end is not None:
                    end.transport.abort()

    async def _relay(
        self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, to_shard: bool
    ) -> None:
        while data := await reader.read(1 << 16):
            if number <= self._silent:
                continue
            if to_shard:
                self.requests_bytes += len(data)
            elif self.lose_answers:
                continue
            writer.write(data)
            await writer.drain()

    def cut(self) -> None:
        """All connections break; new ones are taken."""
        for relay in list(self._relays):
            relay.cancel()

    def forget(self) -> None:
        """Connections that stand carry nothing any more, and nobody is told; new ones do."""
        self._silent = self.connections

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        relays = list(self._relays)
        self.cut()
        await asyncio.gather(*relays, return_exceptions=True)


class Gateway:
    """What gateway/server.py puts together, without signals and health."""

    def __init__(self, store: TopologyStore, clock: Callable[[], int] = lambda: NOW, **changes: Any) -> None:
        self._clock = clock
        settings = GatewaySettings(topology="file:/nowhere", listen="127.0.0.1:0", query_seconds=20, record_seconds=20)
        self.settings = dataclasses.replace(settings, **changes)
        self._store = store
        self.drain = asyncio.Event()

    async def start(self) -> Self:
        topology = await self._store.read()
        settings = self.settings
        channels = ShardChannels(settings, topology.cluster_id)
        self.links = ShardLinks(settings, channels, topology)
        self.watch = RoutingWatch(self._store, topology, self.links.follow)
        self.shard_queries = ShardQueries(settings, channels)
        scatter = Scatter(settings, self.watch, self.shard_queries)
        self.recorder = Recorder(settings, self.watch, self.links)
        self.queries = Queries(settings, topology.settings.resolution_ms, scatter, self._clock)
        describer = ClusterDescriber(settings, self.watch, self.shard_queries, self._store)
        service = self.service = TopKService(settings, self.recorder, self.queries, describer, self.drain)
        self.server = create_server(settings.message_bytes_max)
        pb_grpc.add_TopKServiceServicer_to_server(service, self.server)
        add_raw_handlers(
            self.server,
            "topk.v1.TopKService",
            stream_stream={"StreamPlays": service.stream_plays},
            unary_unary={"RecordPlays": service.record_plays},
        )
        admin = ClusterAdminService(settings, self.watch, self.shard_queries, self._store)
        admin_grpc.add_ClusterAdminServiceServicer_to_server(admin, self.server)
        self.address = await bind(self.server, settings.listen)
        await self.server.start()
        self.channel = grpc.aio.insecure_channel(self.address, options=[("grpc.use_local_subchannel_pool", 1)])
        self.stub: Any = pb_grpc.TopKServiceStub(self.channel)
        self.admin: Any = admin_grpc.ClusterAdminServiceStub(self.channel)
        return self

    async def stop(self) -> None:
        self.drain.set()
        await self.channel.close()
        await self.server.stop(None)
        await self.service.close()
        await self.watch.close()
        await asyncio.gather(self.links.close(), self.shard_queries.close())


class Cluster:
    """Shards, a gateway, and the file that says where they are."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.store = open_store(f"file:{path / 'topology.json'}")
        self.shards: list[ShardServer] = []
        self.gateways: list[Gateway] = []
        self._stack = contextlib.AsyncExitStack()

    async def begin(
        self, shards: int = 2, resolution_ms: int = 1000, *, partitioner: str = "ring", **shard_changes: Any
    ) -> None:
        names = [f"shard-{number}" for number in range(shards)]
        owners = plan_owners(partitioner, names, SLOTS)
        infos = tuple(ShardInfo(name) for name in names)
        cluster = ClusterSettings(SLOTS, partitioner, resolution_ms)
        await self.store.compare_and_set(Topology(CLUSTER_ID, 1, cluster, infos, owners))
        self.shards = [ShardServer(name, self._path / name, self.store, **shard_changes) for name in names]
        for shard in self.shards:
            await shard.start()

    async def gateway(self, **changes: Any) -> Gateway:
        gateway = await Gateway(self.store, **changes).start()
        self.gateways.append(gateway)
        return gateway

    async def end(self) -> None:
        for gateway in self.gateways:
            await gateway.stop()
        for shard in self.shards:
            if shard.owner._loop_task.done():
                continue
            await shard.kill()
        await self.store.close()

    async def change_owners(self, owners: Sequence[int]) -> None:
        present = await self.store.read()
        await self.store.compare_and_set(dataclasses.replace(present, epoch=present.epoch + 1, owners=tuple(owners)))

    async def songs_of(self, shard: int, many: int, slot: int | None = None) -> list[str]:
        """Songs that live on a shard."""
        owners = (await self.store.read()).owners
        named = (f"song-{number}" for number in range(100_000))
        own = (song for song in named if owners[slot_of(song, SLOTS)] == shard)
        some = (song for song in own if slot is None or slot_of(song, SLOTS) == slot)
        return [next(some) for _ in range(many)]

    def counted(self, song_ids: Sequence[str], chart: str = "") -> list[int]:
        """Over all shards, from their own states."""
        each = [shard.counted(song_ids, chart) for shard in self.shards]
        return [sum(counts) for counts in zip(*each, strict=True)]


def batch(sequence: int, plays: Iterable[Play], producer: str = "p", first_sent_ms: int = NOW) -> play_pb2.PlayBatch:
    message = play_pb2.PlayBatch(producer_id=producer, sequence=sequence, first_sent_ms=first_sent_ms)
    for play in plays:
        added = message.plays.add(song_id=play.song_id, played_at_ms=play.played_at_ms, charts=play.charts)
        if play.count != 1:
            added.count = play.count
    return message


def stream_request(message: play_pb2.PlayBatch) -> pb.StreamPlaysRequest:
    return pb.StreamPlaysRequest(batch=message)


async def record(gateway: Gateway, message: play_pb2.PlayBatch) -> pb.RecordPlaysResponse:
    response: pb.RecordPlaysResponse = await gateway.stub.RecordPlays(pb.RecordPlaysRequest(batch=message))
    return response


def rejects(response: pb.RecordPlaysResponse | pb.StreamPlaysResponse) -> dict[int, str]:
    assert all(one.message for one in response.rejected)
    assert [one.index for one in response.rejected] == sorted({one.index for one in response.rejected})
    return {one.index: one.reason for one in response.rejected}


@contextlib.contextmanager
def frozen_clock(now_ms: int = NOW) -> Iterator[None]:
    """The shards' clock stands still."""
    before = owner_module.now_ms
    owner_module.now_ms = lambda: now_ms
    try:
        yield
    finally:
        owner_module.now_ms = before
