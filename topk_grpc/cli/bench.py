"""`topk bench`: loads a running cluster with generated plays and measures what comes back.
 Batches are drawn and encoded before the clock starts; while it runs only their numbers change. So the figures are
the cluster's, and those of the client's delivery, not of a generator. Latency of an acknowledgement counts from the
moment that the batch is handed to the delivery, waiting behind others in flight included.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np
import uvloop
from rich.console import Console
from rich.table import Table

from topk_grpc import kernels
from topk_grpc.cli.load import EncodedPlays, Zipf
from topk_grpc.cli.progress import Progress
from topk_grpc.cli.reach import Reach, unreachable
from topk_grpc.client import TopKClient
from topk_grpc.client.delivery import Delivery
from topk_grpc.client.outbox import OutgoingBatch
from topk_grpc.client.stats import ClientStats
from topk_grpc.errors import UnavailableError
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb

_POOL_PLAYS: Final = 2_000_000
_POOL_SECONDS_MAX: Final = 5.0
_QUERY_K: Final = 100
_QUERIES_IDLE: Final = 200
_QUERY_PAUSE_SECONDS: Final = 0.1
_PATIENCE_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent: `topk bench --help` explains each."""

    seconds: float
    songs: int
    zipf: float
    batch_plays: int
    producers: int
    in_flight: int
    seed: int


@dataclass(slots=True)
class Figures:
    """What was measured; times in milliseconds."""

    plays: int = 0
    rejected: int = 0
    seconds: float = 0.0
    ack_ms: list[float] = field(default_factory=list)
    top_k_busy_ms: list[float] = field(default_factory=list)
    top_k_idle_ms: list[float] = field(default_factory=list)

    def as_json(self, load: Load) -> dict[str, Any]:
        """Rates and percentiles."""
        return {
            "plays": self.plays,
            "rejected": self.rejected,
            "seconds": round(self.seconds, 3),
            "plays_per_second": round(self.plays / self.seconds) if self.seconds else 0,
            "ack_ms": percentiles(self.ack_ms),
            "top_k_busy_ms": percentiles(self.top_k_busy_ms),
            "top_k_idle_ms": percentiles(self.top_k_idle_ms),
            "compiled": kernels.compiled(),
            "load": asdict(load),
        }


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """The 50th and 99th; None without values."""
    if not values:
        return {"p50": None, "p99": None}
    p50, p99 = np.percentile(np.asarray(values), [50, 99])
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3)}


def run(load: Load, gateway: Reach, as_json: bool) -> None:
    """Loads the cluster and prints the figures.

    Raises:
        TopKError: it does not answer, or refuses.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        figures = runner.run(measure(load, gateway))
    result = figures.as_json(load)
    if as_json:
        print(json.dumps(result))  # noqa: T201
        return
    console = Console()
    console.print(
        f"{load.songs:,} songs, Zipf {load.zipf:g}, {load.batch_plays:,} plays a batch, {load.producers} streams",
        highlight=False,
        soft_wrap=True,
    )
    table = Table()
    table.add_column("what")
    table.add_column("p50", justify="right")
    table.add_column("p99", justify="right")
    rows = {
        "batch acknowledged (durable)": result["ack_ms"],
        f"GetTopK k={_QUERY_K} under load": result["top_k_busy_ms"],
        f"GetTopK k={_QUERY_K} idle": result["top_k_idle_ms"],
    }
    for name, pair in rows.items():
        table.add_row(name, *("–" if pair[p] is None else f"{pair[p]:,.2f} ms" for p in ("p50", "p99")))
    console.print(table)
    console.print(
        f"{result['plays_per_second']:,} plays/s durable: {result['plays']:,} in {result['seconds']:.2f} s",
        highlight=False,
    )


async def measure(load: Load, gateway: Reach, progress: Progress | None = None) -> Figures:
    """Sends for a time, then asks an idle cluster.

    Raises:
        TopKError: the cluster does not answer, or refuses.
    """
    figures = Figures()
    with progress or Progress() as shown:
        async with gateway.client(deadline_seconds=_PATIENCE_SECONDS) as client:
            try:
                await client.describe()  # before anything takes long: is there a cluster?
            except UnavailableError as error:
                raise unreachable(gateway, error) from error
            pool = await asyncio.to_thread(_pool, load)
            bar = shown.bar("sending", load.seconds)
            began = time.perf_counter()
            until = began + load.seconds
            producers = [_Producer(load, gateway, pool, index) for index in range(load.producers)]
            asking = asyncio.create_task(_ask_under_load(client, figures))
            try:
                async with asyncio.TaskGroup() as group:
                    for producer in producers:
                        group.create_task(producer.run(until))
                    while (now := time.perf_counter()) < until:
                        bar.update(now - began, sum(producer.stats.plays_accepted for producer in producers))
                        await asyncio.sleep(min(0.1, until - now))
            except ExceptionGroup as failures:
                raise failures.exceptions[0] from None
            finally:
                asking.cancel()
            figures.seconds = time.perf_counter() - began
            bar.close()
            for producer in producers:
                figures.plays += producer.stats.plays_accepted
                figures.rejected += producer.stats.plays_rejected
                figures.ack_ms += producer.ack_ms
            for _ in range(_QUERIES_IDLE):
                figures.top_k_idle_ms.append(await _timed_top_k(client))
    return figures


def _pool(load: Load) -> list[EncodedPlays]:
    """Batches to send round and round; fewer where encoding is slow."""
    zipf = Zipf(load.songs, load.zipf, load.seed)
    times = np.random.default_rng(load.seed)
    until = time.perf_counter() + _POOL_SECONDS_MAX
    pool: list[EncodedPlays] = []
    while len(pool) < 4 or (len(pool) * load.batch_plays < _POOL_PLAYS and time.perf_counter() < until):
        now_ms = int(time.time() * 1000)
        played_at_ms = now_ms - times.integers(0, 1000, load.batch_plays, dtype=np.int64)
        pool.append(EncodedPlays.of(zipf.draw(load.batch_plays), played_at_ms))
    return pool


async def _ask_under_load(client: TopKClient, figures: Figures) -> None:
    while True:
        figures.top_k_busy_ms.append(await _timed_top_k(client))
        await asyncio.sleep(_QUERY_PAUSE_SECONDS)


async def _timed_top_k(client: TopKClient) -> float:
    began = time.perf_counter()
    await client.top_k("global", _QUERY_K)
    return (time.perf_counter() - began) * 1000


class _Producer:
    """One stream of batches."""

    def __init__(self, load: Load, gateway: Reach, pool: Sequence[EncodedPlays], index: int) -> None:
        self.stats = ClientStats()
        self.ack_ms: list[float] = []
        self._load = load
        self._gateway = gateway
        self._pool = pool
        self._turn = index * len(pool) // load.producers
        self._producer_id = f"bench-{uuid.uuid4().hex}".encode()
        self._submitted: dict[int, float] = {}

    async def run(self, until: float) -> None:
        """Sends until the time given, then until all is acknowledged."""
        connection = self._gateway.connection()
        delivery = Delivery(
            connection,
            self,
            self.stats,
            first_sequence=1,
            batches_in_flight=self._load.in_flight,
            expect_duplicates=False,
            silence_seconds=_PATIENCE_SECONDS,
            random=random.random,
        )
        loop = asyncio.get_running_loop()
        try:
            while time.perf_counter() < until:
                await delivery.wait_until(
                    lambda: delivery.has_room, loop.time() + _PATIENCE_SECONDS, "no room for another batch"
                )
                self._submit(delivery)
                await asyncio.sleep(0)
            target = delivery.next_sequence
            await delivery.wait_until(
                lambda: delivery.lowest_unacknowledged >= target,
                loop.time() + _PATIENCE_SECONDS,
                "not everything is durable",
            )
        finally:
            await delivery.close()
            await connection.close()

    def _submit(self, delivery: Delivery) -> None:
        plays = self._pool[self._turn % len(self._pool)]
        self._turn += 1
        sequence = delivery.next_sequence
        self._submitted[sequence] = time.perf_counter()
        delivery.submit(plays.request(self._producer_id, sequence, int(time.time() * 1000)), plays.plays)

    def on_acknowledged(self, batch: OutgoingBatch, response: pb.StreamPlaysResponse) -> None:
        """Counts an acknowledged batch."""
        self.ack_ms.append((time.perf_counter() - self._submitted.pop(batch.sequence)) * 1000)
        self.stats.plays_accepted += response.accepted
        self.stats.plays_rejected += len(response.rejected)

    def on_room(self) -> None:
        """Nothing to do: `run` waits by itself."""
