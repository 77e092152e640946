"""The cluster under test: three shards and two gateways as processes of their own, kept running, behind proxies.

    client → proxy → gateway → proxy → shard → its own small disk (a tmpfs where this user may mount one)
                          controller ↗

A shard listens on a port of its own and advertises its proxy's, so that gateways reach it by way of that. Each process
is started by exec, and started again at once when it ends. How it ends is judged: by our signal, with 0 after a
SIGTERM, with another status after a fault that has to end it. Everything else is a finding.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.faults.files import CONTROL
from tests.faults.proxy import Proxy
from topk_grpc.model import ClusterSettings, ShardInfo, Topology
from topk_grpc.ring.plan import plan_owners
from topk_grpc.topology import TopologyStore, open_store

SHARDS: Final = ("shard-0", "shard-1", "shard-2")
GATEWAYS: Final = ("gateway-0", "gateway-1")
CONTROLLER: Final = "controller"

_RESTART_SECONDS: Final = 0.1
_STOP_SECONDS: Final = 15.0

SHARD_SETTINGS: Final = {
    "TOPK_SEGMENT_BYTES": str(1 << 19),
    "TOPK_SNAPSHOT_LOG_BYTES": str(1 << 20),
    "TOPK_SNAPSHOT_SECONDS": "15",
    "TOPK_DRAIN_SECONDS": "3",
}
"""Small, so that faults meet new segments and snapshots all the time."""

GATEWAY_SETTINGS: Final = {
    "TOPK_RECORD_SECONDS": "6",
    "TOPK_QUERY_SECONDS": "5",
    "TOPK_PENDING_BYTES_MAX": str(8 << 20),
    "TOPK_STREAM_AGE_SECONDS": "60",
    "TOPK_DRAIN_SECONDS": "3",
}


def free_port() -> int:
    """A port that nobody listens on, outside the range that outgoing connections take theirs from."""
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@dataclass
class Ending:
    """How a process ended.

    Attributes:
        name: whose.
        status: as `subprocess` gives it: below 0 a signal.
        expected: what the test was after, empty if nothing.
        last: the last line it wrote.
    """

    name: str
    status: int
    expected: str
    last: str


class Process:
    """A server that is kept running.

    Attributes:
        starts, ends: how often it was started, and has ended.
        ready_at: the time (monotonic) at which the present process was ready; 0 before.
        expected: why it may end next: `kill`, `stop` (SIGTERM), `fail` (it has to end by itself), or nothing.
        may_fail: it may end by itself, for as long as a fault lasts.
    """

    def __init__(
        self, name: str, command: Sequence[str], settings: dict[str, str], log: Path, ended: Callable[[Ending], None]
    ) -> None:
        self.name = name
        self.starts = self.ends = 0
        self.ready_at = 0.0
        self.expected = ""
        self.may_fail = False
        self.events: dict[str, int] = {}
        self._command, self._log, self._ended = [*command, "--exit-with-stdin"], log, ended
        clean = {key: value for key, value in os.environ.items() if not key.startswith("TOPK_")}
        self._environment = clean | {"GRPC_ENABLE_FORK_SUPPORT": "0", "PYTHONFAULTHANDLER": "1"} | settings
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._closing = False

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    @property
    def pid(self) -> int:
        """0 while none runs."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else 0

    @property
    def memory_bytes(self) -> int:
        """Resident."""
        with suppress(OSError, IndexError):
            return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return 0

    def signal(self, number: int) -> bool:
        """Whether there was somebody to send it to."""
        pid = self.pid
        if pid:
            os.kill(pid, number)
        return bool(pid)

    def kill(self) -> bool:
        if self.pid:
            self.expected = "kill"
        return self.signal(signal.SIGKILL)

    async def ended_after(self, starts: int, seconds: float) -> bool:
        """Whether the process of that start ends in time."""
        return await self._wait(lambda: self.ends >= starts, seconds)

    async def ready_after(self, starts: int, seconds: float) -> bool:
        """Whether a later start than that is ready in time."""
        return await self._wait(lambda: self.starts > starts and self.ready_at > 0, seconds)

    async def _wait(self, condition: Callable[[], Any], seconds: float) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
                return True
        return False

    async def _run(self) -> None:
        while not self._closing:
            last = ""
            self.ready_at = 0.0
            self.starts += 1
            process = self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=subprocess.PIPE,  # it ends with us, however we end
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=self._environment,
                limit=1 << 20,
            )
            self._changed.set()
            assert process.stderr is not None
            with self._log.open("ab") as log:
                async for line in process.stderr:
                    log.write(line)
                    log.flush()
                    last = line.decode(errors="replace").strip()
                    self._take(last)
            status = await process.wait()
            expected = self.expected or ("fail" if self.may_fail else "")
            self.expected, self.ready_at = "", 0.0
            self.ends += 1
            if not self._closing:
                self._ended(Ending(self.name, status, expected, last))
            self._changed.set()
            if self._closing:
                return
            await asyncio.sleep(_RESTART_SECONDS)

    def _take(self, line: str) -> None:
        with suppress(ValueError):
            event = json.loads(line).get("event", "")
            self.events[event] = self.events.get(event, 0) + 1
            if event == "ready":
                self.ready_at = time.monotonic()
                self._changed.set()

    async def close(self) -> None:
        """kill -9, for good."""
        self._closing = True
        self.signal(signal.SIGKILL)
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)


@dataclass
class Disk:
    """Where a shard keeps its plays.

    Attributes:
        path: a mount point of its own, or a directory where nothing can be mounted.
        mounted: whether it can be filled.
    """

    path: Path
    mounted: bool
    why_not: str = ""

    @classmethod
    def make(cls, path: Path, size_bytes: int) -> Disk:
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "topk-faults", str(path)]
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=10)
        except OSError as error:
            return cls(path, False, str(error))
        return cls(path, done.returncode == 0, done.stderr.strip())

    def fill(self) -> int:
        """Takes all the room there is; returns how much that was, bytes."""
        descriptor = os.open(self.path / "ballast", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            begin = size = os.fstat(descriptor).st_size
            with suppress(OSError):
                while free := os.statvfs(self.path).f_bavail * os.statvfs(self.path).f_frsize:
                    os.posix_fallocate(descriptor, size, free)
                    size += free
            return size - begin
        finally:
            os.close(descriptor)

    def free(self) -> None:
        (self.path / "ballast").unlink(missing_ok=True)

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.path)], check=False, capture_output=True, timeout=10)


@dataclass
class Cluster:
    """All of it. `start` it, and `close` it in the end.

    Attributes:
        root: for everything that is written.
        on_ending: is told how each process ended.
        disk_bytes: of each shard.
        url: of the topology; empty: a file in `root`.
        settings: further ones of all servers, as environment variables.
    """

    root: Path
    on_ending: Callable[[Ending], None]
    disk_bytes: int = 256 << 20
    url: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    processes: dict[str, Process] = field(default_factory=dict)
    proxies: dict[str, Proxy] = field(default_factory=dict)
    disks: dict[str, Disk] = field(default_factory=dict)
    controls: dict[str, Path] = field(default_factory=dict)
    addresses: dict[str, str] = field(default_factory=dict)
    """Of the gateways' proxies."""
    direct: dict[str, str] = field(default_factory=dict)
    """Of the gateways themselves."""
    owners: tuple[int, ...] = ()
    """When it begins."""
    store: TopologyStore = field(init=False)

    async def start(self) -> None:
        url = self.url = self.url or f"file:{self.root / 'topology.json'}"
        settings = ClusterSettings()
        self.owners = plan_owners(settings.partitioner, SHARDS, settings.slots)
        self.store = open_store(url)
        shards = tuple(map(ShardInfo, SHARDS))
        await self.store.compare_and_set(Topology("storm", 1, settings, shards, self.owners, "a secret of the storm"))
        for name in SHARDS:
            await self._add_shard(name, url)
        for name in GATEWAYS:
            await self._add_gateway(name, url)
        self._add_controller(url)
        for process in self.processes.values():
            process.start()
        for process in self.processes.values():
            if not await process.ready_after(0, 60):
                raise AssertionError(f"{process.name} does not start: see {self.root}")

    async def _add_shard(self, name: str, url: str) -> None:
        port, proxy_port = free_port(), 0
        proxy = self.proxies[name] = Proxy(lambda: port)
        proxy_port = await proxy.start()
        self.disks[name] = disk = Disk.make(self.root / name, self.disk_bytes)
        self.controls[name] = self.root / f"{name}.faults"
        command = [sys.executable, "-m", "tests.faults.shard", "--topology", url, "--shard-id", name]
        command += ["--data-dir", str(disk.path / "data"), "--listen", f"127.0.0.1:{port}"]
        command += ["--advertise", f"127.0.0.1:{proxy_port}"]
        self._add(name, command, SHARD_SETTINGS | {CONTROL: str(self.controls[name])})

    async def _add_gateway(self, name: str, url: str) -> None:
        port = free_port()
        proxy = self.proxies[name] = Proxy(lambda: port)
        self.addresses[name] = f"127.0.0.1:{await proxy.start()}"
        self.direct[name] = f"127.0.0.1:{port}"
        command = [sys.executable, "-m", "topk_grpc", "gateway", "--topology", url, "--listen", f"127.0.0.1:{port}"]
        self._add(name, command, GATEWAY_SETTINGS)

    def _add_controller(self, url: str) -> None:
        command = [sys.executable, "-m", "topk_grpc", "controller", "--topology", url, "--listen", "127.0.0.1:0"]
        self._add(CONTROLLER, command, {})

    def _add(self, name: str, command: Sequence[str], settings: dict[str, str]) -> None:
        log = self.root / f"{name}.log"
        self.processes[name] = Process(name, command, settings | dict(self.settings), log, self.on_ending)

    async def kill_everything(self) -> None:
        """All at one moment; returns when all are ready again."""
        starts = {process: process.starts for process in self.processes.values()}
        for process in starts:
            process.kill()
        for process, before in starts.items():
            if not await process.ready_after(before, 60):
                raise AssertionError(f"{process.name} does not come back: see {self.root}")

    async def close(self) -> None:
        for process in self.processes.values():
            process.signal(signal.SIGCONT)
        await asyncio.gather(*(process.close() for process in self.processes.values()))
        for proxy in self.proxies.values():
            await proxy.close()
        await self.store.close()
        for disk in self.disks.values():
            disk.close()
