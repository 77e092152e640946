"""The runbooks of docs/operations.md, command by command, on the pods of `dev`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.deploy.rendered import Manifests, copied, kustomized
from tests.kubernetes.cluster import hosts_of
from tests.kubernetes.node import run_on_node, why_no_pods
from tests.kubernetes.story import SHARDS

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]


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
