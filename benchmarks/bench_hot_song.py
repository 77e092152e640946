"""One song that takes half of all plays: whether its shard has more to do than the others.

A gateway combines the equal plays of a batch, so a song costs its shard a play a batch and time bucket, however often
it is played. Two clusters take turns in one run, with the same number of plays of a million songs that are alike: in
the second every other play is of one song. For each round the load of the fullest shard is held against the mean, and
the second cluster's against the first's:

- **plays and bytes in parts**: what the gateway's own kernels make of the batches;
- **bytes written**: by the shards, to their logs;
- **processor time** of the shards.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import uvloop

from benchmarks.figures import Figure, Report, Target, print_reports
from benchmarks.harness import Cluster, cpu_seconds, scratch_directory, wait_quiet
from topk_grpc import TopKClient
from topk_grpc.cli.load import EncodedPlays, song_columns
from topk_grpc.kernels.hash import hash_strings
from topk_grpc.kernels.split import split_batch
from topk_grpc.kernels.wire import decode_batch, message_spans

TITLE: Final = "hot-song"
TARGET: Final = Target("<=", 1.10)
_PRODUCER: Final = b"hot-song"
_RESOLUTION_MS: Final = 1000
_SAMPLED_BATCHES: Final = 20
_KINDS: Final = ("uniform", "hot song")

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured: `--help` explains each."""

    rounds: int = 5
    plays: int = 4_000_000
    songs: int = 1_000_000
    batch_plays: int = 8192
    shards: int = 4
    data_dir: Path | None = None


@dataclass(slots=True)
class _Subject:
    """A cluster, and what it was sent.

    Attributes:
        kind: one of `_KINDS`.
        cluster: its processes.
        data_dir: of the cluster.
        loads: by measure, the fullest shard over the mean in each round.
    """

    kind: str
    cluster: Cluster
    data_dir: Path
    loads: dict[str, list[float]] = field(default_factory=dict)

    def note(self, measure: str, by_shard: Sequence[float]) -> None:
        """Keeps a round's load of the fullest shard over the mean."""
        self.loads.setdefault(measure, []).append(max(by_shard) / float(np.mean(by_shard)))


def _written(pid: int) -> int:
    """Bytes that a process has written to files so far."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar:"))


def songs_of(kind: str, plays: int, songs: int, seed: int) -> Int64s:
    """The songs of a round: all alike; of the other kind every other play is of the first."""
    drawn = np.random.default_rng(seed).integers(0, songs, plays, dtype=np.int64)
    if kind == "hot song":
        drawn[::2] = 0
    return drawn


def parts_of(songs: Int64s, batch_plays: int, owners: npt.NDArray[np.int32], shards: int) -> tuple[Int64s, Int64s]:
    """Plays and bytes in the parts of each shard, for the first batches."""
    plays, size = np.zeros(shards, np.int64), np.zeros(shards, np.int64)
    for number in range(min(_SAMPLED_BATCHES, len(songs) // batch_plays)):
        some = songs[number * batch_plays : (number + 1) * batch_plays]
        times = np.full(len(some), 1_700_000_000_000, np.int64)
        raw = EncodedPlays.of(some, times).request(_PRODUCER, number + 1, 1)
        columns = decode_batch(raw, message_spans(raw, 0, len(raw), 1)[0], 128, 8, 64, 65_536)
        hashes = hash_strings(raw, columns.song_starts, columns.song_sizes)
        split = split_batch(raw, columns, hashes, hashes, owners, shards, _RESOLUTION_MS)
        sent = split.stands_for == np.arange(columns.count)
        targets = owners[(hashes[sent] % np.uint64(len(owners))).astype(np.int64)]
        plays += np.bincount(targets, minlength=shards)
        size += np.array([len(part) for part in split.parts], np.int64)
    return plays, size


async def _send(address: str, songs: Int64s, batch_plays: int) -> None:
    """Sends plays of now, and waits until all are acknowledged."""
    now_ms = time.time_ns() // 1_000_000
    async with TopKClient(address, batch_plays=batch_plays, deadline_seconds=60) as client:
        for start in range(0, len(songs), batch_plays):
            some = songs[start : start + batch_plays]
            await client.record_columns(*song_columns(some), np.full(len(some), now_ms, np.int64))
        await client.flush()


def _round(subject: _Subject, options: Options, seed: int, runner: asyncio.Runner) -> None:
    songs = songs_of(subject.kind, options.plays, options.songs, seed)
    topology = json.loads((subject.data_dir / "topology.json").read_text())
    owners = np.array(topology["owners"], np.int32)
    plays, size = parts_of(songs, options.batch_plays, owners, options.shards)
    pids = subject.cluster.shard_pids()
    before = [(cpu_seconds([pid]), _written(pid)) for pid in pids]
    runner.run(_send(subject.cluster.address, songs, options.batch_plays))
    wait_quiet(subject.cluster.pids())
    subject.note("plays in parts", plays.tolist())
    subject.note("bytes in parts", size.tolist())
    subject.note("bytes written", [_written(pid) - wrote for pid, (_, wrote) in zip(pids, before, strict=True)])
    spent = [cpu_seconds([pid]) - cpu for pid, (cpu, _) in zip(pids, before, strict=True)]
    subject.note("processor time", [max(one, 0.01) for one in spent])  # the clock of processes ticks so often


def run(options: Options) -> Report:
    """Measures.

    Raises:
        BenchmarkError: it cannot be carried out.
    """
    report = Report(TITLE)
    loop_factory: Any = uvloop.new_event_loop
    with scratch_directory(options.data_dir) as scratch, ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner(loop_factory=loop_factory))
        subjects = []
        for kind in _KINDS:
            data_dir = scratch / kind.replace(" ", "-")
            cluster = stack.enter_context(Cluster(data_dir, options.shards, snapshot_log_bytes=1 << 40))
            subjects.append(_Subject(kind, cluster, data_dir))
        for number in range(options.rounds + 1):
            for subject in subjects:
                if number == 1:
                    subject.loads.clear()  # the first round gives every song its place, and counts for nothing
                _round(subject, options, number, runner)
    uniform, hot = subjects
    for measure in uniform.loads:
        for subject in subjects:
            name = f"{measure}, fullest shard / mean, {subject.kind}"
            report.figures.append(Figure.of(name, subject.loads[measure], "×"))
        pairs = zip(hot.loads[measure], uniform.loads[measure], strict=True)
        ratios = [one / other for one, other in pairs]
        report.figures.append(Figure.of(f"{measure}, hot song / uniform", ratios, "×", TARGET))
    report.details["loads"] = {subject.kind: subject.loads for subject in subjects}
    report.notes.append(
        f"{options.shards} shards; {options.plays:,} plays a round, {options.batch_plays:,} a batch, of"
        f" {options.songs:,} songs; of the hot song 50 %."
    )
    return report


def parse(arguments: Sequence[str] | None = None) -> tuple[Options, bool]:
    """The options of a command line, and whether JSON is wanted."""
    defaults = Options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=defaults.rounds, help="rounds of each cluster")
    parser.add_argument("--plays", type=int, default=defaults.plays, help="plays in a round")
    parser.add_argument("--songs", type=int, default=defaults.songs, help="different songs")
    parser.add_argument("--batch-plays", type=int, default=defaults.batch_plays, help="plays in a batch")
    parser.add_argument("--shards", type=int, default=defaults.shards, help="shards of each cluster")
    parser.add_argument("--data-dir", type=Path, help="where data is kept meanwhile; default: the current directory")
    parser.add_argument("--json", action="store_true", help="print everything measured as JSON")
    chosen = vars(parser.parse_args(arguments))
    as_json = chosen.pop("json")
    return Options(**chosen), as_json


def main() -> None:
    """Measures and prints."""
    options, as_json = parse()
    print_reports([run(options)], as_json)


if __name__ == "__main__":
    main()
