"""The short form of `make storm`: all kinds of faults under load, then every count. It prints its seed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.schedule import KINDS
from topk_grpc.kernels import compiled

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SECONDS = float(os.environ.get("TOPK_STORM_SECONDS", "90"))


def run_storm(folder: Path, *arguments: str, seconds: float) -> dict[str, object]:
    """A process of its own: what it starts is started by exec, before it has threads that matter."""
    rate = "20000" if compiled() else "100"
    report = folder / "report.json"
    command = [sys.executable, "-m", "tests.faults", "--json", str(report), "--keep", str(folder / "logs")]
    done = subprocess.run(
        [*command, "--plays-per-second", rate, *arguments], check=False, timeout=seconds, capture_output=True, text=True
    )
    print(done.stdout[-20_000:], done.stderr[-5_000:])
    assert done.returncode == 0
    found: dict[str, object] = json.loads(report.read_text())
    return found


@pytest.mark.timeout(600)
def test_a_storm_of_all_faults_loses_and_doubles_nothing_and_no_answer_is_wrong(tmp_path: Path) -> None:
    report = run_storm(tmp_path, "--seconds", str(SECONDS), seconds=SECONDS + 480)
    assert report["passed"] is True
    assert (report["lost"], report["double"], report["wrong_answers"]) == (0, 0, 0)
    faults, answers = report["faults"], report["answers"]
    assert isinstance(faults, dict) and isinstance(answers, dict)
    assert set(faults) <= set(KINDS) and len(faults) >= min(SECONDS / 6, len(KINDS) - 8)
    assert {"global", "sliding", "songs", "watch"} <= set(answers)
