"""How long queries take at 4 shards and 1 M songs, idle and while plays stream in.

One caller asks one query after another, one kind at a time, so what is measured is latency, not throughput, and a scan
of a million entries does not cool the caches that the next short query would find warm.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import uvloop

from benchmarks.figures import Report, Target, percentiles, print_reports
from benchmarks.generator import RAMP_SECONDS
from benchmarks.harness import BenchmarkError, Cluster, Process, module, scratch_directory, wait_quiet
from benchmarks.plays import POOL_PLAYS, song_ids
from topk_grpc import TopKClient

TITLE: Final = "query"
TARGET_P50: Final = Target("<=", 5.0)
_WARM_UP: Final = 5
_BUSY_SECONDS: Final = 3.0
_SONGS_ASKED: Final = 10

Query = Callable[[TopKClient], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured: `--help` explains each."""

    shards: int = 4
    songs: int = 1_000_000
    k: int = 100
    queries: int = 200
    busy_queries: int = 50
    history_seconds: float = 3.0
    batch_plays: int = 8192
    pool_plays: int = POOL_PLAYS
    data_dir: Path | None = None


def _queries(options: Options) -> dict[str, Query]:
    names = [bytes(one).decode() for one in song_ids(options.songs)[:1000]]
    draw = random.Random(1)
    return {
        f"GetTopK k={options.k} global": lambda client: client.top_k("global", options.k),
        f"GetTopK k={options.k} tumbling:1m": lambda client: client.top_k("tumbling:1m", options.k),
        f"GetTopK k={options.k} tumbling:1h": lambda client: client.top_k("tumbling:1h", options.k),
        f"GetSongs {_SONGS_ASKED} songs, count and rank, global": lambda client: client.songs(
            draw.sample(names, min(len(names), _SONGS_ASKED))
        ),
    }


async def measure(address: str, queries: dict[str, Query], times: int) -> dict[str, list[float]]:
    """Milliseconds that each kind of query took, one after another."""
    taken: dict[str, list[float]] = {name: [] for name in queries}
    async with TopKClient(address) as client:
        for name, query in queries.items():
            for turn in range(-_WARM_UP, times):
                began = time.perf_counter()
                await query(client)
                if turn >= 0:
                    taken[name].append((time.perf_counter() - began) * 1000)
    return taken


async def measure_busy(address: str, queries: dict[str, Query], times: int, load: Process) -> dict[str, list[float]]:
    """The same while batches stream in at full rate; what is asked before and after does not count."""
    taken: dict[str, list[float]] = {name: [] for name in queries}
    async with TopKClient(address) as client:
        while min(map(len, taken.values())) < times:
            await asyncio.to_thread(load.ask, do="prepare", seconds=_BUSY_SECONDS)
            sending = asyncio.create_task(asyncio.to_thread(load.ask, do="run", seconds=_BUSY_SECONDS))
            ends = time.perf_counter() + RAMP_SECONDS + _BUSY_SECONDS
            await asyncio.sleep(RAMP_SECONDS)
            for name in itertools.cycle(queries):
                began = time.perf_counter()
                await queries[name](client)
                ended = time.perf_counter()
                if ended > ends:
                    break
                taken[name].append((ended - began) * 1000)
            await sending
    return taken


def run(options: Options) -> Report:
    """Measures.

    Raises:
        BenchmarkError: a process failed.
    """
    report = Report(TITLE)
    queries = _queries(options)
    with scratch_directory(options.data_dir) as scratch, ExitStack() as stack:
        cluster = stack.enter_context(Cluster(scratch / "cluster", options.shards))
        command = module(
            "benchmarks.generator", cluster.address, "--songs", options.songs, "--batch-plays", options.batch_plays,
            "--pool-plays", options.pool_plays, "--streams", 2, "--in-flight", 4,
        )  # fmt: skip
        load = stack.enter_context(Process(command, scratch))
        load.ask(do="load")
        load.ask(do="prepare", seconds=options.history_seconds)
        plays = load.ask(do="run", seconds=options.history_seconds)["plays_total"]
        wait_quiet(cluster.pids())
        loop_factory: Any = uvloop.new_event_loop
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            idle = runner.run(measure(cluster.address, queries, options.queries))
            busy = runner.run(measure_busy(cluster.address, queries, options.busy_queries, load))
    for state, taken in (("idle", idle), ("under ingest", busy)):
        for name, values in taken.items():
            targeted = state == "idle" and name.endswith("global") and name.startswith("GetTopK")
            report.figures += percentiles(f"{name}, {state}", values, TARGET_P50 if targeted else None)
    report.notes.append(
        f"{options.shards} shards, {options.songs:,} songs, {plays + options.songs:,} plays before the first query; "
        "one caller. Under ingest all processors are busy with plays."
    )
    report.details = {"idle_ms": idle, "under_ingest_ms": busy}
    return report


def parse(arguments: Sequence[str] | None = None) -> tuple[Options, bool]:
    """The options of a command line, and whether JSON is wanted."""
    defaults = Options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=defaults.shards)
    parser.add_argument("--songs", type=int, default=defaults.songs, help="different songs")
    parser.add_argument("--k", type=int, default=defaults.k, help="entries asked for")
    parser.add_argument("--queries", type=int, default=defaults.queries, help="queries of each kind, idle")
    parser.add_argument("--busy-queries", type=int, default=defaults.busy_queries, help="the same, under ingest")
    parser.add_argument("--data-dir", type=Path, help="where data is kept meanwhile; default: the current directory")
    parser.add_argument("--json", action="store_true", help="print everything measured as JSON")
    chosen = vars(parser.parse_args(arguments))
    as_json = chosen.pop("json")
    return Options(**chosen), as_json


def main() -> None:
    """Measures and prints."""
    options, as_json = parse()
    try:
        report = run(options)
    except BenchmarkError as error:
        raise SystemExit(f"error: {error}") from error
    print_reports([report], as_json)


if __name__ == "__main__":
    main()
