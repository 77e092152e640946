"""A controller's process: find or make the topology, stand by, and move slots while it leads."""

from __future__ import annotations

import asyncio
from typing import Final

from topk_grpc import metrics
from topk_grpc.config import ControllerSettings
from topk_grpc.controller.leading import Office
from topk_grpc.errors import TopologyError
from topk_grpc.migration.arrival import first_topology
from topk_grpc.migration.members import new_topology
from topk_grpc.model import ClusterSettings, Topology
from topk_grpc.rpc import log, startup
from topk_grpc.rpc.lifecycle import StopRequest, graceful_stop
from topk_grpc.rpc.server import Health, Patience, add_reflection, bind, create_server
from topk_grpc.topology.store import StoreAccess, TopologyStore, open_store

_HANG_SECONDS: Final = 1.0
"""What a move under way gets beyond its own time before it is left to the next controller."""


async def serve(settings: ControllerSettings) -> None:
    """Runs a controller until SIGTERM or SIGINT.

    Raises:
        TopKError: it cannot start; the message says why and what to do.
    """
    startup.begin(settings, "controller")
    stop = StopRequest().install(stdin=settings.exit_with_stdin, seconds=settings.stop_seconds)
    store = open_store(settings.topology, StoreAccess.of(settings))
    try:
        await _serve(settings, stop, store)
    finally:
        await store.close()
        stop.uninstall()


async def _serve(settings: ControllerSettings, stop: StopRequest, store: TopologyStore) -> None:
    server = create_server(
        settings.message_bytes_max, patience=Patience(settings.handshake_seconds, settings.connection_idle_seconds)
    )
    health = Health()
    await health.register(server)
    add_reflection(server, [])
    servers = [server]
    address = await bind(server, settings.listen, credentials=startup.credentials_of(settings, settings.tls_ca))
    servers += await startup.serve_health(settings, health)
    await server.start()
    metrics.CONTROLLER_ACTIVE.set(0)
    try:
        topology = await first_topology(store, settings.topology, stop.event, _new_topology(settings))
        if topology is None:
            return
        if not topology.secret:
            raise TopologyError(
                f"the topology at {settings.topology} was made by an older release and has no secret for the cluster's"
                " parts to know each other by: start `topk up` on its data directory once, which gives it one"
            )
        await health.set(ready=True)
        log.event("ready", address=address, cluster=topology.cluster_id, epoch=topology.epoch)
        startup.tell_supervisor(settings, address)
        office = Office(settings, store, topology, address)
        await _lead_until_stopped(stop, office, settings.move_seconds_max + _HANG_SECONDS)
    finally:
        await graceful_stop(servers, health, min(settings.drain_seconds, settings.stop_seconds), stop.urgent)
    log.event("stopped")


def _new_topology(settings: ControllerSettings) -> Topology | None:
    """What is to be written where there is no topology, if that was asked for."""
    if not settings.create_shards:
        return None
    names = [f"{settings.shard_prefix}{number}" for number in range(settings.create_shards)]
    return new_topology(names, ClusterSettings(slots=settings.slots, partitioner=settings.partitioner))


async def _lead_until_stopped(stop: StopRequest, office: Office, seconds: float) -> None:
    """Leads or stands by until asked to stop; then the move under way gets its time to come to its end."""
    leading = asyncio.create_task(office.run())
    asked = asyncio.create_task(stop.wait())
    hurry = asyncio.create_task(stop.urgent.wait())
    try:
        await asyncio.wait((leading, asked), return_when=asyncio.FIRST_COMPLETED)
        if asked.done():
            log.event("stopping", reason=asked.result())
            if office.end():
                await asyncio.wait((leading, hurry), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if leading.done():
            leading.result()
    finally:
        for task in (leading, asked, hurry):
            task.cancel()
        await asyncio.gather(leading, asked, hurry, return_exceptions=True)
