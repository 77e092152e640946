"""A client in another language: Node's @grpc/grpc-js and @grpc/proto-loader, over the protos alone."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from tests.cluster import foreign
from tests.cluster.processes import Cluster, environment

pytestmark = pytest.mark.cluster

SOURCES = Path(__file__).with_name("node")
PROTOS = Path(__file__).parents[2] / "protos"
INSTALL_SECONDS = 80


def run(*command: str, cwd: Path, seconds: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=seconds, cwd=cwd, env=environment()
    )


@pytest.fixture
def client(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The client beside its packages, which stay in pytest's cache for the next run."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not on this machine: install Node.js to run the client in another language")
    manifest = (SOURCES / "package.json").read_bytes()
    cache: Any = getattr(request.config, "cache", None)
    home = Path(cache.mkdir(f"topk-node-{hashlib.sha256(manifest).hexdigest()[:12]}")) if cache else tmp_path
    if not (home / "installed").exists():
        (home / "package.json").write_bytes(manifest)
        install = ("npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefer-offline")
        try:
            done = run(*install, cwd=home, seconds=INSTALL_SECONDS)
        except subprocess.TimeoutExpired:
            pytest.skip(f"npm's registry did not answer within {INSTALL_SECONDS} s")
        if done.returncode:
            pytest.skip(f"npm cannot install @grpc/grpc-js here: {done.stderr.strip()[-400:]}")
        (home / "installed").touch()
    shutil.copy(SOURCES / "client.mjs", home)
    return home / "client.mjs"


def write_standard_descriptors(path: Path) -> None:
    descriptors = FileDescriptorSet()
    for module in (health_pb2, reflection_pb2):
        module.DESCRIPTOR.CopyToProto(descriptors.file.add())
    path.write_bytes(descriptors.SerializeToString())


def test_node_client_records_and_asks(cluster: Cluster, client: Path, tmp_path: Path) -> None:
    descriptors = tmp_path / "standard.binpb"
    write_standard_descriptors(descriptors)

    arguments = (str(PROTOS), str(descriptors), cluster.address, "foreign-node")
    done = run("node", os.fspath(client), *arguments, cwd=client.parent, seconds=60)

    assert done.returncode == 0, done.stderr
    foreign.check(json.loads(done.stdout))
