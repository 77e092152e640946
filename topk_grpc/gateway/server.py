"""A gateway's process: read the topology, serve, drain."""

from __future__ import annotations

import asyncio

import grpc

from topk_grpc.config import GatewaySettings, is_loopback
from topk_grpc.gateway.access import TokenGate
from topk_grpc.gateway.admin import ADMIN_SERVICE, ClusterAdminService
from topk_grpc.gateway.description import ClusterDescriber
from topk_grpc.gateway.links import ShardLinks
from topk_grpc.gateway.queries import Queries
from topk_grpc.gateway.recorder import Recorder
from topk_grpc.gateway.routing import RoutingWatch
from topk_grpc.gateway.scatter import Scatter, ShardQueries
from topk_grpc.gateway.service import TopKService
from topk_grpc.model import Topology
from topk_grpc.pb.topk.v1 import topk_service_pb2_grpc as pb_grpc
from topk_grpc.pb.topk.v1.admin_service_pb2_grpc import add_ClusterAdminServiceServicer_to_server
from topk_grpc.ring.partitioners import partitioner_of
from topk_grpc.rpc import log, startup
from topk_grpc.rpc.access import AccessInterceptor
from topk_grpc.rpc.lifecycle import StopRequest, serve_until_stopped
from topk_grpc.rpc.server import (
    CONCURRENT_CALLS_MAX,
    Health,
    Patience,
    add_raw_handlers,
    add_reflection,
    bind,
    create_server,
    split_address,
)
from topk_grpc.rpc.shard_channels import ShardChannels
from topk_grpc.topology.patience import StorePatience
from topk_grpc.topology.store import StoreAccess, TopologyStore, open_store

SERVICE = "topk.v1.TopKService"


async def serve(settings: GatewaySettings) -> None:
    """Runs a gateway until SIGTERM or SIGINT.

    Raises:
        TopKError: it cannot start; the message says why and what to do.
    """
    startup.begin(settings, "gateway")
    stop = StopRequest().install(stdin=settings.exit_with_stdin, seconds=settings.stop_seconds)
    store = open_store(settings.topology, StoreAccess.of(settings))
    servers: list[grpc.aio.Server] = []
    try:
        await _serve(settings, stop, store, servers)
    except BaseException:
        await asyncio.gather(*(each.stop(None) for each in servers))
        raise
    finally:
        await store.close()
        stop.uninstall()


async def _serve(
    settings: GatewaySettings, stop: StopRequest, store: TopologyStore, servers: list[grpc.aio.Server]
) -> None:
    health = Health()
    servers += await startup.serve_health(settings, health)
    topology = await StorePatience(settings.topology_wait_seconds, stop).wait_for(store.read, made=False)
    partitioner_of(topology.settings.partitioner)  # one that this release does not know is an error here
    gate = TokenGate(settings.tokens_file) if settings.tokens_file else None
    access = AccessInterceptor(gate) if gate is not None else None
    channels = ShardChannels(settings, topology.cluster_id, topology.secret)
    server = create_server(
        settings.message_bytes_max,
        # Watches are many and idle: they have a bound of their own, and must not keep plays and queries out.
        concurrent_calls_max=CONCURRENT_CALLS_MAX + settings.watches_max,
        access=access,
        patience=Patience(
            settings.handshake_seconds,
            settings.connection_idle_seconds,
            settings.connection_age_seconds,
            settings.stream_age_seconds,
        ),
    )
    servers.append(server)
    await health.register(server)
    address = await bind(server, settings.listen, credentials=startup.credentials_of(settings, settings.tls_client_ca))
    links = ShardLinks(settings, channels, topology)
    shard_queries = ShardQueries(settings, channels)

    def follow(changed: Topology) -> None:
        links.follow(changed)
        shard_queries.keep_only(changed)

    watch = RoutingWatch(store, topology, follow)
    following = asyncio.create_task(gate.follow(access.recheck)) if gate is not None and access is not None else None
    try:
        service = TopKService(
            settings,
            Recorder(settings, watch, links),
            Queries(settings, topology.settings.resolution_ms, Scatter(settings, watch, shard_queries)),
            ClusterDescriber(settings, watch, shard_queries, store),
            stop.event,
        )
        pb_grpc.add_TopKServiceServicer_to_server(service, server)
        add_raw_handlers(
            server,
            SERVICE,
            stream_stream={"StreamPlays": service.stream_plays},
            unary_unary={"RecordPlays": service.record_plays},
        )
        admin = ClusterAdminService(settings, watch, shard_queries, store)
        add_ClusterAdminServiceServicer_to_server(admin, server)
        add_reflection(server, [SERVICE, ADMIN_SERVICE])
        await server.start()
        stop.delay_by(settings.drain_delay_seconds)
        await health.set(ready=True)
        log.event("ready", address=address, cluster=topology.cluster_id, epoch=topology.epoch)
        _warn_if_open(settings)
        startup.tell_supervisor(settings, address)
        await serve_until_stopped(servers, health, stop, min(settings.drain_seconds, settings.stop_seconds))
        await service.close()
    finally:
        if following is not None:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        await watch.close()
        await asyncio.gather(links.close(), shard_queries.close())


def _warn_if_open(settings: GatewaySettings) -> None:
    """Says that nobody is asked who they are, where others than this machine's own may be."""
    asks = settings.tokens_file or settings.tls_client_ca
    if not asks and not is_loopback(split_address(settings.listen)[0]):
        log.warning(
            "open_to_everyone",
            listen=settings.listen,
            consequence="whoever reaches this address may record, ask and delete",
            remedy="--tokens-file, --tls-client-ca, or something in front that asks",
        )
