"""The client for programs on an event loop."""

from __future__ import annotations

import asyncio
import random as chance
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Self

from topk_grpc.changes import WatchUpdate
from topk_grpc.client.columns import Bytes, Int64s, check_columns
from topk_grpc.client.options import RecordOptions
from topk_grpc.client.queries import Queries, watch_request
from topk_grpc.client.recorder import Recorder
from topk_grpc.client.stats import ClientStats
from topk_grpc.errors import InvalidArgumentError, TopKError
from topk_grpc.model import Answer, AsOf, ChartSummary, Rejected, SongsAnswer, Window
from topk_grpc.rpc.connection import Connection, Token
from topk_grpc.rpc.tls import TlsOptions

if TYPE_CHECKING:
    from topk_grpc.pb.topk.v1.topk_service_pb2 import DescribeClusterResponse, WatchTopKRequest


class TopKClient:
    """Records plays and asks what is played most.

    One object is one producer: an ordered source of batches, each counted exactly once, however often connections
    break, gateways go and shards are killed meanwhile. It belongs to the event loop it is first used on; any number of
    its tasks may use it at once.

        async with TopKClient("127.0.0.1:50050") as client:
            await client.record("Boston - More Than a Feeling", charts=["US"])
            await client.flush()                      # on disk and counted
            answer = await client.top_k("tumbling:1d", k=100, chart="US")
    """

    def __init__(
        self,
        target: str | Sequence[str] = "127.0.0.1:50050",
        *,
        tls: TlsOptions | bool | None = None,
        token: Token | None = None,
        plaintext: bool = False,
        producer_id: str | None = None,
        first_sequence: int = 1,
        first_sent_ms: int | None = None,
        batch_plays: int = 8192,
        linger_ms: float = 50,
        batches_in_flight: int = 16,
        expect_duplicates: bool = False,
        on_rejected: Callable[[Rejected], None] | None = None,
        deadline_seconds: float = 30.0,
        clock: Callable[[], float] = time.time,
        random: Callable[[], float] = chance.random,
    ) -> None:
        """Makes a client; it connects when first used.

        Args:
            target: a gateway as HOST:PORT, several as a list, or a name such as `dns:///gateways:50050`; streams and
                queries go to all of them in turn.
            tls: speak TLS. True: trust the public CAs; `TlsOptions`: a CA of your own, a certificate to show. Files are
                read anew when they have changed.
            token: shown to the gateway with each call: the token, a Path of a file that holds it, or a function that
                returns it; file and function are asked again for each call and stream.
            plaintext: allow the token to go to another machine without TLS.
            producer_id: names this source of batches, 1 to 128 bytes. None: a random one, right for every program that
                does not keep it on disk together with its sequence. Two processes must never share one.
            first_sequence: the first batch's number: 1, or the next after those kept with producer_id.
            first_sent_ms: what each batch says of its first send, epoch milliseconds. None: the clock when the batch is
                made. 0: the cluster never forgets this producer (it forgets others after 30 idle days).
            batch_plays: a batch goes when it holds this many plays, 1 to 65,536. More is faster and later.
            linger_ms: a batch goes this long after its first play at the latest. More makes larger batches of rare
                plays.
            batches_in_flight: the most batches that are not acknowledged, 1 to 63; then `record` waits. With
                batch_plays it bounds the memory used.
            expect_duplicates: do not take it for an error that a batch had been counted before: for sources that are
                replayed under the same producer_id on purpose.
            on_rejected: is called with each play that the cluster did not count, on the event loop. None: `flush`
                raises RejectedPlaysError.
            deadline_seconds: how long `record`, `flush`, `close` and every query may wait before they raise
                UnavailableError. Undelivered batches are kept and sent on. A stream on which nothing is acknowledged
                for this long is replaced.
            clock: seconds since the epoch; for tests and simulations.
            random: draws evenly from [0, 1), for the waits between streams; for tests and simulations.

        Raises:
            SettingError: an argument is out of range, the target is no address, a file cannot be used, or the token
                would go to another machine in plaintext.
        """
        self._connection = Connection(target, tls=tls, token=token, plaintext=plaintext)
        self._options = RecordOptions(
            producer_id=uuid.uuid4().hex if producer_id is None else producer_id,
            first_sequence=first_sequence,
            first_sent_ms=first_sent_ms,
            batch_plays=batch_plays,
            linger_ms=linger_ms,
            batches_in_flight=batches_in_flight,
            expect_duplicates=expect_duplicates,
            on_rejected=on_rejected,
            deadline_seconds=deadline_seconds,
            clock=clock,
            random=random,
        )
        self._stats = ClientStats()
        self._recorder: Recorder | None = None
        self._queries: Queries | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        self._recording()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes; a body that failed keeps its error, one that was cancelled does not wait for the cluster."""
        if error is None:
            await self.close()
        elif isinstance(error, Exception):
            try:
                await self.close()
            except Exception as second:  # the first error is the one to tell of
                if second is not error:
                    error.add_note(f"closing the client failed as well: {second}")
        else:
            await self._shut()

    @property
    def producer_id(self) -> str:
        """The name of this source of batches."""
        return self._options.producer_id

    @property
    def stats(self) -> ClientStats:
        """Counts so far; the same object all along."""
        return self._stats

    # --- Recording ----------------------------------------------------------------------------------------------------

    async def record(
        self, song_id: str, played_at: int | datetime | None = None, *, count: int = 1, charts: Sequence[str] = ()
    ) -> None:
        """Takes a play into the batch that is being filled.

        It is durable when a later `flush` or `close` has returned. Waits only while `batches_in_flight` batches are
        unacknowledged and the next one is full.

        Args:
            song_id: what was played, 1 to 128 bytes of UTF-8.
            played_at: when: epoch milliseconds or a datetime (naive: UTC). None: now.
            count: how many plays it stands for. Below 0 it is a correction: it takes so many plays back from the time
                bucket of `played_at` and the charts named, or is rejected.
            charts: the leaderboards besides the global one that it counts in, at most 8.

        Raises:
            InvalidArgumentError: it cannot be encoded; other plays are not touched.
            UnavailableError: no batch was acknowledged for deadline_seconds; the play was not taken.
            UnauthenticatedError, PermissionDeniedError: the gateway refuses the token; the play was not taken. What was
                taken before is kept: see `flush`.
            TopKError: the cluster refused an earlier batch for good, or a first send was answered `duplicate`
                (DuplicateBatchError): nothing more is sent.
        """
        await self._recording().record(song_id, played_at, count, charts)

    async def record_columns(  # noqa: PLR0917  # the columns' natural order
        self,
        song_data: Bytes,
        song_offsets: Int64s,
        played_at_ms: Int64s,
        counts: Int64s | None = None,
        chart_data: Bytes | None = None,
        chart_offsets: Int64s | None = None,
    ) -> int:
        """Sends exactly one batch, out of columns as Arrow lays them out.

        Waits for room where there is none, never for the acknowledgement.

        Args:
            song_data: the song_ids' UTF-8 one after the other.
            song_offsets: int64, one more than rows: where each begins, and where the last ends.
            played_at_ms: int64, epoch milliseconds.
            counts: int64, as in `record`; None: 1 each.
            chart_data: one chart a play, as song_data; an empty text is no chart. None: no charts at all.
            chart_offsets: as song_offsets.

        Returns:
            The batch's sequence.

        Raises:
            InvalidArgumentError: no rows or more than batch_plays, or columns that do not fit each other.
            UnavailableError: as `record`; the batch was not taken.
            TopKError: as `record`.
        """
        recorder = self._recording()
        columns = check_columns(
            song_data, song_offsets, played_at_ms, counts, chart_data, chart_offsets, self._options.batch_plays
        )
        return await recorder.record_columns(columns)

    async def flush(self) -> None:
        """Returns when every play recorded before is on disk at every shard concerned (fdatasync), and counted.

        Raises:
            RejectedPlaysError: all are, but for the plays that it lists; only without on_rejected. Each is raised once.
            DuplicateBatchError: another process uses this producer_id: not everything recorded here was counted.
            UnavailableError: not within deadline_seconds. What is missing is kept and sent on: flush again.
            UnauthenticatedError, PermissionDeniedError: the gateway refuses the token. What is missing is kept; when
                that has been put right, flush again.
            TopKError: the cluster refused a batch for good; nothing more is sent.
        """
        await self._recording().flush()

    async def close(self) -> None:
        """Flushes, then disconnects, that too where flushing fails. The client cannot be used afterwards.

        Raises:
            TopKError: as `flush`; what was not durable by then is given up.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if self._recorder is not None:
                await self._recorder.finish()
        finally:
            await self._shut()

    # --- Asking -------------------------------------------------------------------------------------------------------

    async def top_k(
        self,
        window: str | Window,
        k: int = 10,
        *,
        chart: str | None = None,
        as_of: AsOf | str = None,
        allow_partial: bool = False,
        history_panes: int = 0,
    ) -> Answer:
        """The k songs with the most plays in a window, exactly.

        Args:
            window: `global`, `tumbling:1d`, `sliding:10m/1m`, `session:15m`, `range:START..END`, or a value of
                `topk_grpc.model`.
            k: how many, 1 to 10,000.
            chart: None: the global one.
            as_of: the instant the window is taken at: epoch milliseconds, a datetime, ISO 8601, `latest` (the newest
                play's time), None (the gateway's clock). Refused for the global window.
            allow_partial: answer without shards that are down, and say so in the certificate, instead of failing.
            history_panes: only for tumbling windows: each entry's `history` tells how it fared in so many panes, this
                one included, 2 to 520; 52 is usual. 0: no history.

        Raises:
            InvalidArgumentError: the cluster refuses the request as it is.
            OutOfRangeError: what is kept of a time so far back cannot be cut at the window's bounds any more.
            UnavailableError: a shard does not answer, or no gateway.
            DeadlineError: no answer came within deadline_seconds.
        """
        return await self._asking().top_k(window, k, chart, as_of, allow_partial, history_panes)

    def watch(
        self,
        window: str | Window,
        k: int = 10,
        *,
        chart: str | None = None,
        latest: bool = False,
        allow_partial: bool = False,
        on_interrupted: Callable[[TopKError], None] | None = None,
    ) -> AsyncGenerator[WatchUpdate, None]:
        """The k songs with the most plays in a window, now and whenever they change.

        Gateways and shards may go and come back meanwhile: the watch connects again by itself, for as long as it takes,
        and goes on where it was. Lists that came and went faster than they were asked for are passed over.

            async for update in client.watch("sliding:10m/1m", k=10):
                print(update.answer.entries[0])

        Closing the generator ends the watch; closing the client ends the generator.

        Args:
            window: as in `top_k`; it moves with the gateway's clock.
            k: how many, 1 to 1,000.
            chart: None: the global one.
            latest: take the window at the newest play instead of the gateway's clock.
            allow_partial: go on without shards that are down, and say so in the certificate.
            on_interrupted: is called, on the event loop, each time that a stream fails or none can be opened, with the
                error. The next update means that all is well again.

        Returns:
            A generator of updates: the first comes at once and is the whole list. It raises UnavailableError where that
            takes longer than deadline_seconds, and what the cluster refuses for good.

        Raises:
            InvalidArgumentError: it cannot be written as a request.
        """
        return self._watch(watch_request(window, k, chart, latest, allow_partial), on_interrupted)

    async def songs(
        self,
        song_ids: Sequence[str],
        window: str | Window = "global",
        *,
        chart: str | None = None,
        as_of: AsOf | str = None,
        neighbours: int = 0,
        allow_partial: bool = False,
    ) -> SongsAnswer:
        """Count and exact rank of given songs.

        Args:
            song_ids: 1 to 100 songs; the answer keeps their order.
            window: as in `top_k`.
            chart: as in `top_k`.
            as_of: as in `top_k`.
            neighbours: how many entries directly above and below each song to return, 0 to 100.
            allow_partial: as in `top_k`; ranks then count only what answered.

        Raises:
            InvalidArgumentError: the cluster refuses the request as it is.
            UnavailableError: a shard does not answer, or no gateway.
            DeadlineError: no answer came within deadline_seconds.
        """
        return await self._asking().songs(song_ids, window, chart, as_of, neighbours, allow_partial)

    async def charts(self, *, allow_partial: bool = False) -> tuple[ChartSummary, ...]:
        """All charts with their totals, the most played first.

        Raises:
            UnavailableError: a shard does not answer, or no gateway.
            DeadlineError: no answer came within deadline_seconds.
        """
        return await self._asking().charts(allow_partial)

    async def describe(self) -> DescribeClusterResponse:
        """The shards, who owns what, and the cluster's settings: the message of `protos/topk/v1/topk_service.proto`.

        Raises:
            UnavailableError: no gateway answers.
            DeadlineError: no answer came within deadline_seconds.
        """
        return await self._asking().describe()

    # --- Opening and shutting -----------------------------------------------------------------------------------------

    def _connect(self) -> Connection:
        if self._closed:
            raise InvalidArgumentError("the client is closed: make a new one")
        return self._connection

    def _recording(self) -> Recorder:
        """The recorder; the first call has to be on the loop."""
        connection = self._connect()
        if self._recorder is None:
            self._recorder = Recorder(connection, self._options, self._stats)
        return self._recorder

    def _asking(self) -> Queries:
        connection = self._connect()
        if self._queries is None:
            self._queries = Queries(connection, self._options.deadline_seconds)
        return self._queries

    async def _watch(
        self, request: WatchTopKRequest, on_interrupted: Callable[[TopKError], None] | None
    ) -> AsyncGenerator[WatchUpdate, None]:
        watching = self._asking().watching(request, self._options.random, lambda: self._closed, on_interrupted)
        async with aclosing(watching.updates()) as updates:
            async for update in updates:
                yield update

    async def _shut(self) -> None:
        """Disconnects without a flush."""
        self._closed = True
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            await recorder.close()
        await self._connection.close()
        # The channel's connections end in callbacks that are queued now; a loop that closes at once would lose them.
        await asyncio.sleep(0)
