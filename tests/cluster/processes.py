"""Real processes for the tests of this folder: started by exec, killed for real, waited for with deadlines."""

from __future__ import annotations

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
from pathlib import Path
from typing import Any, Final

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from topk_grpc.kernels import compiled
from topk_grpc.pb.topk.v1 import query_pb2
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.pb.topk.v1.topk_service_pb2_grpc import TopKServiceStub

TOPK: Final = (sys.executable, "-m", "topk_grpc")
READY_SECONDS: Final = 40.0 if compiled() else 120.0
"""How long a cluster may take to answer on a machine that is busy with other things."""

GLOBAL: Final = query_pb2.Window(**{"global": query_pb2.GlobalWindow()})  # type: ignore[arg-type]  # a keyword of Python


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Asks until the answer is true; fails with `what` after the time allowed."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.01)
    return found


def free_port() -> int:
    """A port that nobody listens on, outside the range that outgoing connections take theirs from."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def free_ports(count: int) -> int:
    """The first of so many free ports in a row."""
    while True:
        first = free_port()
        with suppress(OSError):
            probes = [socket.create_server(("127.0.0.1", first + number)) for number in range(count)]
            for probe in probes:
                probe.close()
            return first


def environment() -> dict[str, str]:
    """Without settings that somebody's shell has for other clusters."""
    return {name: value for name, value in os.environ.items() if not name.startswith("TOPK_")}


def run_topk(*arguments: str, seconds: float = 60, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end."""
    return subprocess.run(
        [*TOPK, *arguments], check=False, capture_output=True, text=True, timeout=seconds, env=environment(), **options
    )


class Server:
    """A process of the command line, with what it writes in files."""

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        settings: Mapping[str, str] | None = None,
        command: Sequence[str] = TOPK,
    ) -> None:
        self.out, self.err = log.with_suffix(".out"), log.with_suffix(".err")
        with self.out.open("ab") as out, self.err.open("ab") as err:
            self._read_from = err.tell()
            self.process = subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment() | dict(settings or {}),
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def stderr(self) -> str:
        """What this process wrote; earlier ones of the same log left out."""
        with self.err.open("rb") as file:
            file.seek(self._read_from)
            return file.read().decode(errors="replace")

    def event(self, name: str) -> dict[str, Any] | None:
        """The last log line of that event."""
        found = None
        for line in self.stderr.splitlines():
            with suppress(ValueError):
                fields = json.loads(line)
                if fields.get("event") == name:
                    found = fields
        return found

    def wait_ready(self) -> str:
        """HOST:PORT of a role that serves."""

        def ready() -> dict[str, Any] | None:
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.stderr}"
            return self.event("ready")

        return str(wait_for(ready, READY_SECONDS, f"a role is ready: {self.stderr}")["address"])

    def wait_end(self, seconds: float = READY_SECONDS) -> int:
        return self.process.wait(seconds)

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> None:
        """SIGTERM; SIGKILL when it takes too long."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
            raise


def _children(parent: int) -> dict[str, int]:
    """The processes that a supervisor has started, by `shard-N`, `gateway` or `controller`."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            words = (entry / "cmdline").read_bytes().decode().split("\0")
            if int(fields[1]) != parent or fields[0] == "Z" or "topk_grpc" not in words:
                continue
            name = words[words.index("--shard-id" if "--shard-id" in words else "topk_grpc") + 1]
            found[name] = int(entry.name)
    return found


def is_alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Cluster:
    """`topk up` on a port and a data directory of its own."""

    def __init__(
        self, root: Path, shards: int = 2, settings: Mapping[str, str] | None = None, options: Sequence[str] = ()
    ) -> None:
        self.root = root
        self.data_dir = root / "data"
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.topology = f"file:{self.data_dir / 'topology.json'}"
        self._arguments = ["up", "--data-dir", str(self.data_dir), "--port", str(self.port), *options]
        self._shards = shards
        self._settings = settings
        self._known: set[int] = set()
        self._gateways: list[Server] = []
        self.server: Server | None = None
        self.channel = grpc.insecure_channel(self.address, options=[("grpc.enable_retries", 0)])
        self.stub = TopKServiceStub(self.channel)

    def start(self) -> Cluster:
        """Returns when every shard answers. Later starts have as many shards as there are by then."""
        new = [] if self.data_dir.exists() else ["--shards", str(self._shards)]
        server = self.server = Server([*self._arguments, *new], self.root / "up", self._settings)
        before = server.out.stat().st_size

        def ready() -> bool:
            assert server.process.poll() is None, f"`topk up` ended: {server.stderr}"
            self._known |= set(_children(server.pid).values())
            return b"ready: " in server.out.read_bytes()[before:]

        wait_for(ready, READY_SECONDS, f"`topk up` is ready: {server.stderr}")
        return self

    def pid(self, name: str) -> int:
        """Of `shard-N`, `gateway`, `controller` or `supervisor`; waits for one that is being started again."""
        assert self.server is not None
        supervisor = self.server.pid
        if name == "supervisor":
            return supervisor

        def running() -> int | None:
            self._assert_up()
            return _children(supervisor).get(name)

        pid = int(wait_for(running, READY_SECONDS, f"{name} runs"))
        self._known.add(pid)
        return pid

    def _assert_up(self) -> None:
        """Fails at once where waiting would not help."""
        assert self.server is not None
        assert self.server.process.poll() is None, f"`topk up` ended: {self.server.stderr[-2000:]}"

    def kill(self, name: str) -> None:
        """kill -9; `everything` is the supervisor and all its children."""
        assert self.server is not None
        self._known.update(_children(self.server.pid).values())
        if name == "everything":
            # Stopped first, so that it starts none of them again before it dies itself.
            os.kill(self.server.pid, signal.SIGSTOP)
            pids = [*_children(self.server.pid).values(), self.server.pid]
        else:
            pids = [self.pid(name)]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        if name in {"everything", "supervisor"}:
            self.server.process.wait(10)
            self.wait_gone()

    def snapshots(self, shard_id: str) -> int:
        """How many a shard has said it has taken."""
        assert self.server is not None
        lines = self.server.stderr.splitlines()
        return sum('"snapshot_taken"' in line and f'"{shard_id}"' in line for line in lines)

    def wait_gone(self) -> None:
        """None of the children outlives its supervisor."""
        wait_for(lambda: not any(map(is_alive, self._known)), 30, f"all of {self._known} have ended")
        self._known.clear()

    def wait_whole(self) -> pb.DescribeClusterResponse:
        """Returns when the gateway reaches every shard."""

        def whole() -> pb.DescribeClusterResponse | None:
            self._assert_up()
            with suppress(grpc.RpcError):
                described = self.stub.DescribeCluster(pb.DescribeClusterRequest(), timeout=5, wait_for_ready=True)
                if all(shard.reachable for shard in described.shards):
                    return described
            return None

        found: pb.DescribeClusterResponse = wait_for(whole, READY_SECONDS, "the gateway reaches every shard")
        return found

    def add_gateway(self, settings: Mapping[str, str] | None = None) -> str:
        """Starts one more gateway on the same topology; these settings come before the cluster's."""
        arguments = ["gateway", "--topology", self.topology, "--listen", "127.0.0.1:0"]
        changed = dict(self._settings or {}) | dict(settings or {})
        gateway = Server(arguments, self.root / f"gateway-{len(self._gateways)}", changed)
        self._gateways.append(gateway)
        return gateway.wait_ready()

    @property
    def newest_gateway(self) -> Server:
        """The last that `add_gateway` has started."""
        return self._gateways[-1]

    def stop(self) -> None:
        """SIGTERM, as Ctrl-C does; every shard then takes a snapshot."""
        assert self.server is not None
        self._known |= set(_children(self.server.pid).values())
        self.server.stop()
        self.wait_gone()

    def close(self) -> None:
        """At the end of a test: nothing is left running."""
        self.channel.close()
        for gateway in self._gateways:
            gateway.kill()
        if self.server is not None and self.server.process.poll() is None:
            self.kill("everything")
        for pid in self._known:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


# --- Calls ------------------------------------------------------------------------------------------------------------


def reason_of(error: grpc.RpcError) -> str:
    """ErrorInfo.reason as a client in any language reads it; empty where gRPC itself has refused the call."""
    status = rpc_status.from_call(error)
    for detail in () if status is None else status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Is(info.DESCRIPTOR) and detail.Unpack(info):
            assert info.domain == "topk"
            return str(info.reason)
    return ""


def top_k(address: str, k: int = 10_000, chart: str = "", window: query_pb2.Window = GLOBAL) -> pb.GetTopKResponse:
    """Asks one gateway, over a connection of its own."""
    with grpc.insecure_channel(address) as channel:
        request = pb.GetTopKRequest(window=window, k=k, chart=chart)
        return TopKServiceStub(channel).GetTopK(request, timeout=30, wait_for_ready=True)


def entries_of(answer: pb.GetTopKResponse) -> list[tuple[int, str, int]]:
    return [(entry.rank, entry.song_id, entry.count) for entry in answer.entries]


def ranked(counts: Mapping[str, int], k: int = 10_000) -> list[tuple[int, str, int]]:
    """What a cluster must answer, the plain way: count descending, then song_id ascending by UTF-8 bytes."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0].encode()))
    return [(rank, song_id, count) for rank, (song_id, count) in enumerate(ordered[:k], 1)]
