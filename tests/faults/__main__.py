"""`python -m tests.faults`: a storm in the foreground; see `--help`, docs/development.md and storm.py."""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import uvloop

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # read when grpc is imported: processes are started by exec

from tests.faults.storm import Plan, Storm, save


def main() -> int:
    """0: nothing was lost, counted twice or answered wrongly; 1: something was, and it is told."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800, help="how long faults strike")
    parser.add_argument("--kills", type=int, default=0, help="so many kill -9 of random processes, and nothing else")
    parser.add_argument("--seed", type=int, default=None, help="replays the schedule of a run")
    parser.add_argument("--plays-per-second", type=float, default=40_000, help="of the producer that sends most")
    parser.add_argument("--json", type=Path, default=None, help="write the report, with every fault, to this file")
    parser.add_argument("--keep", type=Path, default=None, help="a new directory for the logs, kept in any case")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if given.seed is None else given.seed
    plan = Plan(seed, given.seconds, given.kills, plays_per_second=given.plays_per_second)
    root = given.keep or Path(tempfile.mkdtemp(prefix="topk-storm-"))
    root.mkdir(parents=True, exist_ok=True)
    again = f"SEED={seed}"
    print(f"{again}; logs in {root}", flush=True)
    storm = Storm(plan, root, lambda line: print(line, flush=True))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            report = runner.run(storm.run())
        except BaseException:
            print("\n".join(storm.fault_log), file=sys.stderr)
            raise
    if given.json is not None:
        save(report, storm.fault_log, given.json)
    if not report.passed:
        print("\n".join(["faults:", *storm.fault_log, "findings:", *report.findings]))
        print(f"to have the same schedule again: {again}; logs are in {root}")
    elif given.keep is None:
        shutil.rmtree(root, ignore_errors=True)
    print(f"queries refused: {report.refusals}; statuses that producers met: {report.statuses}")
    print(f"recovered within {report.calm_seconds_max:.1f} s; {report.snapshots} snapshots")
    if report.not_struck:
        print(f"came to nothing: {report.not_struck}")
    if report.skipped:
        print(f"left out: {report.skipped}")
    print(report.line())
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
