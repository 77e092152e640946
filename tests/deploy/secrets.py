"""The Secrets that docs/kubernetes.md has one make: its commands are run as they stand, only kubectl is another."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.deploy.running import DOCUMENT

_KUBECTL: Final = """\
#!/bin/bash
# Keeps what `create secret generic NAME --from-file=[KEY=]PATH` says as files NAME/KEY, and does nothing else.
[[ "$*" =~ create\\ secret\\ generic\\ ([^\\ ]+) ]] || exit 0
mkdir -p "$SECRETS/${BASH_REMATCH[1]}"
for each in "$@"; do
    [[ "$each" == --from-file=* ]] || continue
    each=${each#--from-file=}
    cp "${each#*=}" "$SECRETS/${BASH_REMATCH[1]}/${each%%=*}"
done
"""


def make_secrets(folder: Path) -> Path:
    """Makes them all, below an empty folder.

    Returns:
        The directory with a directory for each Secret, in which each key is a file.
    """
    section = DOCUMENT.read_text().partition("\n## A cluster to keep\n")[2].partition("\n## ")[0]
    certificates, tokens = re.findall(r"^```(?:ba)?sh\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    binaries, secrets = folder / "bin", folder / "secrets"
    binaries.mkdir()
    secrets.mkdir()
    for name, text in {
        "kubectl": _KUBECTL,
        "topk": f'#!/bin/sh\nexec {sys.executable} -m topk_grpc "$@"\n',
    }.items():
        (binaries / name).write_text(text)
        (binaries / name).chmod(0o755)
    path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
    for script in (certificates, tokens):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=folder,
            env={**os.environ, "PATH": path, "SECRETS": str(secrets), "PYTHONPATH": str(DOCUMENT.parents[1])},
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return secrets
