"""How a test runs a program on the node of a network in which every pod has a host."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.cluster.hosts import Network, why_not
from tests.cluster.processes import environment
from tests.deploy.rendered import KUBECTL, ROOT
from tests.kubernetes.cluster import NODE
from tests.kubernetes.story import described


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
