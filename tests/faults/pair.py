"""The smallest cluster whose disk can fail: a gateway and one shard, as processes, asked by hand."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import grpc

from tests.cluster.processes import Server
from tests.faults.files import CONTROL
from topk_grpc.model import ClusterSettings, ShardInfo, Topology
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.pb.topk.v1.play_pb2 import PlayBatch
from topk_grpc.pb.topk.v1.topk_service_pb2_grpc import TopKServiceStub
from topk_grpc.topology import open_store

STOP_SECONDS: Final = 4.0
FAULTY_SHARD: Final = (sys.executable, "-m", "tests.faults.shard")


class Pair:
    """A gateway and its only shard, whose plays are in `root`/disk/shard-0.

    Args:
        root: for topology, plays and logs.
        settings: further ones of the shard, as environment variables.
    """

    def __init__(self, root: Path, settings: Mapping[str, str] | None = None) -> None:
        self._root = root
        self._settings = dict(settings or {})
        self._topology = f"file:{root / 'topology.json'}"
        asyncio.run(self._create())
        self.control = root / "control"
        (root / "disk").mkdir(exist_ok=True)
        self.shard = self.start_shard()
        self.gateway = Server(["gateway", "--topology", self._topology, "--listen", "127.0.0.1:0"], root / "gateway")
        try:
            self.shard.wait_ready()
            self.address = self.gateway.wait_ready()
        except BaseException:
            self.close()
            raise

    async def _create(self) -> None:
        store = open_store(self._topology)
        settings = ClusterSettings()
        owners = (0,) * settings.slots
        await store.compare_and_set(Topology("stop", 1, settings, (ShardInfo("shard-0"),), owners, "a secret"))
        await store.close()

    def start_shard(self) -> Server:
        data = self._root / "disk" / "shard-0"
        arguments = ["--topology", self._topology, "--shard-id", "shard-0", "--data-dir", str(data)]
        settings = {CONTROL: str(self.control), "TOPK_STOP_SECONDS": str(STOP_SECONDS), "TOPK_DRAIN_SECONDS": "1"}
        return Server(arguments, self._root / "shard", settings | self._settings, FAULTY_SHARD)

    def send(self, sequence: int, timeout: float = 20) -> pb.RecordPlaysResponse:
        batch = PlayBatch(producer_id="p", sequence=sequence)
        batch.plays.add(song_id=f"song {sequence}", played_at_ms=1_700_000_000_000)
        batch.plays.add(song_id="all", played_at_ms=1_700_000_000_000)
        with grpc.insecure_channel(self.address) as channel:
            return TopKServiceStub(channel).RecordPlays(pb.RecordPlaysRequest(batch=batch), timeout=timeout)

    def stop_shard(self) -> tuple[float, int]:
        """SIGTERM; how long it took and how it ended."""
        began = time.monotonic()
        self.shard.process.send_signal(signal.SIGTERM)
        code = self.shard.wait_end(30)
        return time.monotonic() - began, code

    def close(self) -> None:
        for server in (self.shard, self.gateway):
            server.kill()
