"""A shard without its network: state, log and snapshots, owned by one thread.

Theory of operation. `commit` reads a group of requests (`parse`), and takes it through the four steps that make an
acknowledgement true:

1. room for the group is reserved in the log: a full disk is met here, before anything has changed;
2. each request is admitted: decided against the state and the group so far, its marks set;
3. the records are appended, and one fdatasync makes them durable;
4. they are applied; only then is anybody answered.

A request that takes plays back is judged by what there is: those before it take steps 3 and 4 first.

A crash before 3 ends leaves nothing of the group (or, where the write came through unheard, all of it, and the resend
is a duplicate); a crash after it leaves a log that replays to the same state. A failed write ends the process: see
`storage.log`.

A snapshot begins with a copy of what can change (`begin_snapshot`, between two groups), is written by another thread
(`write_snapshot`, which touches nothing but what it was given), comes into use (`end_snapshot`, between two groups
again), and ends with the log's old segments deleted (`clear_snapshot`, by the other thread).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray

from topk_grpc import metrics
from topk_grpc.config import ShardSettings
from topk_grpc.engine.admission import Admission, Limits, Request, admit, read_request
from topk_grpc.engine.apply import apply, replay
from topk_grpc.engine.cells import Cells, Merge, choose_merges, ordered_cells
from topk_grpc.engine.copies import Room, copied_bytes
from topk_grpc.engine.deletion import Deleted, delete, owns, plays_of
from topk_grpc.engine.moves import settle
from topk_grpc.engine.soundness import check_standing
from topk_grpc.engine.state import ShardState, check_settings
from topk_grpc.engine.tiers import RollUp, Tier, parse_tiers
from topk_grpc.engine.transfer import can_import, export_slots, image_totals, read_image, slot_totals
from topk_grpc.engine.windows import bounds_of
from topk_grpc.errors import (
    CorruptError,
    DiskFullError,
    ForeignDirectoryError,
    InvalidArgumentError,
    MigrationError,
    SettingError,
    UnsupportedError,
    WindowError,
)
from topk_grpc.model import Bounds, ClusterSettings, GlobalWindow, RangeWindow, SessionWindow, Window, parse_window
from topk_grpc.pb.topk.v1 import shard_service_pb2 as pb
from topk_grpc.ring.partitioners import partitioner_of
from topk_grpc.storage import ADVICE, Block, DataDirectory, Files, Log, Record, Recovery, Snapshot, recover

APPEND: Final = 1
OWNED: Final = 2
EXPIRE: Final = 3
DELETE_SONG: Final = 4
SETTINGS: Final = 5
FROZEN: Final = 6
IMPORTED: Final = 7
OUTCOME: Final = 8
"""Types of log records; their payloads are AppendRecord, OwnedRecord, ExpireRecord, DeleteSongRecord, SettingsRecord,
FrozenRecord, ImportedRecord and OutcomeRecord of shard_service.proto."""

_BOARD_IDS: Final[Mapping[str, int]] = {"global": 0, "charts": 1}
_MERGES_MAX: Final = 2
_PIECE_BYTES: Final = 4 << 20  # of an image, in one record
_SPARE: Final = 16  # one part in so many of what a snapshot copies
_CLOCKS_APART_MS: Final = 60_000
_SESSIONS_BEHIND_MS: Final = 2_000
"""Sessions only move on: left to themselves they stay a little behind, where slower clocks still ask for them."""
_REPLAY_STEP_MS: Final = 60_000
_SENSELESS: Final = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, DecodeError, MigrationError)
"""What reading bytes that are whole, and make no sense, may raise; `InvalidArgumentError` is a ValueError."""
_BLOCKS: Final = "blocks"
_ROLLED_UP: Final = "blocks_rolled_up"
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
        merges: for each board, what becomes a block.
        blocks: for each board, those that stand already.
        roll_up: what merging does to cells by their age.
    """

    position: int
    meta: dict[str, Any]
    arrays: dict[str, NDArray[np.generic]]
    merges: dict[str, list[Merge]]
    blocks: dict[str, dict[int, Cells]]
    roll_up: RollUp


@dataclass(frozen=True, slots=True, eq=False)
class NewBlock:
    """A block that a snapshot has written.

    Attributes:
        board, number: whose it is.
        merge: what it was made of.
        cells: memory-mapped; None: all has cancelled out.
    """

    board: str
    number: int
    merge: Merge
    cells: Cells | None


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Requests that are taken through together.

    Attributes:
        outcomes: for each request what was decided, or why it was refused.
        admitted: what is to be made durable, then applied.
    """

    outcomes: Sequence[Admission | Exception]
    admitted: Sequence[Admission]


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
        self._reading: Recovery | None = None
        self._snapshot_position = 0
        self._counted_position = 0
        self._sessions_due_ms = 0
        self._pieces: list[bytes] = []  # of an image, while its records are read back
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
    def counted_position(self) -> int:
        """How far in the log the state has come: what has been written and not counted yet lies behind."""
        return self._counted_position

    @property
    def snapshot_log_bytes(self) -> int:
        """Bytes of log since the last snapshot."""
        return self.position - self._snapshot_position

    @property
    def log_bytes(self) -> int:
        """Bytes of the log that is kept."""
        return self.position - self._open_log.first_position

    @property
    def recovered_ratio(self) -> float:
        """How much of the log has been replayed, its last segment taken for full; 1 at the end. From any thread."""
        if self._log is not None or self._reading is None:
            return float(self._log is not None)
        start, end = self._reading.span
        return (self._counted_position - start) / (end - start) if end > start else 0.0

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
        recovery = self.read()
        self._log = recovery.open_log()
        self._counted_position = self.position
        self._recovery = recovery
        return recovery.notes

    def read(self) -> Recovery:
        """Brings the state back, and changes nothing on disk.

        Raises:
            CorruptError, VersionError, ForeignDirectoryError: as for `recover`.
        """
        recovery = self._reading = recover(self._directory, self._settings.segment_bytes)
        if recovery.snapshot is not None:
            self._restore(recovery.snapshot)
        for record_type, payload, position in recovery.records():
            self._replay_record(record_type, payload, position)
            self._counted_position = position
        self.state.ownership.assume_exported()
        return recovery

    def _restore(self, snapshot: Snapshot) -> None:
        columns = {block.block_id: block.columns for block in snapshot.blocks}
        meta = snapshot.meta
        try:
            blocks = {
                board: {number: columns[number] for number in numbers} for board, numbers in meta[_BLOCKS].items()
            }
            self.state = ShardState.from_snapshot(
                self._cluster, self._settings.heap_size, meta, snapshot.arrays, blocks
            )
            self.identity = Identity(**meta[_IDENTITY]) if meta[_IDENTITY] else None
        except _SENSELESS as error:
            raise CorruptError(
                f"{self._directory.snapshots_path}: the newest snapshot is as it was written, but makes no sense"
                f" ({_told(error)}). {ADVICE}",
                str(self._directory.snapshots_path),
            ) from error
        self._snapshot_position = self._counted_position = snapshot.position

    def _replay_record(self, record_type: int, payload: memoryview, position: int) -> None:
        """Does again what a record did; `position` is where it ends."""
        try:
            self._replay(record_type, payload)
        except _SENSELESS as error:
            raise CorruptError(
                f"the log record that ends at position {position} is whole but makes no sense: {_told(error)}",
                str(self._directory.log_path),
            ) from error

    def _replay(self, record_type: int, payload: memoryview) -> None:
        match record_type:
            case 1:
                self._advance_sessions(replay(self.state, payload))
            case 2:
                record = pb.OwnedRecord.FromString(bytes(payload))
                check_settings(
                    ClusterSettings(record.cluster_slots, record.partitioner, record.resolution_ms), self._cluster
                )
                self.identity = Identity(record.cluster_id, record.shard_id)
                self.state.own(record.slots)
            case 3:
                self.state.producers.forget_idle(pb.ExpireRecord.FromString(bytes(payload)).before_ms)
            case 4:
                delete(self.state, pb.DeleteSongRecord.FromString(bytes(payload)).song_id)
            case 5:
                told = pb.SettingsRecord.FromString(bytes(payload))
                tiers = parse_tiers(told.tiers, self._cluster.resolution_ms)
                windows = [parse_window(text) for text in told.standing_windows]
                check_standing(windows, self._cluster.resolution_ms)
                self.state.configure(tiers, windows)
            case 6:
                frozen = pb.FrozenRecord.FromString(bytes(payload))
                self.state.ownership.freeze(frozen.migration_id, frozen.slots, frozen.target)
            case 7:
                self._replay_piece(pb.ImportedRecord.FromString(bytes(payload)))
            case 8:
                outcome = pb.OutcomeRecord.FromString(bytes(payload))
                settle(self.state, outcome.migration_id, committed=outcome.committed)
            case _:
                raise InvalidArgumentError(f"its type is {record_type}, which this release does not know")

    def _replay_piece(self, record: pb.ImportedRecord) -> None:
        """Puts an image together again; its pieces are the records of one group."""
        self._pieces.append(record.piece)
        size = sum(map(len, self._pieces))
        if size > record.image_bytes:
            raise InvalidArgumentError(f"the pieces of an image have {size} bytes, not {record.image_bytes}")
        if size == record.image_bytes:
            image = b"".join(self._pieces)
            self._pieces.clear()
            self.state.ownership.take_in(record.migration_id, record.slots, record.source, image)

    def _advance_sessions(self, admitted_ms: int) -> None:
        """Moves standing sessions on while the log is replayed, as the clock did then, if in longer steps."""
        if admitted_ms >= self._sessions_due_ms:
            self._sessions_due_ms = admitted_ms + _REPLAY_STEP_MS
            self._move_sessions(admitted_ms)

    def _move_sessions(self, now_ms: int) -> None:
        for window in self.state.standing:
            bounds = bounds_of(window, now_ms - _SESSIONS_BEHIND_MS, self._cluster.resolution_ms)
            if isinstance(window, SessionWindow) and bounds is not None:
                self.state.move_standing(window, bounds)

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
        self._append_record(OWNED, record)
        self.identity = identity
        self.state.own(slots)

    def freeze(self, migration_id: int, slots: Sequence[int], target: str) -> None:
        """Takes no more plays of slots, durably; what came before is counted. Once more for the same does nothing.

        Raises:
            MigrationError: this shard does not own all of the slots, or moves some.
            DiskFullError: nothing was frozen.
            WriteFailedError: as for `commit`.
        """
        ownership = self.state.ownership
        held = ownership.held.get(migration_id)
        if held is not None and not held.incoming and held.slots == tuple(slots):
            return
        ownership.check_freeze(migration_id, slots)
        self._append_record(FROZEN, pb.FrozenRecord(migration_id=migration_id, slots=slots, target=target))
        ownership.freeze(migration_id, slots, target)

    def export(self, migration_id: int) -> bytes:
        """The image of frozen slots. From here on no queries are answered until the outcome is known.

        Raises:
            MigrationError: they are not frozen.
        """
        return export_slots(self.state, self.state.ownership.export(migration_id))

    def take_in(self, migration_id: int, slots: Sequence[int], source: str, image: bytes) -> None:
        """Keeps the image of slots, durably and aside. Once more for the same migration does nothing.

        Raises:
            MigrationError: this shard owns one of the slots, or moves some.
            InvalidArgumentError, ResourceExhaustedError: the image cannot be counted here.
            DiskFullError: nothing was kept.
            WriteFailedError: as for `commit`.
        """
        ownership, settings = self.state.ownership, self._settings
        held = ownership.held.get(migration_id)
        if held is not None and held.incoming and held.slots == tuple(slots):
            return
        ownership.check_import(migration_id, slots)
        can_import(
            self.state, read_image(image), charts_max=settings.charts_max, memory_bytes_max=settings.memory_bytes_max
        )
        pieces = [image[start : start + _PIECE_BYTES] for start in range(0, len(image), _PIECE_BYTES)]
        records = [
            pb.ImportedRecord(
                migration_id=migration_id, slots=slots, source=source, piece=piece, image_bytes=len(image)
            ).SerializeToString()
            for piece in pieces
        ]
        self._append_group([(IMPORTED, [record]) for record in records])
        self._counted_position = self.position
        ownership.take_in(migration_id, slots, source, image)

    def settle(self, migration_id: int, *, committed: bool) -> bool:
        """Ends a migration, durably, as the topology has decided. One that is not under way here is left alone.

        Returns:
            Whether the state comes to what the source's did. It always should.

        Raises:
            DiskFullError: nothing has changed.
            WriteFailedError: as for `commit`.
        """
        held = self.state.ownership.held.get(migration_id)
        if held is None:
            return True
        expected = image_totals(read_image(held.image)) if held.incoming else ()
        self._append_record(OUTCOME, pb.OutcomeRecord(migration_id=migration_id, committed=committed))
        settle(self.state, migration_id, committed=committed)
        return not (held.incoming and committed) or slot_totals(self.state, held.slots) == expected

    # --- Settings and standing windows --------------------------------------------------------------------------------

    def configure(self, now_ms: int) -> None:
        """Brings the state in line with the settings, durably where they have changed. When the log is open.

        Raises:
            SettingError: tiers or standing windows make no sense; nothing was changed.
        """
        tiers = parse_tiers(self._settings.tiers, self._cluster.resolution_ms)
        windows = dict.fromkeys([*self._configured_windows(), *self.state.standing])
        if str(self.state.tiers) != ",".join(map(str, tiers)) or set(windows) != set(self.state.standing):
            self._apply_settings(tiers, list(windows))
        for window in windows:
            self.state.standing.use(window, now_ms)

    def _configured_windows(self) -> list[Window]:
        windows: list[Window] = []
        for text in filter(None, (text.strip() for text in self._settings.standing_windows.split(","))):
            try:
                window = parse_window(text)
                bounds_of(window, 0, self._cluster.resolution_ms)
            except WindowError as error:
                raise SettingError(f"--standing-windows: {error}") from error
            if isinstance(window, GlobalWindow | RangeWindow):
                raise SettingError(f"--standing-windows: {window} needs no standing: name tumbling, sliding or session")
            windows.append(window)
        return windows

    def _apply_settings(self, tiers: Sequence[Tier], windows: Sequence[Window]) -> None:
        record = pb.SettingsRecord(tiers=",".join(map(str, tiers)), standing_windows=map(str, windows))
        self._append_record(SETTINGS, record)
        self.state.configure(tiers, windows)

    def follow(self, window: Window, bounds: Bounds, now_ms: int, between: Callable[[], None] | None = None) -> None:
        """Lets a window stand where a query asks for it, if that is worth it and there is room.

        Args:
            window: as the query names it, taken at the gateway's clock.
            bounds: of the window there.
            now_ms: this shard's clock. Where the gateway's is far from it the window stays where it is.
            between: called while it moves, when all but this window can be read.
        """
        state, resolution = self.state, self._cluster.resolution_ms
        if window not in state.standing and not self._may_stand(window, bounds):
            return
        state.standing.use(window, now_ms)
        low = bounds_of(window, now_ms - _CLOCKS_APART_MS, resolution)
        high = bounds_of(window, now_ms + _CLOCKS_APART_MS, resolution)
        if low is not None and high is not None and low.end_ms <= bounds.end_ms <= high.end_ms:
            state.move_standing(window, bounds, between)

    def _may_stand(self, window: Window, bounds: Bounds) -> bool:
        """Whether a window was given its place, durably."""
        state, settings = self.state, self._settings
        room = 16 * state.entries + state.memory_bytes <= settings.memory_bytes_max or not settings.memory_bytes_max
        if len(state.standing) >= settings.standing_windows_max or not room or not state.can_cut(bounds):
            return False
        with suppress(DiskFullError):
            self._apply_settings(state.tiers.tiers, [*state.standing, window])
            return True
        return False

    def move_standing(self, now_ms: int, between: Callable[[], None] | None = None) -> None:
        """Brings all standing windows to where they lie at this time, and lets go of those that nobody asks for.

        `between` is called on the way, when all but the window that moves can be read.
        """
        unused = self.state.standing.unused_since(now_ms - int(self._settings.standing_idle_seconds * 1000))
        if dropped := set(unused) - set(self._configured_windows()):
            with suppress(DiskFullError):
                kept = [window for window in self.state.standing if window not in dropped]
                self._apply_settings(self.state.tiers.tiers, kept)
        for window in self.state.standing:
            bounds = bounds_of(window, now_ms, self._cluster.resolution_ms)
            if bounds is not None and not isinstance(window, SessionWindow):
                self.state.move_standing(window, bounds, between)
        self._move_sessions(now_ms)

    # --- Plays --------------------------------------------------------------------------------------------------------

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
        """Makes a group of AppendRequests durable and applies it: `parse`, `admit`, `write`, `count`.

        Returns:
            For each request its AppendResponse, or why it was refused; nothing of a refused one has happened.

        Raises:
            WriteFailedError: what is on disk is unknown: the process must end without answering.
        """
        group = self.admit(self.parse(requests), now_ms)
        self.write(group)
        return self.count(group)

    def parse(self, requests: Sequence[bytes]) -> list[Request | Exception]:
        """Reads requests, or says what is wrong with them. Nothing that queries look at is touched."""

        def parsed(request: bytes) -> Request | Exception:
            try:
                read = read_request(request)
                if read.corrects:
                    partitioner_of(self._cluster.partitioner).require_whole_songs("taking plays back")
            except (InvalidArgumentError, UnsupportedError) as error:
                return error
            return read

        return [parsed(request) for request in requests]

    def admit(self, requests: Sequence[Request | Exception], now_ms: int) -> Group:
        """Decides about a group; what comes before a correction is made durable and applied at once.

        Args:
            requests: from `parse`.
            now_ms: epoch milliseconds.

        Raises:
            WriteFailedError: as for `commit`.
        """
        log = self._open_log
        sizes = [len(request.raw) for request in requests if isinstance(request, Request)]
        try:
            # A verdict is never larger than what it is about: each reject and each skipped slot stands for a play. What
            # is added covers the rest of the record, and the header of a group that begins with the request.
            log.reserve(len(sizes), sum(2 * size + 128 for size in sizes))
        except DiskFullError as error:
            return Group([error] * len(requests), [])
        limits = self.limits(now_ms)
        outcomes: list[Admission | Exception] = []
        left: list[Admission] = []
        for read in requests:
            if isinstance(read, Exception):
                outcomes.append(read)
                continue
            if read.corrects and left:
                self._append(left)
                self._apply(left)
                left = []
            left.append(admit(self.state, read, limits))
            outcomes.append(left[-1])
        return Group(outcomes, left)

    def write(self, group: Group) -> None:
        """Makes an admitted group durable. Nothing that queries look at is touched.

        Raises:
            WriteFailedError: as for `commit`.
        """
        self._append(group.admitted)

    def count(self, group: Group, between: Callable[[], None] | None = None) -> list[bytes | Exception]:
        """Applies a durable group; returns what `commit` does. `between` is called when a part of it is counted."""
        self._apply(group.admitted, between)
        return [outcome.response() if isinstance(outcome, Admission) else outcome for outcome in group.outcomes]

    def _append_record(self, record_type: int, message: Message) -> None:
        """Makes a change durable that its caller then applies at once."""
        self._append_group([(record_type, [message.SerializeToString()])])
        self._counted_position = self.position

    def _append(self, group: Sequence[Admission]) -> None:
        records = [(APPEND, admission.payload) for admission in group if admission.payload]
        if records:
            self._append_group(records)

    def _append_group(self, records: Sequence[Record]) -> None:
        self._open_log.append_group(records)
        metrics.FDATASYNC_SECONDS.observe(self._open_log.sync_seconds)

    def _apply(self, group: Sequence[Admission], between: Callable[[], None] | None = None) -> None:
        for admission in group:
            apply(self.state, admission, between)
        self._counted_position = self.position

    def delete_song(self, song_id: str) -> Deleted:
        """Takes all plays of a song back, durably, from all charts and windows; of its marks nothing changes.

        Returns:
            What it had. Without any plays, or where another shard owns its slot, nothing is logged and nothing changes.

        Raises:
            DiskFullError: nothing was deleted.
            WriteFailedError: as for `commit`.
        """
        had = plays_of(self.state, song_id) if owns(self.state, song_id) else Deleted(0, 0)
        if had.plays or had.charts:
            self._append_record(DELETE_SONG, pb.DeleteSongRecord(song_id=song_id))
            delete(self.state, song_id)
        return had

    def expire_producers(self, now_ms: int) -> int:
        """Forgets producers that have been idle for their time to live, durably. Returns how many."""
        before_ms = now_ms - int(self._settings.producer_ttl_seconds * 1000)
        idle = self.state.producers.idle_since(before_ms)
        if idle:
            self._append_record(EXPIRE, pb.ExpireRecord(before_ms=before_ms))
            self.state.producers.forget_idle(before_ms)
        return idle

    # --- Snapshots ----------------------------------------------------------------------------------------------------

    def snapshot_room(self) -> int:
        """How many bytes `begin_snapshot` copies, with some to spare for what is counted until then."""
        size = copied_bytes(self.state.to_snapshot)
        return size + size // _SPARE

    def begin_snapshot(self, room: Room | None = None) -> PendingSnapshot:
        """Copies what can change. Takes as long as that copy.

        Args:
            room: where to; made ready by another thread, it spares this one the wait for fresh memory.
        """
        meta, arrays = self.state.to_snapshot(room.copy if room else np.copy)
        identity = self.identity
        meta[_IDENTITY] = {"cluster_id": identity.cluster_id, "shard_id": identity.shard_id} if identity else None
        roll_up = self.state.roll_up
        merges, blocks = {}, {}
        for name, board in self.state.boards.items():
            blocks[name] = dict(board.cells.blocks)
            merges[name] = choose_merges(board.cells.take_chunks(), blocks[name], board.cells.done, roll_up)
        return PendingSnapshot(self.position, meta, arrays, merges, blocks, roll_up)

    def write_snapshot(self, pending: PendingSnapshot) -> list[NewBlock]:
        """Merges the chunks into blocks and writes everything durably. From any thread, one at a time.

        Returns:
            The new blocks.

        Raises:
            StorageError: it could not be written; the snapshots before it stand.
        """
        if self._recovery is None:
            raise RuntimeError("the shard has not recovered yet")
        made: list[NewBlock] = []
        kept: dict[str, dict[int, Cells]] = {}
        for board, merges in pending.merges.items():
            taken = {number for merge in merges for number in merge.blocks}
            kept[board] = {number: cells for number, cells in pending.blocks[board].items() if number not in taken}
            for index, merge in enumerate(merges):
                cells = merge.cells(pending.roll_up)
                made.append(NewBlock(board, _block_number(pending.position, board, index), merge, cells))
                if len(cells):
                    kept[board][made[-1].number] = cells
        done = pending.meta[_ROLLED_UP]
        for block in made:
            done[block.board][str(block.number)] = pending.roll_up.borders
        blocks = [Block(number, cells.columns()) for one in kept.values() for number, cells in one.items()]
        meta = pending.meta | {_BLOCKS: {board: list(one) for board, one in kept.items()}}
        written = self._recovery.snapshots.write(Snapshot(pending.position, meta, pending.arrays, tuple(blocks)))
        columns = {block.block_id: block.columns for block in written}
        return [
            replace(block, cells=ordered_cells(columns[block.number]) if block.number in columns else None)
            for block in made
        ]

    def end_snapshot(self, pending: PendingSnapshot, blocks: Sequence[NewBlock]) -> None:
        """Uses the written blocks for what they were merged from."""
        for block in blocks:
            cells = self.state.boards[block.board].cells
            cells.replace(block.merge, block.number, block.cells, pending.roll_up.borders)
        self._snapshot_position = pending.position

    def clear_snapshot(self, pending: PendingSnapshot, blocks: list[NewBlock]) -> None:
        """Lets go of what the blocks were merged from, and deletes the log that no kept snapshot needs.

        Giving back that much memory and disk takes tens of milliseconds, so it is left to the thread that wrote.

        Raises:
            StorageError: an old segment could not be deleted; the next snapshot tries again.
        """
        pending.merges.clear()
        pending.blocks.clear()
        blocks.clear()
        if self._recovery is not None:
            self._open_log.delete_before(self._recovery.snapshots.kept_position())

    def seal(self) -> None:
        """Closes the log, so that the next start finds its end for certain. Nothing can be changed any more.

        Raises:
            WriteFailedError: that could not be made durable; no group is lost by that.
        """
        if self._log is not None:
            self._log.close()

    def close(self) -> None:
        """Closes log and directory. Nobody may be at a snapshot: others can have the directory from here on."""
        self.seal()
        self._directory.close()


def _told(error: Exception) -> str:
    """What an error says, also one of Python's own."""
    return str(error) if isinstance(error, InvalidArgumentError) else f"{type(error).__name__}: {error}"


def _block_number(position: int, board: str, index: int) -> int:
    """A number for a block of a board in the snapshot at a log position: no two snapshots share a position."""
    return (position * len(_BOARD_IDS) + _BOARD_IDS[board]) * _MERGES_MAX + index
