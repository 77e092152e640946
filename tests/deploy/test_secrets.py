"""The commands of docs/kubernetes.md make the Secrets that production mounts, with the names that it uses."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deploy.rendered import Manifests, pod
from tests.deploy.secrets import make_secrets


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not on this machine: install it to run the commands")
    return make_secrets(tmp_path_factory.mktemp("secrets"))


def test_every_secret_that_is_mounted_is_made(secrets: Path) -> None:
    mounted = {
        volume["secret"]["secretName"]
        for workload in Manifests.of("production").workloads()
        for volume in pod(workload)["volumes"]
        if "secret" in volume
    }
    assert mounted == {each.name for each in secrets.iterdir()}


def _verifies(secrets: Path, part: str, name: str) -> bool:
    folder = secrets / f"topk-{part}-tls"
    done = subprocess.run(
        ["openssl", "verify", "-CAfile", str(folder / "ca.crt"), "-verify_hostname", name, str(folder / "tls.crt")],
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


def test_certificates_have_the_names_that_parts_are_reached_by(secrets: Path) -> None:
    production = Manifests.of("production")
    shards, gateway = production.container("shard"), production.container("gateway")
    members = gateway.environment["TOPK_TOPOLOGY"].removeprefix("etcd://").partition("/")[0].split(",")
    peers = production.container("etcd").environment["ETCD_INITIAL_CLUSTER"].split(",")
    assert len(members) == len(peers) == 3
    for address in members:
        assert _verifies(secrets, "etcd", address.partition(":")[0])
    for peer in peers:
        assert _verifies(secrets, "etcd", peer.partition("//")[2].partition(":")[0])
    assert _verifies(secrets, "shard", shards.environment["TOPK_ADVERTISE"].partition(":")[0])
    for name in ("topk-gateway", "topk-gateway-headless", "topk-gateway.topk.svc.cluster.local"):
        assert _verifies(secrets, "gateway", name)
    assert not _verifies(secrets, "controller", "topk-gateway")
