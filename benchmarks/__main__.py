"""`python -m benchmarks`: all benchmarks, one table of figures with their targets met or missed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from benchmarks import (
    bench_hot_song,
    bench_ingest,
    bench_memory,
    bench_query,
    bench_rebalance,
    bench_recovery,
    bench_storage,
    bench_windows,
)
from benchmarks.figures import Report, print_reports
from benchmarks.harness import BenchmarkError
from topk_grpc import kernels

_SLOW_FORM: Final = 200
"""Without compiled kernels sizes are divided by this, so that it ends in minutes too."""


def benchmarks(data_dir: Path | None, divisor: int) -> dict[str, Callable[[], Report]]:
    """All of them by name, with their usual sizes divided by `divisor`."""
    songs = 1_000_000 // divisor
    pool = (1 << 20) // divisor
    ingest = bench_ingest.Options(songs=songs, data_dir=data_dir, pool_plays=pool)
    query = bench_query.Options(songs=songs, data_dir=data_dir, pool_plays=pool)
    memory = bench_memory.Options(songs=songs, data_dir=data_dir)
    storage = bench_storage.Options(songs=songs, plays=4_000_000 // divisor, data_dir=data_dir)
    recovery = bench_recovery.Options(
        entries=5_000_000 // divisor, songs=songs, plays=8_000_000 // divisor, data_dir=data_dir
    )
    windows = bench_windows.Options(
        songs=songs, many_songs=10 * songs, slide_plays=5_000_000 // divisor, data_dir=data_dir, pool_plays=pool
    )
    hot_song = bench_hot_song.Options(plays=4_000_000 // divisor, songs=songs, data_dir=data_dir)
    rebalance = bench_rebalance.Options(songs=3 * songs // 10, data_dir=data_dir, pool_plays=pool)
    return {
        bench_ingest.TITLE: lambda: bench_ingest.run(ingest),
        bench_query.TITLE: lambda: bench_query.run(query),
        bench_windows.TITLE: lambda: bench_windows.run(windows),
        bench_hot_song.TITLE: lambda: bench_hot_song.run(hot_song),
        bench_rebalance.TITLE: lambda: bench_rebalance.run(rebalance),
        bench_memory.TITLE: lambda: bench_memory.run(memory),
        bench_storage.TITLE: lambda: bench_storage.run(storage),
        bench_recovery.TITLE: lambda: bench_recovery.run(recovery),
    }


def main() -> int:
    """Runs them. Returns 0; 1 where one failed, or with `--check` where a target was missed."""
    names = list(benchmarks(None, 1))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"only these: {', '.join(names)}")
    parser.add_argument("--data-dir", type=Path, help="where data is kept meanwhile; default: the current directory")
    parser.add_argument("--json", action="store_true", help="print everything measured as JSON")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target was missed")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.names) - set(names)):
        parser.error(f"no such benchmark: {', '.join(unknown)} (there are {', '.join(names)})")
    reports: list[Report] = []
    failed = False
    for name, measure in benchmarks(arguments.data_dir, 1 if kernels.compiled() else _SLOW_FORM).items():
        if arguments.names and name not in arguments.names:
            continue
        print(f"measuring {name} …", file=sys.stderr, flush=True)
        try:
            reports.append(measure())
        except BenchmarkError as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            failed = True
    print_reports(reports, arguments.json)
    missed = any(figure.met is False for report in reports for figure in report.figures)
    return int(failed or (arguments.check and missed))


if __name__ == "__main__":
    sys.exit(main())
