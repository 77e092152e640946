"""A disk in memory that knows what is durable and what is not: `storage.files.Files` for tests of crashes.

What was written is there for whoever reads it, as in a page cache; it survives a loss of power for certain only after
`sync` of the file, and its name only after `sync_directory`. `survivors` builds the disks that may be found after such
a loss. `fault` is called before each operation that changes something, and may raise.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from topk_grpc.storage.files import Bytes, Held, WritableFile

Fault = Callable[[str, Path], None]


class PowerLossError(BaseException):
    """The process is gone: not an Exception, so that nobody handles it."""


@dataclass
class Inode:
    path: Path  # for faults and messages
    content: bytearray = field(default_factory=bytearray)
    synced: bytes = b""


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
        self.operations: list[str] = []
        self._locked: set[Path] = set()
        self._lost = False

    # --- Files ----------------------------------------------------------------------------------------------------

    def names(self, directory: Path) -> list[str]:
        self._alive()
        return sorted(self._directory(directory).entries)

    def map(self, path: Path) -> memoryview:
        self._alive()
        return memoryview(bytes(self._inode(path).content))

    def create(self, path: Path) -> WritableFile:
        self.step("create", path)
        inode = Inode(path)
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

    def _survivor(
        self,
        names: Callable[[Directory], dict[str, Inode | Directory]],
        content: Callable[[Inode], bytes],
    ) -> SimulatedDisk:
        def rebuild(entry: Inode | Directory) -> Inode | Directory:
            if isinstance(entry, Inode):
                data = content(entry)
                return Inode(entry.path, bytearray(data), data)
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
        self._step("write")
        data = b"".join(pieces)
        content = self._inode.content
        content.extend(bytes(max(0, offset - len(content))))
        content[offset : offset + len(data)] = data

    def truncate(self, size: int) -> None:
        self._step("truncate")
        del self._inode.content[size:]

    def sync(self) -> None:
        self._step("sync")
        self._inode.synced = bytes(self._inode.content)

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
        before = inode.synced.ljust(len(inode.content), b"\0")[: len(inode.content)]
        changed = [at for at, byte in enumerate(inode.content) if byte != before[at]]
        torn = bytearray(before)
        for at in changed[int(len(changed) * start) : int(len(changed) * end)]:
            torn[at] = inode.content[at]
        return bytes(torn)

    return content


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
