"""The directory of an embedded cluster: who has it, and what is in it.

    DATA_DIR/up.lock          locked (flock) while a supervisor runs
    DATA_DIR/topology.json…   the file topology, and what the processes tell each other beside it
    DATA_DIR/shard-0 …        one data directory a shard
    DATA_DIR/removed.shards/  data directories of shards that were removed from the cluster; never read again

The topology decides who is in the cluster. A directory of a shard that it does not have is set aside, not deleted: it
should hold nothing, but that is for whoever owns the disk to say.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Final

from topk_grpc.cli.shard_directories import FORMAT, TOPOLOGY
from topk_grpc.errors import DirectoryInUseError, ForeignDirectoryError, SettingError, StorageError
from topk_grpc.migration.members import free_names, new_topology, with_new_shards
from topk_grpc.model import ClusterSettings, Topology
from topk_grpc.storage.directory import RESTORING
from topk_grpc.topology import open_store
from topk_grpc.topology.change import change

SHARDS_DEFAULT: Final = 2
"""Shards of a new cluster, if nobody says how many."""

REMOVED: Final = "removed.shards"
"""No shard can have that name."""

_OWN_FILES: Final = frozenset({"up.lock", "lost+found"})


class ClusterDirectory:
    """The data directory of one `topk up`.

    Args:
        path: made by `take_hold` if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._lock: int | None = None

    @property
    def topology_url(self) -> str:
        """Of the topology store."""
        return f"file:{self.path / TOPOLOGY}"

    def of_shard(self, shard_id: str) -> Path:
        """Where a shard keeps its plays."""
        return self.path / shard_id

    # --- Who has it ---------------------------------------------------------------------------------------------------

    def take_hold(self) -> None:
        """Makes it if need be, and keeps others out.

        Raises:
            DirectoryInUseError: another `topk up` runs on it.
            ForeignDirectoryError: it is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ForeignDirectoryError(
                f"--data-dir {self.path} is a file: name a directory, or a path that does not exist"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path / "up.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise DirectoryInUseError(
                f"--data-dir {self.path} is in use by another process{f' ({holder})' if holder else ''}: "
                "a cluster runs on it already. Stop that one, or name another directory"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()}\n".encode(), 0)
        self._lock = descriptor

    def let_go(self) -> None:
        """Lets others have it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # --- The topology -------------------------------------------------------------------------------------------------

    async def open_topology(self, shards: int | None, partitioner: str | None, slots: int | None) -> Topology:
        """The topology that the directory has, with more shards if more are asked for; a new one where it has nothing.

        Args:
            shards: how many are asked for; None: as many as there are.
            partitioner, slots: of a new cluster; None: the defaults.

        Raises:
            SettingError: it has more shards, or was made with another partitioner or number of slots.
            ForeignDirectoryError: the directory holds something else.
            StorageError: it cannot be used.
        """
        store = open_store(self.topology_url)
        try:
            if not (self.path / TOPOLOGY).exists():
                self._check_empty()
                defaults = ClusterSettings()
                settings = ClusterSettings(slots or defaults.slots, partitioner or defaults.partitioner)
                names = [f"shard-{number}" for number in range(shards or SHARDS_DEFAULT)]
                await store.compare_and_set(new_topology(names, settings))
                return await store.read()

            def decide(topology: Topology) -> Topology | None:
                self._check(topology, partitioner, slots)
                grown = self._grown(topology, shards)
                if grown is topology and topology.secret:
                    return None
                # One made by a release that had no secret gets it now.
                secret = topology.secret or secrets.token_hex(32)
                return replace(grown, epoch=topology.epoch + 1, secret=secret)

            return await change(store, decide, "the topology")
        finally:
            await store.close()

    def _check_empty(self) -> None:
        if (self.path / RESTORING).exists():
            raise StorageError(
                f"--data-dir {self.path}: a backup was being restored here, and that was interrupted: run"
                " `topk restore` again, it begins anew"
            )
        names = sorted(each.name for each in self.path.iterdir())
        foreign = [name for name in names if name not in _OWN_FILES and not name.startswith(f"{TOPOLOGY}.")]
        if foreign:
            raise ForeignDirectoryError(
                f"--data-dir {self.path} has no {TOPOLOGY}, but holds {', '.join(foreign[:3])}"
                f"{' …' if len(foreign) > 3 else ''}: name an empty directory or one of `topk up`, "
                f"or put {TOPOLOGY} back"
            )

    def _check(self, topology: Topology, partitioner: str | None, slots: int | None) -> None:
        settings = topology.settings
        for name, asked, has in (
            ("--partitioner", partitioner, settings.partitioner),
            ("--slots", slots, settings.slots),
        ):
            if asked is not None and asked != has:
                raise SettingError(
                    f"{name} is {asked}, but the cluster in {self.path} was made with {has}, which is for good: leave"
                    f" {name} out, or load a new data directory"
                )

    def _grown(self, topology: Topology, shards: int | None) -> Topology:
        present = len(topology.shards)
        if shards is None or shards == present:
            return topology
        if shards < present:
            last = topology.shards[-1].shard_id
            raise SettingError(
                f"--shards is {shards}, but the cluster in {self.path} has {present}: leave --shards out. To have"
                f" fewer, empty some while it runs, as in `topk cluster drain {last}` and `topk cluster remove {last}`"
            )
        return with_new_shards(topology, free_names(topology, shards - present))

    # --- Shards that were removed -------------------------------------------------------------------------------------

    def set_aside(self, shard_ids: Collection[str]) -> list[Path]:
        """Moves the data directories of all shards but these out of the way.

        Returns:
            Where they are now.

        Raises:
            StorageError: one cannot be moved.
        """
        try:
            found = [each for each in sorted(self.path.iterdir()) if (each / FORMAT).is_file()]
            return [self._move_aside(each) for each in found if each.name not in shard_ids]
        except OSError as error:
            raise StorageError(f"{self.path}: a removed shard's directory cannot be moved: {error}") from error

    def _move_aside(self, directory: Path) -> Path:
        target = self.path / REMOVED
        target.mkdir(exist_ok=True)
        number = 1
        while (place := target / f"{directory.name}.{number}").exists():
            number += 1
        return directory.rename(place)
