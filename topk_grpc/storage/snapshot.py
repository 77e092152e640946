"""Snapshots: the state at one position of the log, so that recovery need not read the log from its beginning.

Theory of operation. A snapshot is a directory, snapshots/<number>, with the mutable state as arrays (arrays.npz) and a
manifest; and blocks, immutable columns in files of their own, which the next snapshots name again as they are. It is
written beside the old one under a temporary name and gets its own when every byte is durable: so one that has its name
is whole, or was damaged later, which the checksums in the manifest tell. The last two are kept with the log behind the
older one, so that damage to the newest costs time but no plays.

Nothing here stops the log: the caller copies its mutable state and hands it over, `write` does the rest in a background
thread. A snapshot that fails leaves the last ones, and the log, as they are. One `write` at a time.

Block ids are never used again, not even after the block was dropped.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from topk_grpc.errors import DiskFullError, StorageError
from topk_grpc.storage.array_files import (
    Array,
    DamagedFileError,
    Seal,
    read_arrays,
    read_column,
    read_sealed,
    write_arrays,
    write_bytes,
    write_column,
)
from topk_grpc.storage.directory import DataDirectory
from topk_grpc.storage.files import is_no_space, is_unreadable
from topk_grpc.storage.manifest import (
    ARRAYS_NAME,
    COLUMN,
    NAME,
    Manifest,
    block_name,
    decode_manifest,
    encode_manifest,
)
from topk_grpc.storage.segments import TEMPORARY

_KEPT: Final = 2
_ARRAY: Final = re.compile(r"(?!(?:file|allow_pickle)$)[A-Za-z0-9_.-]+")


@dataclass(frozen=True, eq=False)
class Block:
    """Immutable columns, written once and memory-mapped from then on.

    Attributes:
        block_id: from 0; never used again for others.
        columns: by name (lower-case letters, digits, underscores); of any dtype without Python objects.
    """

    block_id: int
    columns: Mapping[str, Array]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The state at one position of the log.

    Attributes:
        position: all records before it are in the state, none from it on.
        meta: what JSON can hold.
        arrays: by name; written, and read into memory, as a whole.
        blocks: in any order; those already on disk are named again, not written.
    """

    position: int
    meta: Mapping[str, Any]
    arrays: Mapping[str, Array]
    blocks: tuple[Block, ...] = ()


class SnapshotStore:
    """The snapshots and blocks of a data directory. `Recovery.snapshots` is the one to use after a start."""

    def __init__(self, directory: DataDirectory) -> None:
        """Nothing is read yet: call `load` before anything else."""
        self._files = directory.files
        self._path = directory.snapshots_path
        self._blocks_path = directory.blocks_path
        self._kept: list[Manifest] = []
        self._mapped: dict[int, Block] = {}
        self._last_number = 0

    # --- Reading --------------------------------------------------------------------------------------------------

    def load(self, notes: list[str]) -> Snapshot | None:
        """Reads the newest snapshot that is whole, every byte of it checked. Changes nothing on disk.

        Args:
            notes: gets a sentence for each snapshot that is damaged.

        Returns:
            None if there is none that is whole: then the log has to reach back to its beginning.

        Raises:
            VersionError: a newer release wrote one.
        """
        numbers = self._numbers()
        self._last_number = max(numbers, default=0)
        loaded: Snapshot | None = None
        for number in reversed(numbers):
            try:
                manifest = self._read_manifest(number)
                if loaded is None:
                    loaded = self._read_snapshot(manifest)
            except DamagedFileError as error:
                notes.append(f"snapshot {number:06} is damaged: {error}; using the one before, and more of the log")
                continue
            self._kept.insert(0, manifest)
            if len(self._kept) == _KEPT:
                break
        return loaded

    def read(self, number: int) -> Snapshot:
        """Reads one snapshot, every byte of it checked; for whoever only looks.

        Raises:
            DamagedFileError: it is not whole, or was deleted meanwhile.
            VersionError: a newer release wrote it.
        """
        return self._read_snapshot(self._read_manifest(number))

    def manifest(self, number: int) -> Manifest:
        """Of one snapshot; for whoever only looks.

        Raises:
            DamagedFileError: it is not whole, or was deleted meanwhile.
            VersionError: a newer release wrote it.
        """
        return self._read_manifest(number)

    def numbers(self) -> list[int]:
        """The numbers of all snapshots, whole or not, ascending."""
        return self._numbers()

    def kept_position(self) -> int:
        """The log before it is needed by none of the snapshots kept; 0 while there are fewer than two."""
        return self._kept[0].position if len(self._kept) == _KEPT else 0

    def _numbers(self) -> list[int]:
        return sorted(int(name) for name in self._files.names(self._path) if name.isdigit())

    def _directory(self, number: int) -> Path:
        return self._path / f"{number:06}"

    def _read_manifest(self, number: int) -> Manifest:
        path = self._directory(number) / NAME
        try:
            data = self._files.map(path)
        except (FileNotFoundError, NotADirectoryError):
            raise DamagedFileError(path, "is missing") from None
        except OSError as error:
            if not is_unreadable(error):
                raise
            raise DamagedFileError(path, f"cannot be read ({error.strerror})") from error
        manifest = decode_manifest(bytes(data), path)
        if manifest.number != number:
            raise DamagedFileError(path, f"is that of snapshot {manifest.number}")
        return manifest

    def _read_snapshot(self, manifest: Manifest) -> Snapshot:
        path = self._directory(manifest.number) / ARRAYS_NAME
        arrays = read_arrays(read_sealed(self._files, path, manifest.arrays), path)
        blocks = [self._read_block(block_id, columns) for block_id, columns in manifest.blocks.items()]
        self._mapped = {block.block_id: block for block in blocks}
        return Snapshot(manifest.position, manifest.meta, arrays, tuple(blocks))

    def _read_block(self, block_id: int, columns: Mapping[str, Seal]) -> Block:
        paths = {column: self._blocks_path / block_name(block_id, column) for column in columns}
        return Block(
            block_id,
            {
                name: read_column(read_sealed(self._files, paths[name], seal), paths[name])
                for name, seal in columns.items()
            },
        )

    # --- Writing --------------------------------------------------------------------------------------------------

    def write(self, snapshot: Snapshot) -> tuple[Block, ...]:
        """Writes a snapshot beside the others, and drops all but the last two. Returns when it is durable.

        Args:
            snapshot: its arrays must not change meanwhile.

        Returns:
            Its blocks in the same order, all memory-mapped.

        Raises:
            DiskFullError: there is no room for it; what was there before is as it was.
            StorageError: it could not be written; what was there before is as it was. Trying again may help.
        """
        _check(snapshot)
        number = self._last_number + 1
        try:
            self._remove_leftovers()
            manifest, mapped = self._write(snapshot, number)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._prune()  # a full disk needs its room back
            kind, cause = DiskFullError if is_no_space(error) else StorageError, error.strerror or error
            raise kind(
                f"{self._directory(number)}: the snapshot could not be written ({cause}). The last ones and the log are"
                " untouched: no play is lost, but the log grows until a snapshot succeeds"
            ) from error
        finally:
            # Never a number twice: after a failure the disk may, or may not, know this one.
            self._last_number = number
        self._kept = [*self._kept, manifest][-_KEPT:]
        self._mapped = {block_id: mapped[block_id] for block_id in manifest.blocks}
        try:
            self._prune()
        except OSError as error:
            raise StorageError(
                f"{self._path}: the snapshot is durable, but old ones could not be deleted: {error}"
            ) from error
        return tuple(mapped[block.block_id] for block in snapshot.blocks)

    def _write(self, snapshot: Snapshot, number: int) -> tuple[Manifest, dict[int, Block]]:
        """The steps of docs/formats/snapshot.md."""
        seals = {block_id: columns for manifest in self._kept for block_id, columns in manifest.blocks.items()}
        mapped = dict(self._mapped)
        for block in snapshot.blocks:  # step 1
            if block.block_id not in mapped:
                if block.block_id in seals:
                    raise ValueError(f"block {block.block_id} was dropped: its id cannot be used again")
                seals[block.block_id], mapped[block.block_id] = self._write_block(block)
        self._files.sync_directory(self._blocks_path)  # step 2

        temporary = self._directory(number).with_suffix(TEMPORARY)
        self._files.make_directory(temporary)
        manifest = Manifest(
            number=number,
            position=snapshot.position,
            meta=snapshot.meta,
            arrays=write_arrays(self._files, temporary / ARRAYS_NAME, snapshot.arrays),  # step 3
            blocks={block.block_id: seals[block.block_id] for block in snapshot.blocks},
        )
        write_bytes(self._files, temporary / NAME, encode_manifest(manifest))  # step 4
        self._files.sync_directory(temporary)
        self._files.rename(temporary, self._directory(number))  # step 5
        self._files.sync_directory(self._path)
        return manifest, mapped

    def _write_block(self, block: Block) -> tuple[dict[str, Seal], Block]:
        seals, columns = {}, {}
        for name, array in block.columns.items():
            path = self._blocks_path / block_name(block.block_id, name)
            seals[name] = write_column(self._files, path, array)
            columns[name] = read_column(self._files.map(path), path)
        return seals, Block(block.block_id, columns)

    def _prune(self) -> None:
        """Drops the snapshots that are not kept, then the blocks that no kept one names."""
        kept = {manifest.number for manifest in self._kept}
        for number in self._numbers():
            if number not in kept:
                # First the name: half a snapshot must not look like a damaged one.
                self._files.rename(self._directory(number), self._directory(number).with_suffix(TEMPORARY))  # step 6
        self._files.sync_directory(self._path)
        self._remove_leftovers()
        named = {name for manifest in self._kept for name in manifest.block_names()}
        for name in self._files.names(self._blocks_path):
            if name not in named:
                self._files.remove(self._blocks_path / name)  # step 7

    def _remove_leftovers(self) -> None:
        for name in self._files.names(self._path):
            if name.endswith(TEMPORARY):
                for inner in self._files.names(self._path / name):
                    self._files.remove(self._path / name / inner)
                self._files.remove(self._path / name)


def _check(snapshot: Snapshot) -> None:
    """Refuses what could not be read again."""
    arrays = [(name, _ARRAY, array) for name, array in snapshot.arrays.items()]
    arrays += [(name, COLUMN, array) for block in snapshot.blocks for name, array in block.columns.items()]
    for name, pattern, array in arrays:
        if not pattern.fullmatch(name) or array.dtype.hasobject:
            raise ValueError(f"array {name!r} of {array.dtype}: not a name, or a dtype, that a snapshot can hold")
    ids = [block.block_id for block in snapshot.blocks]
    if len(set(ids)) != len(ids) or min(ids, default=0) < 0:
        raise ValueError(f"block ids must be distinct and not negative: {ids}")
