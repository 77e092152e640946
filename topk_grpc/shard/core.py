"""A shard without its network: state, log and snapshots, owned by one thread.

Theory of operation. `commit` takes a group of requests through the four steps that make an acknowledgement true:

1. room for the group is reserved in the log: a full disk is met here, before anything has changed;
2. each request is admitted: decided against the state and the group so far, its marks set;
3. the records are appended, and one fdatasync makes them durable;
4. they are applied; only then is anybody answered.

A crash before 3 ends leaves nothing of the group (or, where the write came through unheard, all of it, and the resend
is a duplicate); a crash after it leaves a log that replays to the same state. A failed write ends the process: see
`storage.log`.

A snapshot begins with a copy of what can change (`begin_snapshot`, between two groups), is written by another thread
(`write_snapshot`, which touches nothing but what it was given), and ends with the log's old segments deleted
(`end_snapshot`, between two groups again).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from topk_grpc.config import ShardSettings
from topk_grpc.engine.admission import Admission, Limits, admit
from topk_grpc.engine.apply import apply, replay
from topk_grpc.engine.cells import Cells, choose_merge, merge, ordered_cells
from topk_grpc.engine.state import ShardState, check_settings
from topk_grpc.errors import CorruptError, DiskFullError, ForeignDirectoryError, InvalidArgumentError
from topk_grpc.model import ClusterSettings
from topk_grpc.pb.topk.v1 import shard_service_pb2 as pb
from topk_grpc.storage import Block, DataDirectory, Files, Log, Recovery, Snapshot, recover

APPEND: Final = 1
OWNED: Final = 2
EXPIRE: Final = 3
"""Types of log records; their payloads are AppendRecord, OwnedRecord and ExpireRecord of shard_service.proto."""

_BOARD_IDS: Final[Mapping[str, int]] = {"global": 0, "charts": 1}
_BLOCKS: Final = "blocks"
_IDENTITY: Final = "identity"


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose plays a data directory holds."""

    cluster_id: str
    shard_id: str


@dataclass(frozen=True, slots=True, eq=False)
class PendingSnapshot:
    """What a snapshot that is being written consists of; nothing in it changes any more.

    Attributes:
        position: of the log.
        meta, arrays: of the state.
        chunks: for each board, to become a block.
        blocks: for each board, those that stand already.
    """

    position: int
    meta: dict[str, Any]
    arrays: dict[str, NDArray[np.generic]]
    chunks: dict[str, list[Cells]]
    blocks: dict[str, dict[int, Cells]]


@dataclass(frozen=True, slots=True, eq=False)
class NewBlock:
    """A block that a snapshot has written.

    Attributes:
        cells: memory-mapped.
        chunks: how many chunks it was merged from.
        merged: the blocks it was merged from besides.
    """

    cells: Cells
    chunks: int
    merged: list[int]


class ShardCore:
    """State, log and snapshots of one shard. Not thread-safe: one thread at a time, `write_snapshot` excepted.

    Args:
        settings: the shard's.
        cluster: what is fixed in the cluster.
        files: the file system, the real one by default.

    Raises:
        StorageError: the directory cannot be used; see errors.py.
    """

    def __init__(self, settings: ShardSettings, cluster: ClusterSettings, files: Files | None = None) -> None:
        self._settings = settings
        self._cluster = cluster
        self._directory = DataDirectory.open(Path(settings.data_dir), files)
        self._log: Log | None = None
        self._recovery: Recovery | None = None
        self._snapshot_position = 0
        self.identity: Identity | None = None
        self.state = ShardState(cluster, settings.heap_size)

    @property
    def directory_id(self) -> str:
        """The identity of the data directory, made with it."""
        return self._directory.directory_id

    @property
    def position(self) -> int:
        """The durable end of the log, in bytes."""
        return self._open_log.position

    @property
    def snapshot_log_bytes(self) -> int:
        """Bytes of log since the last snapshot."""
        return self.position - self._snapshot_position

    @property
    def _open_log(self) -> Log:
        if self._log is None:
            raise RuntimeError("the shard has not recovered yet")
        return self._log

    # --- Recovery -----------------------------------------------------------------------------------------------------

    def recover(self) -> list[str]:
        """Brings the state back from snapshot and log, and opens the log.

        Returns:
            What was found amiss and could be helped, a sentence each.

        Raises:
            CorruptError, VersionError, ForeignDirectoryError: nothing was changed; the message says what to do.
        """
        recovery = recover(self._directory, self._settings.segment_bytes)
        if recovery.snapshot is not None:
            self._restore(recovery.snapshot)
        for record_type, payload, position in recovery.records():
            try:
                self._replay(record_type, payload)
            except InvalidArgumentError as error:
                raise CorruptError(
                    f"the log record that ends at position {position} is whole but makes no sense: {error}",
                    str(self._directory.log_path),
                ) from error
        self._log = recovery.open_log()
        self._recovery = recovery
        return recovery.notes

    def _restore(self, snapshot: Snapshot) -> None:
        columns = {block.block_id: block.columns for block in snapshot.blocks}
        blocks = {
            board: {number: columns[number] for number in numbers} for board, numbers in snapshot.meta[_BLOCKS].items()
        }
        self.state = ShardState.from_snapshot(
            self._cluster, self._settings.heap_size, snapshot.meta, snapshot.arrays, blocks
        )
        self.identity = Identity(**snapshot.meta[_IDENTITY]) if snapshot.meta[_IDENTITY] else None
        self._snapshot_position = snapshot.position

    def _replay(self, record_type: int, payload: memoryview) -> None:
        match record_type:
            case 1:
                replay(self.state, payload)
            case 2:
                record = pb.OwnedRecord.FromString(bytes(payload))
                check_settings(
                    ClusterSettings(record.cluster_slots, record.partitioner, record.resolution_ms), self._cluster
                )
                self.identity = Identity(record.cluster_id, record.shard_id)
                self.state.own(record.slots)
            case 3:
                self.state.producers.forget_idle(pb.ExpireRecord.FromString(bytes(payload)).before_ms)
            case _:
                raise InvalidArgumentError(f"its type is {record_type}, which this release does not know")

    # --- Changes ------------------------------------------------------------------------------------------------------

    def own(self, identity: Identity, slots: Sequence[int]) -> None:
        """Takes slots over, durably; for a shard's first start.

        Raises:
            ForeignDirectoryError: the directory holds another shard's plays.
        """
        if self.identity is not None and self.identity != identity:
            raise ForeignDirectoryError(
                f"{self._settings.data_dir} holds the plays of {self.identity.shard_id} of cluster"
                f" {self.identity.cluster_id}, not of {identity.shard_id} of cluster {identity.cluster_id}: give this"
                " shard a directory of its own (--data-dir)"
            )
        if self.identity is not None:
            return
        record = pb.OwnedRecord(
            shard_id=identity.shard_id,
            cluster_id=identity.cluster_id,
            slots=slots,
            cluster_slots=self._cluster.slots,
            partitioner=self._cluster.partitioner,
            resolution_ms=self._cluster.resolution_ms,
        )
        self._open_log.append_group([(OWNED, [record.SerializeToString()])])
        self.identity = identity
        self.state.own(slots)

    def limits(self, now_ms: int) -> Limits:
        """What admission holds plays against at this time."""
        settings = self._settings
        return Limits(
            now_ms=now_ms,
            future_ms=int(settings.future_seconds_max * 1000),
            producer_ttl_ms=int(settings.producer_ttl_seconds * 1000),
            charts_max=settings.charts_max,
            memory_bytes_max=settings.memory_bytes_max,
        )

    def commit(self, requests: Sequence[bytes], now_ms: int) -> list[bytes | Exception]:
        """Makes a group of AppendRequests durable and applies it.

        Returns:
            For each request its AppendResponse, or why it was refused; nothing of a refused one has happened.

        Raises:
            WriteFailedError: what is on disk is unknown: the process must end without answering.
        """
        log = self._open_log
        try:
            # A verdict is never larger than what it is about: each reject and each skipped slot stands for a play.
            log.reserve(len(requests), sum(2 * len(request) + 64 for request in requests))
        except DiskFullError as error:
            return [error] * len(requests)
        limits = self.limits(now_ms)
        outcomes: list[Admission | Exception] = []
        for request in requests:
            try:
                outcomes.append(admit(self.state, request, limits))
            except InvalidArgumentError as error:
                outcomes.append(error)
        admissions = [outcome for outcome in outcomes if isinstance(outcome, Admission)]
        records = [(APPEND, admission.payload) for admission in admissions if admission.payload]
        if records:
            log.append_group(records)
        for admission in admissions:
            apply(self.state, admission)
        return [outcome.response() if isinstance(outcome, Admission) else outcome for outcome in outcomes]

    def expire_producers(self, now_ms: int) -> int:
        """Forgets producers that have been idle for their time to live, durably. Returns how many."""
        before_ms = now_ms - int(self._settings.producer_ttl_seconds * 1000)
        idle = self.state.producers.idle_since(before_ms)
        if idle:
            self._open_log.append_group([(EXPIRE, [pb.ExpireRecord(before_ms=before_ms).SerializeToString()])])
            self.state.producers.forget_idle(before_ms)
        return idle

    # --- Snapshots ----------------------------------------------------------------------------------------------------

    def begin_snapshot(self) -> PendingSnapshot:
        """Copies what can change. Takes as long as that copy."""
        meta, arrays = self.state.to_snapshot()
        identity = self.identity
        meta[_IDENTITY] = {"cluster_id": identity.cluster_id, "shard_id": identity.shard_id} if identity else None
        blocks = {name: dict(board.cells.blocks) for name, board in self.state.boards.items()}
        return PendingSnapshot(self.position, meta, arrays, self.state.take_chunks(), blocks)

    def write_snapshot(self, pending: PendingSnapshot) -> dict[str, NewBlock]:
        """Merges the chunks into blocks and writes everything durably. From any thread, one at a time.

        Returns:
            The new block of each board that has one.

        Raises:
            StorageError: it could not be written; the snapshots before it stand.
        """
        if self._recovery is None:
            raise RuntimeError("the shard has not recovered yet")
        blocks: list[Block] = []
        numbers: dict[str, list[int]] = {}
        merged: dict[str, list[int]] = {}
        for board, chunks in pending.chunks.items():
            standing = pending.blocks[board]
            merged[board] = choose_merge(chunks, standing) if chunks else []
            kept = {number: cells.columns() for number, cells in standing.items() if number not in merged[board]}
            if chunks:
                whole = merge([*(standing[number] for number in merged[board]), *chunks])
                kept[_block_number(pending.position, board)] = whole.columns()
            numbers[board] = list(kept)
            blocks += (Block(number, columns) for number, columns in kept.items())
        meta = pending.meta | {_BLOCKS: numbers}
        written = self._recovery.snapshots.write(Snapshot(pending.position, meta, pending.arrays, tuple(blocks)))
        columns = {block.block_id: block.columns for block in written}
        return {
            board: NewBlock(ordered_cells(columns[_block_number(pending.position, board)]), len(chunks), merged[board])
            for board, chunks in pending.chunks.items()
            if chunks
        }

    def end_snapshot(self, pending: PendingSnapshot, blocks: Mapping[str, NewBlock]) -> None:
        """Uses the written blocks for what they were merged from, and deletes the log that no kept snapshot needs."""
        for name, block in blocks.items():
            cells = self.state.boards[name].cells
            cells.replace(block.chunks, block.merged, _block_number(pending.position, name), block.cells)
        self._snapshot_position = pending.position
        if self._recovery is not None:
            self._open_log.delete_before(self._recovery.snapshots.kept_position())

    def close(self) -> None:
        """Closes log and directory."""
        if self._log is not None:
            self._log.close()
        self._directory.close()


def _block_number(position: int, board: str) -> int:
    """A number for the block of a board in the snapshot at a log position: no two snapshots share a position."""
    return position * len(_BOARD_IDS) + _BOARD_IDS[board]
