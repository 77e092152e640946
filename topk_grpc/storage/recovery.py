"""Recovery: the newest snapshot that is whole, then the log behind it, then the log open for more.

    recovery = recover(directory, segment_bytes)
    state = restore(recovery.snapshot)
    for record_type, payload, position in recovery.records():
        state.apply(record_type, payload)
    log = recovery.open_log()

Up to `open_log` nothing on disk is changed, so that whoever meets a `CorruptError` still has all there was. `open_log`
writes the last segment anew, without a torn group, into another file: after a failed fdatasync the page cache may hold
what the disk does not, and only bytes that were written and synced again are known to be there. A seal behind them says
so to the next recovery: from then on, damage to any of them is told from a torn tail.
"""

from __future__ import annotations

from collections.abc import Iterator

from topk_grpc.errors import CorruptError, DiskFullError, StorageError
from topk_grpc.storage.directory import DataDirectory
from topk_grpc.storage.files import is_no_space
from topk_grpc.storage.log import SEAL_BYTES, Log
from topk_grpc.storage.log_format import encode_group
from topk_grpc.storage.replay import ADVICE, Replay, Tail
from topk_grpc.storage.segments import TEMPORARY, list_segments, make_segment, segment_path
from topk_grpc.storage.snapshot import Snapshot, SnapshotStore


class Recovery:
    """What a data directory holds. `recover` makes it.

    Attributes:
        snapshot: the newest one that is whole, or None.
        snapshots: where to write the next ones.
        notes: what was found amiss and could be helped, a sentence each. `open_log` may add to it.
    """

    def __init__(
        self,
        directory: DataDirectory,
        segment_bytes: int,
        snapshots: SnapshotStore,
        snapshot: Snapshot | None,
        notes: list[str],
    ) -> None:
        """Use `recover`."""
        self.snapshot = snapshot
        self.snapshots = snapshots
        self.notes = notes
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._segments = list_segments(directory.files, directory.log_path)
        self._replay = Replay(directory.files, directory.log_path, self._segments, snapshot.position if snapshot else 0)
        if not snapshot and notes and self._segments[:1] != [0]:
            raise CorruptError(
                f"{directory.snapshots_path}: no snapshot is whole, and the log before them is gone."
                f" {'. '.join(notes)}. {ADVICE}",
                str(directory.snapshots_path),
            )

    @property
    def span(self) -> tuple[int, int]:
        """The positions that `records` reads: from where, and how far at the most."""
        start = self.snapshot.position if self.snapshot else 0
        return start, max(start, (self._segments or [0])[-1] + self._segment_bytes)

    def records(self) -> Iterator[tuple[int, memoryview, int]]:
        """Reads the log behind the snapshot, once.

        Yields:
            Type, payload (a view of the mapped file) and the position behind the record, for each.

        Raises:
            CorruptError: the log is damaged; nothing was changed, nor should what was read so far be used.
            VersionError: a newer release wrote it.
            StorageError: it cannot be read.
        """
        try:
            yield from self._replay.records()
        except OSError as error:
            raise StorageError(f"{self._directory.log_path} cannot be read: {error}") from error

    def open_log(self) -> Log:
        """Opens the log for appending, when `records` has come to its end. A torn group is cut.

        Raises:
            StorageError: the same for another reason than room.
            DiskFullError: the last segment could not be written anew; nothing was changed.
            WriteFailedError: it is unknown whether it was. Starting again is safe.
        """
        tail = self._replay.tail
        if tail is None:
            raise RuntimeError("open_log before records has come to its end")
        files, path = self._directory.files, self._directory.log_path
        try:
            for name in files.names(path):
                if name.endswith(TEMPORARY):
                    files.remove(path / name)
            return self._open_log(tail)
        except OSError as error:
            kind = DiskFullError if is_no_space(error) else StorageError
            raise kind(f"{path}: the last segment could not be written anew ({error}). Nothing was changed") from error

    def _open_log(self, tail: Tail) -> Log:
        files, path, first = self._directory.files, self._directory.log_path, tail.header.first_position
        if tail.cut_bytes:
            self.notes.append(
                f"{segment_path(path, first)}: cut a group that was being written when the process ended"
                f" ({tail.cut_bytes} bytes at position {tail.end}); it had not been acknowledged"
            )
        groups: list[bytes | memoryview] = [tail.groups]
        end = tail.end
        if not tail.sealed:
            seal, size = encode_group((), end, tail.header.salt)
            groups += seal
            end += size
        least = end - first + SEAL_BYTES
        reserve = range(least, max(least, self._segment_bytes) + 1)
        file, header = make_segment(files, path, first, reserve=reserve, salt=tail.header.salt, groups=groups)
        return Log(
            files,
            path,
            segment_bytes=self._segment_bytes,
            segments=self._segments,
            file=file,
            header=header,
            position=end,
            sealed=True,
        )


def recover(directory: DataDirectory, segment_bytes: int) -> Recovery:
    """Reads the newest whole snapshot of a data directory; `Recovery` does the rest.

    Args:
        directory: open.
        segment_bytes: the size of the log segments to come.

    Raises:
        CorruptError: no snapshot is whole and the log does not reach back to its beginning; nothing was changed.
        VersionError: a newer release wrote it.
        StorageError: it cannot be read.
    """
    notes: list[str] = []
    snapshots = SnapshotStore(directory)
    try:
        snapshot = snapshots.load(notes)
        return Recovery(directory, segment_bytes, snapshots, snapshot, notes)
    except OSError as error:
        raise StorageError(f"{directory.path} cannot be read: {error}") from error
