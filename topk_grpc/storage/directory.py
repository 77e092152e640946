"""The data directory: what marks it as ours, who it is, and that one process at a time has it.

    DIR/FORMAT      {"crc32c": "1d0f2a3b", "format": 1, "directory_id": "<32 hex digits>"}
    DIR/LOCK        locked (flock) by the process that has it open; its content, a process id, is for messages
    DIR/log/        the write-ahead log, see log_format.py
    DIR/snapshots/  the last two snapshots, see snapshot.py
    DIR/blocks/     the blocks that they name

FORMAT is written last, when all else is durable: so a directory that has it has a log with at least one segment, and a
log without any has lost them.
"""

from __future__ import annotations

import contextlib
import json
import re
import uuid
from pathlib import Path
from typing import Final

from topk_grpc.errors import CorruptError, DirectoryInUseError, DiskFullError, StorageError, VersionError
from topk_grpc.storage.checksums import decode_self_checked, encode_self_checked
from topk_grpc.storage.files import Files, Held, OsFiles, is_no_space
from topk_grpc.storage.log_format import SEGMENT_HEADER_BYTES, new_salt
from topk_grpc.storage.segments import TEMPORARY, make_segment, segment_path

VERSION: Final = 1
FORMAT: Final = "FORMAT"
RESTORING: Final = "RESTORING"
"""Stands in a directory while a backup is being restored into it, see restore.py."""
_LOCK: Final = "LOCK"
_DIRECTORY_ID: Final = re.compile("[0-9a-f]{32}")
FOLDERS: Final = ("blocks", "log", "snapshots")
_IGNORED: Final = frozenset({_LOCK, FORMAT + TEMPORARY, "lost+found", *FOLDERS})


class DataDirectory:
    """A data directory, held against all other processes until it is closed.

    Attributes:
        path: where it is.
        files: the file system it is on.
        directory_id: its identity, 32 hex digits, for as long as it lives.
        is_new: whether `open` made it.
    """

    def __init__(self, path: Path, files: Files, lock: Held, directory_id: str, *, is_new: bool) -> None:
        """Use `open`."""
        self.path = path
        self.files = files
        self.directory_id = directory_id
        self.is_new = is_new
        self._lock = lock

    @classmethod
    def open(cls, path: Path, files: Files | None = None) -> DataDirectory:
        """Takes hold of the directory; makes it, durably, where there is none or an empty one.

        Args:
            path: the directory; missing parents are made.
            files: the file system, the real one by default.

        Raises:
            DirectoryInUseError: another process has it.
            VersionError: a newer release wrote it.
            CorruptError: its FORMAT is damaged, or missing beside data.
            DiskFullError: there is no room to make it.
            StorageError: it holds something else, or cannot be read or written.
        """
        files = files or OsFiles()
        try:
            make_directories(files, path)
            lock = _take_lock(files, path)
            try:
                is_new = FORMAT not in files.names(path)
                if is_new:
                    directory_id = _create(files, path)
                else:
                    directory_id = _read_format(files, path)
                    # The process that made it may have ended right before it said so to the disk.
                    files.sync_directory(path)
                    files.sync_directory(path.parent)
            except BaseException:
                lock.close()
                raise
        except OSError as error:
            if is_no_space(error):
                raise DiskFullError(
                    f"{path}: no room for a data directory ({error.strerror}). Free disk space, then try again"
                ) from error
            raise StorageError(f"{path} cannot be used as a data directory: {error}") from error
        return cls(path, files, lock, directory_id, is_new=is_new)

    @classmethod
    def look(cls, path: Path, files: Files | None = None) -> DataDirectory:
        """Looks at a directory that may be another process's, which goes on writing: nothing is held, nothing made.

        Raises:
            StorageError: there is none, or it cannot be read.
            VersionError, CorruptError: as for `open`.
        """
        files = files or OsFiles()
        try:
            directory_id = _read_format(files, path)
        except (FileNotFoundError, NotADirectoryError):
            raise StorageError(
                f"{path} is no data directory of a shard: it has no {FORMAT}. Name the directory of a shard, or the"
                " one of a cluster of `topk up`"
            ) from None
        except OSError as error:
            raise StorageError(f"{path} cannot be read: {error}") from error
        return cls(path, files, _Nothing(), directory_id, is_new=False)

    @property
    def log_path(self) -> Path:
        """Where the log is."""
        return self.path / "log"

    @property
    def snapshots_path(self) -> Path:
        """Where the snapshots are."""
        return self.path / "snapshots"

    @property
    def blocks_path(self) -> Path:
        """Where the blocks are."""
        return self.path / "blocks"

    def close(self) -> None:
        """Lets others have it. Whatever writes to it must have been closed before."""
        self._lock.close()


class _Nothing:
    """Nothing is held."""

    def close(self) -> None:
        pass


def make_directories(files: Files, path: Path) -> None:
    """Makes a directory and those above it that are missing, each durable in its parent."""
    missing = [path]
    while True:
        try:
            files.names(missing[-1])
            break
        except FileNotFoundError:
            if missing[-1].parent == missing[-1]:
                raise
            missing.append(missing[-1].parent)
    for directory in reversed(missing[:-1]):
        files.make_directory(directory)
        files.sync_directory(directory.parent)


def _take_lock(files: Files, path: Path) -> Held:
    names = files.names(path)
    if FORMAT not in names and RESTORING in names:
        raise StorageError(
            f"{path}: a backup was being restored here, and that was interrupted: run `topk restore` again, it begins"
            " anew"
        )
    if FORMAT not in names and not _IGNORED.issuperset(names):
        raise StorageError(
            f"{path} is no data directory, and not empty (it holds {', '.join(sorted(set(names) - _IGNORED)[:3])}):"
            " name another, or an empty one"
        )
    try:
        return files.lock(path / _LOCK)
    except BlockingIOError:
        holder = ""
        with contextlib.suppress(OSError, ValueError):
            holder = f" (process {int(bytes(files.map(path / _LOCK)))})"
        raise DirectoryInUseError(
            f"{path} is in use by another process{holder}: stop that one first, or name another directory"
        ) from None


def _create(files: Files, path: Path) -> str:
    """The steps of docs/formats/data-directory.md."""
    for folder in FOLDERS:
        files.make_directory(path / folder)
    _check_unused(files, path)
    # Recovery replaces this first segment, as it does each time, by one with room for groups.
    size = SEGMENT_HEADER_BYTES
    file, _ = make_segment(files, path / "log", 0, reserve=range(size, size + 1), salt=new_salt())
    file.close()
    directory_id = uuid.uuid4().hex
    temporary = path / (FORMAT + TEMPORARY)
    file = files.create(temporary)
    try:
        file.write(0, [encode_self_checked({"format": VERSION, "directory_id": directory_id})])
        file.sync()
    finally:
        file.close()
    files.sync_directory(path)  # the folders, before the file that vouches for them
    files.rename(temporary, path / FORMAT)
    files.sync_directory(path)
    for parent in path.parents:  # whoever made them may not have
        with contextlib.suppress(PermissionError):
            files.sync_directory(parent)
    return directory_id


def _check_unused(files: Files, path: Path) -> None:
    """A directory without FORMAT may be one whose making was interrupted; one with data has lost it."""
    first = segment_path(path / "log", 0)
    for folder in FOLDERS:
        for name in files.names(path / folder):
            held = path / folder / name
            empty_segment = held == first and len(files.map(first)) <= SEGMENT_HEADER_BYTES
            if not name.endswith(TEMPORARY) and not empty_segment:
                raise CorruptError(
                    f"{path / FORMAT} is missing, but there is data ({held}). Nothing was changed. Restore FORMAT"
                    " from a backup of this directory",
                    str(path / FORMAT),
                )


def _read_format(files: Files, path: Path) -> str:
    data = bytes(files.map(path / FORMAT))
    # The version is believed before the checksum: a newer one may check itself in another way.
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        version = json.loads(data)["format"]
        if version > VERSION:
            raise VersionError(
                f"{path} has data format {version}, while this release reads up to {VERSION}: start the release that"
                " wrote it, or a newer one"
            )
    content = decode_self_checked(data) or {}
    directory_id = content.get("directory_id")
    if not isinstance(directory_id, str) or not _DIRECTORY_ID.fullmatch(directory_id):
        raise CorruptError(
            f"{path / FORMAT} is damaged. Nothing was changed. Restore it from a backup of this directory",
            str(path / FORMAT),
        )
    return directory_id
