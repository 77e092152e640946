"""A client that stock grpcio-tools made from the protos, in a process that has none of our code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster import foreign
from tests.cluster.processes import Cluster, environment

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]


def run(*command: str) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100, env=environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_client_generated_by_grpcio_tools_records_and_asks(cluster: Cluster, tmp_path: Path) -> None:
    protos = sorted(str(path.relative_to(ROOT / "protos")) for path in (ROOT / "protos").rglob("*.proto"))
    run(
        *(sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={ROOT / 'protos'}"),
        *(f"--python_out={tmp_path}", f"--grpc_python_out={tmp_path}", *protos),
    )

    # -P: neither this folder nor the project's root is on its path.
    script = Path(__file__).with_name("foreign_client.py")
    seen = json.loads(run(sys.executable, "-P", str(script), str(tmp_path), cluster.address, "foreign-python"))

    assert seen.pop("ours") == []
    foreign.check(seen)
