"""A shard's process: recover, take its place in the topology, serve, drain."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import grpc

from topk_grpc import metrics
from topk_grpc.config import ShardSettings
from topk_grpc.errors import TopKError, TopologyError
from topk_grpc.migration.arrival import first_topology
from topk_grpc.model import Topology
from topk_grpc.pb.topk.v1 import shard_service_pb2_grpc as pb_grpc
from topk_grpc.ring.partitioners import partitioner_of
from topk_grpc.rpc import log, startup
from topk_grpc.rpc.access import AccessInterceptor, ClusterGate
from topk_grpc.rpc.lifecycle import StopRequest, graceful_stop
from topk_grpc.rpc.server import (
    Health,
    Patience,
    add_raw_handlers,
    add_reflection,
    bind,
    create_server,
)
from topk_grpc.rpc.shard_channels import ShardChannels
from topk_grpc.shard import readings
from topk_grpc.shard.core import Identity, ShardCore
from topk_grpc.shard.moves import ShardMoves
from topk_grpc.shard.owner import ShardOwner, now_ms
from topk_grpc.shard.registration import check_directory, check_slots, find_shard, register
from topk_grpc.shard.service import ShardService
from topk_grpc.storage import Files
from topk_grpc.topology.patience import StorePatience
from topk_grpc.topology.store import StoreAccess, TopologyStore, open_store

SERVICE = "topk.v1.ShardService"


_SEAL_SECONDS = 0.5
"""What is kept of the time to stop for the log's seal, when a snapshot was given up."""


async def serve(settings: ShardSettings, files: Files | None = None) -> None:
    """Runs a shard until SIGTERM or SIGINT.

    Args:
        settings: of the shard.
        files: the file system that its data directory is on, the real one by default.

    Raises:
        TopKError: it cannot start (the message says why and what to do), or its log failed.
    """
    startup.begin(settings, "shard", settings.shard_id)
    stop = StopRequest().install(stdin=settings.exit_with_stdin, seconds=settings.stop_seconds)
    store = open_store(settings.topology, StoreAccess.of(settings))
    servers: list[grpc.aio.Server] = []
    try:
        await _serve(settings, stop, store, files, servers)
    except BaseException:
        await asyncio.gather(*(each.stop(None) for each in servers))
        raise
    finally:
        await store.close()
        stop.uninstall()


async def _serve(
    settings: ShardSettings,
    stop: StopRequest,
    store: TopologyStore,
    files: Files | None,
    servers: list[grpc.aio.Server],
) -> None:
    health = Health()
    servers += await startup.serve_health(settings, health)  # to wait for a topology, or to recover, is to live
    patience = StorePatience(settings.topology_wait_seconds, stop)
    topology = await _find_topology(settings, stop, store, patience)
    if topology is None:
        await asyncio.gather(*(each.stop(None) for each in servers))
        return
    await _serve_cluster(settings, stop, store, files, topology, health, servers, patience)


async def _find_topology(
    settings: ShardSettings, stop: StopRequest, store: TopologyStore, patience: StorePatience
) -> Topology | None:
    """The topology, which has a place for this shard, or will have; None: it was asked to stop before there was one."""
    if settings.join:
        topology = await first_topology(store, settings.topology, stop.event)
    else:
        topology = await patience.wait_for(store.read)
        find_shard(topology, settings.shard_id)
    if topology is not None:
        partitioner_of(topology.settings.partitioner)  # one that this release does not know is an error here
    if topology is not None and not topology.secret:
        raise TopologyError(
            f"the topology at {settings.topology} was made by an older release and has no secret for the cluster's"
            " parts to know each other by: start `topk up` on its data directory once, which gives it one"
        )
    return topology


async def _serve_cluster(  # noqa: PLR0917
    settings: ShardSettings,
    stop: StopRequest,
    store: TopologyStore,
    files: Files | None,
    topology: Topology,
    health: Health,
    servers: list[grpc.aio.Server],
    patience: StorePatience,
) -> None:
    identity = Identity(topology.cluster_id, settings.shard_id)
    core = ShardCore(settings, topology.settings, files)
    check_directory(topology.shard(settings.shard_id), core.directory_id, settings.data_dir)
    server = create_server(
        settings.message_bytes_max * 4,  # parts of several clients' messages travel together
        access=AccessInterceptor(ClusterGate(topology.secret)),
        patience=Patience(settings.handshake_seconds, settings.connection_idle_seconds),
    )
    servers.append(server)
    await health.register(server)
    address = await bind(server, settings.listen, credentials=startup.credentials_of(settings, settings.tls_ca))
    service = ShardService(identity, stop.event)
    pb_grpc.add_ShardServiceServicer_to_server(service, server)
    add_raw_handlers(server, SERVICE, stream_stream={"Append": service.append})
    add_reflection(server, [SERVICE])
    await server.start()
    await _recover(core, settings, stop)
    core.own(identity, topology.slots_of(settings.shard_id))
    check_slots(await patience.wait_for(store.read), settings.shard_id, core.state.ownership, settings.data_dir)
    core.configure(now_ms())
    owner = ShardOwner(core, settings)
    readings.read_from(core, owner, settings)
    channels = ShardChannels(settings, topology.cluster_id, topology.secret)
    moves = ShardMoves(owner, store, channels, settings)
    service.open(owner, moves)
    place = (settings.shard_id, settings.advertise or address, core.directory_id, settings.data_dir)
    try:
        await patience.wait_for(lambda: register(store, *place, join=settings.join))
        await health.set(ready=True)
        log.event(
            "ready", address=address, cluster=topology.cluster_id, songs=len(core.state.songs), position=core.position
        )
        startup.tell_supervisor(settings, address)
        await _serve_until_stopped(settings, stop, owner, health, servers)
    finally:
        await moves.close()


async def _recover(core: ShardCore, settings: ShardSettings, stop: StopRequest) -> None:
    """Recovers; ends the process where it is asked to stop meanwhile.

    Until the last step recovery changes nothing on disk, and that one can be left in its middle.
    """
    started = time.monotonic()
    metrics.RECOVERY_RATIO.read_from(lambda: core.recovered_ratio)
    with ThreadPoolExecutor(1, "recovery") as thread, metrics.RECOVERING.track_inprogress():
        recovering = asyncio.get_running_loop().run_in_executor(thread, core.recover)
        asked = asyncio.ensure_future(stop.wait())
        await asyncio.wait((recovering, asked), return_when=asyncio.FIRST_COMPLETED)
        if not recovering.done():
            log.event("stopped", reason=stop.reason, recovering=True)
            stop.end_now()
        asked.cancel()
        notes = recovering.result()
    for note in notes:
        log.warning("recovery_note", note=note, data_dir=settings.data_dir)
    seconds = time.monotonic() - started
    metrics.RECOVERY_SECONDS.set(seconds)
    log.event("recovered", seconds=round(seconds, 3), position=core.position, songs=len(core.state.songs))


async def _serve_until_stopped(
    settings: ShardSettings, stop: StopRequest, owner: ShardOwner, health: Health, servers: list[grpc.aio.Server]
) -> None:
    """Serves until asked to stop, or until the log fails: then at once, with an error."""
    asked = asyncio.ensure_future(stop.wait())
    await asyncio.wait((asked, owner.failed), return_when=asyncio.FIRST_COMPLETED)
    if owner.failed.done():
        asked.cancel()
        failure: TopKError = owner.failed.result()
        raise failure
    drain_seconds = min(settings.drain_seconds, settings.stop_seconds)
    log.event("stopping", reason=asked.result(), drain_seconds=drain_seconds, stop_seconds=settings.stop_seconds)
    await graceful_stop(servers, health, drain_seconds, stop.urgent)
    left = settings.stop_seconds if stop.seconds_left is None else stop.seconds_left
    ended = await owner.close(snapshot=True, seconds=max(0.0, left - _SEAL_SECONDS), urgent=stop.urgent)
    if owner.failed.done():
        failure = owner.failed.result()
        raise failure
    log.event("stopped")
    if not ended:
        stop.end_now()
