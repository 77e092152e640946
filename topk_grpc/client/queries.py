"""The calls that ask. Those with one message back are tried again by the channel while a gateway is unavailable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import grpc

from topk_grpc.client.watching import Interrupted, Watching
from topk_grpc.errors import DeadlineError, InvalidArgumentError
from topk_grpc.model import Answer, AsOf, ChartSummary, SongsAnswer, Window, parse_window
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.pb.topk.v1.topk_service_pb2_grpc import TopKServiceStub
from topk_grpc.rpc import convert
from topk_grpc.rpc.connection import Connection
from topk_grpc.rpc.status import from_rpc_error, is_own

if TYPE_CHECKING:
    from topk_grpc.pb.topk.v1.topk_service_pb2_grpc import TopKServiceAsyncStub


class Queries:
    """Asks a gateway. The methods' contracts stand at `TopKClient`."""

    def __init__(self, connection: Connection, deadline_seconds: float) -> None:
        """Asks over the connection given; each call takes at most deadline_seconds."""
        self._connection = connection
        self._channel: grpc.aio.Channel | None = None
        self._made: TopKServiceAsyncStub | None = None
        self._deadline_seconds = deadline_seconds

    @property
    def _stub(self) -> TopKServiceAsyncStub:
        """Of the channel that is to be used now."""
        channel = self._connection.channel
        if self._made is None or channel is not self._channel:
            self._channel, self._made = channel, TopKServiceStub(channel)
        return self._made

    async def _call(self, method: str, request: Any) -> Any:
        """Makes a call.

        Raises:
            TopKError: as the gateway says, UnavailableError or DeadlineError.
        """
        metadata = self._connection.metadata()
        try:
            return await getattr(self._stub, method)(request, timeout=self._deadline_seconds, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            failure = from_rpc_error(error)
            if isinstance(failure, DeadlineError) and not is_own(error):
                failure = DeadlineError(
                    f"no answer within {self._deadline_seconds:g} s: the gateway, or a shard that it waits for, is away"
                    " or slow; `topk cluster status` shows how the shards are"
                )
            raise failure from error

    async def top_k(  # noqa: PLR0917  # called from one place
        self,
        window: str | Window,
        k: int,
        chart: str | None,
        as_of: AsOf | str,
        allow_partial: bool,
        history_panes: int,
    ) -> Answer:
        """GetTopK."""
        try:
            request = pb.GetTopKRequest(
                window=convert.window_to_pb(_window(window)),
                k=k,
                chart=chart or "",
                as_of=convert.as_of_to_pb(as_of),
                allow_partial=allow_partial,
                history_panes=history_panes,
            )
        except (TypeError, ValueError) as error:
            raise _refused(error) from error
        return convert.answer_from_pb(await self._call("GetTopK", request))

    async def songs(  # noqa: PLR0917  # called from one place
        self,
        song_ids: Sequence[str],
        window: str | Window,
        chart: str | None,
        as_of: AsOf | str,
        neighbours: int,
        allow_partial: bool,
    ) -> SongsAnswer:
        """GetSongs."""
        if isinstance(song_ids, str):
            raise InvalidArgumentError(f"song_ids is the text {song_ids!r}: give a sequence, as in [{song_ids!r}]")
        try:
            request = pb.GetSongsRequest(
                window=convert.window_to_pb(_window(window)),
                song_ids=song_ids,
                chart=chart or "",
                as_of=convert.as_of_to_pb(as_of),
                neighbours=neighbours,
                allow_partial=allow_partial,
            )
        except (TypeError, ValueError) as error:
            raise _refused(error) from error
        return convert.songs_answer_from_pb(await self._call("GetSongs", request))

    def watching(
        self,
        request: pb.WatchTopKRequest,
        random: Callable[[], float],
        closed: Callable[[], bool],
        on_interrupted: Interrupted | None,
    ) -> Watching:
        """WatchTopK, again and again; the request is one of `watch_request`."""
        return Watching(
            lambda metadata: self._stub.WatchTopK(request, metadata=metadata),
            request,
            self._connection,
            first_seconds=self._deadline_seconds,
            random=random,
            closed=closed,
            on_interrupted=on_interrupted,
        )

    async def charts(self, allow_partial: bool) -> tuple[ChartSummary, ...]:
        """ListCharts."""
        request = pb.ListChartsRequest(allow_partial=allow_partial)
        response = await self._call("ListCharts", request)
        return tuple(convert.chart_from_pb(chart) for chart in response.charts)

    async def describe(self) -> pb.DescribeClusterResponse:
        """DescribeCluster."""
        response: pb.DescribeClusterResponse = await self._call("DescribeCluster", pb.DescribeClusterRequest())
        return response


def watch_request(
    window: str | Window, k: int, chart: str | None, latest: bool, allow_partial: bool
) -> pb.WatchTopKRequest:
    """What a watch asks for.

    Raises:
        InvalidArgumentError: it cannot be written.
    """
    try:
        return pb.WatchTopKRequest(
            window=convert.window_to_pb(_window(window)),
            k=k,
            chart=chart or "",
            latest=latest,
            allow_partial=allow_partial,
        )
    except (TypeError, ValueError) as error:
        raise _refused(error) from error


def _window(window: str | Window) -> Window:
    if isinstance(window, str):
        return parse_window(window)
    if not isinstance(window, Window):
        raise InvalidArgumentError(f"{window!r} is no window: write text as in tumbling:1d, or a value of model.py")
    return window


def _refused(error: Exception) -> InvalidArgumentError:
    """What cannot even be written down as a request, in one class."""
    if isinstance(error, InvalidArgumentError):
        return error
    return InvalidArgumentError(f"the request cannot be written: {error}")
