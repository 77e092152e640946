"""Writes a sample of the present format: `.venv/bin/python -m tests.storage.samples.write_sample 0.1.0`.

Each release adds the directory that its version names; it is never written again. The sample is what the life of the
tests of crash points (tests/shard/crash_life.py) leaves: two snapshots with blocks of several tiers, marks, standing
sessions, corrections, a deletion, changes of settings, and a log tail behind them. Beside it stands what it has to
answer, as the oracle says.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.engine.engine_shard import append_request
from tests.oracle import ModelPart
from tests.shard.cores import PATH
from tests.shard.crash_life import REQUESTS, live_with_the_oracle

HERE = Path(__file__).parent


def write(version: str) -> Path:
    target = HERE / version
    life = live_with_the_oracle()
    for path in life.disk.files(PATH):
        if path.name == "LOCK":
            continue
        copy = target / "shard-0" / path.relative_to(PATH)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(life.disk.map(path))
    held = life.held[-1]
    expected = {
        "answers": [
            {
                "chart": scope.chart,
                "bounds_ms": None if scope.bounds is None else [scope.bounds.start_ms, scope.bounds.end_ms],
                "gap_ms": scope.gap_ms,
                "entries": ranked,
            }
            for scope, ranked in held.answers.items()
        ],
        # Of batches that have counted: each has to be a duplicate again.
        "requests": [
            append_request([request]).hex()
            for _, request in REQUESTS
            if isinstance(request, ModelPart) and request.producer_id != "idle"
        ],
    }
    (target / "expected.json").write_text(json.dumps(expected, ensure_ascii=False, indent=1) + "\n")
    return target


if __name__ == "__main__":
    print(write(sys.argv[1]))
