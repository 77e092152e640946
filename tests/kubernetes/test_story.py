"""The rendered manifests, run: their commands, arguments, variables, volumes, users, probes, hooks and grace periods.

Each pod is a process in a network namespace of its own, with its name; what stands for Kubernetes is in cluster.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import pytest

from tests.deploy.rendered import Manifests, text_of
from tests.kubernetes.cluster import hosts_of
from tests.kubernetes.node import run_on_node, why_no_pods
from tests.kubernetes.story import SHARDS

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]

BACK_SECONDS: Final = 20.0
"""Beyond the time that a pod takes to be ready: the old one's end, probes' periods, and a client's pause."""


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
