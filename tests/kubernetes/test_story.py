"""The rendered manifests, run: their commands, arguments, variables, volumes, users, probes, hooks and grace periods.

Each pod is a process in a network namespace of its own, with its name; what stands for Kubernetes is in cluster.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from tests.cluster.hosts import Network, why_not
from tests.cluster.processes import environment
from tests.deploy.rendered import KUBECTL, ROOT, Manifests, copied, kustomized, text_of
from tests.kubernetes.cluster import NODE, hosts_of
from tests.kubernetes.story import SHARDS, described

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]

BACK_SECONDS: Final = 20.0
"""Beyond the time that a pod takes to be ready: the old one's end, probes' periods, and a client's pause."""


def why_no_pods() -> str:
    """Why pods cannot be run here; empty: they can."""
    if not KUBECTL.exists():
        return "kubectl is not installed (make install)"
    if shutil.which("etcd") is None:
        return "etcd is not installed (Debian: etcd-server)"
    if os.geteuid() != 0:
        return "pods need root: for namespaces, mounts and users"
    return why_not()


def run_on_node(module: str, tmp_path: Path, rendered: str, hosts: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Runs a program on the node of a network, with what `described` makes; what it tells in the end."""
    tmp_path.chmod(0o755)
    with Network(list(hosts), hosts) as network:
        within = {name: network.within(name) for name in hosts}
        description = described(tmp_path, rendered, within, network.addresses, network.hosts_file(NODE))
        (tmp_path / "description.json").write_text(json.dumps(description))
        command = [*network.within(NODE), sys.executable, "-m", module, str(tmp_path / "description.json")]
        done = subprocess.run(
            command, cwd=ROOT, env=environment(), check=False, capture_output=True, text=True, timeout=800
        )
    assert done.returncode == 0, done.stderr[-20_000:]
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_a_cluster_lives_on_kubernetes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if reason := why_no_pods():
        pytest.skip(reason)
    rendered = text_of("dev")
    hosts = hosts_of(Manifests(rendered), {SHARDS: 4})
    told = run_on_node("tests.kubernetes.story", tmp_path, rendered, hosts)
    with capsys.disabled():
        print(f"\nkubernetes: {json.dumps(told)}")
    assert (told["lost"], told["double"], told["wrong"]) == (0, 0, [])
    assert told["plays"] > 1000
    assert told["answers"] > 10
    assert not told["killed"], "a grace period was too short"
    assert not told["ended"], "a container failed"
    assert not told["hooks_failed"]
    assert told["longest_ack_seconds"] <= told["longest_ready_seconds"] + BACK_SECONDS


def test_runbooks_do_what_they_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if reason := why_no_pods():
        pytest.skip(reason)
    overlay = copied(tmp_path, "dev", "backups")
    with (overlay / "kustomization.yaml").open("a") as file:
        file.write(f"replicas: [{{name: {SHARDS}, count: 3}}]\n")
    rendered = kustomized(overlay)
    hosts = hosts_of(Manifests(rendered), {SHARDS: 5}, ["topk-restore"])
    told = run_on_node("tests.kubernetes.runbooks", tmp_path, rendered, hosts)
    with capsys.disabled():
        print(f"\nrunbooks: {json.dumps(told)}")
    assert told["wrong"] == []
    assert told["left_out"] == []
    assert told["plays"] > 1000
    assert told["answers"] > 10
