"""The rendered manifests, run: their commands, arguments, variables, volumes, users, probes, hooks and grace periods.

Each pod is a process in a network namespace of its own, with its name; what stands for Kubernetes is in cluster.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from tests.cluster.hosts import Network, why_not
from tests.cluster.processes import environment
from tests.deploy.rendered import KUBECTL, ROOT, Manifests, text_of
from tests.kubernetes.cluster import NODE, hosts_of
from tests.kubernetes.story import SHARDS, described

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]

SHARDS_MOST: Final = 4
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


def run_story(tmp_path: Path, overlay: str) -> dict[str, Any]:
    rendered = text_of(overlay)
    hosts = hosts_of(Manifests(rendered), {SHARDS: SHARDS_MOST})
    with Network(list(hosts), hosts) as network:
        within = {name: network.within(name) for name in hosts}
        description = described(tmp_path, rendered, within, network.addresses, network.hosts_file(NODE))
        (tmp_path / "story.json").write_text(json.dumps(description))
        command = [*network.within(NODE), sys.executable, "-m", "tests.kubernetes.story", str(tmp_path / "story.json")]
        done = subprocess.run(
            command, cwd=ROOT, env=environment(), check=False, capture_output=True, text=True, timeout=800
        )
    assert done.returncode == 0, done.stderr[-20_000:]
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_a_cluster_lives_on_kubernetes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if reason := why_no_pods():
        pytest.skip(reason)
    tmp_path.chmod(0o755)
    told = run_story(tmp_path, "dev")
    with capsys.disabled():
        print(f"\nkubernetes: {json.dumps(told)}")
    assert (told["lost"], told["double"], told["wrong"]) == (0, 0, [])
    assert told["plays"] > 1000
    assert told["answers"] > 10
    assert not told["killed"], "a grace period was too short"
    assert not told["ended"], "a container failed"
    assert not told["hooks_failed"]
    assert told["longest_ack_seconds"] <= told["longest_ready_seconds"] + BACK_SECONDS
