"""`topk bench partitioners`: the same plays through a cluster of each partitioner, side by side.

How even the shards are and what moves is computed (placement.py). What a query costs, and whether it is right, is
measured: a real cluster is started for each, loaded, and asked by a gateway's own code within this process, so that
every message to a shard is counted. The answers are held against the generator's tally: those of the cluster, and those
that merging the shards' k best alone would give.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
import uvloop
from rich.console import Console
from rich.table import Table

from topk_grpc import metrics
from topk_grpc.cli.embedded import EmbeddedCluster
from topk_grpc.cli.load import EncodedPlays, Int64s
from topk_grpc.cli.placement import Moved, Placement, Traffic, place
from topk_grpc.cli.progress import Progress
from topk_grpc.config import GatewaySettings
from topk_grpc.errors import UnavailableError
from topk_grpc.gateway.queries import Queries
from topk_grpc.gateway.routing import RoutingWatch
from topk_grpc.gateway.scatter import Scatter, ShardQueries
from topk_grpc.model import GlobalWindow
from topk_grpc.pb.topk.v1 import shard_service_pb2 as shard_pb
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.ring import PARTITIONERS
from topk_grpc.rpc.connection import Connection
from topk_grpc.rpc.shard_channels import ShardChannels
from topk_grpc.rpc.status import from_rpc_error
from topk_grpc.topology import open_store

_OPEN: Final = {"TOPK_TLS_CERT": "", "TOPK_TLS_KEY": "", "TOPK_TOKENS_FILE": "", "TOPK_TLS_CLIENT_CA": ""}
_UNDER_WAY_MAX: Final = 16
_PATIENCE_SECONDS: Final = 60.0

Places = Sequence[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class Options:
    """What is compared: `topk bench partitioners --help` explains each."""

    shards: int = 4
    slots: int = 1024
    plays: int = 1_000_000
    songs: int = 100_000
    zipf: float = 1.0
    batch_plays: int = 1000
    producers: int = 4
    k: int = 100
    seed: int = 1

    @property
    def traffic(self) -> Traffic:
        """The plays."""
        return Traffic(self.plays, self.batch_plays, self.songs, self.zipf, self.producers, self.seed)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a query of the k best cost, and how right it was.

    Attributes:
        messages, bytes: between the gateway and its shards, both ways.
        wrong: places of the k that differ from the tally.
        plain_messages, plain_bytes, plain_wrong: the same, had the shards' k best been merged and no more.
    """

    messages: int
    bytes: int
    wrong: int
    plain_messages: int
    plain_bytes: int
    plain_wrong: int


def run(options: Options, as_json: bool) -> int:
    """Compares, and prints a table.

    Returns:
        The exit status: 1 if an answer of a cluster was wrong.

    Raises:
        TopKError: a cluster does not start or does not answer.
    """
    traffic = options.traffic
    placements = {name: place(name, traffic, options.shards, options.slots) for name in PARTITIONERS}
    asked: dict[str, Asked] = {}
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner, Progress() as progress:
        bar = progress.bar("clusters", len(PARTITIONERS))
        for name in PARTITIONERS:
            asked[name] = runner.run(_measure(name, traffic, options))
            bar.update(len(asked), len(asked) * options.plays)
    if as_json:
        found = {name: {"placement": asdict(placements[name]), "query": asdict(asked[name])} for name in PARTITIONERS}
        print(json.dumps({"options": asdict(options), "partitioners": found}))  # noqa: T201
    else:
        _print(options, placements, asked)
    return int(any(one.wrong for one in asked.values()))


# --- A cluster --------------------------------------------------------------------------------------------------------


async def _measure(name: str, traffic: Traffic, options: Options) -> Asked:
    folder = Path(tempfile.mkdtemp(prefix=f"topk-bench-{name}-"))
    cluster = EmbeddedCluster(
        folder / "data", shards=options.shards, partitioner=name, slots=options.slots, environment=_OPEN
    )
    try:
        await cluster.start()
        await cluster.wait_ready()
        await _load(cluster.address, traffic)
        return await _ask(f"file:{folder / 'data' / 'topology.json'}", traffic.ranked[: options.k], options)
    finally:
        await cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


async def _load(address: str, traffic: Traffic) -> None:
    """Sends all batches; a producer's in their order, as many at once as its marks allow."""
    played_at_ms = int(time.time() * 1000)
    room = asyncio.Semaphore(_UNDER_WAY_MAX)
    connection = Connection(address)

    async def send(raw: bytes) -> None:
        try:
            answer = pb.RecordPlaysResponse.FromString(await record(raw, timeout=_PATIENCE_SECONDS))
            if answer.rejected or answer.duplicate:
                raise UnavailableError(f"batch {answer.sequence} did not count as it was sent: {answer}")
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        finally:
            room.release()

    try:
        record: Any = connection.channel.unary_unary("/topk.v1.TopKService/RecordPlays")
        async with asyncio.TaskGroup() as group:
            for batch in traffic.batches():
                await room.acquire()
                encoded = EncodedPlays.of(batch.songs, _all_at(played_at_ms, len(batch.songs)))
                group.create_task(send(encoded.request(batch.producer_id, batch.sequence, played_at_ms)))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    finally:
        await connection.close()


def _all_at(time_ms: int, count: int) -> Int64s:
    return np.full(count, time_ms, np.int64)


async def _ask(topology_url: str, truth: Places, options: Options) -> Asked:
    """Asks as a gateway does, and as one would that merges the shards' best alone."""
    settings = GatewaySettings(topology=topology_url)
    store = open_store(topology_url)
    topology = await store.read()
    watch = RoutingWatch(store, topology, lambda _: None)
    shards = ShardQueries(settings, ShardChannels(settings, topology.cluster_id, topology.secret))
    try:
        scatter = Scatter(settings, watch, shards)
        queries = Queries(settings, topology.settings.resolution_ms, scatter)
        before = _spent()
        answer = await queries.top_k(GlobalWindow(), options.k, "", None, allow_partial=False)
        between = _spent()
        request = shard_pb.QueryTopKRequest(scope=shard_pb.Scope(), k=options.k)
        gathered = await scatter.gather("QueryTopK", request, allow_partial=False)
        after = _spent()
    finally:
        await watch.close()
        await shards.close()
        await store.close()
    exact = [(entry.song_id, entry.count) for entry in answer.entries]
    plain: Counter[str] = Counter()
    for one in gathered.answers.values():
        plain.update(dict(zip(one.song_ids, one.counts, strict=True)))
    merged = sorted(plain.items(), key=lambda place: (-place[1], place[0]))[: options.k]
    return Asked(
        between[0] - before[0], between[1] - before[1], _differ(exact, truth),
        after[0] - between[0], after[1] - between[1], _differ(merged, truth),
    )  # fmt: skip


def _spent() -> tuple[int, int]:
    """Messages and bytes to and from shards so far."""
    counters = metrics.SHARD_QUERY_MESSAGES, metrics.SHARD_QUERY_BYTES
    messages, size = (
        sum(sample.value for family in counter.collect() for sample in family.samples if sample.name.endswith("_total"))
        for counter in counters
    )
    return int(messages), int(size)


def _differ(places: Places, truth: Places) -> int:
    """How many places of the truth are another's, or have another count."""
    return sum(one != other for one, other in zip(places, truth, strict=False)) + abs(len(truth) - len(places))


# --- The tables -------------------------------------------------------------------------------------------------------


def placement_row(name: str, placement: Placement) -> list[str]:
    """A line of the first table; docs/partitioning.md has the same."""
    return [
        name,
        f"{placement.slots_load:.3f}",
        f"{placement.plays_load:.3f}",
        *_moved(placement.joins),
        *_moved(placement.leaves),
    ]


def _moved(moved: Moved) -> tuple[str, str]:
    return f"{moved.slots:.1%}", "refused" if moved.plays is None else f"{moved.plays:.1%}"


def query_row(name: str, asked: Asked) -> list[str]:
    """A line of the second table."""
    return [
        name,
        f"{asked.messages}",
        f"{asked.bytes / 1024:,.1f} KiB",
        f"{asked.wrong}",
        f"{asked.plain_messages}",
        f"{asked.plain_bytes / 1024:,.1f} KiB",
        f"{asked.plain_wrong}",
    ]


def _print(options: Options, placements: dict[str, Placement], asked: dict[str, Asked]) -> None:
    console = Console()
    console.print(
        f"{options.shards} shards, {options.slots:,} slots; {options.plays:,} plays of {options.songs:,} songs, Zipf"
        f" {options.zipf:g}, {options.batch_plays:,} a batch, {options.producers} producers",
        highlight=False,
        soft_wrap=True,
    )
    table = _table("The fullest shard over the mean, and what moves", placements_head(options.shards))
    for name, placement in placements.items():
        table.add_row(*placement_row(name, placement))
    console.print(table)
    table = _table(f"A query of the {options.k} best; and by merging the shards' best alone", QUERY_HEAD)
    for name, one in asked.items():
        table.add_row(*query_row(name, one))
    console.print(table)


QUERY_HEAD: Final = ("messages", "bytes", "wrong", "plain", "bytes", "wrong")
"""The names of the second table's columns behind the partitioner's: how many of the places were wrong."""


def placements_head(shards: int) -> list[str]:
    """The names of the first table's columns behind the partitioner's."""
    joins, leaves = f"{shards} → {shards + 1}", f"{shards} → {shards - 1}"
    return ["slots", "plays", f"{joins}: slots", "plays", f"{leaves}: slots", "plays"]


def _table(title: str, head: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("partitioner", no_wrap=True)
    for name in head:
        table.add_column(name, justify="right", no_wrap=True)
    return table
