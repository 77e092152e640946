"""The way of a batch through the gateway: read, checked, split, sent to its shards, joined into one acknowledgement.

A batch is begun in order (`begin` returns when its parts are queued), and acknowledged when every shard concerned has
answered. Slots that a shard does not own any more are split again by what it says of their new owners, or by a fresh
topology, from the same bytes, until the time is up.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from topk_grpc import metrics
from topk_grpc.config import GatewaySettings
from topk_grpc.errors import DeadlineError, InvalidArgumentError, ProducerExpiredError
from topk_grpc.gateway.link import Part
from topk_grpc.gateway.links import ShardLinks
from topk_grpc.gateway.rates import RateLimits
from topk_grpc.gateway.rejects import SHARD_REASONS, reject_messages
from topk_grpc.gateway.routing import Routing, RoutingWatch
from topk_grpc.kernels.encode import batch_header
from topk_grpc.kernels.hash import hash_strings
from topk_grpc.kernels.split import split_batch
from topk_grpc.kernels.wire import CORRECTION_UNSUPPORTED, REASONS, PlayColumns, decode_batch, message_spans
from topk_grpc.pb.topk.v1 import shard_service_pb2 as shard_pb
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.pb.topk.v1.play_pb2 import RejectedPlay
from topk_grpc.ring.partitioners import partitioner_of
from topk_grpc.rpc.access import caller

PRODUCER_ID_BYTES_MAX = 128
_REROUTE_SECONDS = (0.02, 0.16)
_NUMBERS: Final = np.arange(1 << 16, dtype=np.int32)


@dataclass(slots=True, eq=False)
class _Batch:
    """A batch under way.

    Attributes:
        raw: the client's request.
        header: the ShardBatch's fields 1 to 3.
        plays: how many it has.
        sequence: its number.
        producer_id: whose it is.
        rejects: reason by index, so far.
        duplicate: whether any part had been counted by an earlier send.
        began: the loop's time when it was in hand and might pass.
    """

    raw: bytes
    header: bytes
    plays: int
    sequence: int
    producer_id: bytes
    rejects: dict[int, str] = field(default_factory=dict)
    duplicate: bool = False
    began: float = 0.0


class Recorder:
    """Takes batches through. Belongs to one event loop.

    Args:
        settings: the gateway's.
        watch: follows the topology.
        links: to the shards; kept up to date by its owner.
    """

    def __init__(self, settings: GatewaySettings, watch: RoutingWatch, links: ShardLinks) -> None:
        self._settings = settings
        self._watch = watch
        self._links = links
        self._messages = reject_messages(settings)
        for reason in self._messages:
            metrics.PLAYS_REJECTED.labels(reason)
        self._turn = asyncio.Lock()
        self._rates = RateLimits(settings)

    async def record(self, raw: bytes) -> bytes:
        """Takes a StreamPlaysRequest or RecordPlaysRequest; returns its acknowledgement's bytes when it is durable.

        Raises:
            TopKError: as `begin`.
            RateLimitedError: the producer or the token sends too much.
        """
        begun = await self.begin(raw)
        if begun is None:
            raise AssertionError("only a stream can end before its batch")
        return await begun

    async def begin(self, raw: bytes, leave: asyncio.Event | None = None) -> Coroutine[Any, Any, bytes] | None:
        """Checks a batch and queues its parts; waits only while a shard is too far behind.

        Args:
            raw: the request.
            leave: given for a stream, set when that has to end: a batch over its rate then waits, else it is refused.

        Returns:
            What to await for the acknowledgement: the bytes of a StreamPlaysResponse, which are those of a
                RecordPlaysResponse. None: the stream has to end before the batch may pass.

        Raises:
            InvalidArgumentError: the batch as a whole is wrong.
            DeadlineError: a shard was too far behind for too long.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        who = caller.get()
        async with self._turn:
            # One batch in each round of the event loop: a query waits for one, not for one of every stream.
            await asyncio.sleep(0)
            columns, batch = self._read(raw)
            metrics.BATCHES_RECEIVED.inc()
            metrics.PLAYS_RECEIVED.inc(batch.plays)
            if not self._rates.concern(who):
                return await self._begin(columns, batch, began)
        if leave is None:
            self._rates.take(batch.producer_id, who, batch.plays)
        elif not await self._rates.wait(batch.producer_id, who, batch.plays, leave):
            return None
        began = loop.time()
        async with self._turn:
            return await self._begin(columns, batch, began)

    async def _begin(self, columns: PlayColumns, batch: _Batch, began: float) -> Coroutine[Any, Any, bytes]:
        batch.began, deadline = began, began + self._settings.record_seconds
        routing = self._watch.current
        parts, stands_for = await self._send(batch, columns, routing, routing.owners, deadline)
        return self._finish(batch, parts, stands_for, deadline)

    def _read(self, raw: bytes) -> tuple[PlayColumns, _Batch]:
        settings = self._settings
        spans, _ = message_spans(raw, 0, len(raw), 1)
        if not len(spans):
            raise InvalidArgumentError("the request holds no batch: set `batch` with producer_id, sequence and plays")
        columns = decode_batch(
            raw,
            spans,
            settings.song_id_bytes_max,
            settings.charts_per_play_max,
            settings.chart_bytes_max,
            settings.batch_plays_max,
        )
        producer_id = raw[columns.producer_start : columns.producer_start + columns.producer_size]
        if not 0 < len(producer_id) <= PRODUCER_ID_BYTES_MAX:
            raise InvalidArgumentError(
                f"producer_id has {len(producer_id)} bytes: give 1 to {PRODUCER_ID_BYTES_MAX} bytes of UTF-8, such as a"
                " UUID"
            )
        try:
            producer_id.decode()
        except UnicodeDecodeError as error:
            raise InvalidArgumentError("producer_id is not well-formed UTF-8: encode it so") from error
        if columns.sequence == 0:
            raise InvalidArgumentError("sequence is absent or 0: number the batches of a producer 1, 2, 3, …")
        if columns.first_sent_ms < 0:
            raise InvalidArgumentError(
                f"first_sent_ms is {columns.first_sent_ms}: give milliseconds since the Unix epoch, or leave it out"
            )
        header = batch_header(producer_id, columns.sequence, columns.first_sent_ms)
        return columns, _Batch(raw, header, columns.count, columns.sequence, producer_id)

    async def _send(
        self, batch: _Batch, columns: PlayColumns, routing: Routing, owners: NDArray[np.int32], deadline: float
    ) -> tuple[list[Part], NDArray[np.int32]]:
        """Splits the plays of the owned slots and queues the parts; notes those that are wrong."""
        if not columns.count:
            return [], np.empty(0, np.int32)
        topology = routing.topology
        cluster = topology.settings
        partitioner = partitioner_of(cluster.partitioner)
        if not partitioner.whole_songs:
            columns.reasons[(columns.counts < 0) & (columns.reasons == 0)] = CORRECTION_UNSUPPORTED
        for index in np.flatnonzero(columns.reasons).tolist():
            batch.rejects[index] = REASONS[columns.reasons[index]]
        hashes = hash_strings(batch.raw, columns.song_starts, columns.song_sizes)
        keys = partitioner.slot_keys(hashes, batch.producer_id, batch.sequence, cluster.slots)
        split = split_batch(batch.raw, columns, hashes, keys, owners, len(topology.shards), cluster.resolution_ms)
        alone = np.count_nonzero(split.stands_for == _NUMBERS[: len(split.stands_for)])
        metrics.PLAYS_COMBINED.inc(split.plays - int(alone))
        loop = asyncio.get_running_loop()
        parts = []
        for shard, plays in zip(topology.shards, split.parts, strict=True):
            if len(plays):
                pieces, size = (batch.header, plays), len(batch.header) + len(plays)
                part = Part(topology.epoch, pieces, size, loop.create_future(), shard.shard_id)
                parts.append(part)
                try:
                    async with asyncio.timeout_at(deadline):
                        await self._links[shard.shard_id].submit(part)
                except TimeoutError as error:
                    raise self._too_late() from error
        return parts, split.stands_for

    def _too_late(self) -> DeadlineError:
        seconds = self._settings.record_seconds
        return DeadlineError(
            f"a shard did not take the batch within {seconds:g} s: send it again, it counts once (--record-seconds)"
        )

    async def _finish(self, batch: _Batch, parts: list[Part], stands_for: NDArray[np.int32], deadline: float) -> bytes:
        """Waits for all shards; sends again what went to the wrong ones."""
        try:
            epoch, wait = -1, 0.0
            async with asyncio.timeout_at(deadline):
                told = False
                while True:
                    lost_slots: list[int] = []
                    resent, known = False, True
                    for part in parts:
                        outcome = await part.outcome
                        self._join(batch, part, outcome, stands_for)
                        if outcome.not_owner_slots:
                            lost_slots += outcome.not_owner_slots
                            resent |= part.sends > 1
                            known &= self._watch.learn(part.shard_id, outcome.not_owner_slots, outcome.new_owners)
                    if not lost_slots:
                        self._count(batch)
                        return self._acknowledge(batch)
                    # Two shards may name each other until both have heard what became of a move: not twice at once.
                    told = known and not told
                    if told:
                        routing = self._watch.current
                    else:
                        # Where the slots move, the next epoch says more. If there is none for a while, a target may be
                        # about to serve, or a source to go on with them.
                        before, epoch = epoch, max(part.epoch for part in parts)
                        wait = _REROUTE_SECONDS[0] if epoch > before else min(_REROUTE_SECONDS[1], 2 * wait)
                        routing = await self._watch.newer(epoch, wait)
                    columns, _ = self._read(batch.raw)
                    parts, stands_for = await self._send(batch, columns, routing, routing.only(lost_slots), deadline)
                    # A slot that has moved may have counted it before, where nobody heard the answer.
                    for part in parts:
                        part.sends += resent
        except TimeoutError as error:
            raise self._too_late() from error
        finally:
            for part in parts:
                part.outcome.cancel()

    def _join(self, batch: _Batch, part: Part, outcome: shard_pb.BatchOutcome, stands_for: NDArray[np.int32]) -> None:
        if outcome.refusal:
            raise ProducerExpiredError(
                "the producer was idle for so long that the cluster has forgotten it, and the batch was first sent"
                " before that: whether it counted is unknown. Begin a new producer_id for new plays"
            )
        if outcome.duplicate and part.sends <= 1:
            batch.duplicate = True
        if outcome.rejected_indexes:
            reasons = dict(zip(outcome.rejected_indexes, outcome.rejected_reasons, strict=True))
            plays = np.flatnonzero(np.isin(stands_for, list(reasons)))
            for play, index in zip(plays.tolist(), stands_for[plays].tolist(), strict=True):
                batch.rejects[play] = SHARD_REASONS[reasons[index]]

    @staticmethod
    def _count(batch: _Batch) -> None:
        metrics.ACK_SECONDS.observe(asyncio.get_running_loop().time() - batch.began)
        if batch.duplicate:
            metrics.BATCHES_DUPLICATE.inc()
            metrics.PLAYS_DUPLICATE.inc(batch.plays)
            return
        metrics.PLAYS_ACCEPTED.inc(batch.plays - len(batch.rejects))
        for reason, plays in Counter(batch.rejects.values()).items():
            metrics.PLAYS_REJECTED.labels(reason).inc(plays)

    def _acknowledge(self, batch: _Batch) -> bytes:
        rejected = [
            RejectedPlay(index=index, reason=reason, message=self._messages[reason])
            for index, reason in sorted(batch.rejects.items())
        ]
        return pb.StreamPlaysResponse(
            sequence=batch.sequence, accepted=batch.plays - len(rejected), duplicate=batch.duplicate, rejected=rejected
        ).SerializeToString()
