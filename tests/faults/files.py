"""A real file system that fails on demand: the file port of a shard under test.

Everything is done to real files. A control file, written by the test while the shard runs, says which operations fail
and how; each fault that has struck is noted beside it, so that the test knows what happened. The control file is looked
at before each operation, which costs one `stat`.

What has not been synced is remembered, so that a loss of power can be played: each 512-byte sector of an unsynced write
is there or is not (torn and reordered writes), a file that was never synced may be cut anywhere, and of the changes to
a directory's names since its last sync only the first few have happened. Then the process kills itself. A failed sync
loses unsynced sectors in the same way, and lets the process live: what an application reads after that may be gone
(Rebello et al., "Can Applications Recover from fsync Failures?", USENIX ATC 2020).
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from topk_grpc.storage.files import Bytes, Held, OsFiles, WritableFile

CONTROL: Final = "TOPK_TEST_FAULTS"
"""The environment variable that names the control file."""

SECTOR: Final = 512


@dataclass
class FileFault:
    """One thing that goes wrong.

    Attributes:
        number: told apart from others by it.
        operation: of `Files`, or of a file: create, reserve, write, sync, map, rename, remove, sync_directory.
        under: strikes where the path has this part in it; empty: everywhere.
        action: `error`, `slow`, `short` (half of a write, then an error) or `power` (as if power were lost).
        code: the errno of an error.
        skip: how many operations of the kind pass before.
        times: how many it strikes.
        seconds: how long a slow one takes.
    """

    number: int
    operation: str
    under: str
    action: str
    code: int = errno.EIO
    skip: int = 0
    times: int = 1
    seconds: float = 0.0


def write_control(path: Path, faults: Sequence[FileFault], seed: int) -> None:
    """Tells a shard what is to fail from now on, in place of what was said before."""
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps({"seed": seed, "faults": [asdict(fault) for fault in faults]}))
    temporary.rename(path)


def struck(path: Path) -> set[int]:
    """The numbers of the faults that have struck so far."""
    with suppress(FileNotFoundError):
        return {int(line) for line in path.with_suffix(".struck").read_text().split()}
    return set()


@dataclass
class _Unsynced:
    """What a file has that its disk may not have."""

    descriptor: int
    synced_once: bool = False
    writes: list[tuple[int, bytes, int]] = field(default_factory=list)  # offset, what was there, how much was written


class FaultyFiles(OsFiles):
    """`OsFiles`, with faults.

    Args:
        control: the control file; it need not exist.
        attic: a directory on the same file system, for files that a loss of power brings back.
    """

    def __init__(self, control: Path, attic: Path) -> None:
        self._control, self._attic = control, attic
        self._version: tuple[int, int] | None = None
        self._faults: list[FileFault] = []
        self._chance = random.Random(0)
        self._lock = threading.RLock()
        self._unsynced: dict[int, _Unsynced] = {}
        self._undo: dict[Path, list[tuple[Callable[[], None], Path | None]]] = {}
        self._numbers = 0
        shutil.rmtree(attic, ignore_errors=True)
        attic.mkdir(parents=True)

    @classmethod
    def from_environment(cls, data_dir: str) -> FaultyFiles:
        return cls(Path(os.environ[CONTROL]), Path(data_dir + ".attic"))

    # --- Faults -------------------------------------------------------------------------------------------------------

    def strike(self, operation: str, path: Path) -> FileFault | None:
        """Lets a fault happen, if one is due; returns it where the caller has to do its part."""
        with self._lock:
            fault = self._due(operation, path)
            if fault is None:
                return None
            with self._control.with_suffix(".struck").open("a") as noted:
                noted.write(f"{fault.number}\n")
            if fault.action == "power":
                self.lose_power()
        if fault.action == "slow":
            time.sleep(fault.seconds)
            return None
        if fault.action == "error":
            if operation == "sync":
                return fault
            raise OSError(fault.code, os.strerror(fault.code), str(path))
        return fault

    def _due(self, operation: str, path: Path) -> FileFault | None:
        self._read_control()
        for fault in self._faults:
            if fault.operation == operation and fault.under in str(path):
                if fault.skip:
                    fault.skip -= 1
                elif fault.times:
                    fault.times -= 1
                    return fault
        return None

    def _read_control(self) -> None:
        try:
            status = self._control.stat()
        except FileNotFoundError:
            return
        if (version := (status.st_ino, status.st_mtime_ns)) != self._version:
            self._version = version
            said = json.loads(self._control.read_text())
            before = struck(self._control)
            self._faults = [FileFault(**one) for one in said["faults"] if one["number"] not in before]
            self._chance = random.Random(said["seed"])

    def lose_power(self) -> None:
        """Ends the process, and leaves of what was not synced what a disk may have got. Never returns."""
        with self._lock:
            for unsynced in self._unsynced.values():
                self.lose_unsynced(unsynced)
            for changes in self._undo.values():
                for undo, _ in reversed(changes[self._chance.randrange(len(changes) + 1) :]):
                    with suppress(OSError):
                        undo()
            os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()

    def lose_unsynced(self, unsynced: _Unsynced) -> None:
        """Puts back what was there before, sector by sector, where chance says so."""
        for offset, before, size in reversed(unsynced.writes):
            for start in range(offset - offset % SECTOR, offset + size, SECTOR):
                if self._chance.random() < 0.5:
                    low, high = max(start, offset), min(start + SECTOR, offset + size)
                    os.pwrite(unsynced.descriptor, before[low - offset : high - offset].ljust(high - low, b"\0"), low)
        unsynced.writes.clear()
        if not unsynced.synced_once:
            os.ftruncate(unsynced.descriptor, self._chance.randrange(os.fstat(unsynced.descriptor).st_size + 1))

    # --- Files --------------------------------------------------------------------------------------------------------

    def map(self, path: Path, *, changing: bool = False) -> memoryview:
        self.strike("map", path)
        return super().map(path, changing=changing)

    def create(self, path: Path, *, private: bool = False) -> WritableFile:
        self.strike("create", path)
        with self._lock:
            inner = super().create(path, private=private)
            unsynced = _Unsynced(os.open(path, os.O_RDWR | os.O_CLOEXEC))
            self._unsynced[unsynced.descriptor] = unsynced
            self._note(path.parent, path.unlink)
        return _FaultyFile(self, path, inner, unsynced)

    def rename(self, source: Path, target: Path) -> None:
        self.strike("rename", target)
        with self._lock:
            kept = self._keep(target)
            super().rename(source, target)

            def undo() -> None:
                target.rename(source)
                if kept is not None:
                    os.link(kept, target)

            self._note(target.parent, undo, kept)

    def remove(self, path: Path) -> None:
        self.strike("remove", path)
        with self._lock:
            kept = self._keep(path)
            super().remove(path)
            self._note(path.parent, path.mkdir if kept is None else lambda: os.link(kept, path), kept)

    def make_directory(self, path: Path) -> None:
        with self._lock:
            new = not path.exists()
            super().make_directory(path)
            if new:
                self._note(path.parent, lambda: shutil.rmtree(path))

    def sync_directory(self, path: Path) -> None:
        if self.strike("sync_directory", path) is not None:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        super().sync_directory(path)
        with self._lock:
            for _, kept in self._undo.pop(path, ()):
                if kept is not None:
                    kept.unlink(missing_ok=True)

    def _keep(self, path: Path) -> Path | None:
        """A second name for a file that is about to lose its first."""
        if not path.is_file():
            return None
        self._numbers += 1
        kept = self._attic / str(self._numbers)
        os.link(path, kept)
        return kept

    def _note(self, directory: Path, undo: Callable[[], None], kept: Path | None = None) -> None:
        self._undo.setdefault(directory, []).append((undo, kept))

    def synced(self, unsynced: _Unsynced, upto: int) -> None:
        """The first so many writes of a file are durable."""
        with self._lock:
            del unsynced.writes[:upto]
            unsynced.synced_once = True

    def closed(self, unsynced: _Unsynced) -> None:
        """Nothing more is written to a file. What was not synced stays at stake, and with it a descriptor."""
        with self._lock:
            if unsynced.synced_once and not unsynced.writes and unsynced.descriptor in self._unsynced:
                del self._unsynced[unsynced.descriptor]
                os.close(unsynced.descriptor)


class _FaultyFile(Held):
    def __init__(self, files: FaultyFiles, path: Path, inner: WritableFile, unsynced: _Unsynced) -> None:
        self._files, self._path, self._inner, self._unsynced = files, path, inner, unsynced

    def reserve(self, size: int) -> None:
        self._files.strike("reserve", self._path)
        self._inner.reserve(size)

    def write(self, offset: int, pieces: Sequence[Bytes]) -> None:
        fault = self._files.strike("write", self._path)
        data = b"".join(pieces)
        if fault is not None:
            data = data[: len(data) // 2]
        with self._files._lock:
            before = os.pread(self._unsynced.descriptor, len(data), offset)
            self._unsynced.writes.append((offset, before, len(data)))
            self._inner.write(offset, [data])
        if fault is not None:
            raise OSError(fault.code, os.strerror(fault.code), str(self._path))

    def truncate(self, size: int) -> None:
        self._inner.truncate(size)

    def sync(self) -> None:
        fault = self._files.strike("sync", self._path)
        if fault is not None:
            with self._files._lock:
                self._files.lose_unsynced(self._unsynced)
            raise OSError(fault.code, os.strerror(fault.code), str(self._path))
        upto = len(self._unsynced.writes)
        self._inner.sync()
        self._files.synced(self._unsynced, upto)

    def close(self) -> None:
        self._inner.close()
        self._files.closed(self._unsynced)
