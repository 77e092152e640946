"""The write-ahead log, for appending: group commit over preallocated segments.

Theory of operation. A segment's whole size is reserved, and made durable, before its first group is written. So an
append is one write and one fdatasync of bytes that have their place: it neither grows the file nor asks for room, and a
full disk is met only where the next segment is made, before anything of the group was written. The file keeps its size
until the next segment exists, which is how recovery tells a segment that was cut from one whose last group was torn;
then what was reserved in vain is given back.

After a failed write or fdatasync nobody knows what is on disk, and the page cache may lie about it: the log refuses all
further use, and the process has to end. Recovery then reads what is there and writes it anew, into another file.

A `Log` belongs to one writer. Only `delete_before` may be called from another thread meanwhile.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, NoReturn

from topk_grpc.errors import StorageError, WriteFailedError
from topk_grpc.storage.files import Files, WritableFile
from topk_grpc.storage.log_format import (
    GROUP_HEADER_BYTES,
    RECORD_HEADER_BYTES,
    SEGMENT_HEADER_BYTES,
    Record,
    SegmentHeader,
    encode_group,
    new_salt,
)
from topk_grpc.storage.segments import make_segment, segment_path

SEAL_BYTES: Final = GROUP_HEADER_BYTES
"""The size of a seal, a group without records: each segment keeps room for one."""


class Log:
    """The log of a data directory, open for appending. `Recovery.open_log` makes it.

    Attributes:
        sync_seconds: how long the fdatasync of the last group took.
    """

    def __init__(
        self,
        files: Files,
        directory: Path,
        *,
        segment_bytes: int,
        segments: Iterable[int],
        file: WritableFile,
        header: SegmentHeader,
        position: int,
        sealed: bool,
    ) -> None:
        """Continues a segment.

        Args:
            files: the file system.
            directory: where the segments are.
            segment_bytes: what to reserve for each new segment; a group that is larger gets a segment of its size.
            segments: first positions of all segments, the last one included.
            file: the last segment, durable up to `position`, zeros from there.
            header: its header.
            position: the end of its last group.
            sealed: whether that group is a seal.
        """
        self._files = files
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._segments = deque(segments)
        self._file = file
        self._header = header
        self._position = position
        self._sealed = sealed
        self._unusable: str | None = None
        self.sync_seconds = 0.0

    @property
    def first_position(self) -> int:
        """Where the oldest segment that is kept begins. From any thread."""
        return self._segments[0]

    @property
    def position(self) -> int:
        """The durable end: bytes since the log began, over all segments."""
        return self._position

    def reserve(self, records: int, payload_bytes: int) -> None:
        """Sees to it that a group of so many records with so many bytes of payload has its place on disk.

        Whoever decides about records on the ground of what the log will hold asks first: an `append_group` that is no
        larger then meets no full disk.

        Raises:
            DiskFullError: nothing was written; the log is as it was, and can be used on.
            WriteFailedError: as for `append_group`.
        """
        self._check_usable()
        size = GROUP_HEADER_BYTES + records * RECORD_HEADER_BYTES + payload_bytes
        if self._offset + size + SEAL_BYTES > self._header.reserved:
            self._roll(size)

    def append_group(self, records: Sequence[Record]) -> int:
        """Appends the records as one group: recovery finds all of them or none. Returns after fdatasync.

        Args:
            records: type (1 to 255) and pieces of the payload of each; pieces are C-contiguous and are not copied.

        Returns:
            The new durable position.

        Raises:
            DiskFullError: nothing was written; the log is as it was, and can be used on.
            WriteFailedError: it is unknown what was written; the log refuses all further use, the process must end.
        """
        self._check_usable()
        if not records:
            raise ValueError("a group without records")
        pieces, size = encode_group(records, self._position, self._header.salt)
        if self._offset + size + SEAL_BYTES > self._header.reserved:
            self._roll(size)
            pieces, size = encode_group(records, self._position, self._header.salt)
        try:
            self._file.write(self._offset, pieces)
            began = time.perf_counter()
            self._file.sync()
            self.sync_seconds = time.perf_counter() - began
        except OSError as error:
            self._fail("a group could not be made durable", error)
        self._position += size
        self._sealed = False
        return self._position

    def delete_before(self, position: int) -> int:
        """Deletes the segments that lie before `position` as a whole, oldest first. Returns how many.

        Nothing is synced: what a crash brings back is not read by recovery, and is deleted the next time. Another
        thread than the one that appends may do this: it takes from the old end of the segments only.

        Raises:
            StorageError: one could not be deleted; the log is whole and can be used on.
        """
        deleted = 0
        try:
            while len(self._segments) > 1 and self._segments[1] <= position:
                with contextlib.suppress(FileNotFoundError):
                    self._files.remove(segment_path(self._directory, self._segments[0]))
                self._segments.popleft()
                deleted += 1
        except OSError as error:
            raise StorageError(f"{self._directory}: an old log segment could not be deleted: {error}") from error
        return deleted

    def close(self) -> None:
        """Appends a seal, which proves the last group whole to whoever opens the log next, and closes the file.

        Raises:
            WriteFailedError: the seal could not be made durable; no group is lost by that.
        """
        if self._unusable is not None:
            return
        try:
            if not self._sealed:
                pieces, _ = encode_group((), self._position, self._header.salt)
                self._file.write(self._offset, pieces)
                self._file.sync()
        except OSError as error:
            self._fail("the log could not be sealed", error)
        finally:
            self._file.close()
        self._unusable = "it was closed"

    @property
    def _offset(self) -> int:
        return self._position - self._header.first_position

    def _roll(self, group_bytes: int) -> None:
        """Goes on in a new segment that has room for a group of that size and a seal."""
        least = SEGMENT_HEADER_BYTES + group_bytes + SEAL_BYTES
        reserve = range(least, max(least, self._segment_bytes) + 1)
        try:
            file, header = make_segment(self._files, self._directory, self._position, reserve=reserve, salt=new_salt())
        except WriteFailedError as error:
            self._unusable = str(error)
            raise
        except OSError as error:
            self._fail("a new log segment could not be made", error)
        # Given back is only what no group ever used; where that fails, zeros stay behind, and nobody minds.
        with contextlib.suppress(OSError):
            self._file.truncate(self._offset)
        with contextlib.suppress(OSError):
            self._file.close()
        self._segments.append(header.first_position)
        self._file, self._header = file, header
        self._position += SEGMENT_HEADER_BYTES

    def _check_usable(self) -> None:
        if self._unusable is not None:
            raise WriteFailedError(f"{self._directory}: the log cannot be used any more: {self._unusable}")

    def _fail(self, what: str, error: OSError) -> NoReturn:
        path = segment_path(self._directory, self._header.first_position)
        self._unusable = f"{what} ({error.strerror or error})"
        with contextlib.suppress(OSError):
            self._file.close()
        raise WriteFailedError(
            f"{path}: {what} ({error.strerror or error}). What is on disk is unknown: end this process; when the disk"
            " is healthy again, start it: recovery finds every group that was acknowledged"
        ) from error
