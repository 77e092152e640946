"""What a coordinator asks of shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from topk_grpc.errors import UnavailableError
from topk_grpc.model import ShardInfo
from topk_grpc.pb.topk.v1 import shard_service_pb2 as pb
from topk_grpc.pb.topk.v1.shard_service_pb2_grpc import ShardServiceStub
from topk_grpc.rpc.shard_channels import ShardChannels
from topk_grpc.rpc.status import from_rpc_error


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a target has got.

    Attributes:
        image_bytes: the size of the image.
        plays: of its slots, in the global chart.
    """

    image_bytes: int
    plays: int


class ShardCalls(Protocol):
    """Each may be called again, with the same effect. All raise TopKError: as the shard said, or UnavailableError."""

    async def probe(self, shard: ShardInfo, seconds: float) -> None:
        """Returns when a shard has answered that it serves."""
        ...

    async def freeze(self, source: ShardInfo, migration_id: int, seconds: float) -> float:
        """Has a source take no more plays of a migration's slots; returns for how many seconds it has not."""
        ...

    async def fetch(self, target: ShardInfo, migration_id: int, seconds: float) -> Fetched:
        """Has a target fetch and keep the image of a migration's slots."""
        ...

    async def settle(self, shard: ShardInfo, migration_id: int, seconds: float) -> bool:
        """Has a shard act on a migration's outcome; returns whether everything was conserved."""
        ...


class GrpcShardCalls:
    """`ShardCalls` over gRPC.

    Args:
        channels: the way to the shards.
    """

    def __init__(self, channels: ShardChannels) -> None:
        self._channels = channels
        self._open: dict[str, tuple[tuple[str, int], grpc.aio.Channel]] = {}

    async def probe(self, shard: ShardInfo, seconds: float) -> None:
        """As `ShardCalls.probe`."""
        await self._call(shard, "DescribeShard", pb.DescribeShardRequest(), seconds)

    async def freeze(self, source: ShardInfo, migration_id: int, seconds: float) -> float:
        """As `ShardCalls.freeze`."""
        answer = await self._call(source, "FreezeSlots", pb.FreezeSlotsRequest(migration_id=migration_id), seconds)
        return float(answer.seconds)

    async def fetch(self, target: ShardInfo, migration_id: int, seconds: float) -> Fetched:
        """As `ShardCalls.fetch`."""
        answer = await self._call(target, "ImportSlots", pb.ImportSlotsRequest(migration_id=migration_id), seconds)
        return Fetched(answer.image_bytes, answer.plays)

    async def settle(self, shard: ShardInfo, migration_id: int, seconds: float) -> bool:
        """As `ShardCalls.settle`."""
        request = pb.SettleMigrationRequest(migration_id=migration_id)
        return not (await self._call(shard, "SettleMigration", request, seconds)).not_conserved

    async def _call(self, shard: ShardInfo, method: str, request: Any, seconds: float) -> Any:
        if not shard.address:
            raise UnavailableError(f"{shard.shard_id} has not started yet")
        channel = await self._channel(shard)
        try:
            return await getattr(ShardServiceStub(channel), method)(
                request, timeout=max(seconds, 0.001), metadata=self._channels.metadata(shard.shard_id)
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    async def _channel(self, shard: ShardInfo) -> grpc.aio.Channel:
        wanted = shard.address, self._channels.generation
        opened_for, channel = self._open.get(shard.shard_id, (None, None))
        if channel is None or opened_for != wanted:
            if channel is not None:
                await channel.close()
            # Asking again is the mover's, who looks at the topology first.
            channel = self._channels.open(shard.address, options=[("grpc.enable_retries", 0)])
            self._open[shard.shard_id] = (wanted, channel)
        return channel

    async def close(self) -> None:
        """Closes all connections."""
        for _, channel in self._open.values():
            await channel.close()
        self._open.clear()
