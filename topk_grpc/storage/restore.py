"""Making a shard's data directory from an archive: all of it, or nothing that a shard would take for one.

A file RESTORING is the first thing in the directory and the last to go; FORMAT, without which nothing starts there, is
written when all else is durable. So whoever meets a restore that was interrupted is told so, and the next one begins
anew. Every object is checked before the first file is written.

Besides a backup as it was made, an older snapshot can be taken with the log that later backups hold, as long as that
log has no gap: each segment has to begin where another one ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from topk_grpc.errors import DiskFullError, StorageError
from topk_grpc.storage.archive import Archive, Stored
from topk_grpc.storage.array_files import write_bytes
from topk_grpc.storage.directory import FOLDERS, FORMAT, RESTORING, make_directories
from topk_grpc.storage.files import Files, is_no_space
from topk_grpc.storage.log import SEAL_BYTES
from topk_grpc.storage.log_format import SEGMENT_HEADER_BYTES, decode_segment_header, encode_group
from topk_grpc.storage.segments import TEMPORARY, make_segment, segment_path

_IGNORED: Final = frozenset({RESTORING, "lost+found"})


@dataclass(frozen=True, slots=True)
class Plan:
    """What one shard's directory will consist of.

    Attributes:
        format: its FORMAT.
        files: by path in the directory.
        log: segments in order: first position, end, object.
        end: the position up to which plays are brought back.
    """

    format: Stored
    files: Mapping[str, Stored]
    log: Sequence[tuple[int, int, Stored]]
    end: int

    def objects(self) -> list[Stored]:
        """All of them."""
        return [self.format, *self.files.values(), *(stored for _, _, stored in self.log)]


def plan_shard(archive: Archive, number: int, name: str, snapshot: int | None = None) -> Plan:
    """What a shard is restored from.

    Args:
        archive: where the backups are.
        number: of the backup whose end of the log is restored.
        name: of the shard.
        snapshot: the number of an older snapshot to begin with; None: those of the backup.

    Raises:
        StorageError: the backup does not have the shard, or there is no such snapshot, or a gap behind it.
    """
    told = _shard(archive.read(number), name)
    if told is None:
        raise StorageError(f"backup {number} has no shard {name!r}: see `topk restore --list`")
    if snapshot is None:
        chosen, start = list(told["snapshots"]), 0
        log = _segments(told)
    else:
        older = [_shard(archive.read(each), name) for each in archive.numbers() if each <= number]
        known = {
            one["number"]: one
            for each in older
            if each is not None and each["directory_id"] == told["directory_id"]
            for one in each["snapshots"]
        }
        if snapshot not in known:
            numbers = ", ".join(map(str, sorted(known))) or "none"
            raise StorageError(f"no backup up to {number} has snapshot {snapshot} of {name}; there are: {numbers}")
        chosen, start = [known[snapshot]], known[snapshot]["position"]
        log = _reach_back(_segments(told), [_segments(each) for each in older if each is not None], start, name)
    files = {path: Stored.from_json(one) for each in chosen for path, one in each["files"].items()}
    return Plan(Stored.from_json(told["format"]), files, log, told["end"])


def _shard(content: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    found: dict[str, Any] | None = content["shards"].get(name)
    return found


def _segments(told: Mapping[str, Any]) -> list[tuple[int, int, Stored]]:
    return [(one["first"], one["end"], Stored.from_json(one)) for one in told["log"]]


def _reach_back(
    log: list[tuple[int, int, Stored]], older: Sequence[list[tuple[int, int, Stored]]], start: int, name: str
) -> list[tuple[int, int, Stored]]:
    """Segments from the one that holds a position on, out of all backups."""
    known = {(first, end): (first, end, stored) for segments in older for first, end, stored in segments}
    while log[0][0] > start:
        before = [one for (_, end), one in known.items() if end == log[0][0]]
        if not before:
            raise StorageError(
                f"the log of {name} between position {start} and {log[0][0]} is in no backup: it was deleted between"
                " two of them. Choose a later --snapshot, or none"
            )
        log = [before[-1], *log]
    while len(log) > 1 and log[1][0] <= start:
        log = log[1:]
    return log


def check(archive: Archive, stored: Sequence[Stored]) -> None:
    """Reads objects through.

    Raises:
        CorruptError: one is not as it was written.
    """
    for one in dict.fromkeys(stored):
        archive.get(one)


def prepare(files: Files, path: Path, finished: str) -> None:
    """Makes a directory ready: there, empty but for the sign that something is being restored in it.

    Args:
        files: the file system.
        path: the directory.
        finished: the file that says that what is there is whole.

    Raises:
        StorageError: it holds something.
    """
    make_directories(files, path)
    names = set(files.names(path))
    if finished in names or (names - _IGNORED and RESTORING not in names):
        raise StorageError(
            f"{path} is not empty (it holds {', '.join(sorted(names - _IGNORED)[:3])}): restore into a new directory,"
            " or an empty one"
        )
    for name in names - _IGNORED:
        _remove(files, path / name)
    write_bytes(files, path / RESTORING, b"a backup is being restored here\n")
    files.sync_directory(path)
    files.sync_directory(path.parent)


def finish(files: Files, path: Path) -> None:
    """Takes the sign away."""
    files.remove(path / RESTORING)
    files.sync_directory(path)


def put(files: Files, path: Path, data: bytes | memoryview, *, private: bool = False) -> None:
    """Writes a file, durably, under its name when it is whole."""
    temporary = path.with_name(path.name + TEMPORARY)
    write_bytes(files, temporary, data, private=private)
    files.rename(temporary, path)
    files.sync_directory(path.parent)


def restore_shard(archive: Archive, plan: Plan, files: Files, path: Path) -> None:
    """Makes a shard's data directory. Returns when all of it is durable.

    Raises:
        CorruptError: the backup is damaged; nothing was written.
        StorageError: the directory is not empty, or cannot be written.
        DiskFullError: there is no room.
    """
    check(archive, plan.objects())
    try:
        _restore(archive, plan, files, path)
    except OSError as error:
        kind = DiskFullError if is_no_space(error) else StorageError
        raise kind(f"{path} could not be restored: {error}. Restore again, there or elsewhere") from error


def _restore(archive: Archive, plan: Plan, files: Files, path: Path) -> None:
    prepare(files, path, FORMAT)
    for folder in FOLDERS:
        files.make_directory(path / folder)
    folders = {path / folder for folder in FOLDERS}
    for name, stored in plan.files.items():
        if path / name not in folders and (path / name).parent not in folders:
            files.make_directory((path / name).parent)
            folders.add((path / name).parent)
        write_bytes(files, path / name, archive.get(stored))
    for first, _, stored in plan.log[:-1]:
        write_bytes(files, segment_path(path / "log", first), archive.get(stored))
    _restore_tail(archive, plan, files, path / "log")
    for one in sorted(folders, reverse=True):
        files.sync_directory(one)
    files.sync_directory(path)
    put(files, path / FORMAT, archive.get(plan.format))
    finish(files, path)


def _restore_tail(archive: Archive, plan: Plan, files: Files, path: Path) -> None:
    """The last segment, with what it reserves, and a seal: what was archived is known to be whole."""
    first, end, stored = plan.log[-1]
    data = archive.get(stored)
    header = decode_segment_header(data)
    seal, size = encode_group((), end, header.salt)
    least = len(data) + size + SEAL_BYTES
    groups = [data[SEGMENT_HEADER_BYTES:], *seal]
    file, _ = make_segment(files, path, first, reserve=range(least, least + 1), salt=header.salt, groups=groups)
    file.close()


def _remove(files: Files, path: Path) -> None:
    with contextlib.suppress(NotADirectoryError):
        for name in files.names(path):
            _remove(files, path / name)
    files.remove(path)
