"""The long form: `make fuzz`. All targets under libFuzzer, two at a time, until each has had its share of the inputs.

Works in rounds of about a minute, one libFuzzer process each, and writes down after each what was done: whoever
starts it again goes on. A finding does not stop it: the input is kept (`build/fuzz/findings`), counted, and the round
counts as far as it came. At the end stands a table; the exit status is 1 if there is any finding.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from tests.fuzz.targets import NAMES, load

ROOT: Final = Path(__file__).parents[2]
WORK: Final = ROOT / "build/fuzz"
KERNELS: Final = WORK / "lib/topk_grpc/kernels"
COMMITTED: Final = ROOT / "tests/fuzz/corpus"
ROUND_SECONDS: Final = 60.0
FIRST_ROUND: Final = 2000
_PROGRESS: Final = re.compile(r"^#(\d+)\s+(\w+)\s+cov: (\d+) ft: (\d+)", re.MULTILINE)
_EMPTY: Final[dict[str, Any]] = {
    "inputs": 0,
    "seconds": 0.0,
    "findings": 0,
    "rounds": 0,
    "branches": [0, 0],
    "rate": 0.0,
}


def sanitizer_environment() -> dict[str, str]:
    """For a process that loads kernels compiled with sanitizers."""
    import atheris

    preload = Path(atheris.__file__).parent.parent / "asan_with_fuzzer.so"
    return os.environ | {
        "LD_PRELOAD": str(preload),
        "PYTHONPATH": str(ROOT),
        # CPython never frees everything; a refused allocation is a MemoryError, which is a finding.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:handle_segv=1",
    }


class Run:
    """What was done so far, kept in a file."""

    def __init__(self, total: int, names: Iterable[str]) -> None:
        self.path = WORK / "state.json"
        self.state: dict[str, dict[str, Any]] = json.loads(self.path.read_text()) if self.path.exists() else {}
        shares = {name: load(name).share for name in names}
        self.wanted = {name: total * share // sum(shares.values()) for name, share in shares.items()}
        rest = total - sum(self.wanted.values())
        self.wanted[next(iter(self.wanted))] += rest
        for name in shares:
            self.state.setdefault(name, dict(_EMPTY))
        self._busy: set[str] = set()
        self._lock = threading.Lock()

    def next_target(self) -> str | None:
        """The one that has come least far; None: nothing is left to begin."""
        with self._lock:
            left = {
                name: self.state[name]["inputs"] / wanted
                for name, wanted in self.wanted.items()
                if self.state[name]["inputs"] < wanted and name not in self._busy
            }
            if not left:
                return None
            name = min(left, key=lambda each: left[each])
            self._busy.add(name)
            return name

    def work(self) -> None:
        """Rounds until nothing is left to begin."""
        while (name := self.next_target()) is not None:
            done = self.state[name]
            room = self.wanted[name] - done["inputs"]
            size = min(room, max(FIRST_ROUND, int(done["rate"] * ROUND_SECONDS)))
            result = one_round(name, size, done["rounds"])
            with self._lock:
                self._busy.discard(name)
                done["inputs"] += result["inputs"]
                done["seconds"] += result["seconds"]
                done["findings"] += result["findings"]
                done["rounds"] += 1
                done["rate"] = result["inputs"] / result["seconds"]
                done["branches"] = [done["branches"][0] or result["branches"][0], result["branches"][1]]
                new = self.path.with_suffix(".new")
                new.write_text(json.dumps(self.state, indent=1))
                new.replace(self.path)
                print(
                    f"{name:12} {done['inputs']:>10,} of {self.wanted[name]:>10,}  {done['rate']:>8,.0f}/s"
                    f"  branches {done['branches'][1]:>6,}  findings {done['findings']}",
                    flush=True,
                )


def one_round(name: str, inputs: int, number: int) -> dict[str, Any]:
    """One libFuzzer process."""
    corpus, findings = WORK / "corpus" / name, WORK / "findings"
    for directory in (corpus, findings, COMMITTED / name):
        directory.mkdir(parents=True, exist_ok=True)
    before = set(findings.iterdir())
    arguments = (
        *(f"-runs={inputs}", f"-seed={number + 1}", "-timeout=20", "-rss_limit_mb=3000", "-malloc_limit_mb=600"),
        *(f"-artifact_prefix={findings}/{name}-", "-reload=0", str(corpus), str(COMMITTED / name)),
    )
    begun = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-P", "-m", "tests.fuzz.worker", name, str(KERNELS), *arguments],
        check=False, capture_output=True, cwd=ROOT, env=sanitizer_environment(),
    )  # fmt: skip
    seconds = time.monotonic() - begun
    said = process.stderr.decode(errors="replace")
    lines = _PROGRESS.findall(said)
    new = sorted(set(findings.iterdir()) - before)
    mine = [path for path in new if path.name.startswith(f"{name}-")]
    if process.returncode:
        (WORK / f"findings-{name}.log").write_text(said[-20_000:])
        if not lines:
            raise SystemExit(f"{name} did not start:\n{said[-3000:]}")
    return {
        "inputs": int(lines[-1][0]) if lines else 0,
        "seconds": seconds,
        "findings": len(mine) or int(process.returncode != 0),
        "branches": [int(lines[0][2]), int(lines[-1][2])],
    }


def table(run: Run) -> str:
    """What was done, a line for each target."""
    rows: list[tuple[str, ...]] = [("target", "inputs", "seconds", "corpus", "bytes", "branches", "new", "crashes")]
    total = [0, 0.0, 0, 0, 0, 0, 0]
    for name in run.wanted:
        done = run.state[name]
        files = [path.stat().st_size for path in (WORK / "corpus" / name).glob("*")]
        first, last = done["branches"]
        numbers = [done["inputs"], done["seconds"], len(files), sum(files), last, last - first, done["findings"]]
        total = [one + other for one, other in zip(total, numbers, strict=True)]
        rows.append((name, *(f"{number:,.0f}" for number in numbers)))
    rows.append(("all", *(f"{number:,.0f}" for number in total)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        row[0].ljust(widths[0]) + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=20_000_000, help="inputs of all targets together")
    parser.add_argument("--processes", type=int, default=2, help="at a time")
    parser.add_argument("--target", action="append", choices=NAMES, help="only this one; repeatable")
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    run = Run(options.runs, options.target or NAMES)
    threads = [threading.Thread(target=run.work) for _ in range(options.processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(table(run))
    findings = sum(run.state[name]["findings"] for name in run.wanted)
    if findings:
        print(f"{findings} findings: the inputs lie in {WORK / 'findings'}; python -m tests.fuzz.replay TARGET FILE")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
