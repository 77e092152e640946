"""A place for backups: files that are written once, and a manifest for each backup that names those it consists of.

    TARGET/BACKUP               marks the directory as ours: {"crc32c": …, "format": 1}
    TARGET/LOCK                 locked while a backup is being made
    TARGET/objects/NAME         copies of files. NAME is where it comes from, its size and its CRC-32C: so a file that
                                has not changed since the last backup is there already, and is not copied again
    TARGET/backups/000001.json  a manifest, self-checked, with size and CRC-32C of every object it names

An object is written under a temporary name, synced and renamed; a manifest as well, after all objects that it names are
durable. So a backup is whole from the moment it has a manifest; a crash before that leaves objects that the next one
uses, or removes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from topk_grpc.errors import CorruptError, DirectoryInUseError, StorageError, VersionError
from topk_grpc.storage.array_files import DamagedFileError, Seal, read_sealed, seal_of, write_bytes
from topk_grpc.storage.checksums import decode_self_checked, encode_self_checked
from topk_grpc.storage.directory import make_directories
from topk_grpc.storage.files import Bytes, Files, OsFiles
from topk_grpc.storage.segments import TEMPORARY

VERSION: Final = 1
_FORMAT: Final = "BACKUP"
_FOLDERS: Final = ("backups", "objects")
_IGNORED: Final = frozenset({"LOCK", _FORMAT + TEMPORARY, "lost+found", *_FOLDERS})


@dataclass(frozen=True, slots=True)
class Stored:
    """An object: its name in the archive, and what all its bytes come to."""

    name: str
    seal: Seal

    def to_json(self) -> dict[str, Any]:
        """For a manifest."""
        return {"object": self.name, "bytes": self.seal.size, "crc32c": f"{self.seal.checksum:08x}"}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Stored:
        """From a manifest."""
        return cls(content["object"], Seal(content["bytes"], int(content["crc32c"], 16)))


class Archive:
    """A place for backups. `open` makes or finds it.

    Attributes:
        path: where it is.
        files: the file system.
        copied_bytes: what has been written to objects, by this process.
    """

    def __init__(self, path: Path, files: Files) -> None:
        """Use `open`."""
        self.path = path
        self.files = files
        self.copied_bytes = 0
        self._present = set(files.names(path / "objects"))

    @classmethod
    def open(cls, path: Path, files: Files | None = None, *, make: bool) -> Archive:
        """Finds an archive.

        Args:
            path: of it.
            files: the file system, the real one by default.
            make: make one where there is nothing.

        Raises:
            StorageError: there is none, or something else.
            VersionError, CorruptError: as it says.
        """
        files = files or OsFiles()
        try:
            names = files.names(path)
        except (FileNotFoundError, NotADirectoryError):
            names = []
        if _FORMAT not in names:
            if not make or not _IGNORED.issuperset(names):
                raise StorageError(
                    f"{path} holds no backups (it has no file {_FORMAT})"
                    + (": name another directory, or an empty one" if make else "")
                )
            make_directories(files, path)
            for folder in _FOLDERS:
                files.make_directory(path / folder)
            _put(files, path / _FORMAT, encode_self_checked({"format": VERSION}))
            files.sync_directory(path.parent)
        content = decode_self_checked(bytes(files.map(path / _FORMAT)))
        if content is None:
            raise CorruptError(f"{path / _FORMAT} is damaged: is this a place for backups?", str(path / _FORMAT))
        if content["format"] > VERSION:
            raise VersionError(
                f"{path} has backup format {content['format']}, while this release reads up to {VERSION}: use the"
                " release that wrote it, or a newer one"
            )
        return cls(path, files)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Held against other processes that make backups here.

        Raises:
            DirectoryInUseError: one is at it.
        """
        try:
            lock = self.files.lock(self.path / "LOCK")
        except BlockingIOError:
            raise DirectoryInUseError(f"{self.path}: another process makes a backup here: wait for it") from None
        try:
            yield
        finally:
            lock.close()

    # --- Objects ------------------------------------------------------------------------------------------------------

    def has(self, origin: str, seal: Seal) -> Stored | None:
        """The object of that origin with those bytes, if it is there."""
        stored = Stored(_name(origin, seal), seal)
        return stored if stored.name in self._present else None

    def put(self, origin: str, data: Bytes, *, private: bool = False) -> Stored:
        """Copies bytes, unless they are there; durable but for the name, which `commit` sees to.

        Args:
            origin: where they come from, as in shard-0/log/00000000000000000000.log.
            data: all of them.
            private: nobody else may read them.
        """
        stored = Stored(_name(origin, seal_of(data)), seal_of(data))
        if stored.name not in self._present:
            path = self.path / "objects" / stored.name
            write_bytes(self.files, path.with_name(path.name + TEMPORARY), data, private=private)
            self.files.rename(path.with_name(path.name + TEMPORARY), path)
            self._present.add(stored.name)
            self.copied_bytes += stored.seal.size
        return stored

    def get(self, stored: Stored) -> memoryview:
        """An object, every byte of it checked.

        Raises:
            CorruptError: it is not as it was written.
        """
        path = self.path / "objects" / stored.name
        try:
            return read_sealed(self.files, path, stored.seal)
        except DamagedFileError as error:
            raise CorruptError(
                f"the backup is damaged: {error}. Nothing was changed. Use another backup (--backup), or another copy"
                " of this one",
                str(path),
            ) from error

    # --- Backups ------------------------------------------------------------------------------------------------------

    def numbers(self) -> list[int]:
        """Of all backups, ascending."""
        names = (Path(name) for name in self.files.names(self.path / "backups"))
        return sorted(int(name.stem) for name in names if name.suffix == ".json" and name.stem.isdigit())

    def read(self, number: int) -> dict[str, Any]:
        """What a backup's manifest says.

        Raises:
            StorageError: there is none of that number.
            CorruptError: it is damaged.
        """
        path = self._manifest(number)
        try:
            content = decode_self_checked(bytes(self.files.map(path)))
        except FileNotFoundError:
            known = ", ".join(map(str, self.numbers())) or "none"
            raise StorageError(f"{self.path} has no backup {number}; there are: {known}") from None
        if content is None:
            raise CorruptError(f"{path} is damaged: use another backup (--backup)", str(path))
        return content

    def commit(self, content: Mapping[str, Any]) -> int:
        """Makes a backup of objects that were put; returns its number when all is durable."""
        self.files.sync_directory(self.path / "objects")
        number = max(self.numbers(), default=0) + 1
        _put(self.files, self._manifest(number), encode_self_checked({"number": number, **content}))
        return number

    def prune(self, keep: int) -> int:
        """Removes all but the last backups, and the objects that none of those names; returns how many objects."""
        numbers = self.numbers()
        for number in numbers[:-keep]:
            self.files.remove(self._manifest(number))
        self.files.sync_directory(self.path / "backups")
        named = {name for number in numbers[-keep:] for name in _objects(self.read(number))}
        unused = [name for name in self.files.names(self.path / "objects") if name not in named]
        for name in unused:
            self.files.remove(self.path / "objects" / name)
        self._present &= named
        return len(unused)

    def _manifest(self, number: int) -> Path:
        return self.path / "backups" / f"{number:06}.json"


def _name(origin: str, seal: Seal) -> str:
    return f"{origin.replace('/', '~')}~{seal.size}-{seal.checksum:08x}"


def _objects(content: Any) -> Iterator[str]:
    """The names of all objects in a manifest, wherever they stand."""
    if isinstance(content, dict):
        if "object" in content:
            yield content["object"]
        for value in content.values():
            yield from _objects(value)
    elif isinstance(content, list):
        for value in content:
            yield from _objects(value)


def _put(files: Files, path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + TEMPORARY)
    write_bytes(files, temporary, data)
    files.rename(temporary, path)
    files.sync_directory(path.parent)
