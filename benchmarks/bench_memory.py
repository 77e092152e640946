"""Resident memory of a shard: bytes an entry beside its id, at 1 M songs in the global chart.

The shard first takes traffic of a few songs (libraries, buffers, open chunks), then each of the songs is played
once. What its anonymous resident memory (`RssAnon`) has grown by, less the ids' own bytes, is divided by the songs.
It is read twice: right after the plays, when each also lies in memory as a cell of its second, and after the next
snapshot, when those cells are mapped files, which the kernel may drop: the first is a peak, the second is what an
entry costs for good, and has the target.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.figures import Figure, Report, Target, print_reports
from benchmarks.harness import BenchmarkError, Cluster, Process, module, scratch_directory, wait_quiet
from benchmarks.plays import ID_BYTES, song_ids
from topk_grpc import TopKClient

TITLE: Final = "memory"
TARGET: Final = Target("<=", 120)
_SNAPSHOT_SECONDS: Final = 45.0


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured: `--help` explains each."""

    songs: int = 1_000_000
    few_songs: int = 1000
    warm_up_seconds: float = 1.0
    batch_plays: int = 8192
    snapshot_seconds: float = 8.0
    data_dir: Path | None = None


def _anonymous_bytes(pid: int) -> int:
    """Resident memory of a process that no file stands for."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise BenchmarkError("this kernel does not tell RssAnon (Linux 4.5 and later do)")


def _load(stack: ExitStack, scratch: Path, address: str, songs: int, options: Options) -> Process:
    command = module(
        "benchmarks.generator", address, "--songs", songs, "--batch-plays", options.batch_plays,
        "--pool-plays", 16 * options.batch_plays, "--streams", 2, "--in-flight", 4,
    )  # fmt: skip
    return stack.enter_context(Process(command, scratch))


async def _reported(address: str) -> tuple[int, int]:
    """Entries, and the bytes that the shard itself says it uses."""
    async with TopKClient(address) as client:
        (shard,) = (await client.describe()).shards
        return shard.entries, shard.memory_bytes


async def _play_once_more(address: str) -> None:
    """Plays a song that is known, so that another snapshot falls due."""
    async with TopKClient(address) as client:
        await client.record(song_ids(1)[0].tobytes().decode(), time.time_ns() // 1_000_000)
        await client.flush()


def _wait_snapshot(data: Path, address: str) -> None:
    """Returns when everything so far is in a snapshot: the next one may have begun before the last plays came."""
    for _ in range(2):
        _wait_next_snapshot(data, address)


def _wait_next_snapshot(data: Path, address: str) -> None:
    before = {path.name for path in (data / "snapshots").iterdir()}
    asyncio.run(_play_once_more(address))
    deadline = time.monotonic() + _SNAPSHOT_SECONDS
    while not {path.name for path in (data / "snapshots").iterdir() if path.name.isdigit()} - before:
        if time.monotonic() > deadline:
            raise BenchmarkError(f"no snapshot within {_SNAPSHOT_SECONDS:g} s")
        asyncio.run(_reported(address))  # a turn of the shard's loop, which looks whether one is due
        time.sleep(0.2)


def run(options: Options) -> Report:
    """Measures.

    Raises:
        BenchmarkError: a process failed.
    """
    report = Report(TITLE)
    with scratch_directory(options.data_dir) as scratch, ExitStack() as stack:
        # A snapshot is due some seconds after the one before.
        cluster = stack.enter_context(Cluster(scratch / "cluster", 1, snapshot_seconds=options.snapshot_seconds))
        (pid,) = cluster.shard_pids()
        data = scratch / "cluster" / "shard-0"
        few = _load(stack, scratch, cluster.address, options.few_songs, options)
        few.ask(do="prepare", seconds=options.warm_up_seconds)
        few.ask(do="run", seconds=options.warm_up_seconds)
        load = _load(stack, scratch, cluster.address, options.songs, options)
        _wait_snapshot(data, cluster.address)
        wait_quiet([pid])
        before = _anonymous_bytes(pid)
        entries_before, reported_before = asyncio.run(_reported(cluster.address))
        load.ask(do="load")
        peak = _anonymous_bytes(pid)
        _wait_snapshot(data, cluster.address)
        wait_quiet([pid])
        after = _anonymous_bytes(pid)
        entries, reported = asyncio.run(_reported(cluster.address))
    added = entries - entries_before
    if added != options.songs - options.few_songs:
        raise BenchmarkError(f"the shard has {added} entries more, not those of {options.songs} songs")
    report.figures = [
        Figure("an entry beside its id, resident", (after - before) / added - ID_BYTES, "bytes", target=TARGET),
        Figure("the same before its play is in a snapshot", (peak - before) / added - ID_BYTES, "bytes"),
        Figure("the same by the shard's own account", (reported - reported_before) / added - ID_BYTES, "bytes"),
        Figure("resident before and without them", before / 1e6, "MB"),
    ]
    report.notes.append(f"{added:,} entries, ids of {ID_BYTES} bytes, one shard.")
    report.details = {"before": before, "peak": peak, "after": after, "reported": reported, "entries": added}
    return report


def parse(arguments: Sequence[str] | None = None) -> tuple[Options, bool]:
    """The options of a command line, and whether JSON is wanted."""
    defaults = Options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--songs", type=int, default=defaults.songs, help="different songs")
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
