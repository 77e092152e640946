"""A topology in a file, for the processes of one machine.

A writer takes an exclusive lock on PATH.lock (the file itself is replaced, a lock on it would stay with the old one),
compares, and then

1. writes PATH.new, which nobody else may read (it holds the cluster's secret), and fsyncs it
                                      a crash here leaves PATH as it was; the next writer overwrites PATH.new
2. renames it over PATH               readers see the old file or the new one, never a part
3. fsyncs the directory               before this the change may be lost with the machine's power, and only then

Readers take no lock. Watchers compare the file's identity every 100 ms: inotify would be quicker, and silent on network
file systems.
"""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Final

from topk_grpc.errors import DiskFullError, StorageError, TopologyError
from topk_grpc.model import Topology
from topk_grpc.topology.codec import decode, encode
from topk_grpc.topology.locks import locked
from topk_grpc.topology.presence import FilePresence
from topk_grpc.topology.store import Leadership, check_succession

POLL_SECONDS: Final = 0.1
"""How often a watch looks."""

LOCK_SECONDS: Final = 10.0
"""How long a writer waits for another, whose turn takes milliseconds."""

# Two files can follow each other under one inode, size and time stamp, as time stamps are coarse: for this long after a
# change the file itself is read.
_SETTLE_SECONDS: Final = 2.0


class FileTopologyStore:
    """The store `file:PATH`."""

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self._presence = FilePresence(self._path)
        self._closed = asyncio.Event()

    async def read(self) -> Topology:
        """As `TopologyStore.read`."""
        return await asyncio.to_thread(self._read)

    async def compare_and_set(self, topology: Topology) -> None:
        """As `TopologyStore.compare_and_set`; returns after the fsync of file and directory.

        Raises:
            UnavailableError: another writer held the lock for too long.
            StorageError: the file cannot be written.
        """
        await asyncio.to_thread(self._compare_and_set, topology)

    async def watch(self) -> AsyncGenerator[Topology, None]:
        """As `TopologyStore.watch`."""
        seen: tuple[int, ...] | None = None
        changed = time.monotonic()
        epoch = -1
        while not self._closed.is_set():
            now = time.monotonic()
            found = self._identity()
            if found != seen:
                seen, changed = found, now
            if found is not None and now - changed <= _SETTLE_SECONDS:
                try:
                    topology = await self.read()
                except TopologyError:
                    topology = None  # removed since
                if topology is not None and topology.epoch > epoch:
                    epoch = topology.epoch
                    yield topology
            try:
                async with asyncio.timeout(POLL_SECONDS):
                    await self._closed.wait()
            except TimeoutError:
                continue

    def lead(self, name: str) -> AbstractAsyncContextManager[Leadership]:
        """As `TopologyStore.lead`."""
        return self._presence.lead(name)

    def announce(self, name: str, text: str) -> AbstractAsyncContextManager[None]:
        """As `TopologyStore.announce`."""
        return self._presence.announce(name, text)

    async def alive(self) -> Mapping[str, str]:
        """As `TopologyStore.alive`."""
        return await self._presence.alive()

    async def close(self) -> None:
        """Ends all watches."""
        self._closed.set()

    def _identity(self) -> tuple[int, ...] | None:
        """What changes when the file is replaced; None without one."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size

    def _read(self) -> Topology:
        try:
            raw = self._path.read_bytes()
        except FileNotFoundError as error:
            raise TopologyError(
                f"there is no topology at {self._path}: check --topology, or start the cluster that "
                "keeps its topology there"
            ) from error
        except OSError as error:
            raise StorageError(f"the topology at {self._path} cannot be read: {error.strerror}") from error
        return decode(raw, str(self._path))

    def _compare_and_set(self, topology: Topology) -> None:
        raw = encode(topology)
        try:
            with locked(self._beside(".lock"), LOCK_SECONDS):
                self._compare(topology)
                self._replace(raw)
        except OSError as error:
            kind = DiskFullError if error.errno in {errno.ENOSPC, errno.EDQUOT} else StorageError
            raise kind(f"the topology at {self._path} cannot be written: {error.strerror}") from error

    def _compare(self, topology: Topology) -> None:
        try:
            present = self._read()
        except TopologyError:
            present = None
        check_succession(present, topology, str(self._path))

    def _replace(self, raw: bytes) -> None:
        new = self._beside(".new")
        new.unlink(missing_ok=True)  # one left behind by a crash may be readable by others
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._path)
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _beside(self, suffix: str) -> Path:
        return self._path.with_name(self._path.name + suffix)
