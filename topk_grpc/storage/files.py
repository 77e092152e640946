"""The port to the file system: everything that storage does to a disk goes through these few methods.

`OsFiles` is the real one. Tests put another in its place that fails, or stops the world, at any one of the calls.
No method retries, and none hides an error: what an `OSError` means is decided by the caller.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

Bytes = bytes | memoryview
"""What is written: C-contiguous bytes."""

_IOV_MAX: Final = 1024
_MAP_BYTES_MIN: Final = 64 << 10
_READ_BYTES: Final = 1 << 20
_ZEROS: Final = bytes(1 << 20)
_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_UNREADABLE: Final = frozenset({errno.EIO, errno.EBADMSG, errno.EUCLEAN})
_NO_FALLOCATE: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


class Held(Protocol):
    """Something that is held until it is closed."""

    def close(self) -> None:
        """Gives it back."""


class WritableFile(Held, Protocol):
    """A file being written. Nothing is durable before `sync` has returned."""

    def reserve(self, size: int) -> None:
        """Makes the file `size` bytes long, with room on the disk for all of them; new bytes read as zeros.

        Raises:
            OSError: `is_no_space` tells a full disk.
        """

    def write(self, offset: int, pieces: Sequence[Bytes]) -> None:
        """Writes all pieces one after the other, from `offset` bytes on."""

    def truncate(self, size: int) -> None:
        """Drops what lies beyond `size` bytes."""

    def sync(self) -> None:
        """Returns when content and size are durable (fdatasync)."""


class Files(Protocol):
    """The file system."""

    def names(self, directory: Path) -> list[str]:
        """What the directory holds, sorted."""

    def map(self, path: Path, *, changing: bool = False) -> memoryview:
        """The whole file, read-only; it stays readable after the file has been removed or replaced.

        Args:
            path: of it.
            changing: another process writes to it, and may cut it: its bytes are those of now. Without that, reading
                what has been cut off ends the process.
        """

    def create(self, path: Path, *, private: bool = False) -> WritableFile:
        """A new, empty file. One of that name is removed first, so that what is mapped of it stays whole.

        Args:
            path: of it.
            private: nobody but its owner may read it.
        """

    def rename(self, source: Path, target: Path) -> None:
        """Gives a file, or a directory, another name; a file of that name is replaced in one step."""

    def remove(self, path: Path) -> None:
        """Removes a file, or a directory that is empty."""

    def make_directory(self, path: Path) -> None:
        """Makes the directory unless it is there."""

    def sync_directory(self, path: Path) -> None:
        """Returns when the names in the directory are durable."""

    def lock(self, path: Path) -> Held:
        """Locks the file, made if it is missing, against all other processes until it is closed.

        Raises:
            BlockingIOError: somebody else holds it.
        """


def is_no_space(error: OSError) -> bool:
    """Whether it says that the disk, a quota or the largest file size is used up."""
    return error.errno in _NO_SPACE


def is_unreadable(error: OSError) -> bool:
    """Whether it says that the disk does not give bytes back, or not as they were."""
    return error.errno in _UNREADABLE


class OsFiles:
    """The operating system's files."""

    def names(self, directory: Path) -> list[str]:
        """See `Files.names`."""
        return sorted(path.name for path in directory.iterdir())

    def map(self, path: Path, *, changing: bool = False) -> memoryview:
        """See `Files.map`. Small files are read: Python's mmap keeps a descriptor open for each map."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            if size >= _MAP_BYTES_MIN and not changing:
                _read_through(descriptor)
                return memoryview(mmap.mmap(descriptor, size, access=mmap.ACCESS_READ))
            with open(descriptor, "rb", closefd=False) as file:
                return memoryview(file.read())
        finally:
            os.close(descriptor)

    def create(self, path: Path, *, private: bool = False) -> WritableFile:
        """See `Files.create`."""
        path.unlink(missing_ok=True)
        mode = 0o600 if private else 0o644
        return _OsFile(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode))

    def rename(self, source: Path, target: Path) -> None:
        """See `Files.rename`."""
        source.rename(target)

    def remove(self, path: Path) -> None:
        """See `Files.remove`."""
        try:
            path.unlink()
        except IsADirectoryError:
            path.rmdir()

    def make_directory(self, path: Path) -> None:
        """See `Files.make_directory`."""
        path.mkdir(exist_ok=True)

    def sync_directory(self, path: Path) -> None:
        """See `Files.sync_directory`."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def lock(self, path: Path) -> Held:
        """See `Files.lock`. The holder's process id is left in the file, for messages only."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        return _OsFile(descriptor)


def _read_through(descriptor: int) -> None:
    """Brings a file into the page cache, where a sector that cannot be read is an OSError.

    Through a map it would be a SIGBUS, which ends the process without a word.
    """
    buffer = bytearray(_READ_BYTES)
    while os.readv(descriptor, [buffer]):
        pass


class _OsFile:
    """A descriptor, open for writing."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def reserve(self, size: int) -> None:
        present = os.fstat(self._descriptor).st_size
        if size <= present:
            return
        try:
            os.posix_fallocate(self._descriptor, present, size - present)
        except OSError as error:
            if error.errno not in _NO_FALLOCATE:
                raise
            # A file system without fallocate: writing zeros takes the room as well.
            for offset in range(present, size, len(_ZEROS)):
                self.write(offset, [_ZEROS[: size - offset]])

    def write(self, offset: int, pieces: Sequence[Bytes]) -> None:
        if len(pieces) > _IOV_MAX:
            pieces = [b"".join(pieces)]
        total = sum(memoryview(piece).nbytes for piece in pieces)
        written = os.pwritev(self._descriptor, pieces, offset)
        if written == total:
            return
        # A short write (the kernel stops at 2 GiB, or a disk fills up): the rest follows, or says what is wrong.
        rest = memoryview(b"".join(pieces))
        while written < total:
            count = os.pwrite(self._descriptor, rest[written:], offset + written)
            if count == 0:
                raise OSError(errno.EIO, "nothing more was written")
            written += count

    def truncate(self, size: int) -> None:
        os.ftruncate(self._descriptor, size)

    def sync(self) -> None:
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)
