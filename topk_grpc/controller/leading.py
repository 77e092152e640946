"""One controller moves slots, however many run: the one that leads. The others wait for its end.

    standing by → leading → the lead is lost, or the process stops → standing by, or the end

A controller that has lost the lead lets the move under way come to its end, and begins no other. That it may overlap
with its successor does no harm: every change it makes replaces one epoch of the topology.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final

from topk_grpc import metrics
from topk_grpc.config import ControllerSettings
from topk_grpc.errors import TopKError
from topk_grpc.migration.calls import GrpcShardCalls
from topk_grpc.migration.mover import Mover, Pace
from topk_grpc.model import CONTROLLER, Topology
from topk_grpc.rpc import log
from topk_grpc.rpc.shard_channels import ShardChannels
from topk_grpc.topology.store import Leadership, TopologyStore

_AGAIN_SECONDS: Final = 1.0


class Office:
    """The one place of a cluster's coordinator, held or waited for. Belongs to one event loop.

    Args:
        settings: the controller's.
        store: of the topology.
        topology: of the cluster.
        address: where this process answers, for others to read.
    """

    def __init__(self, settings: ControllerSettings, store: TopologyStore, topology: Topology, address: str) -> None:
        self._settings = settings
        self._store = store
        self._address = address
        self._channels = ShardChannels(settings, topology.cluster_id, topology.secret)
        self._mover: Mover | None = None
        self._ending = False

    async def run(self) -> None:
        """Stands by and leads, in turns, until `end` while it leads; standing by, until it is cancelled."""
        while not self._ending:
            try:
                async with self._store.lead(CONTROLLER) as leadership:
                    await self._lead(leadership)
            except TopKError as error:
                log.warning("leading_failed", reason=str(error), again_seconds=_AGAIN_SECONDS)
                await asyncio.sleep(_AGAIN_SECONDS)

    def end(self) -> bool:
        """Lets the move under way come to its end; returns whether this process leads, so that it is worth waiting."""
        self._ending = True
        if self._mover is not None:
            self._mover.end()
        return self._mover is not None

    async def _lead(self, leadership: Leadership) -> None:
        settings = self._settings
        shards = GrpcShardCalls(self._channels)
        pace = Pace(settings.move_share, settings.move_slots_max, settings.move_seconds_max)
        mover = self._mover = Mover(self._store, shards, pace, auto=settings.auto_rebalance)
        log.event("leading")
        metrics.CONTROLLER_ACTIVE.set(1)
        announcing = asyncio.create_task(self._announce())
        lost = asyncio.create_task(leadership.lost.wait())
        moving = asyncio.create_task(mover.run())
        try:
            await asyncio.wait((moving, lost), return_when=asyncio.FIRST_COMPLETED)
            if lost.done():
                log.warning("lead_lost", consequence="no further move begins here")
                mover.end()
            await moving
        finally:
            self._mover = None
            metrics.CONTROLLER_ACTIVE.set(0)
            for task in (announcing, lost, moving):
                task.cancel()
            await asyncio.gather(announcing, lost, moving, return_exceptions=True)
            await shards.close()

    async def _announce(self) -> None:
        """Says that there is a leader: what `topk cluster status` shows. Nothing depends on it."""
        while True:
            with suppress(TopKError):
                async with self._store.announce(CONTROLLER, self._address):
                    await asyncio.Event().wait()
            await asyncio.sleep(_AGAIN_SECONDS)
