"""What a gateway tells of its cluster: the topology, what moves, and what each shard says of itself."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from topk_grpc._version import VERSION
from topk_grpc.config import GatewaySettings
from topk_grpc.errors import TopKError
from topk_grpc.gateway.routing import RoutingWatch
from topk_grpc.gateway.scatter import ShardQueries
from topk_grpc.migration.members import ShardState, state_of
from topk_grpc.migration.plan import eligible, moves_left
from topk_grpc.model import CONTROLLER, MigrationState, ShardInfo, Topology
from topk_grpc.pb.topk.v1 import shard_service_pb2 as shard_pb
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.topology.store import TopologyStore

_SECONDS: Final = 2.0

_SHARD_STATES: Final = {
    ShardState.NEW: pb.SHARD_STATE_NEW,
    ShardState.ACTIVE: pb.SHARD_STATE_ACTIVE,
    ShardState.DRAINING: pb.SHARD_STATE_DRAINING,
    ShardState.DRAINED: pb.SHARD_STATE_DRAINED,
}
_MIGRATION_STATES: Final = {
    MigrationState.MOVING: pb.MIGRATION_STATE_MOVING,
    MigrationState.COMMITTED: pb.MIGRATION_STATE_COMMITTED,
    MigrationState.ABORTED: pb.MIGRATION_STATE_ABORTED,
}


class ClusterDescriber:
    """Answers DescribeCluster.

    Args:
        settings: the gateway's.
        watch: follows the topology.
        shard_queries: asks single shards.
        store: of the topology; knows whether a controller leads.
    """

    def __init__(
        self, settings: GatewaySettings, watch: RoutingWatch, shard_queries: ShardQueries, store: TopologyStore
    ) -> None:
        self._settings = settings
        self._watch = watch
        self._shard_queries = shard_queries
        self._store = store

    async def describe(self) -> pb.DescribeClusterResponse:
        """The cluster as it is now, as far as it answers."""
        controller = asyncio.create_task(self._controller())
        topology = self._watch.current.topology
        shards = await self._describe_all(topology)
        if not all(shard.reachable for shard in shards):
            # A shard that has just started may be at another address than this gateway has heard of.
            fresh = (await self._watch.refresh()).topology
            if fresh.epoch > topology.epoch:
                topology, shards = fresh, await self._describe_all(fresh)
        settings = self._settings
        return pb.DescribeClusterResponse(
            cluster_id=topology.cluster_id,
            epoch=topology.epoch,
            slots=topology.settings.slots,
            partitioner=topology.settings.partitioner,
            resolution_ms=topology.settings.resolution_ms,
            shards=shards,
            gateway_version=VERSION,
            k_max=settings.k_max,
            batch_plays_max=settings.batch_plays_max,
            message_bytes_max=settings.message_bytes_max,
            migrations=[
                pb.MigrationDescription(
                    migration_id=one.migration_id,
                    source=one.source,
                    target=one.target,
                    slots=len(one.slots),
                    state=_MIGRATION_STATES[one.state],
                )
                for one in topology.migrations
            ],
            slots_left=sum(len(move.slots) for move in moves_left(topology)),
            slots_moved=topology.moved_slots,
            longest_stall_ms=topology.longest_stall_ms,
            paused=topology.paused,
            skew=_skew(topology, shards),
            controller=await controller,
        )

    async def _controller(self) -> str:
        """Where the controller that leads answers; empty: none does, as far as is known."""
        try:
            async with asyncio.timeout(_SECONDS):
                return (await self._store.alive()).get(CONTROLLER, "")
        except (TopKError, TimeoutError):
            return ""

    async def _describe_all(self, topology: Topology) -> list[pb.ShardDescription]:
        return await asyncio.gather(*(self._describe(topology, shard) for shard in topology.shards))

    async def _describe(self, topology: Topology, shard: ShardInfo) -> pb.ShardDescription:
        index = topology.shards.index(shard)
        described = pb.ShardDescription(
            shard_id=shard.shard_id,
            address=shard.address,
            slots=topology.owners.count(index),
            slots_wanted=(topology.wanted or topology.owners).count(index),
            state=_SHARD_STATES[state_of(topology, shard.shard_id)],
        )
        try:
            answer = await self._shard_queries.ask(shard, "DescribeShard", shard_pb.DescribeShardRequest(), _SECONDS)
        except TopKError:
            return described
        described.reachable = True
        described.total_plays = answer.coverage.total_plays
        described.songs = answer.songs
        described.entries = answer.entries
        described.newest_event_ms = answer.coverage.newest_event_ms
        described.memory_bytes = answer.memory_bytes
        return described


def _skew(topology: Topology, shards: Sequence[pb.ShardDescription]) -> pb.Skew:
    names = set(eligible(topology))
    active = [shard for shard in shards if shard.shard_id in names]
    return pb.Skew(
        slots=_unevenness([shard.slots for shard in active]),
        plays=_unevenness([shard.total_plays for shard in active if shard.reachable]),
    )


def _unevenness(loads: Sequence[int]) -> float:
    """The largest as a multiple of the mean; 0 of nothing."""
    return max(loads) * len(loads) / sum(loads) if any(loads) else 0.0
