"""A whole cluster on this machine: what `topk up` runs, and `topk demo` inside its own process.

    DATA_DIR/up.lock         locked (flock) while a supervisor runs
    DATA_DIR/topology.json   the file topology
    DATA_DIR/shard-0 …       one data directory a shard

Only the gateway's port is known beforehand. Shards take free ones at each start and register them in the topology,
which the gateway watches.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
import socket
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from topk_grpc.cli.children import Child, OnLine
from topk_grpc.config import GatewaySettings
from topk_grpc.errors import (
    AddressInUseError,
    DirectoryInUseError,
    ForeignDirectoryError,
    InvalidArgumentError,
    SettingError,
    StorageError,
)
from topk_grpc.model import ClusterSettings, ShardInfo, Topology
from topk_grpc.ring.plan import plan_owners
from topk_grpc.storage.directory import RESTORING
from topk_grpc.topology import open_store

SHARDS_DEFAULT: Final = 2
"""Shards of a new cluster, if nobody says how many."""

_EPOCH_FIRST: Final = 1
_OWN_FILES: Final = frozenset({"up.lock", "topology.json.lock", "topology.json.new", "lost+found"})


class EmbeddedCluster:
    """Shard processes and a gateway process, kept running until `stop`."""

    def __init__(
        self,
        data_dir: Path,
        *,
        shards: int | None = None,
        partitioner: str | None = None,
        slots: int | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        metrics_port: int = 0,
        environment: Mapping[str, str] | None = None,
        on_line: OnLine = lambda _name, _line: None,
    ) -> None:
        """Nothing runs before `start`.

        Args:
            data_dir: made if it does not exist.
            shards: how many; None: as many as the data directory has, `SHARDS_DEFAULT` in a new one.
            partitioner, slots: what is fixed in a new cluster (model.ClusterSettings); None: as the data directory has,
                the defaults in a new one.
            host: the gateway's address.
            port: the gateway's port, 0 for a free one.
            metrics_port: where the gateway serves metrics; the shards in their order on the ports after it. 0: nowhere.
            environment: settings of the servers, by variable.
            on_line: is told what the processes write on stderr, and when they end.
        """
        self._data_dir = data_dir.absolute()
        self._shards_asked = shards
        self._partitioner_asked = partitioner
        self._slots_asked = slots
        self._host = host
        self._port = port
        self._metrics_port = metrics_port
        self._environment = os.environ | dict(environment or {})
        self._on_line = on_line
        self._lock: int | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.shards: dict[str, Child] = {}
        self.gateway: Child | None = None

    @property
    def address(self) -> str:
        """HOST:PORT of the gateway."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{host}:{self._port}"

    async def start(self) -> None:
        """Takes hold of the data directory and starts the processes; does not wait for them.

        Raises:
            DirectoryInUseError: another `topk up` runs on it.
            ForeignDirectoryError: it holds something else.
            SettingError: it has another number of shards, another partitioner or number of slots.
            AddressInUseError: the gateway's port is taken.
        """
        self._take_hold()
        try:
            self._port = _free_port(self._host, self._port)
            topology = await self._topology()
            for info in topology.shards:
                self.shards[info.shard_id] = Child(
                    info.shard_id, self._shard_command(info.shard_id), self._shard_environment(), self._on_line
                )
            self.gateway = Child("gateway", self._gateway_command(), self._environment, self._on_line)
            self._tasks = {child.start() for child in [*self.shards.values(), self.gateway]}
        except BaseException:
            self._let_go()
            raise

    async def wait_ready(self) -> None:
        """Returns when the gateway and every shard have said that they answer; recovery may take its time.

        Raises:
            ProcessFailedError: a process does not start; the others still have to be stopped.
        """
        waiting = asyncio.ensure_future(self._all_ready())
        try:
            await asyncio.wait({waiting, *self._tasks}, return_when=asyncio.FIRST_COMPLETED)
            self._raise_failure()
            await waiting
        finally:
            waiting.cancel()
        for child in self._children():
            child.was_ready = True

    async def _all_ready(self) -> None:
        await asyncio.gather(*(child.ready.wait() for child in self._children()))

    async def wait_failed(self) -> None:
        """Returns only by an exception, when a process failed for good."""
        if self._tasks:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        self._raise_failure()

    async def stop(self) -> None:
        """Stops the gateway, then the shards, each gracefully, and lets go of the data directory."""
        # Each has ended by itself within its stop_seconds.
        seconds = float(self._environment.get("TOPK_STOP_SECONDS") or GatewaySettings(topology="-").stop_seconds) + 5
        try:
            if self.gateway is not None:
                await self.gateway.stop(seconds)
            await asyncio.gather(*(child.stop(seconds) for child in self.shards.values()))
        finally:
            self.kill()
            self._let_go()

    def kill(self) -> None:
        """Kills what still runs, at once."""
        for child in self._children():
            child.kill()

    def _children(self) -> list[Child]:
        return [*self.shards.values(), *([self.gateway] if self.gateway else [])]

    def _raise_failure(self) -> None:
        for task in self._tasks:
            if task.done() and not task.cancelled():
                task.result()

    # --- The data directory -------------------------------------------------------------------------------------------

    def _take_hold(self) -> None:
        if self._data_dir.exists() and not self._data_dir.is_dir():
            raise ForeignDirectoryError(
                f"--data-dir {self._data_dir} is a file: name a directory, or a path that does not exist"
            )
        self._data_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._data_dir / "up.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise DirectoryInUseError(
                f"--data-dir {self._data_dir} is in use by another process{f' ({holder})' if holder else ''}: "
                "a cluster runs on it already. Stop that one, or name another directory"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()}\n".encode(), 0)
        self._lock = descriptor

    def _let_go(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    async def _topology(self) -> Topology:
        """The topology that the data directory has; a new one where it has nothing."""
        store = open_store(self._topology_url())
        try:
            if (self._data_dir / "topology.json").exists():
                topology = await store.read()
                self._check(topology)
                if not topology.secret:  # it was made by a release that had none
                    topology = replace(topology, epoch=topology.epoch + 1, secret=secrets.token_hex(32))
                    await store.compare_and_set(topology)
                return topology
            if (self._data_dir / RESTORING).exists():
                raise StorageError(
                    f"--data-dir {self._data_dir}: a backup was being restored here, and that was interrupted: run"
                    " `topk restore` again, it begins anew"
                )
            foreign = sorted(each.name for each in self._data_dir.iterdir() if each.name not in _OWN_FILES)
            if foreign:
                raise ForeignDirectoryError(
                    f"--data-dir {self._data_dir} has no topology.json, but holds {', '.join(foreign[:3])}"
                    f"{' …' if len(foreign) > 3 else ''}: name an empty directory or one of `topk up`, "
                    "or put topology.json back"
                )
            shard_ids = tuple(f"shard-{index}" for index in range(self._shards_asked or SHARDS_DEFAULT))
            topology = _new_topology(shard_ids, self._new_settings())
            await store.compare_and_set(topology)
            return topology
        finally:
            await store.close()

    def _new_settings(self) -> ClusterSettings:
        """What is fixed in a new cluster."""
        defaults = ClusterSettings()
        return ClusterSettings(
            slots=self._slots_asked or defaults.slots, partitioner=self._partitioner_asked or defaults.partitioner
        )

    def _check(self, topology: Topology) -> None:
        fixed = topology.settings
        for flag, asked, has in (
            ("--partitioner", self._partitioner_asked, fixed.partitioner),
            ("--slots", self._slots_asked, fixed.slots),
        ):
            if asked is not None and asked != has:
                raise SettingError(
                    f"{flag} is {asked}, but the cluster in {self._data_dir} was made with {has}, which is fixed: leave"
                    f" {flag} out, or load the plays into a new data directory"
                )
        present = len(topology.shards)
        if self._shards_asked is not None and self._shards_asked != present:
            raise SettingError(
                f"--shards is {self._shards_asked}, but the cluster in {self._data_dir} has {present}: leave --shards "
                f"out or say {present}. (To have another number of shards, load a new data directory)"
            )

    def _topology_url(self) -> str:
        return f"file:{self._data_dir / 'topology.json'}"

    # --- Commands -----------------------------------------------------------------------------------------------------

    def _shard_environment(self) -> dict[str, str]:
        """Shards listen on this machine alone, so without a CA of the cluster's own they need no TLS."""
        own_ca = self._environment.get("TOPK_TLS_CA")
        left_out = () if own_ca else ("TOPK_TLS_CERT", "TOPK_TLS_KEY")
        return {name: value for name, value in self._environment.items() if name not in left_out}

    def _shard_command(self, shard_id: str) -> list[str]:
        # What must not come from the environment is said on the command line: a TOPK_LISTEN there is meant for others.
        return [
            *self._role_command("shard", "127.0.0.1:0", len(self.shards) + 1),
            *("--shard-id", shard_id, "--data-dir", str(self._data_dir / shard_id), "--advertise", ""),
        ]

    def _gateway_command(self) -> list[str]:
        return self._role_command("gateway", self.address, 0)

    def _role_command(self, role: str, listen: str, number: int) -> list[str]:
        metrics_port = self._metrics_port + number if self._metrics_port else 0
        return [
            *(sys.executable, "-m", "topk_grpc", role, "--topology", self._topology_url()),
            *("--listen", listen, "--health-port", "0", "--metrics-port", str(metrics_port), "--exit-with-stdin"),
        ]


def _new_topology(shard_ids: Sequence[str], settings: ClusterSettings) -> Topology:
    return Topology(
        cluster_id=uuid.uuid4().hex,
        epoch=_EPOCH_FIRST,
        settings=settings,
        shards=tuple(ShardInfo(shard_id) for shard_id in sorted(shard_ids)),
        owners=_sorted_owners(shard_ids, settings),
        secret=secrets.token_hex(32),
    )


def _sorted_owners(shard_ids: Sequence[str], settings: ClusterSettings) -> tuple[int, ...]:
    # A topology lists its shards by name ("shard-10" before "shard-2"), and owners are places in that list.
    return plan_owners(settings.partitioner, sorted(shard_ids), settings.slots)


def _free_port(host: str, port: int) -> int:
    """Checks that the port can be listened on; finds a free one for 0.

    Raises:
        AddressInUseError: it is taken.
        InvalidArgumentError: no such address.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise InvalidArgumentError(f"--host {host!r} is no address of this machine: {error.strerror}") from error
    with socket.socket(family, kind, protocol) as probe:
        # As the server does: a port whose last connections are still closing is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            raise AddressInUseError(
                f"{host}:{port} cannot be listened on ({error.strerror}): stop what uses it, or give another --port "
                "(0 takes a free one)"
            ) from error
        return int(probe.getsockname()[1])
