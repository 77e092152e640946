"""A gateway's process: read the topology, serve, drain."""

from __future__ import annotations

import asyncio

from topk_grpc.config import GatewaySettings
from topk_grpc.errors import SettingError
from topk_grpc.gateway.admin import ADMIN_SERVICE, ClusterAdminService
from topk_grpc.gateway.link import ShardLink
from topk_grpc.gateway.queries import Queries
from topk_grpc.gateway.recorder import Recorder
from topk_grpc.gateway.routing import RoutingWatch
from topk_grpc.gateway.scatter import Scatter, ShardQueries
from topk_grpc.gateway.service import TopKService
from topk_grpc.kernels import compiled
from topk_grpc.model import Topology
from topk_grpc.pb.topk.v1 import topk_service_pb2_grpc as pb_grpc
from topk_grpc.pb.topk.v1.admin_service_pb2_grpc import add_ClusterAdminServiceServicer_to_server
from topk_grpc.rpc import log, process
from topk_grpc.rpc.lifecycle import StopRequest, serve_until_stopped
from topk_grpc.rpc.server import (
    CONCURRENT_CALLS_MAX,
    Health,
    add_raw_handlers,
    add_reflection,
    bind,
    create_server,
    start_health_server,
)
from topk_grpc.topology.store import TopologyStore, open_store

SERVICE = "topk.v1.TopKService"
_PARTITIONERS = ("ring", "modulo")


async def serve(settings: GatewaySettings) -> None:
    """Runs a gateway until SIGTERM or SIGINT.

    Raises:
        TopKError: it cannot start; the message says why and what to do.
    """
    log.configure(settings.log_level, role="gateway")
    stop = StopRequest().install(stdin=settings.exit_with_stdin)
    if not compiled():
        log.warning(
            "kernels_uncompiled",
            consequence="hundreds of times slower",
            remedy="install a C compiler, then `make install`",
        )
    process.prepare()
    store = open_store(settings.topology)
    try:
        await _serve(settings, stop, store)
    finally:
        await store.close()
        stop.uninstall()


async def _serve(settings: GatewaySettings, stop: StopRequest, store: TopologyStore) -> None:
    topology = await store.read()
    if topology.settings.partitioner not in _PARTITIONERS:
        raise SettingError(
            f"the cluster's partitioner is {topology.settings.partitioner!r}: this release knows"
            f" {', '.join(_PARTITIONERS)}"
        )
    # Watches are many and idle: they have a bound of their own, and must not keep plays and queries out.
    server = create_server(settings.message_bytes_max, concurrent_calls_max=CONCURRENT_CALLS_MAX + settings.watches_max)
    health = Health()
    await health.register(server)
    servers = [server]
    address = await bind(server, settings.listen)
    if settings.health_port:
        health_server, _ = await start_health_server(health, settings.listen, settings.health_port)
        servers.append(health_server)
    links = {shard.shard_id: ShardLink(settings, topology.cluster_id, shard) for shard in topology.shards}

    def follow(changed: Topology) -> None:
        for shard in changed.shards:
            if shard.shard_id in links:
                links[shard.shard_id].move(shard)
            else:
                links[shard.shard_id] = ShardLink(settings, changed.cluster_id, shard)

    watch = RoutingWatch(store, topology, follow)
    shard_queries = ShardQueries(settings, topology.cluster_id)
    try:
        service = TopKService(
            settings,
            watch,
            Recorder(settings, watch, links),
            Queries(settings, topology.settings.resolution_ms, Scatter(settings, watch, shard_queries)),
            shard_queries,
            stop.event,
        )
        pb_grpc.add_TopKServiceServicer_to_server(service, server)
        add_raw_handlers(
            server,
            SERVICE,
            stream_stream={"StreamPlays": service.stream_plays},
            unary_unary={"RecordPlays": service.record_plays},
        )
        add_ClusterAdminServiceServicer_to_server(ClusterAdminService(settings, watch, shard_queries), server)
        add_reflection(server, [SERVICE, ADMIN_SERVICE])
        await server.start()
        await health.set(ready=True)
        log.event("ready", address=address, cluster=topology.cluster_id, epoch=topology.epoch)
        await serve_until_stopped(servers, health, stop, settings.drain_seconds)
        await service.close()
    finally:
        await watch.close()
        await asyncio.gather(*(link.close() for link in links.values()), shard_queries.close())
