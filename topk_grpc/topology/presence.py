"""Who leads and who lives, of the processes of one machine: files beside the topology that their holders lock.

    PATH.NAME.lock     locked by the leader of that name
    PATH.alive/NAME    locked by the process of that name while it lives; holds its text

The kernel gives a lock back when its holder dies, so nothing has to be renewed or cleaned up. An announcement is
written and locked under another name and then renamed: who reads it finds it whole and locked. The file of an earlier
process of the same name is thereby replaced, and its lock is of no name any more.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import quote, unquote

from topk_grpc.errors import StorageError
from topk_grpc.topology.locks import is_locked, is_still, locked, try_lock
from topk_grpc.topology.store import Leadership

POLL_SECONDS: Final = 0.1
"""How often a candidate tries, and a leader looks."""

_TURN_SECONDS: Final = 10.0
_NEW: Final = "%new"  # no name is quoted to this


class FilePresence:
    """Leaders and announcements of one cluster.

    Args:
        path: of the topology.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._alive = path.with_name(path.name + ".alive")

    @asynccontextmanager
    async def lead(self, name: str) -> AsyncGenerator[Leadership, None]:
        """As `TopologyStore.lead`.

        Raises:
            StorageError: the lock's file cannot be opened.
        """
        path = self._path.with_name(f"{self._path.name}.{_quoted(name)}.lock")
        with _told(path):
            while (descriptor := try_lock(path)) is None or not is_still(descriptor, path):
                if descriptor is not None:  # the file was removed meanwhile, and its lock is worth nothing
                    os.close(descriptor)
                await asyncio.sleep(POLL_SECONDS)
        leadership = Leadership()
        looking = asyncio.create_task(_look(descriptor, path, leadership))
        try:
            yield leadership
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
            os.close(descriptor)

    @asynccontextmanager
    async def announce(self, name: str, text: str) -> AsyncGenerator[None, None]:
        """As `TopologyStore.announce`.

        Raises:
            StorageError: the file cannot be written.
        """
        path = self._alive / _quoted(name)
        descriptor = await asyncio.to_thread(self._announce, path, text)
        try:
            yield
        finally:
            await asyncio.to_thread(self._withdraw, path, descriptor)

    async def alive(self) -> dict[str, str]:
        """As `TopologyStore.alive`.

        Raises:
            StorageError: a file cannot be read.
        """
        return await asyncio.to_thread(self._read_alive)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        with locked(self._alive.with_name(self._alive.name + ".lock"), _TURN_SECONDS):
            yield

    def _announce(self, path: Path, text: str) -> int:
        with _told(path), self._turn():
            self._alive.mkdir(exist_ok=True)
            new = self._alive / _NEW
            new.unlink(missing_ok=True)
            descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.write(descriptor, text.encode())
                new.replace(path)
            except BaseException:
                os.close(descriptor)
                raise
        return descriptor

    def _withdraw(self, path: Path, descriptor: int) -> None:
        try:
            with self._turn():
                if is_still(descriptor, path):
                    path.unlink()
        finally:
            os.close(descriptor)

    def _read_alive(self) -> dict[str, str]:
        found = {}
        with _told(self._alive):
            for path in sorted(self._alive.iterdir()) if self._alive.exists() else []:
                text = None if path.name == _NEW else _text_of(path)
                if text is not None:
                    found[unquote(path.name)] = text
        return found


async def _look(descriptor: int, path: Path, leadership: Leadership) -> None:
    """A lock is lost only with its file's name: another process then makes a new file and locks that."""
    while is_still(descriptor, path):  # noqa: ASYNC110 - another process may change it
        await asyncio.sleep(POLL_SECONDS)
    leadership.lost.set()


def _text_of(path: Path) -> str | None:
    """What the living process that has the file says; None: there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        return file.read().decode() if is_locked(descriptor) else None


def _quoted(name: str) -> str:
    """A name as a file's name: no part of a path, and not that of another name."""
    return quote(name, safe="").replace(".", "%2E")


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path} cannot be used: {error.strerror}") from error
