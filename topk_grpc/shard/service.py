"""The shard's gRPC service: bytes and messages in, the owner's answers out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from contextlib import aclosing
from typing import Any, Final, TypeVar

import grpc
import numpy as np

from topk_grpc.engine import query
from topk_grpc.engine.account import Copied, copy_state
from topk_grpc.engine.query import Scope, Totals
from topk_grpc.errors import InvalidArgumentError, NotReadyError, WrongServerError
from topk_grpc.model import Bounds
from topk_grpc.pb.topk.v1 import shard_service_pb2 as pb
from topk_grpc.pb.topk.v1 import shard_service_pb2_grpc as pb_grpc
from topk_grpc.rpc import convert
from topk_grpc.rpc.streams import messages
from topk_grpc.shard.audit import serve_audit
from topk_grpc.shard.core import Identity, ShardCore
from topk_grpc.shard.moves import ShardMoves
from topk_grpc.shard.owner import ShardOwner, now_ms

SHARD_ID_KEY: Final = "topk-shard-id"
CLUSTER_ID_KEY: Final = "topk-cluster-id"
_STREAM_REQUESTS_MAX: Final = 64
_PIECE_BYTES: Final = 1 << 20  # of an image, in one message
_PAGE_ENTRIES: Final = 8192  # of an answer in pages: about a megabyte with the longest names

T = TypeVar("T")

_Base: Any = pb_grpc.ShardServiceServicer
Context = grpc.aio.ServicerContext[Any, Any]


class ShardService(_Base):  # type: ignore[misc]
    """Answers the gateways of the shard's own cluster.

    Args:
        identity: who is served here; calls meant for others are refused.
        drain: set when streams have to come to their end.
    """

    def __init__(self, identity: Identity, drain: asyncio.Event) -> None:
        self._recovered: ShardOwner | None = None
        self._moves: ShardMoves | None = None
        self._identity = identity
        self._drain = drain

    def open(self, owner: ShardOwner, moves: ShardMoves | None = None) -> None:
        """Serves from here on; until then every call is told to come again. Slots move only with `moves`."""
        self._recovered, self._moves = owner, moves

    @property
    def _owner(self) -> ShardOwner:
        if self._recovered is None:
            raise NotReadyError(f"{self._identity.shard_id} is recovering from its log: try again soon")
        return self._recovered

    @property
    def _moving(self) -> ShardMoves:
        if self._moves is None:
            raise NotReadyError(f"{self._identity.shard_id} does not move slots yet: try again soon")
        return self._moves

    def _check_addressee(self, context: Context) -> None:
        metadata: dict[str, Any] = dict(context.invocation_metadata() or ())
        meant = (metadata.get(CLUSTER_ID_KEY), metadata.get(SHARD_ID_KEY))
        if meant != (self._identity.cluster_id, self._identity.shard_id):
            raise WrongServerError(
                f"this is {self._identity.shard_id} of cluster {self._identity.cluster_id}, the call is meant for"
                f" {meant[1]} of cluster {meant[0]}: read the topology again"
            )

    async def append(self, requests: AsyncIterator[bytes], context: Context) -> None:
        """The raw Append: reads on while requests are under way, answers in order."""
        self._check_addressee(context)
        answers: asyncio.Queue[asyncio.Future[bytes] | None] = asyncio.Queue(_STREAM_REQUESTS_MAX)

        async def read_all() -> None:
            try:
                async with aclosing(messages(requests, self._drain)) as incoming:
                    async for request in incoming:
                        await answers.put(await self._owner.append(request))
            finally:
                await answers.put(None)

        reader = asyncio.create_task(read_all())
        try:
            while (answer := await answers.get()) is not None:
                await context.write(await answer)
            await reader
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def QueryTopK(self, request: pb.QueryTopKRequest, context: Context) -> pb.QueryTopKResponse:  # noqa: N802
        """The shard's k best."""
        self._check_addressee(context)
        scope = _scope(request.scope)

        def answer(core: ShardCore) -> pb.QueryTopKResponse:
            ranked, totals = query.top_k(core.state, scope, request.k)
            core.state.standing.use(scope.standing, now_ms())
            return pb.QueryTopKResponse(
                coverage=_coverage(core, totals),
                song_ids=ranked.song_ids,
                counts=ranked.counts,
                sessions=_spans(ranked.sessions),
            )

        def answer_if_short(core: ShardCore) -> pb.QueryTopKResponse | None:
            return None if query.scans(core.state, scope, request.k) else answer(core)

        may_be_short = scope.bounds is None or self._owner.stands(scope.standing)
        short = await self._owner.read(answer_if_short) if may_be_short else None
        return short if short is not None else await self._scan(("top_k", scope, request.k), scope, answer)

    async def _scan(self, key: Hashable, scope: Scope, answer: Callable[[ShardCore], T]) -> T:
        """Answers a query that a standing window may answer, once it stands where the query is."""

        def followed(core: ShardCore) -> T:
            if scope.standing is not None and scope.bounds is not None:
                core.follow(scope.standing, scope.bounds, now_ms(), self._owner.answer_short)
            return answer(core)

        return await self._owner.scan(key, followed)

    async def QueryAtLeast(  # noqa: N802
        self, request: pb.QueryAtLeastRequest, context: Context
    ) -> AsyncIterator[pb.QueryAtLeastResponse]:
        """Entries with at least so many plays, and the counts of songs, from one state, in pages."""
        self._check_addressee(context)
        scope, song_ids = _scope(request.scope), tuple(request.song_ids)
        if request.count_min < 1 or scope.gap_ms:
            raise InvalidArgumentError("count_min has to be 1 at least, and sessions are not counted so")

        def answer(core: ShardCore) -> tuple[pb.Coverage, list[int], query.Ranked]:
            asked, found, totals = query.at_least(core.state, scope, request.count_min, song_ids, request.entries_max)
            core.state.standing.use(scope.standing, now_ms())
            return _coverage(core, totals), asked, found

        key = ("at_least", scope, request.count_min, song_ids, request.entries_max)
        coverage, asked, found = await self._scan(key, scope, answer)
        for start in range(0, max(1, len(found.counts)), _PAGE_ENTRIES):
            page = slice(start, start + _PAGE_ENTRIES)
            yield pb.QueryAtLeastResponse(
                coverage=None if start else coverage,
                asked_counts=() if start else asked,
                song_ids=found.song_ids[page],
                counts=found.counts[page],
            )

    async def QueryCounts(self, request: pb.QueryCountsRequest, context: Context) -> pb.QueryCountsResponse:  # noqa: N802
        """The counts of songs."""
        self._check_addressee(context)
        scope = _scope(request.scope)
        song_ids = tuple(request.song_ids)

        def answer(core: ShardCore) -> pb.QueryCountsResponse:
            found, totals = query.counts_of(core.state, scope, song_ids)
            return pb.QueryCountsResponse(
                coverage=_coverage(core, totals), counts=found.counts, sessions=_spans(found.sessions)
            )

        if scope.bounds is None:
            return await self._owner.read(answer)
        return await self._scan(("counts", scope, song_ids), scope, answer)

    async def QueryRanks(self, request: pb.QueryRanksRequest, context: Context) -> pb.QueryRanksResponse:  # noqa: N802
        """How many entries stand above places, and the nearest around."""
        self._check_addressee(context)
        scope = _scope(request.scope)
        places = tuple((place.song_id, place.count) for place in request.places)

        def answer(core: ShardCore) -> pb.QueryRanksResponse:
            standings, totals = query.standings(core.state, scope, places, request.neighbours)
            return pb.QueryRanksResponse(
                coverage=_coverage(core, totals),
                standings=[
                    pb.PlaceStanding(above_count=one.above_count, above=_places(one.above), below=_places(one.below))
                    for one in standings
                ],
            )

        return await self._scan(("ranks", scope, places, request.neighbours), scope, answer)

    async def QueryCharts(self, request: pb.QueryChartsRequest, context: Context) -> pb.QueryChartsResponse:  # noqa: N802
        """All charts with their totals."""
        self._check_addressee(context)

        def answer(core: ShardCore) -> pb.QueryChartsResponse:
            charts = query.charts(core.state)
            return pb.QueryChartsResponse(
                coverage=_coverage(core, query.totals(core.state, Scope())),
                charts=[name for name, _ in charts],
                total_plays=[totals.plays for _, totals in charts],
                distinct_songs=[totals.songs for _, totals in charts],
            )

        return await self._owner.scan("charts", answer)

    async def DeleteSong(self, request: pb.DeleteSongRequest, context: Context) -> pb.DeleteSongResponse:  # noqa: N802
        """Takes a song's plays back, if its slot is owned here; answers when that is on disk and applied."""
        self._check_addressee(context)
        song_id = request.song_id

        def answer(core: ShardCore) -> pb.DeleteSongResponse:
            had = core.delete_song(song_id)
            coverage = _coverage(core, query.totals(core.state, Scope()))
            coverage.slots = np.packbits(core.state.owned, bitorder="little").tobytes()  # of a frozen one nothing goes
            return pb.DeleteSongResponse(coverage=coverage, plays=had.plays, charts=had.charts)

        # It looks through all cells, as a scan does; and two who ask at once are told of the same plays.
        return await self._owner.scan(("delete_song", song_id), answer)

    async def FreezeSlots(self, request: pb.FreezeSlotsRequest, context: Context) -> pb.FreezeSlotsResponse:  # noqa: N802
        """Freezes the slots of a migration."""
        self._check_addressee(context)
        return pb.FreezeSlotsResponse(seconds=await self._moving.freeze(request.migration_id))

    async def ExportSlots(  # noqa: N802
        self, request: pb.ExportSlotsRequest, context: Context
    ) -> AsyncIterator[pb.ExportSlotsResponse]:
        """The image of a migration's slots."""
        self._check_addressee(context)
        image = await self._moving.export(request.migration_id)
        for start in range(0, len(image), _PIECE_BYTES):
            yield pb.ExportSlotsResponse(piece=image[start : start + _PIECE_BYTES])

    async def ImportSlots(self, request: pb.ImportSlotsRequest, context: Context) -> pb.ImportSlotsResponse:  # noqa: N802
        """Fetches the image of a migration's slots and keeps it."""
        self._check_addressee(context)
        size, plays = await self._moving.fetch(request.migration_id)
        return pb.ImportSlotsResponse(image_bytes=size, plays=plays)

    async def SettleMigration(  # noqa: N802
        self, request: pb.SettleMigrationRequest, context: Context
    ) -> pb.SettleMigrationResponse:
        """Acts on the outcome of a migration."""
        self._check_addressee(context)
        return pb.SettleMigrationResponse(not_conserved=not await self._moving.settle(request.migration_id))

    async def Audit(self, request: pb.AuditRequest, context: Context) -> pb.AuditResponse:  # noqa: N802
        """Digests of the state. Writes wait for a copy of what can change, not for the digests."""
        self._check_addressee(context)

        def answer(core: ShardCore) -> tuple[Copied, pb.Coverage]:
            return copy_state(core.state), _coverage(core, query.totals(core.state, Scope()))

        copied, coverage = await self._owner.scan("audit", answer)
        return await asyncio.to_thread(serve_audit, copied, coverage, request)

    async def DescribeShard(self, request: pb.DescribeShardRequest, context: Context) -> pb.DescribeShardResponse:  # noqa: N802
        """The shard's load and position."""
        self._check_addressee(context)

        def answer(core: ShardCore) -> pb.DescribeShardResponse:
            state = core.state
            return pb.DescribeShardResponse(
                coverage=_coverage(core, query.totals(state, Scope())),
                songs=len(state.songs),
                entries=state.entries,
                memory_bytes=state.memory_bytes,
            )

        return await self._owner.read(answer)


def _scope(message: pb.Scope) -> Scope:
    bounds = convert.bounds_from_pb(message.bounds) if message.HasField("bounds") else None
    if bounds is not None and bounds.end_ms < bounds.start_ms:
        raise InvalidArgumentError(f"the window ends at {bounds.end_ms} ms, before it starts at {bounds.start_ms} ms")
    standing = convert.window_from_pb(message.standing) if message.HasField("standing") else None
    return Scope(message.chart, bounds, message.session_gap_ms, standing)


def _spans(sessions: Sequence[Bounds] | None) -> pb.SessionSpans | None:
    if sessions is None:
        return None
    return pb.SessionSpans(starts_ms=[one.start_ms for one in sessions], ends_ms=[one.end_ms for one in sessions])


def _coverage(core: ShardCore, totals: Totals) -> pb.Coverage:
    state = core.state
    return pb.Coverage(
        slots=state.slots_bitmap,
        log_position=core.counted_position,
        newest_event_ms=state.newest_event_ms,
        total_plays=totals.plays,
        distinct_songs=totals.songs,
    )


def _places(ranked: query.Ranked) -> Sequence[pb.Place]:
    places = [
        pb.Place(song_id=song_id, count=count) for song_id, count in zip(ranked.song_ids, ranked.counts, strict=True)
    ]
    for place, session in zip(places, ranked.sessions or (), strict=False):
        place.session_start_ms, place.session_end_ms = session.start_ms, session.end_ms
    return places
