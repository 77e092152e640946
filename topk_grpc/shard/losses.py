"""What log records said, for whoever has lost them: batches with their producers, and other changes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from topk_grpc.engine.admission import read_request
from topk_grpc.errors import InvalidArgumentError
from topk_grpc.kernels.wire import message_spans
from topk_grpc.pb.topk.v1 import shard_service_pb2 as pb
from topk_grpc.shard.core import APPEND, DELETE_SONG, EXPIRE, OWNED, SETTINGS


@dataclass(frozen=True, slots=True)
class LostBatch:
    """A part of a client's batch that was acknowledged, or about to be.

    Attributes:
        producer_id, sequence: the client's.
        rows: plays, as the gateway sent them: equal ones combined.
        plays: the sum of their counts; what was rejected is left out.
    """

    producer_id: str
    sequence: int
    rows: int
    plays: int

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def losses(records: Iterable[tuple[int, bytes]]) -> tuple[list[LostBatch], list[str]]:
    """The batches of log records, and what the others did, a few words each."""
    batches: list[LostBatch] = []
    others: list[str] = []
    for record_type, payload in records:
        if record_type == APPEND:
            try:
                batches += _batches(payload)
            except InvalidArgumentError as error:
                others.append(f"a record that makes no sense ({error})")
        elif record_type == DELETE_SONG:
            others.append(f"the deletion of {pb.DeleteSongRecord.FromString(payload).song_id!r}")
        elif record_type == EXPIRE:
            others.append("producers that were forgotten")
        elif record_type == SETTINGS:
            others.append("a change of tiers or standing windows")
        elif record_type == OWNED:
            others.append("the slots that the shard owns")
        else:
            others.append(f"a record of type {record_type}")
    return batches, others


def _batches(payload: bytes) -> list[LostBatch]:
    spans, _ = message_spans(payload, 0, len(payload), 1)
    if len(spans) != 1:
        raise InvalidArgumentError("it holds no request")
    start, end = spans[0].tolist()
    request = payload[start:end]
    verdicts = {one.batch: one for one in pb.AppendRecord.FromString(payload[end:]).verdicts}
    found = []
    for index, part in enumerate(read_request(request).parts):
        columns, verdict = part.columns, verdicts.get(index, pb.Verdict())
        if verdict.refusal:
            continue
        rejected = set(verdict.rejected_indexes)
        counts = [
            count
            for count, place in zip(columns.counts.tolist(), columns.indexes.tolist(), strict=True)
            if place not in rejected
        ]
        name = request[columns.producer_start : columns.producer_start + columns.producer_size].decode()
        found.append(LostBatch(name, columns.sequence, columns.count, sum(counts)))
    return found
