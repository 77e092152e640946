"""The links to all shards of the topology: one for each that is in it, for as long as it is."""

from __future__ import annotations

import asyncio

from topk_grpc import metrics
from topk_grpc.config import GatewaySettings
from topk_grpc.errors import UnavailableError
from topk_grpc.gateway.link import ShardLink
from topk_grpc.model import Topology
from topk_grpc.rpc.shard_channels import ShardChannels


class ShardLinks:
    """Belongs to one event loop.

    Args:
        settings: the gateway's.
        channels: the way to the cluster's shards.
        topology: the first one.
    """

    def __init__(self, settings: GatewaySettings, channels: ShardChannels, topology: Topology) -> None:
        self._settings = settings
        self._channels = channels
        self._links: dict[str, ShardLink] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self.follow(topology)
        metrics.SHARD_PENDING_BYTES_MAX.read_from(lambda: settings.pending_bytes_max)
        metrics.SHARD_PENDING_BYTES.read_from(
            lambda: {shard_id: link.waiting_bytes for shard_id, link in list(self._links.items())}
        )

    def follow(self, topology: Topology) -> None:
        """Opens links to shards that have joined, and closes those to shards that were removed."""
        for shard in topology.shards:
            if shard.shard_id in self._links:
                self._links[shard.shard_id].move(shard)
            else:
                metrics.SHARD_UNANSWERED.labels(shard.shard_id)
                self._links[shard.shard_id] = ShardLink(self._settings, self._channels, shard)
        for gone in self._links.keys() - {shard.shard_id for shard in topology.shards}:
            task = asyncio.create_task(self._links.pop(gone).close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def __getitem__(self, shard_id: str) -> ShardLink:
        """The link to a shard.

        Raises:
            UnavailableError: it was removed since the caller has looked who owns what.
        """
        link = self._links.get(shard_id)
        if link is None:
            raise UnavailableError(f"{shard_id} has left the cluster meanwhile: send the batch again, it counts once")
        return link

    async def close(self) -> None:
        """Closes all of them."""
        await asyncio.gather(*(link.close() for link in self._links.values()), *self._closing)
