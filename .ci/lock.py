"""Pins what the image installs, with hashes: deploy/requirements.lock and deploy/build-requirements.lock.

Usage: lock.py. Needs uv, which `make lock` installs. What is pinned already stays as it is as long as pyproject.toml
allows it; delete a lock file to have everything in it anew.
"""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXTRAS = ("etcd", "tracing")
"""What servers need besides on a cluster."""


def wanted() -> dict[str, list[str]]:
    """The requirements behind each lock file."""
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())
    runtime = list(stated["project"]["dependencies"])
    for extra in EXTRAS:
        runtime += stated["project"]["optional-dependencies"][extra]
    return {"requirements.lock": runtime, "build-requirements.lock": list(stated["build-system"]["requires"])}


def main() -> int:
    uv = Path(sys.executable).with_name("uv")
    for name, requirements in wanted().items():
        subprocess.run(
            [
                *(str(uv), "pip", "compile", "-", "--quiet", "--no-config", "--generate-hashes"),
                *("--default-index", "https://pypi.org/simple", "--no-emit-index-url", "--no-annotate"),
                *("--python-version", "3.11", "--python-platform", "linux"),
                *("--custom-compile-command", "make lock", "--output-file", f"deploy/{name}"),
            ],
            input="\n".join(requirements),
            text=True,
            check=True,
            cwd=ROOT,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
