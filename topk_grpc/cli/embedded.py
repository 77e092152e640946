"""A whole cluster on this machine: what `topk up` runs, and `topk demo` inside its own process.

Theory of operation. The topology says which shards there are, whoever changes it: `topk cluster add` and `remove`, or
another `--shards` at the start. The supervisor watches it and keeps one process running for each shard, besides a
gateway and a controller. A shard that was removed is stopped, and its directory set aside (cluster_directory.py).

Only the gateway's port is known beforehand. Shards take free ones at each start and register them in the topology,
which the gateway watches. The supervisor holds no data and decides nothing: killed and started again, it finds in the
topology what there is to run.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Iterable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

from topk_grpc.cli.children import Child, OnLine
from topk_grpc.cli.cluster_directory import ClusterDirectory
from topk_grpc.config import GatewaySettings
from topk_grpc.errors import AddressInUseError, InvalidArgumentError, StorageError, TopKError
from topk_grpc.model import Topology
from topk_grpc.topology import open_store

_AGAIN_SECONDS = 1.0
_FIRST_SHARD = 2  # of the processes, for their metrics: behind the gateway and the controller


class EmbeddedCluster:
    """Shard processes, a gateway and a controller, kept running until `stop`."""

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
            metrics_port: where the gateway serves metrics; the controller on the next port, the shards in their order
                on those after it. 0: nowhere.
            environment: settings of the servers, by variable.
            on_line: is told what the processes write on stderr, and when they end.
        """
        self._directory = ClusterDirectory(data_dir)
        self._shards_asked = shards
        self._partitioner_asked = partitioner
        self._slots_asked = slots
        self._host = host
        self._port = port
        self._metrics_port = metrics_port
        self._environment = os.environ | dict(environment or {})
        self._on_line = on_line
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: asyncio.Future[None] | None = None
        self._following: asyncio.Task[None] | None = None
        self._newest: Topology | None = None
        self._stopping: dict[str, asyncio.Task[None]] = {}  # shards that were removed
        self._numbers: dict[str, int] = {}  # of shards, for the ports of their metrics
        self.shards: dict[str, Child] = {}
        self.gateway: Child | None = None
        self.controller: Child | None = None

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
            SettingError: it has more shards, or was made with other settings.
            AddressInUseError: the gateway's port is taken.
        """
        self._directory.take_hold()
        self._failure = asyncio.get_running_loop().create_future()
        try:
            self._port = _free_port(self._host, self._port)
            topology = await self._directory.open_topology(
                self._shards_asked, self._partitioner_asked, self._slots_asked
            )
            self._set_aside(topology)
            for info in topology.shards:
                self._start_shard(info.shard_id)
            self.gateway = self._start("gateway", self._role_command("gateway", self.address, 0), self._environment)
            command = self._role_command("controller", "127.0.0.1:0", 1)
            self.controller = self._start("controller", command, self._inner_environment())
            self._following = asyncio.create_task(self._follow())
        except BaseException:
            self._directory.let_go()
            raise

    async def wait_ready(self) -> None:
        """Returns when every process has said that it answers; recovery may take its time.

        Raises:
            ProcessFailedError: a process does not start; the others still have to be stopped.
        """
        children, failure = self._children(), self._failed
        waiting = asyncio.ensure_future(_all_ready(children))
        try:
            both: set[asyncio.Future[Any]] = {waiting, failure}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if failure.done():
                failure.result()
            await waiting
        finally:
            waiting.cancel()
        for child in children:
            child.was_ready = True

    async def wait_failed(self) -> None:
        """Returns only by an exception, when a process failed for good."""
        await asyncio.shield(self._failed)

    @property
    def _failed(self) -> asyncio.Future[None]:
        """Done when a process failed for good."""
        if self._failure is None:
            raise RuntimeError("the cluster was not started")
        return self._failure

    @property
    def _stop_seconds(self) -> float:
        """By then each has ended by itself, within its stop_seconds."""
        return float(self._environment.get("TOPK_STOP_SECONDS") or GatewaySettings(topology="-").stop_seconds) + 5

    async def stop(self) -> None:
        """Stops the gateway, then the others, each gracefully, and lets go of the data directory."""
        seconds = self._stop_seconds
        try:
            if self._following is not None:
                self._following.cancel()
                await asyncio.gather(self._following, return_exceptions=True)
            if self.gateway is not None:
                await self.gateway.stop(seconds)
            others = [child.stop(seconds) for child in self._children() if child is not self.gateway]
            await asyncio.gather(*others, *self._stopping.values())
        finally:
            self.kill()
            self._failed.cancel()
            self._directory.let_go()

    def kill(self) -> None:
        """Kills what still runs, at once."""
        for child in self._children():
            child.kill()

    def _children(self) -> list[Child]:
        others = (child for child in (self.gateway, self.controller) if child is not None)
        return [*self.shards.values(), *others]

    def _start(self, name: str, command: list[str], environment: Mapping[str, str]) -> Child:
        child = Child(name, command, environment, self._on_line)
        task = child.start()
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return child

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self._failed.done():
            self._failed.set_exception(error)
            self._failed.exception()  # whether anybody waits for it or not

    # --- The topology's shards ----------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Runs what the topology says, as it changes."""
        store = open_store(self._directory.topology_url)
        try:
            while True:
                try:
                    async with aclosing(store.watch()) as topologies:
                        async for topology in topologies:
                            self._adjust(topology)
                except TopKError as error:  # damaged by somebody's hand, say: what runs goes on
                    self._on_line("topology", f"cannot be followed: {error}")
                await asyncio.sleep(_AGAIN_SECONDS)
        finally:
            await store.close()

    def _adjust(self, topology: Topology) -> None:
        self._newest = topology
        names = {shard.shard_id for shard in topology.shards}
        for gone in self.shards.keys() - names:
            self._stopping[gone] = asyncio.create_task(self._remove(gone, self.shards.pop(gone)))
        for new in sorted(names - self.shards.keys() - self._stopping.keys()):
            # What does not start now is tried again and again: the others serve.
            self._start_shard(new).was_ready = True

    def _start_shard(self, shard_id: str) -> Child:
        taken = {self._numbers[name] for name in self.shards.keys() | self._stopping.keys()}
        number = next(each for each in range(len(taken) + 1) if each not in taken)
        self._numbers[shard_id] = number
        child = self._start(shard_id, self._shard_command(shard_id, _FIRST_SHARD + number), self._inner_environment())
        self.shards[shard_id] = child
        return child

    async def _remove(self, shard_id: str, child: Child) -> None:
        """Stops a shard that was removed, and sets its directory aside; it may come back under its name after that."""
        await child.stop(self._stop_seconds)
        self._on_line(shard_id, "was removed from the cluster, and has been stopped")
        del self._stopping[shard_id]
        if self._newest is not None:
            self._set_aside(self._newest)
            self._adjust(self._newest)

    def _set_aside(self, topology: Topology) -> None:
        """Moves the directories of shards out of the way that are neither in the topology nor running."""
        names = {shard.shard_id for shard in topology.shards} | self.shards.keys() | self._stopping.keys()
        try:
            for place in self._directory.set_aside(names):
                self._on_line(place.name, f"the directory of a shard that was removed is kept at {place}")
        except StorageError as error:
            self._on_line("removed", str(error))

    # --- Commands -----------------------------------------------------------------------------------------------------

    def _inner_environment(self) -> dict[str, str]:
        """Of those that this machine alone can reach: without a CA of the cluster's own they need no TLS."""
        own_ca = self._environment.get("TOPK_TLS_CA")
        left_out = () if own_ca else ("TOPK_TLS_CERT", "TOPK_TLS_KEY")
        return {name: value for name, value in self._environment.items() if name not in left_out}

    def _shard_command(self, shard_id: str, number: int) -> list[str]:
        # What must not come from the environment is said on the command line: a TOPK_LISTEN there is meant for others.
        return [
            *self._role_command("shard", "127.0.0.1:0", number),
            *("--shard-id", shard_id, "--data-dir", str(self._directory.of_shard(shard_id)), "--advertise", ""),
        ]

    def _role_command(self, role: str, listen: str, number: int) -> list[str]:
        metrics_port = self._metrics_port + number if self._metrics_port else 0
        return [
            *(sys.executable, "-m", "topk_grpc", role, "--topology", self._directory.topology_url),
            *("--listen", listen, "--health-port", "0", "--metrics-port", str(metrics_port), "--exit-with-stdin"),
        ]


async def _all_ready(children: Iterable[Child]) -> None:
    await asyncio.gather(*(child.ready.wait() for child in children))


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
