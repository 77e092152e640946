"""A start after a crash, and what a snapshot costs while the shard serves: one shard's core with millions of entries.

Half of the entries are songs in the global chart, half are the same songs in one of 100 charts; sessions stand, whose
spans are part of a snapshot. The replay is of a log as gateways write it. Beside it, in the same rounds, a yardstick:
the same files read and their bytes checked by CRC-32C, and nothing else.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.bench_storage import append_request, requests
from benchmarks.figures import Figure, Report, Target, print_reports
from benchmarks.harness import BenchmarkError, scratch_directory
from benchmarks.plays import ID_BYTES, song_ids
from topk_grpc.config import ShardSettings
from topk_grpc.engine.copies import Room
from topk_grpc.kernels.encode import encode_batch_columns
from topk_grpc.model import ClusterSettings
from topk_grpc.shard.core import Identity, ShardCore
from topk_grpc.storage.checksums import crc32c
from topk_grpc.storage.files import OsFiles

TITLE: Final = "recovery"
_CHARTS: Final = 100
_HELD_MS: Final = 100.0
_LOAD_SECONDS: Final = 5.0
_REPLAY_PLAYS: Final = 3e6


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured: `--help` explains each."""

    entries: int = 5_000_000
    plays: int = 8_000_000
    songs: int = 1_000_000
    batch_plays: int = 8192
    rounds: int = 5
    data_dir: Path | None = None


class Shard:
    """A shard's core in a directory, started again and again."""

    def __init__(self, path: Path, standing: str) -> None:
        self.cluster = ClusterSettings()
        self.settings = ShardSettings(topology="-", shard_id=path.name, data_dir=str(path), standing_windows=standing)
        self.core = self.start()
        self.core.own(Identity("bench", path.name), range(self.cluster.slots))
        self.core.configure(_now_ms())

    def start(self) -> ShardCore:
        """Recovers."""
        self.core = ShardCore(self.settings, self.cluster)
        self.core.recover()
        return self.core

    def commit(self, group: Sequence[bytes]) -> None:
        """Takes a group through."""
        for answer in self.core.commit(group, _now_ms()):
            if isinstance(answer, Exception):
                raise answer

    def log_files(self) -> list[Path]:
        """The segments."""
        return sorted((Path(self.settings.data_dir) / "log").glob("*.log"))


def run(options: Options) -> Report:
    """Measures.

    Raises:
        BenchmarkError: the shard did not keep what it was given.
    """
    report = Report(TITLE)
    with scratch_directory(options.data_dir) as scratch:
        _snapshots(options, scratch / "entries", report)
        _replay(options, scratch / "log", report)
    return report


def _snapshots(options: Options, path: Path, report: Report) -> None:
    shard = Shard(path, "session:15m,tumbling:1h")
    for request in _every_entry(options, shard.cluster):
        shard.commit([request])
    shard.core.move_standing(_now_ms())
    entries = shard.core.state.entries
    held, used = [], []
    for number in range(options.rounds):
        room = Room(shard.core.snapshot_room())
        began = time.perf_counter()
        pending = shard.core.begin_snapshot(room)
        held.append(1000 * (time.perf_counter() - began))
        blocks = shard.core.write_snapshot(pending)
        began = time.perf_counter()
        shard.core.end_snapshot(pending, blocks)
        used.append(1000 * (time.perf_counter() - began))
        shard.core.clear_snapshot(pending, blocks)
        # Something to write at the next one.
        songs = max(options.entries // 2, 1)
        shard.commit(requests(options.batch_plays, songs, options.batch_plays, shard.cluster, b"new-%d" % number))
    pending = shard.core.begin_snapshot()
    shard.core.end_snapshot(pending, shard.core.write_snapshot(pending))
    shard.core.close()

    def load() -> None:
        shard.start().close()

    loads, processor = [], []
    for _ in range(options.rounds):
        before = time.process_time()
        loads.append(_seconds(load))
        processor.append(time.process_time() - before)
    if shard.core.state.entries != entries:
        raise BenchmarkError(f"{shard.core.state.entries} entries came back, not {entries}")
    stored = sum(file.stat().st_size for folder in ("blocks", "snapshots") for file in (path / folder).rglob("*.np*"))
    name = f"{entries / 1e6:g} M entries"
    report.figures += [
        Figure.of(f"snapshot of {name}: writes held when it begins", held, "ms", Target("<=", _HELD_MS)),
        Figure.of(f"snapshot of {name}: writes held when it is done", used, "ms", Target("<=", _HELD_MS)),
        Figure.of(f"snapshot of {name}: loaded by a start in", loads, "s", Target("<=", _LOAD_SECONDS)),
        Figure.of(f"snapshot of {name}: loaded, processor time", processor, "s"),
    ]
    report.notes.append(f"Snapshots: {entries:,} entries, {stored / 1e6:.0f} MB on disk with both generations.")


def _replay(options: Options, path: Path, report: Report) -> None:
    shard = Shard(path, "tumbling:1h")
    made = requests(options.plays, options.songs, options.batch_plays, shard.cluster)
    for first in range(0, len(made), 8):
        shard.commit(made[first : first + 8])
    plays, log_bytes = len(made) * options.batch_plays, shard.core.position
    shard.core.close()
    read, replayed, processor = [], [], []
    for _ in range(options.rounds):
        read.append(_seconds(lambda: [crc32c(OsFiles().map(file)) for file in shard.log_files()]))
        before = time.process_time()
        replayed.append(_seconds(shard.start))
        processor.append(time.process_time() - before)
        counted, _ = shard.core.state.boards["global"].totals(0)
        shard.core.close()
        if counted != plays:
            raise BenchmarkError(f"{counted} plays came back, not {plays}")
    report.figures += [
        Figure.of("log replayed", [plays / seconds for seconds in replayed], "plays/s", Target(">=", _REPLAY_PLAYS)),
        Figure.of("log replayed, by processor time", [plays / seconds for seconds in processor], "plays/s"),
        Figure.of("log replayed, bytes", [log_bytes / seconds / 1e6 for seconds in replayed], "MB/s"),
        Figure.of(
            "yardstick: the same bytes read and checked", [log_bytes / seconds / 1e6 for seconds in read], "MB/s"
        ),
        Figure.of(
            "the replay takes that of the yardstick",
            [replay / plain for replay, plain in zip(replayed, read, strict=True)],
            "×",
        ),
    ]
    report.notes.append(
        f"Replay: {plays:,} plays in {options.batch_plays:,} a batch, {options.songs:,} songs, {log_bytes / 1e6:.0f} MB"
        " of log, one standing window."
    )


def _every_entry(options: Options, cluster: ClusterSettings) -> list[bytes]:
    """Requests that play each song once, each in a chart."""
    ids = song_ids(options.entries // 2)
    names = [b"chart-%d" % (number % _CHARTS) for number in range(options.batch_plays)]
    made = []
    for number, part in enumerate(np.array_split(ids, -(-len(ids) // options.batch_plays))):
        charts = names[: len(part)]
        offsets = np.concatenate(([0], np.cumsum([len(name) for name in charts]))).astype(np.int64)
        raw = encode_batch_columns(
            b"every",
            number + 1,
            _now_ms(),
            np.ascontiguousarray(part).reshape(-1),
            np.arange(len(part) + 1, dtype=np.int64) * ID_BYTES,
            np.full(len(part), _now_ms(), np.int64),
            None,
            b"".join(charts),
            offsets,
        )
        made.append(append_request(raw, number + 1, _now_ms(), cluster, b"every"))
    return made


def _seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def parse(arguments: Sequence[str] | None = None) -> tuple[Options, bool]:
    """The options of a command line, and whether JSON is wanted."""
    defaults = Options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=defaults.entries, help="(chart, song) pairs in the snapshot")
    parser.add_argument("--plays", type=int, default=defaults.plays, help="plays in the log")
    parser.add_argument("--songs", type=int, default=defaults.songs, help="different songs in the log")
    parser.add_argument("--batch-plays", type=int, default=defaults.batch_plays, help="plays in a batch")
    parser.add_argument("--rounds", type=int, default=defaults.rounds, help="how often each is measured")
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
