"""Turns single plays into batches, and hands those to the delivery.

Theory of operation. Plays gather in one buffer. It is sealed into a batch, which takes the next sequence, when it is
full, when its first play has waited for `linger_ms`, or when somebody flushes. Sealing needs room in the delivery;
while there is none, the buffer fills up, is overdue, and is sealed by the acknowledgement that makes room. A full
buffer without room is what `record` waits for: so memory is bounded by the batches in flight and one more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime
from typing import Final

from google.protobuf.message import DecodeError

from topk_grpc.client.buffer import Added, PlayBuffer, check_play
from topk_grpc.client.columns import Columns
from topk_grpc.client.delivery import Delivery
from topk_grpc.client.options import RecordOptions
from topk_grpc.client.outbox import OutgoingBatch
from topk_grpc.client.stats import ClientStats
from topk_grpc.errors import RejectedPlaysError
from topk_grpc.kernels.encode import encode_batch, encode_batch_columns
from topk_grpc.model import Play, Rejected
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.rpc.connection import Connection

_REJECTED_KEPT: Final = 1000
"""Rejected plays that are kept for a RejectedPlaysError; more are counted."""


class Recorder:
    """One producer: buffers, batches, delivers."""

    def __init__(self, connection: Connection, options: RecordOptions, stats: ClientStats) -> None:
        """Starts the delivery on the running loop."""
        self._options = options
        self._producer_id = options.producer_id.encode()
        self._stats = stats
        self._loop = asyncio.get_running_loop()
        self._buffer = PlayBuffer(options.batch_plays)
        self._overdue = False
        self._linger: asyncio.TimerHandle | None = None
        self._rejected: list[Rejected] = []
        self._rejected_count = 0
        self._delivery = Delivery(
            connection,
            self,
            stats,
            first_sequence=options.first_sequence,
            batches_in_flight=options.batches_in_flight,
            expect_duplicates=options.expect_duplicates,
            silence_seconds=options.deadline_seconds,
            random=options.random,
        )

    # --- Plays come in ------------------------------------------------------------------------------------------------

    def add(self, song_id: str, played_at: int | datetime | None, count: int, charts: Sequence[str]) -> Added:
        """Puts a play into the buffer if there is room, without waiting; from any thread.

        Whatever it answers but QUIET and REFUSED has to be passed to `follow_up`, on the loop.

        Raises:
            InvalidArgumentError: the play cannot be encoded.
            TopKError: the producer has stopped.
        """
        self._delivery.raise_failure()
        when = self._options.now_ms() if played_at is None else played_at
        return self._buffer.add(song_id, *check_play(song_id, when, count, charts))

    def follow_up(self, added: Added) -> None:
        """Does what the state of the buffer asks for after an `add`."""
        if added is Added.FULL:
            self._seal_if_due()
        elif added is Added.FIRST and self._linger is None:
            self._linger = self._loop.call_later(self._options.linger_ms / 1000, self._linger_over)

    async def record(self, song_id: str, played_at: int | datetime | None, count: int, charts: Sequence[str]) -> None:
        """Puts a play into the buffer; waits while that is full and its batch cannot go."""
        until = self._until()
        while (added := self.add(song_id, played_at, count, charts)) is Added.REFUSED:
            await self._delivery.wait_until(lambda: not self._buffer.full, until, "no room for another play")
        if added is not Added.QUIET:
            self.follow_up(added)
        if added is Added.FULL:
            # Callers that never wait for anything else would keep the stream from running.
            await asyncio.sleep(0)

    async def record_columns(self, columns: Columns) -> int:
        """Sends exactly one batch; waits while there is no room for it. Returns its sequence."""
        await self._delivery.wait_until(lambda: self._delivery.has_room, self._until(), "no room for another batch")
        payload = encode_batch_columns(
            self._producer_id,
            self._delivery.next_sequence,
            self._first_sent_ms(),
            columns.song_data,
            columns.song_offsets,
            columns.played_at_ms,
            columns.counts,
            columns.chart_data,
            columns.chart_offsets,
        )
        sequence = self._delivery.submit(payload, len(columns))
        await asyncio.sleep(0)
        return sequence

    async def flush(self) -> None:
        """Returns when every play recorded before is durable."""
        until = self._until()
        generation = self._buffer.generation
        if len(self._buffer):
            await self._delivery.wait_until(
                lambda: self._delivery.has_room or self._buffer.generation != generation,
                until,
                "the last plays cannot be sent",
            )
            if self._buffer.generation == generation:
                self._seal()
        target = self._delivery.next_sequence
        await self._delivery.wait_until(
            lambda: self._delivery.lowest_unacknowledged >= target, until, "not everything is durable"
        )
        if self._rejected_count:
            rejected, count = tuple(self._rejected), self._rejected_count
            self._rejected, self._rejected_count = [], 0
            first = rejected[0]
            raise RejectedPlaysError(
                f"{count} plays were not counted, all others are durable. The first: {first.reason}: {first.message} "
                f"(batch {first.sequence}, index {first.index}: {first.play}). Give on_rejected to be told of each",
                rejected,
                count,
            )

    async def finish(self) -> None:
        """Takes no more plays, and flushes."""
        self._buffer.close()
        await self.flush()

    async def close(self) -> None:
        """Ends the stream; what is not acknowledged is given up."""
        self._buffer.close()
        if self._linger is not None:
            self._linger.cancel()
        await self._delivery.close()

    # --- Batches go out -----------------------------------------------------------------------------------------------

    def _until(self) -> float:
        return self._loop.time() + self._options.deadline_seconds

    def _first_sent_ms(self) -> int:
        # Taken when the batch is made, not when a connection takes it: a batch held back while the cluster is away must
        # look as old as it is, or it could count again after its producer was forgotten.
        given = self._options.first_sent_ms
        return self._options.now_ms() if given is None else given

    def _linger_over(self) -> None:
        self._linger = None
        self._overdue = True
        self._seal_if_due()

    def _seal_if_due(self) -> None:
        if (self._buffer.full or self._overdue) and self._delivery.has_room and self._delivery.failure is None:
            self._seal()

    def _seal(self) -> None:
        self._overdue = False
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        rows = self._buffer.take()
        if not len(rows):
            return
        try:
            payload = encode_batch(
                self._producer_id,
                self._delivery.next_sequence,
                self._first_sent_ms(),
                rows.song_ids,
                rows.played_at_ms,
                rows.counts if any(count != 1 for count in rows.counts) else None,
                rows.charts if any(rows.charts) else None,
            )
        except Exception as error:
            # `add` lets nothing pass that does not encode. Should it happen all the same, plays are lost: say so.
            self._delivery.fail(error)
            raise
        self._delivery.submit(payload, len(rows))

    # --- What the delivery tells --------------------------------------------------------------------------------------

    def on_room(self) -> None:
        """Sends what waited for room."""
        self._seal_if_due()

    def on_acknowledged(self, batch: OutgoingBatch, response: pb.StreamPlaysResponse) -> None:
        """Counts, and passes the rejected plays on."""
        self._stats.plays_accepted += response.accepted
        self._stats.plays_rejected += len(response.rejected)
        if not response.rejected:
            return
        plays = _plays_of(batch.payload)
        for item in response.rejected:
            play = plays[item.index] if item.index < len(plays) else None
            self._reject(Rejected(item.index, item.reason, item.message, batch.sequence, play))

    def _reject(self, rejected: Rejected) -> None:
        if self._options.on_rejected is None:
            self._rejected_count += 1
            if len(self._rejected) < _REJECTED_KEPT:
                self._rejected.append(rejected)
            return
        try:
            self._options.on_rejected(rejected)
        except Exception as error:
            # The batch is durable whatever the callback does; its mistake is reported as any callback's on this loop.
            self._loop.call_exception_handler({"message": "on_rejected failed", "exception": error})


def _plays_of(payload: bytes) -> list[Play]:
    """Reads a batch's plays back: rejects are rare, so keeping the plays of every batch would not pay."""
    try:
        batch = pb.StreamPlaysRequest.FromString(payload).batch
    except DecodeError:  # a song_id that is not UTF-8, out of columns: protobuf reads no play of such a batch
        return []
    return [
        Play(play.song_id, play.played_at_ms, play.count if play.HasField("count") else 1, tuple(play.charts))
        for play in batch.plays
    ]
