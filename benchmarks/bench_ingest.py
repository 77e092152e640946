"""Plays acknowledged per second: the real system, the bare relay and Redis, taking turns in one run.

1. **system**: `topk up` with 2 shards and a gateway, fdatasync before every acknowledgement, on a real disk;
2. **relay**: the same bytes over the same two gRPC hops, nothing done to them (relay.py);
3. **redis**: redis-server, its append-only file synced each second, ZINCRBY in pipelines (redis_load.py).

All hold every song before the clock starts, all are fed by a process of their own on this machine, from batches
encoded before.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks import redis_load, relay
from benchmarks.figures import Figure, Report, Target, print_reports
from benchmarks.harness import (
    BenchmarkError,
    Cluster,
    ForeignCpu,
    Process,
    cpu_seconds,
    module,
    scratch_directory,
    wait_quiet,
)
from benchmarks.plays import POOL_PLAYS

TITLE: Final = "ingest"
BATCH_TARGETED: Final = 8192
TARGETS: Final = {"relay": Target(">=", 0.35), "redis": Target(">=", 12)}
_REDIS_PIPELINE: Final = 1024
_FOREIGN_SHARE_MAX: Final = 0.05


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured: `--help` explains each."""

    batch_plays: Sequence[int] = (8192, 32_768)
    rounds: int = 5
    seconds: float = 2.5
    songs: int = 1_000_000
    zipf: float = 1.0
    streams: int = 4
    in_flight: int = 8
    pool_plays: int = POOL_PLAYS
    data_dir: Path | None = None
    redis: bool = True


@dataclass(slots=True)
class Subject:
    """One of the systems that are compared.

    Attributes:
        name: in the table.
        load: the process that sends and counts.
        processes: all of it, `load` included.
        rounds: what was measured, a dictionary each.
    """

    name: str
    load: Process
    processes: Sequence[Process]
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def pids(self) -> list[int]:
        """Of all its processes."""
        return [pid for process in self.processes for pid in process.pids()]

    def run(self, seconds: float) -> dict[str, Any]:
        """One round; returns the rate in plays/s and what goes with it."""
        pids = self.pids()
        self.load.ask(do="prepare", seconds=seconds)
        before = cpu_seconds(pids)
        foreign = ForeignCpu(pids)
        result = self.load.ask(do="run", seconds=seconds)
        share = foreign.share()
        cpu = cpu_seconds(pids) - before
        wait_quiet(pids)
        return {
            "plays_per_second": result["plays"] / result["seconds"],
            "cpu_us_per_play": 1e6 * cpu / max(1, result["plays_total"]),
            "ack_ms": statistics.median(result["ack_ms"]) if result["ack_ms"] else None,
            "foreign_cpu_share": share,
        }

    def measured(self, name: str) -> list[float]:
        """A measure of all rounds."""
        return [one[name] for one in self.rounds if one[name] is not None]


def generator(scratch: Path, options: Options, batch_plays: int, address: str, *more: object) -> Process:
    """The load that is sent to an address."""
    command = module(
        "benchmarks.generator", address, "--songs", options.songs, "--zipf", options.zipf, "--batch-plays", batch_plays,
        "--pool-plays", options.pool_plays, "--streams", options.streams, "--in-flight", options.in_flight, *more,
    )  # fmt: skip
    return Process(command, scratch)


def _system(stack: ExitStack, scratch: Path, options: Options, batch_plays: int) -> Subject:
    cluster = stack.enter_context(Cluster(scratch / f"cluster-{batch_plays}", shards=2))
    load = stack.enter_context(generator(scratch, options, batch_plays, cluster.address))
    load.ask(do="load")
    return Subject("system", load, [cluster, load])


def _relay(stack: ExitStack, scratch: Path, options: Options, batch_plays: int) -> Subject:
    sinks = [stack.enter_context(Process(module("benchmarks.relay"), scratch)) for _ in range(2)]
    between = stack.enter_context(Process(module("benchmarks.relay", *(sink.greeting for sink in sinks)), scratch))
    load = stack.enter_context(
        generator(scratch, options, batch_plays, between.greeting, "--method", relay.METHOD, "--no-check")
    )
    return Subject("relay", load, [*sinks, between, load])


def _redis(stack: ExitStack, scratch: Path, options: Options) -> Subject:
    directory = scratch / "redis"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    server = stack.enter_context(Process(redis_load.server_command(directory), scratch))
    server.wait_for_line("ready to accept connections")
    command = module(
        "benchmarks.redis_load", directory / "redis.sock", "--songs", options.songs, "--zipf", options.zipf,
        "--pipeline", _REDIS_PIPELINE, "--pool-plays", options.pool_plays,
    )  # fmt: skip
    load = stack.enter_context(Process(command, scratch))
    load.ask(do="load")
    return Subject("redis", load, [server, load])


def _compare(scratch: Path, options: Options, batch_plays: int, with_redis: bool) -> list[Subject]:
    with ExitStack() as stack:
        subjects = [_system(stack, scratch, options, batch_plays), _relay(stack, scratch, options, batch_plays)]
        if with_redis:
            subjects.append(_redis(stack, scratch, options))
        for subject in subjects:
            subject.run(min(1.0, options.seconds))  # warms up, counts for nothing
        for _ in range(options.rounds):
            for subject in subjects:
                subject.rounds.append(subject.run(options.seconds))
        return subjects


def _figures(subjects: Sequence[Subject], batch_plays: int) -> list[Figure]:
    batch = f"{batch_plays:,} a batch"
    figures = [
        Figure.of(f"{subject.name}, {batch}", subject.measured("plays_per_second"), "plays/s") for subject in subjects
    ]
    system, *others = subjects
    for other in others:
        rates = zip(system.measured("plays_per_second"), other.measured("plays_per_second"), strict=True)
        target = TARGETS[other.name] if batch_plays == BATCH_TARGETED else None
        figures.append(
            Figure.of(f"system / {other.name}, {batch}", [ours / theirs for ours, theirs in rates], "×", target)
        )
    figures.append(Figure.of(f"batch durable, {batch}", system.measured("ack_ms"), "ms"))
    figures += [
        Figure.of(f"processor time of {subject.name}, {batch}", subject.measured("cpu_us_per_play"), "µs/play")
        for subject in subjects
    ]
    return figures


def run(options: Options) -> Report:
    """Measures.

    Raises:
        BenchmarkError: a process failed.
    """
    report = Report(TITLE)
    with_redis = options.redis and shutil.which("redis-server") is not None
    if options.redis and not with_redis:
        report.notes.append("redis-server is not installed (Debian: apt-get install redis-server): left out.")
    shares: list[float] = []
    with scratch_directory(options.data_dir) as scratch:
        for batch_plays in options.batch_plays:
            subjects = _compare(scratch, options, batch_plays, with_redis)
            report.figures += _figures(subjects, batch_plays)
            report.details[str(batch_plays)] = {subject.name: subject.rounds for subject in subjects}
            shares += [share for subject in subjects for share in subject.measured("foreign_cpu_share")]
            shutil.rmtree(scratch / f"cluster-{batch_plays}", ignore_errors=True)
    report.notes.append(
        f"{options.rounds} rounds of {options.seconds:g} s taking turns; ratios are medians of the rounds' ratios. "
        f"{options.songs:,} songs, Zipf {options.zipf:g}, {options.streams} streams, "
        f"{options.in_flight} batches in flight on each."
    )
    if statistics.median(shares) > _FOREIGN_SHARE_MAX:
        report.notes.append(
            f"Other programs took {statistics.median(shares):.0%} of the machine (up to {max(shares):.0%} in a round): "
            "measure again when it is idle."
        )
    return report


def parse(arguments: Sequence[str] | None = None) -> tuple[Options, bool]:
    """The options of a command line, and whether JSON is wanted."""
    defaults = Options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-plays", type=int, nargs="+", default=defaults.batch_plays, help="plays in a batch")
    parser.add_argument("--rounds", type=int, default=defaults.rounds, help="rounds of each subject")
    parser.add_argument("--seconds", type=float, default=defaults.seconds, help="length of a round")
    parser.add_argument("--songs", type=int, default=defaults.songs, help="different songs")
    parser.add_argument("--zipf", type=float, default=defaults.zipf, help="exponent of the songs' popularity")
    parser.add_argument("--streams", type=int, default=defaults.streams, help="producers, each with a stream")
    parser.add_argument("--in-flight", type=int, default=defaults.in_flight, help="unacknowledged batches a stream")
    parser.add_argument("--pool-plays", type=int, default=defaults.pool_plays, help="plays in all different batches")
    parser.add_argument("--data-dir", type=Path, help="where data is kept meanwhile; default: the current directory")
    parser.add_argument("--redis", action=argparse.BooleanOptionalAction, default=True, help="compare with Redis")
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
