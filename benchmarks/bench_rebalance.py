"""What moving slots costs plays, and how fast it goes.

One cluster of 3 shards takes plays all the time. By turns nothing moves, the third shard gets its share of the slots,
nothing moves again, and the third shard drains, with the controller's usual pace. Each rate while slots move is held
against the two around it. A round counts only if slots were moving to its very end.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import grpc

from benchmarks import bench_ingest
from benchmarks.bench_ingest import Subject, generator
from benchmarks.figures import Figure, Report, Target, print_reports
from benchmarks.harness import BenchmarkError, Cluster, scratch_directory, wait_quiet
from benchmarks.plays import POOL_PLAYS
from topk_grpc.pb.topk.v1 import admin_service_pb2 as admin_pb
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.pb.topk.v1.admin_service_pb2_grpc import ClusterAdminServiceStub
from topk_grpc.pb.topk.v1.topk_service_pb2_grpc import TopKServiceStub

TITLE: Final = "rebalance"
TARGETS: Final = {"ingest": Target(">=", 0.60), "stall": Target("<=", 500.0)}
SHARD: Final = "shard-2"
_CALL_SECONDS: Final = 20.0
_MOVED_SECONDS: Final = 300.0
_POLL_SECONDS: Final = 0.02


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured: `--help` explains each."""

    rounds: int = 3
    seconds: float = 3.0
    songs: int = 300_000
    batch_plays: int = 8192
    pool_plays: int = POOL_PLAYS
    data_dir: Path | None = None


class _Elastic:
    """A cluster of two shards, and a third that comes and goes."""

    def __init__(self, stack: ExitStack, scratch: Path, options: Options) -> None:
        self.cluster = stack.enter_context(Cluster(scratch / "cluster", 2))
        load = bench_ingest.Options(songs=options.songs, pool_plays=options.pool_plays)
        self.load = stack.enter_context(generator(scratch, load, options.batch_plays, self.cluster.address))
        channel = stack.enter_context(grpc.insecure_channel(self.cluster.address))
        self._admin: Any = ClusterAdminServiceStub(channel)
        self._topk: Any = TopKServiceStub(channel)
        self.load.ask(do="load")
        self._add()
        self._wait(lambda cluster: len(cluster.shards) == 3 and cluster.shards[2].slots > 0)
        self._wait(_has_moved)
        self.subject = Subject("cluster", self.load, [self.cluster, self.load])

    def _add(self) -> None:
        self._admin.AddShards(admin_pb.AddShardsRequest(shard_ids=[SHARD]), timeout=_CALL_SECONDS)

    def describe(self) -> pb.DescribeClusterResponse:
        """The cluster now."""
        described: pb.DescribeClusterResponse = self._topk.DescribeCluster(
            pb.DescribeClusterRequest(), timeout=_CALL_SECONDS
        )
        return described

    def _wait(self, condition: Callable[[pb.DescribeClusterResponse], bool]) -> pb.DescribeClusterResponse:
        until = time.monotonic() + _MOVED_SECONDS
        while not condition(found := self.describe()):
            if time.monotonic() > until:
                raise BenchmarkError(f"slots did not move within {_MOVED_SECONDS:g} s: {found.slots_left} are left")
            time.sleep(_POLL_SECONDS)
        return found

    def at_rest(self, seconds: float) -> float:
        """Plays/s while nothing moves."""
        wait_quiet(self.subject.pids())
        return float(self.subject.run(seconds)["plays_per_second"])

    def moving(self, seconds: float, *, drain: bool) -> _Moving:
        """Plays/s while the third shard gets slots, or gives them away."""
        self._admin.PauseMoves(admin_pb.PauseMovesRequest(), timeout=_CALL_SECONDS)
        if drain:
            self._admin.DrainShards(admin_pb.DrainShardsRequest(shard_ids=[SHARD]), timeout=_CALL_SECONDS)
        else:
            self._add()
            self._admin.Rebalance(admin_pb.RebalanceRequest(), timeout=_CALL_SECONDS)
        slots = self.describe().slots_left
        self.load.ask(do="prepare", seconds=seconds)
        began = time.monotonic()
        self._admin.ResumeMoves(admin_pb.ResumeMovesRequest(), timeout=_CALL_SECONDS)
        result = self.load.ask(do="run", seconds=seconds)
        lasted = self.describe().slots_left > 0
        done = self._wait(_has_moved)
        moved_seconds = time.monotonic() - began
        return _Moving(result["plays"] / result["seconds"], lasted, slots, moved_seconds, done.longest_stall_ms)

    def image_bytes(self) -> int:
        """Of all slots that have moved so far, as the controller has told."""
        lines = [line for line in self.cluster.stderr().splitlines() if '"slots_moved"' in line]
        return sum(int(json.loads(line[line.index("{") :])["image_bytes"]) for line in lines)


@dataclass(frozen=True, slots=True)
class _Moving:
    """One round of moves.

    Attributes:
        plays_per_second: meanwhile.
        lasted: whether slots were moving to the end of what was measured.
        slots: how many moved.
        seconds: how long that took, the rest without load included.
        stall_ms: the longest that plays of a slot had to wait.
    """

    plays_per_second: float
    lasted: bool
    slots: int
    seconds: float
    stall_ms: int


def _has_moved(cluster: pb.DescribeClusterResponse) -> bool:
    return not cluster.slots_left and not cluster.migrations


def run(options: Options) -> Report:
    """Measures.

    Raises:
        BenchmarkError: a process failed, or slots moved too fast to measure anything meanwhile.
    """
    report = Report(TITLE)
    with scratch_directory(options.data_dir) as scratch, ExitStack() as stack:
        elastic = _Elastic(stack, scratch, options)
        before_bytes = elastic.image_bytes()
        elastic.at_rest(min(1.0, options.seconds))  # warms up, counts for nothing
        rest = [elastic.at_rest(options.seconds)]
        moves: list[_Moving] = []
        for turn in range(2 * options.rounds):
            moves.append(elastic.moving(options.seconds, drain=turn % 2 == 0))
            rest.append(elastic.at_rest(options.seconds))
        moved_bytes = elastic.image_bytes() - before_bytes
    ratios = [
        2 * one.plays_per_second / (before + after)
        for one, before, after in zip(moves, rest, rest[1:], strict=False)
        if one.lasted
    ]
    if not ratios:
        raise BenchmarkError("all slots had moved before the time was up: take more --songs, or fewer --seconds")
    slots = sum(one.slots for one in moves)
    report.figures += [
        Figure.of("ingest, nothing moves", rest, "plays/s"),
        Figure.of("ingest, slots move", [one.plays_per_second for one in moves if one.lasted], "plays/s"),
        Figure.of("slots move / nothing moves", ratios, "×", TARGETS["ingest"]),
        Figure("longest stall of a slot", max(one.stall_ms for one in moves), "ms", target=TARGETS["stall"]),
        Figure.of("slots moved", [one.slots / one.seconds for one in moves], "slots/s"),
        Figure("moved with them", moved_bytes / sum(one.seconds for one in moves) / (1 << 20), "MiB/s"),
    ]
    report.notes.append(
        f"{len(ratios)} of {len(moves)} rounds count; {slots:,} slots with {moved_bytes / (1 << 20):,.0f} MiB moved, of"
        f" {options.songs:,} songs; {options.batch_plays:,} plays a batch."
    )
    report.details |= {"at_rest": rest, "moving": [asdict(one) for one in moves], "ratios": ratios}
    return report


def parse(arguments: Sequence[str] | None = None) -> tuple[Options, bool]:
    """The options of a command line, and whether JSON is wanted."""
    defaults = Options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=defaults.rounds, help="how often the third shard goes and comes")
    parser.add_argument("--seconds", type=float, default=defaults.seconds, help="how long each rate is measured")
    parser.add_argument("--songs", type=int, default=defaults.songs, help="different songs")
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
