"""Copying a shard's data directory into an archive, while the shard may be writing to it.

What is copied is what recovery reads: the last two snapshots that are whole, with their blocks, and the log from the
older one on. Blocks, snapshots and finished segments never change, so those that an earlier backup has are not copied
again. Of the last segment only whole groups are taken. Everything is checked on its way: damage is not backed up.

Where the shard prunes what is being copied, copying begins again (`view.MovedOnError`); what was copied stays.
"""

from __future__ import annotations

from typing import Any, Final

from topk_grpc.errors import CorruptError, StorageError
from topk_grpc.storage.archive import Archive, Stored
from topk_grpc.storage.array_files import DamagedFileError, Seal, read_sealed, seal_of
from topk_grpc.storage.directory import DataDirectory
from topk_grpc.storage.manifest import ARRAYS_NAME, NAME, Manifest, block_name
from topk_grpc.storage.replay import Replay
from topk_grpc.storage.segments import list_segments, segment_path
from topk_grpc.storage.snapshot import SnapshotStore
from topk_grpc.storage.view import MovedOnError

_TRIES: Final = 10
_KEPT: Final = 2


def copy_shard(directory: DataDirectory, name: str, archive: Archive, *, live: bool) -> dict[str, Any]:
    """Copies a shard into an archive.

    Args:
        directory: held, or only looked at.
        name: of the shard.
        archive: held.
        live: whether a process has the directory.

    Returns:
        The shard's part of a backup's manifest.

    Raises:
        CorruptError: the directory is damaged beyond what a start makes up for.
        StorageError: it changed faster than it could be copied, or cannot be read.
    """
    for left in reversed(range(_TRIES)):
        try:
            return _copy(directory, name, archive, live=live)
        except MovedOnError as error:
            if not left and isinstance(error.__cause__, CorruptError):
                raise error.__cause__ from None
        except OSError as error:
            raise StorageError(f"{directory.path} could not be copied to {archive.path}: {error}") from error
    raise StorageError(f"{directory.path} was pruned {_TRIES} times while it was copied: try again under less load")


def _copy(directory: DataDirectory, name: str, archive: Archive, *, live: bool) -> dict[str, Any]:
    store = SnapshotStore(directory)
    notes: list[str] = []
    snapshots: list[dict[str, Any]] = []
    for number in reversed(store.numbers()):
        try:
            snapshots.insert(0, _copy_snapshot(directory, name, archive, store.manifest(number)))
        except DamagedFileError as error:
            if live and number not in store.numbers():
                raise MovedOnError from error
            notes.append(f"snapshot {number:06} is damaged and was left out: {error}")
        if len(snapshots) == _KEPT:
            break
    first = list_segments(directory.files, directory.log_path)[:1]
    if notes and not snapshots and first != [0]:
        raise CorruptError(f"{directory.path}: no snapshot is whole. {'. '.join(notes)}", str(directory.snapshots_path))
    start = snapshots[0]["position"] if snapshots else 0
    log, end = _copy_log(directory, name, archive, start, live=live)
    return {
        "directory_id": directory.directory_id,
        "format": archive.put(f"{name}/FORMAT", directory.files.map(directory.path / "FORMAT")).to_json(),
        "snapshots": snapshots,
        "log": log,
        "end": end,
        "notes": notes,
    }


def _copy_snapshot(directory: DataDirectory, name: str, archive: Archive, manifest: Manifest) -> dict[str, Any]:
    files, folder = directory.files, f"snapshots/{manifest.number:06}"
    copied: dict[str, Any] = {}

    def copy(path: str, seal: Seal) -> None:
        stored = archive.has(f"{name}/{path}", seal)
        if stored is None:
            stored = archive.put(f"{name}/{path}", read_sealed(files, directory.path / path, seal))
        copied[path] = stored.to_json()

    for block_id, columns in manifest.blocks.items():
        for column, seal in columns.items():
            copy(f"blocks/{block_name(block_id, column)}", seal)
    copy(f"{folder}/{ARRAYS_NAME}", manifest.arrays)
    try:
        data = files.map(directory.path / folder / NAME)
    except FileNotFoundError:
        raise DamagedFileError(directory.path / folder / NAME, "is missing") from None
    copy(f"{folder}/{NAME}", seal_of(data))
    return {"number": manifest.number, "position": manifest.position, "files": copied}


def _copy_log(
    directory: DataDirectory, name: str, archive: Archive, start: int, *, live: bool
) -> tuple[list[dict[str, Any]], int]:
    """The log from a position to its end; every group is checked."""
    files, path = directory.files, directory.log_path
    segments = list_segments(files, path)
    replay = Replay(files, path, segments, start, live=live)
    try:
        for _ in replay.records():
            pass
    except FileNotFoundError as error:
        raise MovedOnError from error
    except CorruptError as error:
        if live:  # a group that was being written, or a segment that was rolled meanwhile
            raise MovedOnError from error
        raise
    tail = replay.tail
    if tail is None:
        raise RuntimeError("the log was read, and has no tail")
    copied = []
    begun = [first for first in segments if first <= start][-1:] + [first for first in segments if first > start]
    for first, end in zip(begun, [*begun[1:], tail.end], strict=True):
        try:
            data = files.map(segment_path(path, first), changing=live)
        except FileNotFoundError as error:
            raise MovedOnError from error
        stored: Stored = archive.put(f"{name}/log/{first:020}.log", data[: end - first])
        copied.append({"first": first, "end": end, **stored.to_json()})
    return copied, tail.end
