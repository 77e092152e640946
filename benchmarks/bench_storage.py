"""What a shard does without its network: groups made durable and applied, a snapshot, recovery.

It is the shard's own core, in this process, fed with the requests that a gateway would send.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.figures import Figure, Report, print_reports
from benchmarks.harness import BenchmarkError, scratch_directory
from benchmarks.plays import PlayPool, request
from topk_grpc.config import ShardSettings
from topk_grpc.kernels.encode import batch_header, varint
from topk_grpc.kernels.hash import hash_strings
from topk_grpc.kernels.split import split_batch
from topk_grpc.kernels.wire import decode_batch, message_spans
from topk_grpc.model import ClusterSettings
from topk_grpc.shard.core import Identity, ShardCore

TITLE: Final = "storage"
_PRODUCER: Final = b"bench"


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured: `--help` explains each."""

    plays: int = 4_000_000
    songs: int = 1_000_000
    batch_plays: int = 8192
    group_batches: int = 8
    data_dir: Path | None = None


def append_request(
    raw: bytes, sequence: int, now_ms: int, cluster: ClusterSettings, producer_id: bytes = _PRODUCER
) -> bytes:
    """What the gateway makes of a client's request when one shard owns everything."""
    spans, _ = message_spans(raw, 0, len(raw), 1)
    columns = decode_batch(raw, spans, 128, 8, 64, 65_536)
    hashes = hash_strings(raw, columns.song_starts, columns.song_sizes)
    split = split_batch(raw, columns, hashes, hashes, np.zeros(cluster.slots, np.int32), 1, cluster.resolution_ms)
    header = batch_header(producer_id, sequence, now_ms)
    part = split.parts[0]
    return b"".join((b"\x08", varint(sequence), b"\x1a", varint(len(header) + len(part)), header, part))


def requests(
    plays: int, songs: int, batch_plays: int, cluster: ClusterSettings, producer_id: bytes = _PRODUCER
) -> list[bytes]:
    """AppendRequests with plays of songs by Zipf's law, a batch each."""
    pool = PlayPool(songs, 1.0, batch_plays, plays)
    pool.stamp(0)
    now_ms = time.time_ns() // 1_000_000
    made = []
    for turn in range(max(1, plays // batch_plays)):
        raw = request(pool.batch(turn, 0), producer_id, turn + 1, now_ms)
        made.append(append_request(raw, turn + 1, now_ms, cluster, producer_id))
    return made


def _timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def run(options: Options) -> Report:
    """Measures.

    Raises:
        BenchmarkError: the shard did not keep what it was given.
    """
    report = Report(TITLE)
    cluster = ClusterSettings()
    made = requests(options.plays, options.songs, options.batch_plays, cluster)
    plays = len(made) * options.batch_plays
    with scratch_directory(options.data_dir) as scratch:
        settings = ShardSettings(topology="-", shard_id="shard-0", data_dir=str(scratch / "shard-0"))

        def open_core() -> ShardCore:
            core = ShardCore(settings, cluster)
            core.recover()
            return core

        core = open_core()
        core.own(Identity("bench", settings.shard_id), range(cluster.slots))
        began = time.perf_counter()
        for first in range(0, len(made), options.group_batches):
            answers = core.commit(made[first : first + options.group_batches], time.time_ns() // 1_000_000)
            for answer in answers:
                if isinstance(answer, Exception):
                    raise answer
        commit = time.perf_counter() - began
        log_bytes = core.position
        core.close()

        began = time.perf_counter()
        core = open_core()
        replay = time.perf_counter() - began
        counted, _ = core.state.boards["global"].totals(0)
        if counted != plays:
            raise BenchmarkError(f"{counted} plays came back, not {plays}")

        began = time.perf_counter()
        pending = core.begin_snapshot()
        copied = time.perf_counter()
        blocks = core.write_snapshot(pending)
        written = time.perf_counter()
        core.end_snapshot(pending, blocks)
        songs = len(core.state.songs)
        core.close()
        load = _timed(lambda: open_core().close())
    report.figures = [
        Figure(f"groups of {options.group_batches} batches made durable and applied", plays / commit, "plays/s"),
        Figure("log replayed", plays / replay, "plays/s"),
        Figure("log replayed, bytes", log_bytes / replay / 1e6, "MB/s"),
        Figure("snapshot: writes stopped for", 1000 * (copied - began), "ms"),
        Figure("snapshot: written beside them in", 1000 * (written - copied), "ms"),
        Figure("recovery from the snapshot", 1000 * load, "ms"),
    ]
    report.notes.append(
        f"One shard's core in one process: {plays:,} plays, {options.batch_plays:,} a batch, "
        f"{songs:,} different songs, {log_bytes / 1e6:.0f} MB of log."
    )
    return report


def parse(arguments: Sequence[str] | None = None) -> tuple[Options, bool]:
    """The options of a command line, and whether JSON is wanted."""
    defaults = Options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plays", type=int, default=defaults.plays, help="plays in the log")
    parser.add_argument("--songs", type=int, default=defaults.songs, help="different songs")
    parser.add_argument("--batch-plays", type=int, default=defaults.batch_plays, help="plays in a batch")
    parser.add_argument("--group-batches", type=int, default=defaults.group_batches, help="batches in an fdatasync")
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
