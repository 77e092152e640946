"""The public gRPC service: bytes and messages in, answers out."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from topk_grpc import metrics
from topk_grpc.config import GatewaySettings
from topk_grpc.gateway.description import ClusterDescriber
from topk_grpc.gateway.history import check_history, with_history
from topk_grpc.gateway.queries import Queries
from topk_grpc.gateway.recorder import Recorder
from topk_grpc.gateway.watch import WatchHub, watch_query_from_pb
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.pb.topk.v1 import topk_service_pb2_grpc as pb_grpc
from topk_grpc.rpc import convert
from topk_grpc.rpc.streams import messages

_Base: Any = pb_grpc.TopKServiceServicer
Context = grpc.aio.ServicerContext[Any, Any]


class TopKService(_Base):  # type: ignore[misc]
    """What clients call.

    Args:
        settings: the gateway's.
        recorder: takes batches through.
        queries: answers queries.
        describer: tells of the cluster.
        drain: set when streams have to come to their end.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        recorder: Recorder,
        queries: Queries,
        describer: ClusterDescriber,
        drain: asyncio.Event,
    ) -> None:
        self._settings = settings
        self._recorder = recorder
        self._queries = queries
        self._describer = describer
        self._drain = drain
        self._hub = WatchHub(settings, queries, drain)
        metrics.WATCHERS.read_from(lambda: self._hub.watchers)
        metrics.WATCHED_QUERIES.read_from(lambda: self._hub.watched)

    async def close(self) -> None:
        """Ends what runs beside the calls; they have to have ended."""
        await self._hub.close()

    # --- Recording ----------------------------------------------------------------------------------------------------

    async def stream_plays(self, requests: AsyncIterator[bytes], context: Context) -> None:
        """The raw StreamPlays: reads on while batches are under way, acknowledges in order."""
        leave = asyncio.Event()
        age = self._settings.stream_age_seconds * random.uniform(0.9, 1.0)
        loop = asyncio.get_running_loop()
        timer = loop.call_later(age, leave.set)
        idle_seconds = self._settings.stream_idle_seconds
        idle = loop.call_later(idle_seconds, leave.set)
        drained = asyncio.create_task(self._leave_on_drain(leave))
        acks: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue(self._settings.stream_batches_max)
        room = asyncio.Semaphore(self._settings.stream_batches_max)

        async def read_all() -> None:
            nonlocal idle
            try:
                async with aclosing(messages(requests, leave)) as incoming:
                    async for raw in incoming:
                        idle.cancel()
                        idle = loop.call_later(idle_seconds, leave.set)
                        await room.acquire()
                        begun = await self._recorder.begin(raw, leave)
                        if begun is None:
                            break  # its client sends it again
                        await acks.put(asyncio.create_task(begun))
            finally:
                await acks.put(None)

        reader = asyncio.create_task(read_all())
        try:
            while (ack := await acks.get()) is not None:
                await context.write(await ack)
                room.release()
            await reader
        finally:
            timer.cancel()
            idle.cancel()
            tasks: list[asyncio.Task[Any]] = [reader, drained]
            while not acks.empty():
                if (left := acks.get_nowait()) is not None:
                    tasks.append(left)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _leave_on_drain(self, leave: asyncio.Event) -> None:
        await self._drain.wait()
        leave.set()

    async def record_plays(self, raw: bytes, context: Context) -> bytes:
        """The raw RecordPlays."""
        return await self._recorder.record(raw)

    # --- Queries ------------------------------------------------------------------------------------------------------

    async def GetTopK(self, request: pb.GetTopKRequest, context: Context) -> pb.GetTopKResponse:  # noqa: N802
        """The k best of a window."""
        window = convert.window_from_pb(request.window if request.HasField("window") else None)
        as_of = convert.as_of_from_pb(request)
        check_history(window, request.history_panes)
        answer = await self._queries.top_k(window, request.k, request.chart, as_of, allow_partial=request.allow_partial)
        if request.history_panes:
            answer = await with_history(
                self._queries,
                answer,
                request.k,
                request.chart,
                request.history_panes,
                allow_partial=request.allow_partial,
            )
        return convert.answer_to_pb(answer)

    async def WatchTopK(  # noqa: N802
        self, request: pb.WatchTopKRequest, context: Context
    ) -> AsyncIterator[pb.WatchTopKResponse]:
        """The k best of a window, now and whenever they change."""
        async with aclosing(self._hub.follow(watch_query_from_pb(request), request.resume_token)) as steps:
            async for step in steps:
                yield step

    async def GetSongs(self, request: pb.GetSongsRequest, context: Context) -> pb.GetSongsResponse:  # noqa: N802
        """Count, rank and neighbours of songs."""
        window = convert.window_from_pb(request.window if request.HasField("window") else None)
        answer = await self._queries.songs(
            window,
            list(request.song_ids),
            request.chart,
            convert.as_of_from_pb(request),
            request.neighbours,
            allow_partial=request.allow_partial,
        )
        return convert.songs_answer_to_pb(answer)

    async def ListCharts(self, request: pb.ListChartsRequest, context: Context) -> pb.ListChartsResponse:  # noqa: N802
        """All charts with their totals."""
        certificate, charts = await self._queries.charts(allow_partial=request.allow_partial)
        return pb.ListChartsResponse(
            certificate=convert.certificate_to_pb(certificate), charts=[convert.chart_to_pb(chart) for chart in charts]
        )

    async def DescribeCluster(self, request: pb.DescribeClusterRequest, context: Context) -> pb.DescribeClusterResponse:  # noqa: N802
        """The shards, who owns what, what moves, and the settings."""
        return await self._describer.describe()
