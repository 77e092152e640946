"""The write-ahead log, for reading: the records of a chain of segments, from a position on.

Theory of operation. Segments are mapped one after the other; a group is checked as a whole, then its payloads are
handed out as views of the map, uncopied. Nothing on disk is changed.

What may be missing follows from how the log is written: each group only after the one before it was durable. So just
one group can have been under way when the process ended, and it is the last thing in the last segment. A group there
that does not read is cut, unless something proves that it had been durable: a group begun behind it, or a segment after
its own. That, and whatever else is not as it must be, is damage, and ends the replay with a `CorruptError`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from topk_grpc.errors import CorruptError, VersionError
from topk_grpc.storage.files import Files
from topk_grpc.storage.log_format import (
    SEGMENT_HEADER_BYTES,
    DamagedError,
    SegmentHeader,
    decode_group,
    decode_segment_header,
    later_group_begins,
    written_bytes,
)
from topk_grpc.storage.segments import segment_path

ADVICE = "Nothing was changed. Restore this data directory from its last backup (topk restore)"
TAIL_ADVICE = (
    ADVICE + ", or cut the log there and lose what follows (topk audit --repair-tail says what that is, and keeps it)"
)


@dataclass(frozen=True, slots=True)
class Tail:
    """Where the log can go on.

    Attributes:
        header: the last segment's.
        groups: its groups, all whole.
        end: the position behind them.
        sealed: whether the last of them is a seal.
        cut_bytes: how far a torn group reaches behind them, 0 if there is none.
    """

    header: SegmentHeader
    groups: memoryview
    end: int
    sealed: bool
    cut_bytes: int


class Replay:
    """One pass over the log.

    Attributes:
        tail: known when the pass is over; None before.
    """

    def __init__(
        self, files: Files, directory: Path, segments: Sequence[int], start: int, *, live: bool = False
    ) -> None:
        """Nothing is read yet.

        Args:
            files: the file system.
            directory: where the segments are.
            segments: the first positions of all, ascending.
            start: the position to begin at, the end of a group or 0.
            live: whether a shard writes to it meanwhile.
        """
        self.tail: Tail | None = None
        self._files = files
        self._directory = directory
        self._segments = segments
        self._start = start
        self._live = live

    def records(self) -> Iterator[tuple[int, memoryview, int]]:
        """Type, payload and the position behind it, of each record.

        Raises:
            CorruptError: at the first byte that is not as it must be.
            VersionError: a segment was written by a newer release.
        """
        needed = [first for first in self._segments if first <= self._start][-1:]
        needed += [first for first in self._segments if first > self._start]
        if not needed or needed[0] > self._start:
            missing = segment_path(self._directory, self._start)
            self._stop(missing, f"the log is missing from position {self._start} on", None)
        for first, next_first in zip(needed, [*needed[1:], None], strict=True):
            yield from self._segment(first, next_first)

    def _segment(self, first: int, next_first: int | None) -> Iterator[tuple[int, memoryview, int]]:
        path = segment_path(self._directory, first)
        data = self._files.map(path, changing=self._live)
        header = self._header(path, data, first)
        # Of a segment that has a successor we know where it ends; in the last one the groups end somewhere.
        end = len(data) if next_first is None else next_first - first
        if next_first is None and len(data) < header.reserved:
            self._stop(path, f"the file has {len(data)} bytes of the {header.reserved} it was made with", len(data))
        if len(data) < end:
            self._stop(path, f"{end - len(data)} bytes are missing before the next segment", len(data))

        offset = max(self._start - first, SEGMENT_HEADER_BYTES)
        if next_first is None and offset > len(data):
            self._stop(path, f"the log ends before the snapshot's position {self._start}", len(data))
        sealed = False
        while offset < end:
            try:
                group = decode_group(data, offset, end, header)
            except DamagedError as damage:
                if next_first is not None:
                    self._stop(
                        path, f"{damage.reason}, and the segment at position {next_first} follows", damage.offset
                    )
                self._check_torn(path, data, offset, header, damage)
                break
            for record_type, start, record_end in group.records:
                yield record_type, data[start:record_end], first + record_end
            offset = group.end
            sealed = not group.records
        if next_first is None:
            self.tail = self._tail(data, header, offset, sealed=sealed)
        elif written_bytes(data[end:]):
            self._stop(path, f"there are bytes behind position {next_first}, where the next segment begins", end)

    def _header(self, path: Path, data: memoryview, first: int) -> SegmentHeader:
        try:
            header = decode_segment_header(data)
        except DamagedError as damage:
            self._stop(path, damage.reason, damage.offset)
        except VersionError as error:
            raise VersionError(f"{path} has {error}: start the release that wrote it, or a newer one") from None
        if header.first_position != first:
            self._stop(path, f"the file belongs at position {header.first_position}", 0)
        return header

    def _check_torn(
        self, path: Path, data: memoryview, offset: int, header: SegmentHeader, damage: DamagedError
    ) -> None:
        """Stops unless the group at `offset` may be the one that was under way at the end."""
        later = later_group_begins(data, offset, header) if written_bytes(data[offset:]) else None
        if later is not None:
            self._stop(
                path,
                f"{damage.reason}; it had been durable, for a later group begins at byte {later}",
                damage.offset,
            )

    def _tail(self, data: memoryview, header: SegmentHeader, offset: int, *, sealed: bool) -> Tail:
        cut_bytes = written_bytes(data[offset:])
        return Tail(header, data[SEGMENT_HEADER_BYTES:offset], header.first_position + offset, sealed, cut_bytes)

    def _stop(self, path: Path, reason: str, offset: int | None) -> NoReturn:
        at = "" if offset is None else f" at byte {offset}"
        in_last = bool(self._segments) and path == segment_path(self._directory, self._segments[-1])
        advice = TAIL_ADVICE if in_last else ADVICE
        raise CorruptError(f"{path} is damaged{at}: {reason}. {advice}", str(path), offset)
