"""Admission: what counts of a request and what does not, decided once, before it is logged.

A request holds parts of several clients' batches. For each part: which of its slots this shard owns, which have counted
the batch before, which plays are rejected. The marks are set here, so that the next part of the same group is decided
against this one; corrections are decided last, see `corrections`. What was decided stands in the record (only where
something does not count); replay follows it.

Theory of operation: a part is read into columns once. `Part.chosen` says which rows count, and `apply` takes it from
there after the record is on disk.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from topk_grpc.engine import corrections
from topk_grpc.engine.producers import Producer
from topk_grpc.engine.state import GLOBAL, ShardState
from topk_grpc.errors import InvalidArgumentError
from topk_grpc.kernels.counters import reach_limit
from topk_grpc.kernels.encode import varint
from topk_grpc.kernels.hash import hash_strings
from topk_grpc.kernels.marks import APPLY, DUPLICATE, NOT_OWNER, touch_slots
from topk_grpc.kernels.wire import REASONS, PlayColumns, decode_batch, message_spans
from topk_grpc.model import COUNT_MAX, ClusterSettings
from topk_grpc.pb.topk.v1 import shard_service_pb2 as pb
from topk_grpc.ring.partitioners import partitioner_of

SONG_BYTES_MAX: Final = 128
CHARTS_PER_PLAY_MAX: Final = 8
CHART_BYTES_MAX: Final = 64
PLAYS_MAX: Final = 65_536

_IN_FUTURE: Final = pb.REJECT_REASON_IN_FUTURE
_CHART_LIMIT: Final = pb.REJECT_REASON_CHART_LIMIT
_MEMORY_LIMIT: Final = pb.REJECT_REASON_MEMORY_LIMIT
_TOTAL_OVERFLOW: Final = pb.REJECT_REASON_TOTAL_OVERFLOW
_NEGATIVE_BUCKET: Final = pb.REJECT_REASON_NEGATIVE_BUCKET


@dataclass(frozen=True, slots=True)
class Limits:
    """What admission holds plays against.

    Attributes:
        now_ms: the shard's clock.
        future_ms: how far ahead of it a play may be.
        producer_ttl_ms: after how long an idle producer may have been forgotten.
        charts_max: the most charts of a shard.
        memory_bytes_max: the budget; 0 is none.
    """

    now_ms: int
    future_ms: int = 300_000
    producer_ttl_ms: int = 30 * 86_400_000
    charts_max: int = 10_000
    memory_bytes_max: int = 0


@dataclass(slots=True)
class Part:
    """One part of a request, decided.

    Attributes:
        columns: its plays; offsets point into the request.
        hashes: of the songs.
        corrects: whether any of its plays is a correction: has a negative count.
        chosen: uint8[n], 1 where the play counts; None: all of them.
        chart_numbers: of the columns' chart names; None where nothing names a chart.
        plays: that it adds, all together; corrections take from them.
        outcome: what the gateway is told.
        verdict: what the log is told; None where all counts.
        changes: whether anything of it has to be logged.
    """

    columns: PlayColumns
    hashes: NDArray[np.uint64]
    corrects: bool = False
    chosen: NDArray[np.uint8] | None = None
    chart_numbers: NDArray[np.int32] | None = None
    plays: int = 0
    outcome: pb.BatchOutcome = field(default_factory=pb.BatchOutcome)
    verdict: pb.Verdict | None = None
    changes: bool = False

    def producer_id(self, request: bytes | memoryview) -> bytes:
        """Whose batch it is of."""
        columns = self.columns
        return bytes(request[columns.producer_start : columns.producer_start + columns.producer_size])

    def slot_keys(self, request: bytes | memoryview, cluster: ClusterSettings) -> NDArray[np.uint64]:
        """What modulo the slots is the slot of each play, uint64[n]."""
        keys_of = partitioner_of(cluster.partitioner).slot_keys
        return keys_of(self.hashes, self.producer_id(request), self.columns.sequence, cluster.slots)


@dataclass(slots=True)
class Request:
    """An AppendRequest, read.

    Attributes:
        raw: its bytes.
        request_id: its number on its stream.
        parts: in order, not decided yet.
    """

    raw: bytes | memoryview
    request_id: int
    parts: list[Part]

    @property
    def corrects(self) -> bool:
        """Whether it holds corrections: then it is admitted when everything before it has been applied."""
        return any(part.corrects for part in self.parts)


@dataclass(slots=True)
class Admission:
    """A request, decided.

    Attributes:
        request: its bytes.
        request_id: its number on its stream.
        parts: in order.
        payload: of the log record, in pieces; empty where nothing changes.
    """

    request: bytes
    request_id: int
    parts: list[Part]
    payload: list[bytes]

    def response(self) -> bytes:
        """The AppendResponse, once the record is durable and applied."""
        return pb.AppendResponse(
            request_id=self.request_id, outcomes=[part.outcome for part in self.parts]
        ).SerializeToString()


def read_request(request: bytes | memoryview) -> Request:
    """Reads an AppendRequest into parts, without deciding anything.

    Raises:
        InvalidArgumentError: its bytes are no such message, or hold what a gateway never sends.
    """
    spans, numbers = message_spans(request, 0, len(request), 3)
    parts: list[Part] = []
    for index, span in enumerate(spans.tolist()):
        columns = decode_batch(request, [span], SONG_BYTES_MAX, CHARTS_PER_PLAY_MAX, CHART_BYTES_MAX, PLAYS_MAX)
        wrong = np.flatnonzero(columns.reasons)
        if len(wrong):
            reason = REASONS[columns.reasons[wrong[0]]]
            raise InvalidArgumentError(
                f"part {index} of the request, play {wrong[0]}: {reason}; gateways send checked plays only"
            )
        if not columns.sequence or not columns.producer_size:
            raise InvalidArgumentError(
                f"part {index} of the request has no producer_id or no sequence; gateways send checked batches only"
            )
        if (columns.indexes[1:] <= columns.indexes[:-1]).any():
            # The log names rejected plays by index: replay would take out all that share one.
            raise InvalidArgumentError(
                f"part {index} of the request: the indexes of its plays do not ascend; gateways send them so"
            )
        hashes = hash_strings(request, columns.song_starts, columns.song_sizes)  # type: ignore[arg-type]
        parts.append(Part(columns, hashes, bool(columns.count) and int(columns.counts.min()) < 0))
    return Request(request, int(numbers[1]), parts)


def admit(state: ShardState, read: Request, limits: Limits) -> Admission:
    """Decides about a request and sets its marks.

    Args:
        state: the shard's. Where the request holds corrections everything admitted before has been applied to it.
        read: from `read_request`.
        limits: what plays are held against.
    """
    request, parts = bytes(read.raw), read.parts
    for index, part in enumerate(parts):
        _decide(state, request, parts[:index], part, limits)
        if part.verdict is not None:
            part.verdict.batch = index
    payload: list[bytes] = []
    if any(part.changes for part in parts):
        rest = pb.AppendRecord(verdicts=[part.verdict for part in parts if part.verdict], admitted_ms=limits.now_ms)
        payload = [b"\x0a" + varint(len(request)), request, rest.SerializeToString()]
    return Admission(request, read.request_id, parts, payload)


def _decide(state: ShardState, request: bytes, earlier: list[Part], part: Part, limits: Limits) -> None:
    columns = part.columns
    producer_id = part.producer_id(request)
    known = state.producers.get(producer_id)
    if known is None and 0 < columns.first_sent_ms < limits.now_ms - limits.producer_ttl_ms:
        part.outcome.refusal = pb.REFUSAL_PRODUCER_EXPIRED
        part.verdict = pb.Verdict(refusal=pb.REFUSAL_PRODUCER_EXPIRED)
        part.chosen = np.zeros(columns.count, np.uint8)
        return
    producer = known or state.producers.get_or_add(producer_id)
    slots = np.empty(columns.count, np.int32)
    verdicts = np.zeros(state.settings.slots, np.uint8)
    touch_slots(part.slot_keys(request, state.settings), columns.count, slots, verdicts)
    occurred = state.producers.marks.decide(verdicts, state.owned, producer.number, columns.sequence)
    part.changes = bool(occurred & 1 << APPLY)
    if known is None and not part.changes:
        # Nothing of it was marked or will be logged: it is as unknown as before, and as likely to have expired.
        state.producers.discard(producer_id)
    if occurred & ~(1 << APPLY):
        part.chosen = (verdicts[slots] == APPLY).astype(np.uint8)
        part.verdict = pb.Verdict(skipped_slots=np.flatnonzero(verdicts > APPLY).tolist())
        lost = np.flatnonzero(verdicts == NOT_OWNER).tolist()
        part.outcome.not_owner_slots.extend(lost)
        part.outcome.new_owners.extend(state.ownership.going_to(slot) for slot in lost)
    if occurred & 1 << DUPLICATE:
        part.outcome.duplicate = True
        for index, reason in producer.rejects_of(columns.sequence):
            part.outcome.rejected_indexes.append(index)
            part.outcome.rejected_reasons.append(reason)  # type: ignore[arg-type]
    if part.changes:
        rejects = _reject(state, request, earlier, part, limits)
        # By the later of both clocks: whoever is forgotten has no batch left that would still be taken for a new one.
        state.producers.seen(producer, max(limits.now_ms, columns.first_sent_ms), permanent=not columns.first_sent_ms)
        _note_rejects(state, part, producer, rejects)


def _note_rejects(state: ShardState, part: Part, producer: Producer, rejects: list[tuple[int, int]]) -> None:
    if not rejects:
        return
    state.producers.remember_rejects(producer, part.columns.sequence, rejects)
    if part.verdict is None:
        part.verdict = pb.Verdict()
    for target in (part.outcome, part.verdict):
        target.rejected_indexes.extend(index for index, _ in rejects)
        target.rejected_reasons.extend(reason for _, reason in rejects)  # type: ignore[misc]


def _reject(
    state: ShardState, request: bytes, earlier: list[Part], part: Part, limits: Limits
) -> list[tuple[int, int]]:
    """Takes out the plays that must not count; index and reason of each."""
    columns = part.columns
    rejects: list[tuple[int, int]] = []

    def take_out(rows: NDArray[np.intp], reason: int) -> None:
        if part.chosen is None:
            part.chosen = np.ones(columns.count, np.uint8)
        rows = rows[part.chosen[rows] == 1]
        part.chosen[rows] = 0
        rejects.extend((index, reason) for index in columns.indexes[rows].tolist())

    # A play is judged by where its bucket begins: plays that a gateway has combined are judged as each would be alone.
    resolution = state.settings.resolution_ms
    horizon = (limits.now_ms + limits.future_ms) // resolution * resolution + resolution
    if columns.count and int(columns.times_ms.max()) >= horizon:
        take_out(np.flatnonzero(columns.times_ms >= horizon), _IN_FUTURE)
    if limits.memory_bytes_max and state.memory_bytes > limits.memory_bytes_max:
        songs = state.songs.find(request, columns.song_starts, columns.song_sizes, part.hashes)
        take_out(np.flatnonzero((songs < 0) & (columns.counts > 0)), _MEMORY_LIMIT)
    total = state.boards[GLOBAL].totals(0)[0] + state.pending_plays
    if columns.count and total + columns.count * int(columns.counts.max()) > COUNT_MAX:
        chosen = _chosen_plays(part).copy()
        before = chosen.copy()
        reach_limit(columns.counts, chosen, total, COUNT_MAX, columns.count)
        take_out(np.flatnonzero(before != chosen), _TOTAL_OVERFLOW)
    if columns.charts_used:  # last, as replay interns the charts of plays that count, and no others
        _intern_charts(state, request, part, limits.charts_max, take_out)
    if part.corrects:
        take_out(corrections.refused(state, request, earlier, part), _NEGATIVE_BUCKET)
    counted = columns.counts if part.chosen is None else columns.counts[part.chosen == 1]
    part.plays = int(counted.sum())
    state.pending_plays += part.plays
    return rejects


def _chosen_plays(part: Part) -> NDArray[np.uint8]:
    """1 for what has not been taken out, corrections left aside."""
    chosen = np.ones(part.columns.count, np.uint8) if part.chosen is None else part.chosen
    return np.where(part.columns.counts > 0, chosen, np.uint8(0)) if part.corrects else chosen


def _intern_charts(state: ShardState, request: bytes, part: Part, charts_max: int, take_out: object) -> None:
    """Numbers the chart names; plays that name one more than the shard may have are taken out."""
    columns = part.columns
    used = columns.charts_used
    starts, sizes = columns.chart_starts[:used], columns.chart_sizes[:used]
    hashes = hash_strings(request, starts, sizes)
    numbers = state.charts.find(request, starts, sizes, hashes)
    if (numbers < 0).any():
        refused: list[int] = []
        for play in np.flatnonzero(_chosen_plays(part)).tolist():
            own = slice(int(columns.chart_bounds[play]), int(columns.chart_bounds[play + 1]))
            fresh = numbers[own] < 0
            if not fresh.any():
                continue
            found = state.charts.find(request, starts[own], sizes[own], hashes[own])
            if len(state.charts) - 1 + int((found < 0).sum()) > charts_max:
                refused.append(play)
                continue
            numbers[own] = state.charts.add(request, starts[own], sizes[own], hashes[own])
        take_out(np.array(refused, np.intp), _CHART_LIMIT)  # type: ignore[operator]
        if part.corrects:  # they add no chart, but may name those that were just added
            numbers = state.charts.find(request, starts, sizes, hashes)
    part.chart_numbers = numbers
