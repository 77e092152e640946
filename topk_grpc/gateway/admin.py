"""The service of operators' tools: changes of the cluster's members and plan, and the deletion of a song.

Members and plan are changed here, by replacing the topology; slots are moved by the controller, which sees the change.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final

import grpc
import numpy as np

from topk_grpc.config import GatewaySettings
from topk_grpc.errors import InvalidArgumentError, ResourceExhaustedError, TopKError, UnavailableError
from topk_grpc.gateway.routing import Routing, RoutingWatch
from topk_grpc.gateway.scatter import ShardQueries
from topk_grpc.kernels.hash import hash_strings
from topk_grpc.migration import members
from topk_grpc.migration.plan import fewest, moves_left, planned
from topk_grpc.model import Topology
from topk_grpc.pb.topk.v1 import admin_service_pb2 as pb
from topk_grpc.pb.topk.v1 import admin_service_pb2_grpc as pb_grpc
from topk_grpc.pb.topk.v1 import shard_service_pb2 as shard_pb
from topk_grpc.ring.partitioners import partitioner_of
from topk_grpc.rpc import log
from topk_grpc.rpc.access import caller
from topk_grpc.topology.change import change
from topk_grpc.topology.store import TopologyStore

ADMIN_SERVICE: Final = "topk.v1.ClusterAdminService"
_AGAIN_SECONDS: Final = (0.05, 1.0)
_ESTIMATE_SECONDS: Final = 2.0

_Base: Any = pb_grpc.ClusterAdminServiceServicer
Context = grpc.aio.ServicerContext[Any, Any]


class ClusterAdminService(_Base):  # type: ignore[misc]
    """What `topk cluster` asks for.

    Args:
        settings: the gateway's.
        watch: follows the topology.
        shard_queries: asks single shards.
        store: of the topology.
    """

    def __init__(
        self, settings: GatewaySettings, watch: RoutingWatch, shard_queries: ShardQueries, store: TopologyStore
    ) -> None:
        self._settings = settings
        self._watch = watch
        self._shard_queries = shard_queries
        self._store = store

    # --- Members and plan ---------------------------------------------------------------------------------------------

    async def AddShards(self, request: pb.AddShardsRequest, context: Context) -> pb.AddShardsResponse:  # noqa: N802
        """Gives shards a place; those that drain are kept after all."""
        if not request.shard_ids and not request.count:
            raise InvalidArgumentError("no shard is named, and `count` is 0: name some, or say how many to add")
        added: list[str] = []

        def decide(topology: Topology) -> Topology:
            added[:] = request.shard_ids
            more = members.free_names(topology, len(added) + min(request.count, topology.settings.slots))
            added.extend([name for name in more if name not in added][: request.count])
            return members.with_new_shards(topology, added)

        topology = await self._change(decide, "shards_added", added)
        return pb.AddShardsResponse(shard_ids=added, epoch=topology.epoch)

    async def DrainShards(self, request: pb.DrainShardsRequest, context: Context) -> pb.DrainShardsResponse:  # noqa: N802
        """Plans that all slots of shards go to the others."""
        names = list(request.shard_ids)
        if not names:
            raise InvalidArgumentError("no shard is named: name those that are to drain")
        topology = await self._change(lambda present: members.draining(present, names), "shards_drain", names)
        slots = sum(len(move.slots) for move in moves_left(topology) if move.source in names)
        return pb.DrainShardsResponse(slots=slots, epoch=topology.epoch)

    async def RemoveShard(self, request: pb.RemoveShardRequest, context: Context) -> pb.RemoveShardResponse:  # noqa: N802
        """Takes a shard out that owns nothing."""
        name = request.shard_id
        topology = await self._change(lambda present: members.without_shard(present, name), "shard_removed", [name])
        return pb.RemoveShardResponse(epoch=topology.epoch)

    async def Rebalance(self, request: pb.RebalanceRequest, context: Context) -> pb.RebalanceResponse:  # noqa: N802
        """Plans anew, or says what that would move."""
        if request.dry_run:
            before = await self._store.read()
            after = planned(before, anew=True)
        else:
            after = await self._change(_planned_anew, "rebalance_planned", [])
            before = after
        moves = sorted(moves_left(after), key=lambda move: (move.source, move.target))
        sources = sorted({move.source for move in moves})
        sizes = dict(zip(sources, await asyncio.gather(*(self._mean_of(after, name) for name in sources)), strict=True))
        return pb.RebalanceResponse(
            moves=[
                pb.PlannedMove(
                    source=move.source,
                    target=move.target,
                    slots=len(move.slots),
                    plays_estimated=round(sizes[move.source][0] * len(move.slots)),
                    bytes_estimated=round(sizes[move.source][1] * len(move.slots)),
                )
                for move in moves
            ],
            slots_min=fewest(before),
            epoch=before.epoch,
        )

    async def PauseMoves(self, request: pb.PauseMovesRequest, context: Context) -> pb.PauseMovesResponse:  # noqa: N802
        """Lets no further move begin."""
        topology = await self._change(lambda present: members.paused(present, pause=True), "moves_paused", [])
        return pb.PauseMovesResponse(epoch=topology.epoch)

    async def ResumeMoves(self, request: pb.ResumeMovesRequest, context: Context) -> pb.ResumeMovesResponse:  # noqa: N802
        """Lets moves begin again."""
        topology = await self._change(lambda present: members.paused(present, pause=False), "moves_resumed", [])
        return pb.ResumeMovesResponse(epoch=topology.epoch)

    async def _change(
        self, decide: Callable[[Topology], Topology | None], event: str, shards: Sequence[str]
    ) -> Topology:
        """Changes the topology, says so, and goes by it from here on."""
        topology = await change(self._store, decide, "the change")
        log.event(event, epoch=topology.epoch, shards=list(shards), token=caller.get().name)
        self._watch.take(topology)
        return topology

    async def _mean_of(self, topology: Topology, shard_id: str) -> tuple[float, float]:
        """The plays and the bytes of memory that a slot of a shard has on average; 0 where the shard does not say."""
        shard = topology.shard(shard_id)
        owned = len(topology.slots_of(shard_id))
        if shard is None or not owned:
            return 0, 0
        request = shard_pb.DescribeShardRequest()
        try:
            answer = await self._shard_queries.ask(shard, "DescribeShard", request, _ESTIMATE_SECONDS)
        except TopKError:
            return 0, 0
        return answer.coverage.total_plays / owned, answer.memory_bytes / owned

    # --- Songs --------------------------------------------------------------------------------------------------------

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


def _planned_anew(topology: Topology) -> Topology | None:
    changed = planned(topology, anew=True)
    return None if changed is topology else changed


def _slot(song: bytes, routing: Routing) -> int:
    hashes = hash_strings(song, np.zeros(1, np.int64), np.array([len(song)], np.int32))
    return int(hashes[0]) % len(routing.owners)
