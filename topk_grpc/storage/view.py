"""A look at a data directory that its shard may go on writing to: whole snapshots, and the log behind them.

Theory of operation. Nothing is held, so what was listed may be gone when it is read: snapshots and segments are pruned
while the shard works. What has been mapped stays readable, whatever becomes of its name. So whoever looks begins again
where something has gone (`MovedOnError`): the next snapshots are there by then. A group that is being written does not
read as whole yet, and counts as the end.
"""

from __future__ import annotations

from collections.abc import Iterator

from topk_grpc.errors import CorruptError
from topk_grpc.storage.array_files import DamagedFileError
from topk_grpc.storage.directory import DataDirectory
from topk_grpc.storage.replay import Replay
from topk_grpc.storage.segments import list_segments
from topk_grpc.storage.snapshot import Snapshot, SnapshotStore


class MovedOnError(Exception):
    """What was looked at has been pruned meanwhile: look again."""


class View:
    """What a data directory holds now.

    Args:
        directory: held, or only looked at.
        live: whether a shard writes to it meanwhile.

    Attributes:
        notes: what is amiss, a sentence each.
    """

    def __init__(self, directory: DataDirectory, *, live: bool) -> None:
        self._directory = directory
        self._live = live
        self.notes: list[str] = []

    def generations(self) -> list[Snapshot | None]:
        """The last two snapshots that are whole, the newest first; None stands for the beginning of the log.

        Raises:
            VersionError: a newer release wrote one.
        """
        store = SnapshotStore(self._directory)
        found: list[Snapshot | None] = []
        for number in reversed(store.numbers()):
            try:
                found.append(store.read(number))
            except DamagedFileError as error:
                if self._live and number not in store.numbers():
                    raise MovedOnError from error
                self.notes.append(f"snapshot {number:06} is damaged: {error}")
            if len(found) == 2:
                return found
        if list_segments(self._directory.files, self._directory.log_path)[:1] == [0]:
            found.append(None)
        return found

    def records(self, start: int, end: int | None) -> Iterator[tuple[int, memoryview, int]]:
        """Type, payload and the position behind it of each record from one position to another.

        Args:
            start: of a snapshot, or 0.
            end: None: to the end of the log.

        Raises:
            CorruptError: the log is damaged, or ends before `end`.
            MovedOnError: it was deleted meanwhile.
        """
        files, path = self._directory.files, self._directory.log_path
        segments = list_segments(files, path)
        replay = Replay(files, path, segments, start, live=self._live)
        try:
            for record_type, payload, position in replay.records():
                if end is not None and position > end:
                    return
                yield record_type, payload, position
        except FileNotFoundError as error:
            raise MovedOnError from error
        except CorruptError as error:
            if self._live:  # a segment rolled meanwhile, and a group that was being written, can look so
                raise MovedOnError from error
            raise
        if end is not None and replay.tail is not None and replay.tail.end < end:
            if self._live and segments != list_segments(files, path):
                raise MovedOnError
            raise CorruptError(
                f"{path}: the log ends at position {replay.tail.end}, before position {end}, up to which the shard has"
                " counted",
                str(path),
            )
