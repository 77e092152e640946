"""A cluster of the storms whose coordinator is the test: it takes migrations step by step, and then kills somebody.

The producers and askers of the storms are at it all the while. Their plays, and those that go with each migration, are
in one ledger.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc
import numpy as np

from tests.cluster.processes import GLOBAL
from tests.cluster.stages import ABORT, BEGIN, COMMIT, EXPORT, FREEZE, IMPORT, SETTLE, Stage
from tests.faults.cluster import CONTROLLER, GATEWAYS, SHARDS, Cluster, Ending
from tests.faults.crowd import Crowd, Scene
from tests.faults.ledger import NAMES, Ledger, Plays
from tests.faults.traffic import now_ms, reason_of
from tests.faults.weather import Weather
from tests.oracle import slot_of
from tests.topology.etcd_server import EtcdServer
from topk_grpc.config import ControllerSettings
from topk_grpc.errors import TopKError
from topk_grpc.kernels import compiled
from topk_grpc.migration.calls import GrpcShardCalls
from topk_grpc.migration.plan import moves_left
from topk_grpc.migration.records import Event, advance, begin
from topk_grpc.model import ClusterSettings, Migration, Topology
from topk_grpc.pb.topk.v1 import shard_service_pb2 as shard_pb
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.pb.topk.v1.play_pb2 import PlayBatch
from topk_grpc.pb.topk.v1.shard_service_pb2_grpc import ShardServiceStub
from topk_grpc.rpc.channels import open_channel
from topk_grpc.rpc.shard_channels import ShardChannels
from topk_grpc.topology import open_store
from topk_grpc.topology.change import change

T = TypeVar("T")

SEED: Final = random.SystemRandom().randrange(1 << 32)
SLOTS: Final = ClusterSettings().slots
SLOTS_EACH: Final = 2
SONGS_OF: Final[dict[int, list[int]]] = {}
for _song, _name in enumerate(NAMES):
    SONGS_OF.setdefault(slot_of(_name, SLOTS), []).append(_song)
CALL_SECONDS: Final = 10.0
AGAIN_SECONDS: Final = 60.0 if compiled() else 180.0
"""Within which everything has to be well again, on a busy machine."""

SETTINGS: Final = {"TOPK_FROZEN_SECONDS_MAX": "30", "TOPK_MOVE_SECONDS_MAX": "2", "TOPK_MOVE_SLOTS_MAX": "24"}
"""A source must not abort by itself while stages are made; a stuck copy is given up soon; plans take some time."""


@dataclass
class Moving:
    """A stage that a migration stands at.

    Attributes:
        stage: which.
        songs: those of its slots, as the ledger numbers them.
        chart: of its plays alone.
        migration: its record when it began.
        sending: the batch that is sent while it stands there.
    """

    stage: Stage
    songs: list[int]
    chart: str
    migration: Migration
    sending: asyncio.Task[None] | None = None


@dataclass
class Bench:
    """A cluster whose coordinator is the test."""

    root: Path
    etcd: EtcdServer
    findings: list[str] = field(default_factory=list)

    async def start(self) -> None:
        self.cluster = Cluster(self.root, self._on_ending, url=self.etcd.url("crashes"), settings=SETTINGS)
        await self.cluster.start()
        self.store = open_store(self.cluster.url)
        topology = await self.store.read()
        self.channels = ShardChannels(ControllerSettings(topology=self.cluster.url), "storm", topology.secret)
        self.calls = GrpcShardCalls(self.channels)
        self.gateways = [open_channel(address, options=[("grpc.enable_retries", 0)]) for address in self._addresses]
        self.ledger = Ledger(now_ms(), 1800)
        weather = Weather()
        self._broken = weather.broken(*SHARDS, *GATEWAYS)
        self._broken.__enter__()
        scene = Scene(self.cluster.addresses, SHARDS, None, weather, self.ledger)
        rate = 2000.0 if compiled() else 20.0
        self.crowd = Crowd(scene, SEED, rate, self.findings.append, self.findings.append)
        self.crowd.send()
        self.crowd.ask()

    @property
    def _addresses(self) -> list[str]:
        return list(self.cluster.addresses.values())

    def _on_ending(self, ending: Ending) -> None:
        if ending.expected != "kill" or ending.status != -signal.SIGKILL:
            self.findings.append(f"{ending.name} ended with {ending.status}: {ending.last}")

    async def close(self) -> None:
        await self.crowd.close()
        self._broken.__exit__(None, None, None)
        for channel in self.gateways:
            await channel.close()
        await self.calls.close()
        await self.store.close()
        await self.cluster.close()

    # --- Plays of a stage ---------------------------------------------------------------------------------------------

    async def send(self, moving: Moving, sequence: int, first: int = 0) -> pb.RecordPlaysResponse:
        """Sends a batch of a stage's songs until it is acknowledged, by turns through both gateways."""
        batch = PlayBatch(producer_id=moving.chart, sequence=sequence, first_sent_ms=now_ms())
        played_ms = self.ledger.grids["past"].first_ms
        for song in moving.songs:
            batch.plays.add(song_id=NAMES[song], played_at_ms=played_ms, charts=[moving.chart])
        request = pb.RecordPlaysRequest(batch=batch).SerializeToString()
        for turn in itertools.count(first):
            record: Any = self.gateways[turn % 2].unary_unary("/topk.v1.TopKService/RecordPlays")
            try:
                answer = await record(request, timeout=10)
            except grpc.RpcError as error:
                assert is_passing(error), error
                await asyncio.sleep(0.05)
                continue
            response = pb.RecordPlaysResponse.FromString(answer)
            assert (response.accepted, len(response.rejected)) == (len(moving.songs), 0)
            return response
        raise AssertionError

    async def record(self, moving: Moving, sequence: int) -> None:
        """Sends a batch for the first time."""
        zeros = np.zeros(len(moving.songs), np.int64)
        plays = Plays("past", zeros, zeros, np.array(moving.songs), zeros, zeros + 1)
        self.ledger.add_sent(plays)
        await self.send(moving, sequence)
        self.ledger.add_acknowledged(plays)

    async def count(self, chart: str, gateway: int) -> tuple[dict[str, int], int]:
        """The songs of a chart with their counts, and the total, as soon as a gateway can say."""
        request = pb.GetTopKRequest(window=GLOBAL, k=100, chart=chart).SerializeToString()
        ask: Any = self.gateways[gateway].unary_unary("/topk.v1.TopKService/GetTopK")
        async with asyncio.timeout(AGAIN_SECONDS):
            while True:
                try:
                    answer = pb.GetTopKResponse.FromString(await ask(request, timeout=8))
                except grpc.RpcError as error:
                    assert is_passing(error), error
                    await asyncio.sleep(0.05)
                    continue
                counts = {entry.song_id: entry.count for entry in answer.entries}
                return counts, answer.certificate.total_plays

    # --- Steps of a coordinator ---------------------------------------------------------------------------------------

    async def begin(self, stage: Stage, chart: str, a: str, b: str) -> Moving:
        """Begins a migration of slots that nobody moves, with a batch before."""
        source, target = (b, a) if stage.reverse else (a, b)
        topology = await self.store.read()
        busy = {slot for one in topology.migrations for slot in one.slots}
        free = [slot for slot in topology.slots_of(source) if slot not in busy]
        slots = tuple(random.Random(f"{SEED} {chart}").sample(sorted(SONGS_OF.keys() & set(free)), SLOTS_EACH))
        songs = [song for slot in slots for song in SONGS_OF[slot]]
        moving = Moving(stage, songs, chart, Migration(0, source, target, slots))
        await self.record(moving, 1)
        changed = await change(self.store, lambda found: begin(found, source, target, slots)[0], "a beginning")
        moving.migration = next(one for one in changed.migrations if one.slots == tuple(sorted(slots)))
        return moving

    async def step(self, moving: Moving, step: str) -> None:
        """Takes one step of a stage."""
        number = moving.migration.migration_id
        topology = await self.store.read()
        source, target = topology.shard(moving.migration.source), topology.shard(moving.migration.target)
        assert source is not None and target is not None
        if step == FREEZE:
            await self.calls.freeze(source, number, CALL_SECONDS)
        elif step == EXPORT:
            stub: Any = ShardServiceStub(await self.calls._channel(source))
            metadata = self.channels.metadata(source.shard_id)
            call = stub.ExportSlots(shard_pb.ExportSlotsRequest(migration_id=number), metadata=metadata)
            assert [piece async for piece in call]
        elif step == IMPORT:
            await self.calls.fetch(target, number, CALL_SECONDS)
        elif step in {COMMIT, ABORT, SETTLE}:
            await change(self.store, lambda found: advance(found, number, Event(step)), f"to {step}")
        elif step != BEGIN:
            await self.calls.settle(source if step.endswith("source") else target, number, CALL_SECONDS)

    async def bring(self, some: list[Moving], *, decided: bool) -> None:
        """Takes the steps of some migrations before their outcome is decided, or from there on."""
        for moving in some:
            steps = moving.stage.steps
            border = steps.index(moving.stage.outcome) if moving.stage.outcome else len(steps)
            for step in steps[border:] if decided else steps[1:border]:
                await self.step(moving, step)

    # --- Victims ------------------------------------------------------------------------------------------------------

    def stop(self, *names: str) -> None:
        for name in names:
            assert self.cluster.processes[name].signal(signal.SIGSTOP), name

    def go_on(self) -> None:
        for process in self.cluster.processes.values():
            process.signal(signal.SIGCONT)

    async def strike(self, victim: str, a: str, b: str) -> None:
        """Kills the victim of a round and lets everybody else go on; returns when it was started again."""
        named = {
            "coordinator": [CONTROLLER], "A": [a], "B": [b], "A and B": [a, b], "gateway": [GATEWAYS[0]],
            "everybody": list(self.cluster.processes), "etcd": [],
        }  # fmt: skip
        killed = [self.cluster.processes[name] for name in named.get(victim, [])]
        starts = {process: process.starts for process in killed}
        if victim in {"etcd", "everybody"}:
            await asyncio.to_thread(self.etcd.kill)
        for process in killed:
            assert process.kill()
        if victim == "the line between A and B":
            self._cut(a, b)
        self.go_on()
        if victim in {"etcd", "everybody"}:
            await asyncio.sleep(random.Random(SEED).uniform(0, 1))
            await asyncio.to_thread(self.etcd.start)
        for process, before in starts.items():
            assert await process.ready_after(before, AGAIN_SECONDS), f"{process.name} is not back"

    def _cut(self, a: str, b: str) -> None:
        """Neither of the two gets through to the other any more; everybody else does."""
        for name, other in ((a, b), (b, a)):
            pid = self.cluster.processes[other].pid
            self.cluster.proxies[name].refused = partial(is_from, pid)

    def heal(self) -> None:
        for proxy in self.cluster.proxies.values():
            proxy.refused = lambda _: False

    # --- Afterwards ---------------------------------------------------------------------------------------------------

    async def settled(self) -> Topology:
        """The topology, when no migration is left in it."""

        async def without_migrations() -> Topology | None:
            topology = await self.store.read()
            return None if topology.migrations else topology

        return await until(without_migrations)

    async def moved(self) -> Topology:
        """The topology, when all slots are where the plan wants them."""

        async def as_planned() -> Topology | None:
            topology = await self.settled()
            return None if moves_left(topology) else topology

        return await until(as_planned)

    async def check_owners(self) -> None:
        """Each slot is answered for by the shard that owns it, and by no other."""
        topology = await self.settled()
        for shard in topology.shards:
            stub: Any = ShardServiceStub(await self.calls._channel(shard))
            metadata = self.channels.metadata(shard.shard_id)
            answer = await stub.DescribeShard(
                shard_pb.DescribeShardRequest(), timeout=AGAIN_SECONDS, metadata=metadata, wait_for_ready=True
            )
            covered = int.from_bytes(answer.coverage.slots, "little")
            assert tuple(slot for slot in range(SLOTS) if covered >> slot & 1) == topology.slots_of(shard.shard_id)

    async def check(self, moving: Moving, topology: Topology) -> str:
        """Every play of a stage counts once, both batches are known as duplicates; returns who owns its slots."""
        assert moving.sending is not None
        await asyncio.wait_for(moving.sending, AGAIN_SECONDS)
        for sequence in (1, 2):
            again = await self.send(moving, sequence, first=sequence)
            assert again.duplicate, f"{moving.stage.name}: batch {sequence} was not known any more"
        right = {NAMES[song]: 2 for song in moving.songs}, 2 * len(moving.songs)
        for gateway in (0, 1):
            assert await self.count(moving.chart, gateway) == right, f"{moving.stage.name}, gateway {gateway}"
        owners = {topology.shards[topology.owners[slot]].shard_id for slot in moving.migration.slots}
        assert len(owners) == 1, moving.stage.name
        (owner,) = owners
        one = moving.migration
        may = {COMMIT: {one.target}, ABORT: {one.source}, "": {one.source, one.target}}[moving.stage.outcome]
        assert owner in may, f"{moving.stage.name}: {owner}"
        return owner


async def until(condition: Callable[[], Awaitable[T | None]]) -> T:
    """Asks until the answer is true; a topology that cannot be read is no answer."""
    async with asyncio.timeout(AGAIN_SECONDS):
        while True:
            with suppress(TopKError):
                if found := await condition():
                    return found
            await asyncio.sleep(0.05)


def is_passing(error: grpc.RpcError) -> bool:
    """Whether a client would try again."""
    reason, retry = reason_of(error)
    return retry or reason.startswith("grpc ")


def is_from(pid: int, port: int) -> bool:
    """Whether a local TCP port is that of one of a process's connections."""
    sockets = set()
    with suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                sockets.add(str(descriptor.readlink()).removeprefix("socket:[").rstrip("]"))
        tables = [Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:] for table in ("tcp", "tcp6")]
        rows = [line.split() for line in itertools.chain(*tables)]
        return any(int(row[1].rpartition(":")[2], 16) == port and row[9] in sockets for row in rows)
    return False
