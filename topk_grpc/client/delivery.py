"""A producer's ordered stream: batches go in, each is acknowledged once, whatever happens to connections and servers.

Theory of operation. One task runs streams one after the other while there is something to deliver:

    wait for work → back off → StreamPlays: a writer hands out batches, a reader takes acknowledgements → it ends → …

- Every end of a stream means the same: open another and send what is unacknowledged again, in order. That holds for OK
  too, which a draining server or one that bounds the age of its streams ends with. Nothing counts twice: a shard knows
  each batch by (producer, sequence).
- Waits between streams grow with full jitter and are short again after any acknowledgement.
- A stream that stays silent although batches are unacknowledged is given up: a connection may be dead without an end.
- A gateway that refuses the token stops nothing for good: a stream with another token is tried at once, where there is
  one; else everybody who waits is told, plays are taken no more, and the next `wait_until` (a flush, say) tries again.
- Only three things stop a producer: a status that would be the same the next time (retries.py), an acknowledgement
  `duplicate` of a batch sent once (two processes share the producer id), and an acknowledgement that answers nothing.
  The failure is raised to everybody who waits, now and later; what is unacknowledged is not sent again.

Who owns what: the outbox knows order and bounds, this module knows streams and time, recorder.py knows plays and
batches. All of it runs on one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

import grpc

from topk_grpc.client.backoff import Backoff
from topk_grpc.client.notifier import Notifier
from topk_grpc.client.outbox import Outbox, OutgoingBatch
from topk_grpc.client.retries import retry_after_seconds
from topk_grpc.client.stats import ClientStats
from topk_grpc.errors import (
    DeadlineError,
    DuplicateBatchError,
    InvalidArgumentError,
    PermissionDeniedError,
    SettingError,
    TopKError,
    UnauthenticatedError,
    UnavailableError,
)
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.rpc.connection import Connection, Metadata
from topk_grpc.rpc.status import from_rpc_error

if TYPE_CHECKING:
    PlaysMultiCallable = grpc.aio.StreamStreamMultiCallable[bytes, pb.StreamPlaysResponse]
    PlaysCall = grpc.aio.StreamStreamCall[bytes, pb.StreamPlaysResponse]

_GOODBYE_SECONDS: Final = 1.0
"""How long a finished stream may take to end by itself before it is cut."""


class Listener(Protocol):
    """Whoever fills the outbox."""

    def on_acknowledged(self, batch: OutgoingBatch, response: pb.StreamPlaysResponse) -> None:
        """A batch is durable; called once for each."""

    def on_room(self) -> None:
        """Acknowledgements made room; called before waiters wake."""


class Delivery:
    """Delivers batches in order, each counted exactly once."""

    def __init__(
        self,
        connection: Connection,
        listener: Listener,
        stats: ClientStats,
        *,
        first_sequence: int,
        batches_in_flight: int,
        expect_duplicates: bool,
        silence_seconds: float,
        random: Callable[[], float],
    ) -> None:
        """Starts delivering; a stream is opened with the first batch.

        Args:
            connection: to the gateways; stays the caller's.
            listener: is told of acknowledgements.
            stats: is counted up.
            first_sequence: of the first batch.
            batches_in_flight: the most batches unacknowledged, 1 to 63.
            expect_duplicates: a first send may be answered `duplicate`: an earlier process sent under the same id.
            silence_seconds: a stream without any acknowledgement for this long, though batches wait for one, is given
                up.
            random: draws evenly from [0, 1).

        Raises:
            SettingError: a number is out of range.
        """
        self._outbox = Outbox(first_sequence, batches_in_flight)
        self._listener = listener
        self._stats = stats
        self._expect_duplicates = expect_duplicates
        self._silence_seconds = silence_seconds
        self._backoff = Backoff(random)
        self._changed = Notifier()
        self._streams = 0
        self._progress_at = 0.0  # the loop's time of the last sign that the stream moves
        self._closing = False
        self._last_end: TopKError | None = None  # how the last stream ended, for messages
        self.failure: Exception | None = None
        """What stopped the producer, if anything did."""
        self._refused = False  # by a failure that putting the token right would end
        self._connection = connection
        self._shown: Metadata = ()  # on the present stream
        self._retried = False  # with another token, since anything was acknowledged
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._run(), name="topk delivery")

    # --- What callers use ---------------------------------------------------------------------------------------------

    @property
    def next_sequence(self) -> int:
        """The sequence that the next batch has to carry."""
        return self._outbox.next_sequence

    @property
    def lowest_unacknowledged(self) -> int:
        """The lowest unacknowledged sequence; `next_sequence` where everything is durable."""
        return self._outbox.lowest_unacknowledged

    @property
    def has_room(self) -> bool:
        """Whether `submit` may be called."""
        return self._outbox.has_room

    def submit(self, payload: bytes, plays: int) -> int:
        """Takes a batch that carries `next_sequence`; there must be room.

        Args:
            payload: the bytes of a StreamPlaysRequest.
            plays: how many plays are in it.

        Returns:
            Its sequence.
        """
        if not len(self._outbox):
            self._progress_at = self._loop.time()
        sequence = self._outbox.add(payload, plays)
        self._stats.plays_sent += plays
        self._changed.notify()
        return sequence

    async def wait_until(self, condition: Callable[[], bool], until: float, purpose: str) -> None:
        """Returns as soon as the condition holds; looked at whenever anything changes.

        Args:
            condition: free of side effects.
            until: the loop's time at which to give up.
            purpose: what the caller waits for, for the message.

        Raises:
            DeadlineError: it did not hold in time. Unacknowledged batches stay and are sent on.
            TopKError: the producer has stopped.
        """
        if self._refused:
            self._refused, self.failure = False, None
            self._changed.notify()
        try:
            async with asyncio.timeout_at(until):
                while True:
                    self.raise_failure()
                    if condition():
                        return
                    await self._changed.wait()
        except TimeoutError:
            why = f"the last stream ended so: {self._last_end}" if self._last_end else "the stream is open but silent"
            raise DeadlineError(
                f"{purpose}: {len(self._outbox)} batches from {self.lowest_unacknowledged} on are unacknowledged; "
                f"{why}. Until the client is closed they are sent again: "
                "flush() once more, or see whether the gateway runs"
            ) from self._last_end

    def raise_failure(self) -> None:
        """Raises what stopped the producer, if anything did."""
        if self.failure is not None:
            raise self.failure.with_traceback(None)

    def fail(self, failure: Exception) -> None:
        """Stops the producer for good; everybody who waits hears why."""
        if self.failure is None:
            self.failure = failure
        self._changed.notify()

    async def close(self) -> None:
        """Ends the stream: politely where everything is acknowledged, else at once, giving up what is not."""
        self._closing = True
        self._changed.notify()
        if not len(self._outbox) and self.failure is None:
            await asyncio.wait({self._task}, timeout=_GOODBYE_SECONDS)
        self._task.cancel()
        await asyncio.wait({self._task})
        self.fail(InvalidArgumentError("the client is closed: make a new one"))

    # --- Streams, one after the other ---------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            wait_seconds = 0.0
            while await self._work_to_do():
                await asyncio.sleep(wait_seconds)
                try:
                    least_seconds = await self._run_stream()
                except (UnauthenticatedError, PermissionDeniedError, SettingError) as error:
                    least_seconds = 0.0
                    self._last_end = error
                    # One other token is tried, then it is not the token's age.
                    self._retried = not self._retried and self._connection.has_other(self._shown)
                    if not self._retried:
                        self._refused, self.failure = True, error
                        self._changed.notify()
                wait_seconds = self._backoff.next_seconds(least_seconds)
        except Exception as error:
            # Whatever it is, nobody else will see it: the callers must.
            self.fail(error)

    async def _work_to_do(self) -> bool:
        """Waits for something to deliver; False when there is nothing more to come."""
        while self._refused or not len(self._outbox):
            if self._closing or (self.failure is not None and not self._refused):
                return False
            await self._changed.wait()
        return self.failure is None

    async def _run_stream(self) -> float:
        """Runs one stream to its end.

        Returns:
            The least time to wait before the next one, in seconds, as the server asked.

        Raises:
            TopKError: another stream would not help.
        """
        self._streams += 1
        self._stats.reconnects = self._streams - 1
        self._outbox.begin_stream()
        self._progress_at = self._loop.time()
        self._shown = self._connection.metadata()
        open_call: PlaysMultiCallable = self._connection.channel.stream_stream(
            "/topk.v1.TopKService/StreamPlays",
            request_serializer=None,
            response_deserializer=pb.StreamPlaysResponse.FromString,
        )
        call = open_call(metadata=self._shown)
        reader = self._loop.create_task(self._read(call), name="topk delivery reader")
        writer = self._loop.create_task(self._write(call), name="topk delivery writer")
        try:
            await self._watch(reader, writer)
            reader.result()
            self._last_end = UnavailableError("the server ended the stream (OK), as one does that drains")
        except grpc.aio.AioRpcError as error:
            least_seconds = retry_after_seconds(error)
            failure = from_rpc_error(error)
            if least_seconds is None:
                raise failure from error
            self._last_end = failure
            return least_seconds
        except _SilentError:
            self._last_end = DeadlineError(f"nothing was acknowledged for {self._silence_seconds:g} s")
        finally:
            reader.cancel()
            writer.cancel()
            call.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)
        return 0.0

    async def _watch(self, reader: asyncio.Task[None], writer: asyncio.Task[None]) -> None:
        """Returns when the stream has ended; the reader knows how.

        Raises:
            _SilentError: batches wait for an acknowledgement and none came for too long.
        """
        running = {reader, writer}
        while not reader.done():
            await asyncio.wait(running, timeout=self._silence_left(), return_when=asyncio.FIRST_COMPLETED)
            if writer.done() and writer in running:
                running.remove(writer)
                writer.result()
            if not reader.done() and self._silence_left() <= 0:
                raise _SilentError
        if reader.cancelled():
            raise _SilentError  # nobody but this module cancels it; never mistake it for a cancellation of ourselves

    def _silence_left(self) -> float:
        if not len(self._outbox):
            return self._silence_seconds
        return self._progress_at + self._silence_seconds - self._loop.time()

    async def _write(self, call: PlaysCall) -> None:
        """Hands out batches until the stream has ended."""
        while self.failure is None:
            batch = self._outbox.next_to_send()
            if batch is None:
                if self._closing:
                    await call.done_writing()
                    return
                await self._changed.wait()
                continue
            if batch.sends > 1:
                self._stats.batches_resent += 1
            try:
                await call.write(batch.payload)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return  # the stream has ended: its status is the reader's to tell

    async def _read(self, call: PlaysCall) -> None:
        """Takes acknowledgements until the stream has ended.

        Raises:
            AioRpcError: it did not end with OK.
            TopKError: the producer has to stop.
        """
        while True:
            response = await call.read()
            if not isinstance(response, pb.StreamPlaysResponse):
                return  # grpc.aio.EOF: the status is OK
            self._acknowledge(response)

    def _acknowledge(self, response: pb.StreamPlaysResponse) -> None:
        batch = self._outbox.acknowledge(response.sequence)
        if batch is None:
            return
        self._progress_at = self._loop.time()
        self._backoff.reset()
        self._last_end = None
        self._retried = False
        self._stats.batches_acknowledged += 1
        self._stats.batches_duplicate += response.duplicate
        self._listener.on_acknowledged(batch, response)
        if response.duplicate and batch.sends == 1 and not self._expect_duplicates:
            raise DuplicateBatchError(
                f"batch {batch.sequence} was sent once and answered `duplicate`: another process uses this producer_id "
                f"or used it up to there. The batch's {batch.plays} plays did not all count. Take a producer_id of its "
                "own for each process, or go on from the sequence kept with it"
            )
        self._listener.on_room()
        self._changed.notify()


class _SilentError(Exception):
    """The stream neither ended nor moved."""
