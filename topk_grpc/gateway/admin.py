"""The service of operators' tools: changes that concern one shard, sent to the one that owns the song."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import grpc
import numpy as np

from topk_grpc.config import GatewaySettings
from topk_grpc.errors import InvalidArgumentError, ResourceExhaustedError, TopKError, UnavailableError
from topk_grpc.gateway.routing import Routing, RoutingWatch
from topk_grpc.gateway.scatter import ShardQueries
from topk_grpc.kernels.hash import hash_strings
from topk_grpc.pb.topk.v1 import admin_service_pb2 as pb
from topk_grpc.pb.topk.v1 import admin_service_pb2_grpc as pb_grpc
from topk_grpc.pb.topk.v1 import shard_service_pb2 as shard_pb
from topk_grpc.ring.partitioners import partitioner_of

ADMIN_SERVICE: Final = "topk.v1.ClusterAdminService"
_AGAIN_SECONDS: Final = (0.05, 1.0)

_Base: Any = pb_grpc.ClusterAdminServiceServicer
Context = grpc.aio.ServicerContext[Any, Any]


class ClusterAdminService(_Base):  # type: ignore[misc]
    """What `topk cluster` asks for.

    Args:
        settings: the gateway's.
        watch: follows the topology.
        shard_queries: asks single shards.
    """

    def __init__(self, settings: GatewaySettings, watch: RoutingWatch, shard_queries: ShardQueries) -> None:
        self._settings = settings
        self._watch = watch
        self._shard_queries = shard_queries

    async def DeleteSong(  # noqa: N802
        self, request: pb.ClusterAdminServiceDeleteSongRequest, context: Context
    ) -> pb.ClusterAdminServiceDeleteSongResponse:
        """Has the song's shard take its plays back; answers when that is on disk and applied."""
        partitioner_of(self._watch.current.topology.settings.partitioner).require_whole_songs("deleting a song")
        song = request.song_id.encode()
        if not 0 < len(song) <= self._settings.song_id_bytes_max:
            raise InvalidArgumentError(
                f"song_id has {len(song)} bytes: give 1 to {self._settings.song_id_bytes_max} bytes of UTF-8"
            )
        deleted = await self._ask_owner(song, "DeleteSong", shard_pb.DeleteSongRequest(song_id=request.song_id))
        return pb.ClusterAdminServiceDeleteSongResponse(plays=deleted.plays, charts=deleted.charts)

    async def _ask_owner(self, song: bytes, method: str, request: Any) -> Any:
        """Asks the shard that owns a song until one that does has answered, or the time is up.

        Raises:
            UnavailableError: nobody who owns it does.
            InvalidArgumentError, ResourceExhaustedError: as the shard said.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.record_seconds
        again, again_max = _AGAIN_SECONDS
        routing = self._watch.current
        while True:
            slot = _slot(song, routing)
            shard = routing.topology.shards[routing.owners[slot]]
            try:
                answer = await self._shard_queries.ask(shard, method, request, deadline - loop.time())
                if int.from_bytes(answer.coverage.slots, "little") >> slot & 1:
                    return answer
                problem: TopKError = UnavailableError(
                    f"{shard.shard_id} does not own slot {slot}: it is moving, ask again"
                )
            except (InvalidArgumentError, ResourceExhaustedError):
                raise
            except TopKError as error:  # it stops, fails or starts, or is not the shard that it was
                problem = UnavailableError(
                    f"{shard.shard_id}, which owns the song, does not answer ({error}): ask again. What it may have"
                    " done meanwhile stays done"
                )
            if loop.time() + again >= deadline:
                raise problem
            await asyncio.sleep(again)
            again = min(again_max, 2 * again)
            routing = await self._watch.refresh()


def _slot(song: bytes, routing: Routing) -> int:
    hashes = hash_strings(song, np.zeros(1, np.int64), np.array([len(song)], np.int32))
    return int(hashes[0]) % len(routing.owners)
