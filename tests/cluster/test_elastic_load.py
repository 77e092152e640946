"""Two shards grow to four and drain back to two under plays and queries, again and again: all of it exactly.

Everybody of the storms sends and asks meanwhile (tests/faults/crowd.py), and holds each answer against what had been
acknowledged before it was asked for and what had been sent when it came; nothing is broken here, so no query may fail,
and no program that uses the library may hear of anything. In the middle of each drain the moves are paused, all that
is under way is brought home, and every count and window of the four shards is compared with the oracle.

`make moves` is the long form, with MOVES_ROUNDS (3) rounds; the short one has one. It prints its seed, and SEED=… has
the same traffic again. The longest stall of a slot is the coordinator's figure. Clients feel it as an acknowledgement
that takes longer, so one producer plays songs of all slots all the time, and measures its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
import pytest

from tests.cluster.processes import Cluster, run_topk
from tests.faults.comparison import Comparison
from tests.faults.crowd import Crowd, Scene
from tests.faults.ledger import SONGS, Ledger, Plays
from tests.faults.traffic import RawProducer, now_ms
from tests.faults.weather import Weather
from topk_grpc.kernels import compiled
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ROUNDS: Final = int(os.environ.get("TOPK_MOVES_ROUNDS", "1"))
SEED: Final = int(os.environ.get("TOPK_MOVES_SEED") or random.SystemRandom().randrange(1 << 32))
STALL_MS_MAX: Final = 500
LOAD_MAX: Final = 6.0
"""Of a processor, the cluster's included. Where it is higher, or kernels are not compiled, stalls are not judged."""
HOME_SECONDS: Final = 30.0
MOVES_SECONDS: Final = 120.0 if compiled() else 360.0
PLAYS_PER_SECOND: Final = 5000.0 if compiled() else 50.0


def load_of_a_processor() -> float:
    """How many threads were running, or wanted to, on each of them, in the last minute or so."""
    return os.getloadavg()[0] / (os.cpu_count() or 1)


class Meter(RawProducer):
    """Plays every song in each batch, one batch at a time: its acknowledgement waits for the slowest of their slots.

    Attributes:
        waits: when each batch was sent (monotonic), and how long its acknowledgement took, seconds.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.waits: list[tuple[float, float]] = []
        self._songs = np.arange(SONGS if compiled() else 30)

    def batch(self) -> tuple[bytes, Plays]:
        zeros = np.zeros(len(self._songs), np.int64)
        plays = Plays("past", zeros, zeros, self._songs, zeros, zeros + 1)
        return self.request(plays), plays

    async def run(self, until: asyncio.Event) -> None:
        while not until.is_set():
            raw, plays = self.batch()
            self.ledger.add_sent(plays)
            began = time.monotonic()
            while True:
                try:
                    answer = await self.chance.choice(self._record)(raw, timeout=10)
                    break
                except grpc.RpcError as error:
                    self.met(error)
                    await asyncio.sleep(0.02)
            self.waits.append((began, time.monotonic() - began))
            self.check(answer, self.sequence, len(plays))
            self.acknowledged(plays)
            await asyncio.sleep(0.02)

    def longest(self, spans: list[tuple[float, float]], *, within: bool) -> float:
        """The longest wait of the batches that were under way in one of these spans of time, or of all others."""

        def moved(sent: float, wait: float) -> bool:
            return any(sent < end and begin < sent + wait for begin, end in spans)

        return max((wait for sent, wait in self.waits if moved(sent, wait) == within), default=0.0)


@dataclass
class Elastic:
    """One run.

    Attributes:
        cluster: of two shards and two gateways.
        gateways: HOST:PORT by name.
        findings: everything that ought not to be.
        stalls_ms: the longest stall of each change, as coordinators saw it.
        moving: when slots moved (monotonic).
    """

    cluster: Cluster
    gateways: dict[str, str]
    seed: int
    findings: list[str] = field(default_factory=list)
    stalls_ms: list[int] = field(default_factory=list)
    slots_moved: int = 0
    moving: list[tuple[float, float]] = field(default_factory=list)
    compared: int = 0

    async def run(self, rounds: int) -> str:
        """Grows and shrinks so many times; returns what came of it, a line."""
        began = time.monotonic()
        ledger = Ledger(now_ms(), rounds * 2 * MOVES_SECONDS)
        scene = Scene(self.gateways, [f"shard-{number}" for number in range(4)], None, Weather(), ledger)
        crowd = Crowd(scene, self.seed, PLAYS_PER_SECOND, self.findings.append, self.findings.append)
        meter = Meter("meter", ledger, self.findings.append, self.seed, crowd.channels)
        crowd.producers.append(meter)
        crowd.ask()
        try:
            for number in range(rounds):
                crowd.send()
                self._find_silent(await crowd.get_on(HOME_SECONDS))
                added = await self._change("add", "--shards", "2")
                await self._drain(added["shards"], crowd, ledger, whole=number == rounds - 1)
                for shard in added["shards"]:
                    await self._command("remove", shard)
                self._find_silent(await crowd.get_on(HOME_SECONDS))
                await self._compare(crowd, ledger, whole=number == rounds - 1)
        finally:
            await crowd.close()
        assert crowd.gave_up == 0, crowd.statuses
        assert not crowd.asked.refusals, crowd.asked.refusals
        still, moved = (1000 * meter.longest(self.moving, within=within) for within in (False, True))
        return (
            f"moves: seed {self.seed}, {rounds} rounds in {time.monotonic() - began:.0f} s, {self.slots_moved:,} slots"
            f" moved; plays acknowledged {ledger.plays_acknowledged:,}; answers checked"
            f" {crowd.asked.answers.total() + self.compared:,}; findings {len(self.findings)}; longest stall of a slot"
            f" {max(self.stalls_ms)} ms; longest acknowledgement {moved:.0f} ms while slots moved, {still:.0f} ms else;"
            f" load {load_of_a_processor():.1f}; statuses met {dict(crowd.statuses)}"
        )

    def _find_silent(self, silent: list[str]) -> None:
        self.findings += [f"{name} did not get on within {HOME_SECONDS:g} s" for name in silent]

    async def _command(self, *arguments: str) -> dict[str, Any]:
        """What `topk cluster …` prints."""
        where = ("--gateway", ",".join(self.gateways.values()), "--json")
        done = await asyncio.to_thread(run_topk, "cluster", *arguments, *where, seconds=MOVES_SECONDS)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    async def _change(self, *arguments: str) -> dict[str, Any]:
        """A command that returns when the slots have moved."""
        with self._slots_move():
            changed = await self._command(*arguments)
        self.stalls_ms.append(changed["longest_stall_ms"])
        self.slots_moved += changed["slots_moved"]
        assert changed["slots_moved"] > 0, changed
        return changed

    @contextmanager
    def _slots_move(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.moving.append((began, time.monotonic()))

    async def _drain(self, shards: list[str], crowd: Crowd, ledger: Ledger, *, whole: bool) -> None:
        """Drains, with a pause when about half is done, in which everything is compared."""
        begun = asyncio.create_task(self._change("drain", *shards))
        left, first = await self._slots_left(), 0
        while not begun.done() and (not first or left > first / 2):
            first, left = max(first, left), await self._slots_left()
        await self._command("pause")
        await self._compare(crowd, ledger, whole=whole)
        crowd.send()
        self._find_silent(await crowd.get_on(HOME_SECONDS))
        await self._command("resume")
        await begun

    async def _slots_left(self) -> int:
        described: pb.DescribeClusterResponse = await asyncio.to_thread(
            self.cluster.stub.DescribeCluster, pb.DescribeClusterRequest(), timeout=10
        )
        return described.slots_left

    async def _compare(self, crowd: Crowd, ledger: Ledger, *, whole: bool) -> None:
        """Everything is brought home: every count, and with `whole` every window, is exactly what the oracle has."""
        assert await crowd.bring_home(HOME_SECONDS), self.findings
        comparison = await asyncio.to_thread(
            Comparison, ledger, self.gateways, self.findings.append, self.seed, HOME_SECONDS
        )
        assert await comparison.counts() == (0, 0), self.findings
        if whole:
            await comparison.windows()
            await comparison.watch(crowd.watched)
        self.compared += comparison.compared


@pytest.mark.timeout(120 + ROUNDS * 2 * MOVES_SECONDS)
def test_shards_come_and_go_under_load_and_every_play_counts_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = Cluster(tmp_path, shards=2)
    try:
        cluster.start()
        run = Elastic(cluster, {"gateway-0": cluster.address, "gateway-1": cluster.add_gateway()}, SEED)
        line = asyncio.run(run.run(ROUNDS))
        with capsys.disabled():
            print(f"\n{line}")
        assert not run.findings, "\n".join(run.findings[:20])
        assert run.slots_moved >= ROUNDS * 2 * 512
        judged = compiled() and load_of_a_processor() <= LOAD_MAX
        assert not judged or max(run.stalls_ms) < STALL_MS_MAX
    finally:
        cluster.close()
