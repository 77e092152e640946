"""Cutting the log where it is damaged: for an operator who would rather lose its end than restore a backup.

Only the last segment is ever cut, at the first group that does not read, and only where recovery refuses it: a torn end
is cut by every start, and nobody loses by it. What lies behind the cut is kept, byte by byte, in a file beside the
segment, `<segment>.cut-<position>`; records in it that are still whole can be read, and are what is known to be lost.

The steps, and what a crash between them leaves, stand in docs/durability.md. Until the last one the segment is as it
was; repeating all of them does the same again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from topk_grpc.errors import CorruptError, DiskFullError, StorageError
from topk_grpc.storage.array_files import write_bytes
from topk_grpc.storage.directory import DataDirectory
from topk_grpc.storage.files import is_no_space
from topk_grpc.storage.log_format import (
    SEGMENT_HEADER_BYTES,
    DamagedError,
    SegmentHeader,
    decode_group,
    decode_segment_header,
    later_group_begins,
    new_salt,
    whole_records,
    written_bytes,
)
from topk_grpc.storage.replay import Replay
from topk_grpc.storage.segments import TEMPORARY, list_segments, make_segment, segment_path
from topk_grpc.storage.snapshot import SnapshotStore


@dataclass(frozen=True, slots=True)
class Cut:
    """What a repair did.

    Attributes:
        damage: what recovery refused, and why.
        segment: the file that was cut.
        kept: the file with what was cut off.
        position: of the log's end now.
        cut_bytes: how many bytes were cut off.
        groups: begun behind the cut, as far as can be told.
        records: of those cut off, type and payload of each that is still whole.
    """

    damage: str
    segment: Path
    kept: Path
    position: int
    cut_bytes: int
    groups: int
    records: list[tuple[int, bytes]] = field(default_factory=list)


def repair_tail(directory: DataDirectory) -> Cut | None:
    """Cuts the log's last segment where it is damaged.

    Args:
        directory: held, so that no shard has it.

    Returns:
        None: recovery does not refuse the log; nothing was changed.

    Raises:
        CorruptError: the damage lies elsewhere, and cannot be cut off; nothing was changed.
        DiskFullError: there is no room for what is cut off; nothing was changed.
        StorageError: the disk cannot be read or written.
    """
    try:
        return _repair(directory)
    except OSError as error:
        kind = DiskFullError if is_no_space(error) else StorageError
        raise kind(f"{directory.log_path} could not be repaired: {error}. It is as it was") from error


def _repair(directory: DataDirectory) -> Cut | None:
    files, path = directory.files, directory.log_path
    segments = list_segments(files, path)
    notes: list[str] = []
    snapshot = SnapshotStore(directory).load(notes)
    if snapshot is None and segments[:1] != [0]:
        raise CorruptError(
            f"{path}: no snapshot is whole and the log before them is gone, so its tail cannot be repaired."
            f" {'. '.join(notes)}. Restore this data directory from its last backup (topk restore)",
            str(directory.snapshots_path),
        )
    start = snapshot.position if snapshot is not None else 0
    try:
        for _ in Replay(files, path, segments, start).records():
            pass
    except CorruptError as error:
        last = segment_path(path, segments[-1]) if segments else path
        if error.path != str(last):
            raise CorruptError(
                f"{error} (The damage is not in the last segment: cutting there would lose whole segments, so nothing"
                " was cut)",
                error.path,
                error.offset,
            ) from error
        return _cut(directory, segments[-1], start, str(error))
    return None


def _cut(directory: DataDirectory, first: int, start: int, damage: str) -> Cut:
    files, path = directory.files, segment_path(directory.log_path, first)
    data = files.map(path)
    try:
        header = decode_segment_header(data)
        if header.first_position != first:
            raise DamagedError("another segment's header", 0)
        end = _end_of_groups(data, header)
    except DamagedError:  # nothing in it can be told apart
        header, end = SegmentHeader(first, 0, new_salt()), SEGMENT_HEADER_BYTES
    if first + end < start:
        raise CorruptError(
            f"{path}: the log would end at position {first + end}, before position {start} of the last snapshot, which"
            " has counted what follows: nothing was cut. Restore this data directory from its last backup (topk"
            " restore)",
            str(path),
        )
    rest = data[end:]
    cut_bytes = written_bytes(rest)
    kept = path.with_name(f"{path.name}.cut-{first + end}")
    groups, records = _lost(data, end, header)
    write_bytes(files, kept.with_name(kept.name + TEMPORARY), rest[:cut_bytes])
    files.rename(kept.with_name(kept.name + TEMPORARY), kept)
    files.sync_directory(directory.log_path)
    file, _ = make_segment(
        files,
        directory.log_path,
        first,
        reserve=range(end, end + 1),
        salt=new_salt() if end == SEGMENT_HEADER_BYTES else header.salt,
        groups=[data[SEGMENT_HEADER_BYTES:end]],
    )
    file.close()
    return Cut(damage, path, kept, first + end, cut_bytes, groups, records)


def _end_of_groups(data: memoryview, header: SegmentHeader) -> int:
    """Where the first group begins that does not read."""
    offset = SEGMENT_HEADER_BYTES
    while offset < len(data):
        try:
            offset = decode_group(data, offset, len(data), header).end
        except DamagedError:
            break
    return offset


def _lost(data: memoryview, end: int, header: SegmentHeader) -> tuple[int, list[tuple[int, bytes]]]:
    """How many groups begin behind the end, and the records there that are whole."""
    groups, records = 0, []
    offset: int | None = end
    while offset is not None:
        groups += 1
        later = later_group_begins(data, offset, header)
        stop = len(data) if later is None else later
        records += [(kind, bytes(data[at:stop_at])) for kind, at, stop_at in whole_records(data, offset, stop)]
        offset = later
    return groups if written_bytes(data[end:]) else 0, records
