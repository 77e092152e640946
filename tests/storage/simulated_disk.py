"""A disk in memory that knows what is durable and what is not: `storage.files.Files` for tests of crashes.

What was written is there for whoever reads it, as in a page cache; it survives a loss of power for certain only after
`sync` of the file, and its name only after `sync_directory`. `survivors` builds the disks that may be found after such
a loss: unsynced sectors may have reached the disk in any order, and one of them in part. What is assumed of a disk is
that a write changes no bytes but its own, even where it is torn.

`fault` is called before each operation that changes something, and may raise; `read_fault` before each that reads. A
write that fails may have written its first half (`short_writes`). After a failed sync the page cache may keep what the
disk does not have, and take it for clean (`forgets_on_failed_sync`), as Linux does: later syncs succeed without it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from topk_grpc.storage.checksums import crc32c
from topk_grpc.storage.files import Bytes, Held, WritableFile

Fault = Callable[[str, Path], None]
SECTOR_BYTES = 512


class PowerLossError(BaseException):
    """The process is gone: not an Exception, so that nobody handles it."""


@dataclass
class Inode:
    path: Path  # for faults and messages
    content: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    forgotten: set[int] = field(default_factory=set)  # sectors that pass for clean, and are not on the disk
    private: bool = False

    def sync(self) -> None:
        data = bytearray(self.content)
        for sector in self.forgotten:
            part = slice(sector * SECTOR_BYTES, min((sector + 1) * SECTOR_BYTES, len(data)))
            data[part] = self.synced[part].ljust(part.stop - part.start, b"\0")
        self.synced = bytes(data)

    def on_disk(self) -> bytes:
        """What the disk has where every size has reached it."""
        return self.synced[: len(self.content)].ljust(len(self.content), b"\0")

    def unsynced(self) -> NDArray[np.intp]:
        """The sectors in which the page cache and the disk differ."""
        cached, kept = np.frombuffer(bytes(self.content), np.uint8), np.frombuffer(self.on_disk(), np.uint8)
        return np.unique(np.flatnonzero(cached != kept) // SECTOR_BYTES)


@dataclass
class Directory:
    entries: dict[str, Inode | Directory] = field(default_factory=dict)
    synced: dict[str, Inode | Directory] = field(default_factory=dict)
    history: list[dict[str, Inode | Directory]] = field(default_factory=list)  # since the last sync, oldest first

    def change(self, entries: dict[str, Inode | Directory]) -> None:
        self.history.append(self.entries)
        self.entries = entries


class SimulatedDisk:
    def __init__(self, root: Directory | None = None) -> None:
        self.root = root or Directory()
        self.fault: Fault | None = None
        self.read_fault: Fault | None = None
        self.short_writes = False
        self.forgets_on_failed_sync = False
        self.operations: list[str] = []
        self._locked: set[Path] = set()
        self._lost = False

    # --- Files ----------------------------------------------------------------------------------------------------

    def names(self, directory: Path) -> list[str]:
        self._reading("names", directory)
        return sorted(self._directory(directory).entries)

    def map(self, path: Path, *, changing: bool = False) -> memoryview:
        self._reading("map", path)
        return memoryview(bytes(self._inode(path).content))

    def create(self, path: Path, *, private: bool = False) -> WritableFile:
        self.step("create", path)
        inode = Inode(path, private=private)
        parent = self._directory(path.parent)
        parent.change({**parent.entries, path.name: inode})
        return SimulatedFile(self, inode)

    def rename(self, source: Path, target: Path) -> None:
        self.step("rename", target)
        assert source.parent == target.parent
        parent = self._directory(source.parent)
        assert not isinstance(parent.entries.get(target.name), Directory)
        entries = dict(parent.entries)
        entries[target.name] = renamed = entries.pop(source.name)
        if isinstance(renamed, Inode):
            renamed.path = target
        parent.change(entries)

    def remove(self, path: Path) -> None:
        self.step("remove", path)
        parent = self._directory(path.parent)
        entries = dict(parent.entries)
        if path.name not in entries:
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        removed = entries.pop(path.name)
        assert not (isinstance(removed, Directory) and removed.entries), f"{path} is not empty"
        parent.change(entries)

    def make_directory(self, path: Path) -> None:
        self.step("make_directory", path)
        parent = self._directory(path.parent)
        if path.name not in parent.entries:
            parent.change({**parent.entries, path.name: Directory()})

    def sync_directory(self, path: Path) -> None:
        self.step("sync_directory", path)
        directory = self._directory(path)
        directory.synced, directory.history = directory.entries, []

    def lock(self, path: Path) -> Held:
        self._alive()
        if path in self._locked:
            raise BlockingIOError
        parent = self._directory(path.parent)
        if path.name not in parent.entries:
            self.step("lock", path)  # what makes it
            parent.change({**parent.entries, path.name: Inode(path)})
        self._locked.add(path)
        return SimulatedLock(self._locked, path)

    # --- What tests do with it --------------------------------------------------------------------------------------

    def step(self, operation: str, path: Path) -> None:
        self._alive()
        if self.fault is not None:
            try:
                self.fault(operation, path)
            except PowerLossError:
                self._lost = True
                raise
        self.operations.append(f"{operation} {path}")

    def _reading(self, operation: str, path: Path) -> None:
        self._alive()
        if self.read_fault is not None:
            self.read_fault(operation, path)

    def write_durably(self, path: Path, content: bytes) -> None:
        """Puts a file there, as an operator or a cosmic ray would."""
        parent = self._directory(path.parent)
        parent.entries = {**parent.entries, path.name: Inode(path, bytearray(content), content)}
        parent.synced = parent.entries

    def remove_durably(self, path: Path) -> None:
        parent = self._directory(path.parent)
        parent.entries = {name: entry for name, entry in parent.entries.items() if name != path.name}
        parent.synced = parent.entries

    def files(self, path: Path) -> list[Path]:
        """All files below a directory."""
        found = []
        for name, entry in sorted(self._directory(path).entries.items()):
            found += [path / name] if isinstance(entry, Inode) else self.files(path / name)
        return found

    def copy(self) -> SimulatedDisk:
        """Another disk with the same files, all of them durable."""
        return self._survivor(lambda directory: directory.entries, lambda inode: bytes(inode.content))

    def end_of_process(self) -> None:
        """Its locks are given back; what was written stays in the page cache."""
        self._locked.clear()

    def survivors(self) -> Iterator[tuple[str, SimulatedDisk]]:
        """What may be found at the next start."""
        every_name = lambda directory: directory.entries  # noqa: E731
        synced_names = lambda directory: directory.synced  # noqa: E731
        every_byte = lambda inode: bytes(inode.content)  # noqa: E731
        synced_bytes = lambda inode: inode.synced  # noqa: E731
        yield "everything, as after kill -9", self._survivor(every_name, every_byte)
        yield "what was synced", self._survivor(synced_names, synced_bytes)
        yield "all names, synced bytes", self._survivor(every_name, synced_bytes)
        yield "synced names, all bytes", self._survivor(synced_names, every_byte)
        yield "half the names, the first half of what was not synced", self._survivor(_half_history, _torn(0, 0.5))
        yield "of the names only the last that changed", self._survivor(_last_change, every_byte)
        yield "all names, the second half of what was not synced", self._survivor(every_name, _torn(0.5, 1))
        yield "all names, the middle of what was not synced", self._survivor(every_name, _torn(0.1, 0.9))
        yield "all names, unsynced sectors but the first", self._survivor(every_name, _sectors(lambda some: some[1:]))
        yield "all names, every other unsynced sector", self._survivor(every_name, _sectors(lambda some: some[::2]))
        yield "all names, the last sector torn", self._survivor(every_name, _last_sector_torn)
        chance = np.random.default_rng(len(self.operations))
        some_sectors = _sectors(lambda some: some[chance.random(len(some)) < 0.5])
        yield "all names, sectors by chance", self._survivor(every_name, some_sectors)

    def digest(self) -> int:
        """Tells disks apart that hold different files."""
        checksum = 0
        for path in self.files(Path("/")):
            checksum = crc32c(str(path).encode() + b"\0%d" % len(self._inode(path).content), checksum)
            checksum = crc32c(bytes(self._inode(path).content), checksum)
        return checksum

    def _survivor(
        self,
        names: Callable[[Directory], dict[str, Inode | Directory]],
        content: Callable[[Inode], bytes],
    ) -> SimulatedDisk:
        def rebuild(entry: Inode | Directory) -> Inode | Directory:
            if isinstance(entry, Inode):
                data = content(entry)
                return Inode(entry.path, bytearray(data), data, private=entry.private)
            entries = {name: rebuild(inner) for name, inner in names(entry).items()}
            return Directory(entries, entries)

        root = rebuild(self.root)
        assert isinstance(root, Directory)
        return SimulatedDisk(root)

    def _alive(self) -> None:
        if self._lost:
            raise PowerLossError

    def _entry(self, path: Path) -> Inode | Directory:
        entry: Inode | Directory = self.root
        for name in path.parts[1:]:
            if not isinstance(entry, Directory):
                raise NotADirectoryError(errno.ENOTDIR, "not a directory", str(path))
            if name not in entry.entries:
                raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
            entry = entry.entries[name]
        return entry

    def _directory(self, path: Path) -> Directory:
        entry = self._entry(path)
        if not isinstance(entry, Directory):
            raise NotADirectoryError(errno.ENOTDIR, "not a directory", str(path))
        return entry

    def _inode(self, path: Path) -> Inode:
        entry = self._entry(path)
        assert isinstance(entry, Inode), path
        return entry


class SimulatedFile:
    def __init__(self, disk: SimulatedDisk, inode: Inode) -> None:
        self._disk, self._inode, self._open = disk, inode, True

    def reserve(self, size: int) -> None:
        self._step("reserve")
        self._inode.content.extend(bytes(size - len(self._inode.content)))

    def write(self, offset: int, pieces: Sequence[Bytes]) -> None:
        data = b"".join(pieces)
        try:
            self._step("write")
        except OSError:
            if self._disk.short_writes:
                self._write(offset, data[: len(data) // 2])
            raise
        self._write(offset, data)

    def _write(self, offset: int, data: bytes) -> None:
        content = self._inode.content
        content.extend(bytes(max(0, offset - len(content))))
        content[offset : offset + len(data)] = data
        self._inode.forgotten -= set(range(offset // SECTOR_BYTES, -(-(offset + len(data)) // SECTOR_BYTES)))

    def truncate(self, size: int) -> None:
        self._step("truncate")
        del self._inode.content[size:]

    def sync(self) -> None:
        try:
            self._step("sync")
        except OSError:
            if self._disk.forgets_on_failed_sync:
                self._inode.forgotten |= set(self._inode.unsynced().tolist())
            raise
        self._inode.sync()

    def close(self) -> None:
        self._open = False

    def _step(self, operation: str) -> None:
        assert self._open, f"{operation} of {self._inode.path}, which was closed"
        self._disk.step(operation, self._inode.path)


class SimulatedLock:
    def __init__(self, locked: set[Path], path: Path) -> None:
        self._locked, self._path = locked, path

    def close(self) -> None:
        self._locked.discard(self._path)


def _half_history(directory: Directory) -> dict[str, Inode | Directory]:
    states = [*directory.history, directory.entries]
    return states[len(states) // 2] if directory.history else directory.entries


def _last_change(directory: Directory) -> dict[str, Inode | Directory]:
    """POSIX promises no order among the names that were not synced."""
    if not directory.history:
        return directory.entries
    before, after = directory.history[-1], directory.entries
    kept = {name: entry for name, entry in directory.synced.items() if name in after or name not in before}
    return kept | {name: entry for name, entry in after.items() if before.get(name) is not entry}


def _torn(start: float, end: float) -> Callable[[Inode], bytes]:
    """Of the bytes that changed since the last sync, only a part reached the disk."""

    def content(inode: Inode) -> bytes:
        cached, kept = np.frombuffer(bytes(inode.content), np.uint8), np.frombuffer(inode.on_disk(), np.uint8)
        changed = np.flatnonzero(cached != kept)
        written = changed[int(len(changed) * start) : int(len(changed) * end)]
        torn = kept.copy()
        torn[written] = cached[written]
        return torn.tobytes()

    return content


def _sectors(choose: Callable[[NDArray[np.intp]], NDArray[np.intp]]) -> Callable[[Inode], bytes]:
    """Of the sectors that changed since the last sync, only those chosen reached the disk."""

    def content(inode: Inode) -> bytes:
        found = bytearray(inode.on_disk())
        for sector in choose(inode.unsynced()).tolist():
            part = slice(sector * SECTOR_BYTES, (sector + 1) * SECTOR_BYTES)
            found[part] = inode.content[part]
        return bytes(found)

    return content


def _last_sector_torn(inode: Inode) -> bytes:
    """All sectors reached the disk, the last one with its first half."""
    found, changed = bytearray(inode.content), inode.unsynced()
    if len(changed):
        torn = slice(int(changed[-1]) * SECTOR_BYTES + SECTOR_BYTES // 2, (int(changed[-1]) + 1) * SECTOR_BYTES)
        found[torn] = inode.on_disk()[torn]
    return bytes(found)


def crash_at(operation_index: int) -> Fault:
    """Loses power before the operation of that index, from 0."""
    left = operation_index

    def fault(_operation: str, _path: Path) -> None:
        nonlocal left
        if left == 0:
            raise PowerLossError
        left -= 1

    return fault


def fail_on(operation: str, suffix: str, code: int, times: int = 1) -> Fault:
    """Lets an operation fail, on files whose name ends so, as often as said."""
    left = times

    def fault(present: str, path: Path) -> None:
        nonlocal left
        if left > 0 and present == operation and path.name.endswith(suffix):
            left -= 1
            raise OSError(code, errno.errorcode[code], str(path))

    return fault
