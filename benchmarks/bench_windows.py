"""What standing windows cost, and what they give.

1. **ingest**: two clusters of 2 shards taking turns, one with the global chart alone, one that keeps `tumbling:1h` and
   `sliding:10m/1m` standing besides;
2. **queries** on the three windows, idle and under full ingest;
3. **slides** of a window of ten minutes that a million songs were played in, in a shard's own state;
4. **size**: what a play costs a shard's core that holds ten million songs, against one that holds a million, in turns.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import uvloop

from benchmarks import bench_ingest, bench_query
from benchmarks.bench_ingest import Subject, generator
from benchmarks.bench_storage import append_request
from benchmarks.figures import Figure, Report, Target, percentiles, print_reports
from benchmarks.harness import BenchmarkError, Cluster, Process, scratch_directory, wait_quiet
from benchmarks.plays import POOL_PLAYS, PlayPool, request
from topk_grpc.config import ShardSettings
from topk_grpc.engine import query
from topk_grpc.engine.query import Scope
from topk_grpc.engine.state import GLOBAL, ShardState
from topk_grpc.engine.windows import bounds_of
from topk_grpc.model import ClusterSettings, parse_window
from topk_grpc.shard.core import Identity, ShardCore

TITLE: Final = "windows"
STANDING: Final = ("tumbling:1h", "sliding:10m/1m")
TARGETS: Final = {
    "ingest": Target(">=", 0.75),
    "idle": Target("<=", 5.0),
    "busy": Target("<=", 50.0),
    "slide": Target("<=", 50.0),
    "size": Target("<=", 2.0),
}
_MINUTE: Final = 60
_GROUP_BATCHES: Final = 8


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured: `--help` explains each."""

    rounds: int = 5
    seconds: float = 2.5
    songs: int = 1_000_000
    many_songs: int = 10_000_000
    slide_plays: int = 5_000_000
    k: int = 100
    queries: int = 200
    busy_queries: int = 300
    batch_plays: int = 8192
    pool_plays: int = POOL_PLAYS
    data_dir: Path | None = None


# --- Clusters ---------------------------------------------------------------------------------------------------------


def _clusters(report: Report, scratch: Path, options: Options) -> None:
    load = bench_ingest.Options(songs=options.songs, pool_plays=options.pool_plays)
    settings: dict[str, dict[str, object]] = {
        "global alone": {"standing_windows_max": 0},
        "three standing": {"standing_windows": ",".join(STANDING)},
    }
    subjects: list[Subject] = []
    addresses: list[str] = []
    with ExitStack() as stack:
        for name, chosen in settings.items():
            cluster = stack.enter_context(Cluster(scratch / name.replace(" ", "-"), 2, **chosen))
            sending = stack.enter_context(generator(scratch, load, options.batch_plays, cluster.address))
            sending.ask(do="load")
            subjects.append(Subject(name, sending, [cluster, sending]))
            addresses.append(cluster.address)
        for subject in subjects:
            subject.run(min(1.0, options.seconds))  # warms up, counts for nothing
        for _ in range(options.rounds):
            for subject in subjects:
                subject.rounds.append(subject.run(options.seconds))
        alone, standing = subjects
        report.figures += [
            Figure.of(f"ingest, {one.name}", one.measured("plays_per_second"), "plays/s") for one in subjects
        ]
        rates = zip(standing.measured("plays_per_second"), alone.measured("plays_per_second"), strict=True)
        ratios = [with_windows / without for with_windows, without in rates]
        report.figures.append(Figure.of("three standing / global alone", ratios, "×", TARGETS["ingest"]))
        report.details["ingest"] = {one.name: one.rounds for one in subjects}
        wait_quiet(standing.pids())
        _query(report, addresses[-1], standing.load, options)


def _query(report: Report, address: str, sending: Process, options: Options) -> None:
    queries: dict[str, bench_query.Query] = {
        f"GetTopK k={options.k} {window}": lambda client, window=window: client.top_k(window, options.k)  # type: ignore[misc]
        for window in ("global", *STANDING)
    }
    loop_factory: Any = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        idle = runner.run(bench_query.measure(address, queries, options.queries))
        busy = runner.run(bench_query.measure_busy(address, queries, options.busy_queries, sending))
    for name, values in idle.items():
        report.figures += percentiles(f"{name}, idle", values, target_p50=TARGETS["idle"])
    for name, values in busy.items():
        report.figures += percentiles(f"{name}, under full ingest", values, target_p99=TARGETS["busy"])
    report.details |= {"idle_ms": idle, "under_ingest_ms": busy}


# --- Slides -----------------------------------------------------------------------------------------------------------


def _seconds_of_plays(options: Options) -> Iterator[np.ndarray[Any, np.dtype[np.int32]]]:
    """Songs played in each second of twelve minutes: every song within any ten of them, the rest by chance."""
    random = np.random.default_rng(1)
    order = random.permutation(options.songs).astype(np.int32)
    each = -(-options.songs // (9 * _MINUTE))
    rest = max(0, options.slide_plays // (12 * _MINUTE) - each)
    for second in range(12 * _MINUTE):
        regular = order[(np.arange(each) + second * each) % options.songs]
        yield np.concatenate((regular, random.integers(0, options.songs, rest, dtype=np.int32)))


def _slides(report: Report, options: Options) -> None:
    state = ShardState(ClusterSettings(), 1000)
    songs = state.songs.add_texts([f"track-{number:016d}" for number in range(options.songs)])
    by_minute, by_second = parse_window("sliding:10m/1m"), parse_window("sliding:10m")
    state.configure(state.tiers.tiers, [by_minute, by_second])
    begin = time.time_ns() // 60_000_000_000 * 60
    plays = 0
    for second, played in enumerate(_seconds_of_plays(options)):
        rows = len(played)
        plays += rows
        state.boards[GLOBAL].add(
            songs[played], np.zeros(rows, np.int32), np.full(rows, begin + second, np.int64),
            np.ones(rows, np.int64), state.songs_of(GLOBAL), state.songs, options.songs,
        )  # fmt: skip
    taken: dict[str, list[float]] = {"sliding:10m/1m by a minute": [], "sliding:10m by a second": []}
    answered: list[float] = []
    for window, name, instants in (
        (by_minute, "sliding:10m/1m by a minute", range(10 * _MINUTE, 12 * _MINUTE + 1, _MINUTE)),
        (by_second, "sliding:10m by a second", range(10 * _MINUTE, 11 * _MINUTE)),
    ):
        for turn, instant in enumerate(instants):
            bounds = bounds_of(window, 1000 * (begin + instant), 1000)
            if bounds is None:
                raise BenchmarkError(f"{window} has no bounds")
            began = time.perf_counter()
            state.move_standing(window, bounds)
            moved = time.perf_counter()
            query.top_k(state, Scope("", bounds), options.k)
            if turn:  # the first counts all plays of ten minutes
                taken[name].append(1000 * (moved - began))
                answered.append(1000 * (time.perf_counter() - moved))
    report.figures += [
        Figure.of(f"slide of {name}, {options.songs:,} songs", values, "ms", TARGETS["slide"])
        for name, values in taken.items()
    ]
    report.figures.append(Figure.of("first query after a slide, shard time", answered, "ms"))
    report.notes.append(f"Slides: {plays:,} plays in twelve minutes, each in a cell of its own.")
    report.details["slides_ms"] = taken


# --- Size -------------------------------------------------------------------------------------------------------------


class _LoadedCore:
    """A shard's core that holds many songs, and requests for it."""

    def __init__(self, scratch: Path, songs: int, options: Options) -> None:
        self._cluster = ClusterSettings()
        settings = ShardSettings(
            topology="-", shard_id="shard-0", data_dir=str(scratch / f"songs-{songs}"),
            standing_windows=",".join(STANDING),
        )  # fmt: skip
        self.core = ShardCore(settings, self._cluster)
        self.core.recover()
        self.core.own(Identity("bench", settings.shard_id), range(self._cluster.slots))
        self._now_ms = time.time_ns() // 1_000_000
        self.core.configure(self._now_ms)
        self.core.move_standing(self._now_ms)
        self._pool = PlayPool(songs, 1.0, options.batch_plays, options.pool_plays)
        self._sequence = 0
        for body in self._pool.every_song():
            self._commit([self._request(body)])

    def _request(self, body: bytes) -> bytes:
        self._sequence += 1
        raw = request(body, b"bench", self._sequence, self._now_ms)
        return append_request(raw, self._sequence, self._now_ms, self._cluster)

    def _commit(self, requests: Sequence[bytes]) -> None:
        for answer in self.core.commit(requests, self._now_ms):
            if isinstance(answer, Exception):
                raise answer

    def microseconds_per_play(self, batches: int) -> float:
        """Processor time of a play, made durable and counted in all windows."""
        self._pool.stamp(0)
        requests = [self._request(self._pool.batch(turn, 0)) for turn in range(batches)]
        began = time.process_time()
        for first in range(0, batches, _GROUP_BATCHES):
            self._commit(requests[first : first + _GROUP_BATCHES])
        return 1e6 * (time.process_time() - began) / (batches * self._pool.batch_plays)


def _size(report: Report, scratch: Path, options: Options) -> None:
    cores = [_LoadedCore(scratch, songs, options) for songs in (options.songs, options.many_songs)]
    batches = max(_GROUP_BATCHES, options.pool_plays // options.batch_plays)
    costs: list[list[float]] = [[], []]
    for turn in range(-1, options.rounds):
        for core, cost in zip(cores, costs, strict=True):
            measured = core.microseconds_per_play(batches)
            if turn >= 0:
                cost.append(measured)
    for core in cores:
        core.core.close()
    for songs, cost in zip((options.songs, options.many_songs), costs, strict=True):
        report.figures.append(Figure.of(f"processor time of a play, {songs:,} songs", cost, "µs"))
    ratios = [many / few for few, many in zip(*costs, strict=True)]
    report.figures.append(
        Figure.of(f"{options.many_songs:,} songs / {options.songs:,} songs", ratios, "×", TARGETS["size"])
    )
    report.details["size_us"] = costs


def run(options: Options) -> Report:
    """Measures.

    Raises:
        BenchmarkError: a process failed.
    """
    report = Report(TITLE)
    with scratch_directory(options.data_dir) as scratch:
        _clusters(report, scratch, options)
        _slides(report, options)
        _size(report, scratch, options)
    report.notes.append(
        f"Ingest: {options.rounds} rounds of {options.seconds:g} s taking turns, {options.batch_plays:,} plays a batch,"
        f" {options.songs:,} songs, Zipf 1; standing besides the global chart: {' and '.join(STANDING)}."
    )
    return report


def parse(arguments: Sequence[str] | None = None) -> tuple[Options, bool]:
    """The options of a command line, and whether JSON is wanted."""
    defaults = Options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=defaults.rounds, help="rounds of each subject")
    parser.add_argument("--seconds", type=float, default=defaults.seconds, help="length of a round")
    parser.add_argument("--songs", type=int, default=defaults.songs, help="different songs")
    parser.add_argument("--many-songs", type=int, default=defaults.many_songs, help="of the larger of two cores")
    parser.add_argument("--slide-plays", type=int, default=defaults.slide_plays, help="plays that windows slide over")
    parser.add_argument("--k", type=int, default=defaults.k, help="entries asked for")
    parser.add_argument("--queries", type=int, default=defaults.queries, help="queries of each kind, idle")
    parser.add_argument("--busy-queries", type=int, default=defaults.busy_queries, help="the same under ingest")
    parser.add_argument("--batch-plays", type=int, default=defaults.batch_plays, help="plays in a batch")
    parser.add_argument("--pool-plays", type=int, default=defaults.pool_plays, help="plays in all different batches")
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
