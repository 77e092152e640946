"""A Debian machine without a registry: base images made by debootstrap, an image built by buildah, run by podman.

What the image's Dockerfile and the manifests name is made here under these names: the Python image from Debian's own
packages, and etcd from Debian's. So what is tested is everything but the registries. It needs root and the packages
`PACKAGES`; the images stay in build/containers (TOPK_IMAGE_STORE names another place), so the next time takes less.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Final

from tests.deploy.rendered import ROOT

PACKAGES: Final = ("buildah", "podman", "runc", "debootstrap", "iproute2", "iptables")
PYTHON_IMAGE: Final = "docker.io/library/python:3.11-slim-bookworm"

_PYTHON: Final = (
    "python3.11",
    "python3.11-venv",
    "python3-venv",
    "python3-pip",
    "libpython3.11-dev",
    "ca-certificates",
)
_REVISION: Final = "org.opencontainers.image.revision"
_SOURCES: Final = (
    "topk_grpc",
    "protos",
    "setup.py",
    "pyproject.toml",
    "deploy/Dockerfile",
    "deploy/*.lock",
    ".dockerignore",
)
_CERTIFICATES: Final = "/etc/ssl/certs/ca-certificates.crt"

# crun does not run where cgroups are mixed, and without the ulimits no container starts on some kernels.
_CONTAINERS: Final = """\
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
[network]
network_config_dir = "{store}/networks"
"""
_STORAGE: Final = """\
[storage]
driver = "overlay"
graphroot = "{store}/graph"
runroot = "{store}/run"
"""
_ETCD: Final = f"""\
FROM {PYTHON_IMAGE}
RUN apt-get update && apt-get install -y --no-install-recommends etcd-server etcd-client \\
    && ln -s /usr/bin/etcd /usr/bin/etcdctl /usr/local/bin/
"""


def missing() -> str:
    """What this machine lacks; empty: nothing."""
    if os.geteuid() != 0:
        return "root"
    commands = {"iproute2": "ip"}
    return " ".join(each for each in PACKAGES if shutil.which(commands.get(each, each)) is None)


class Machine:
    """Builds and runs. Its images and containers are apart from those of everybody else."""

    def __init__(self) -> None:
        self.store = Path(os.environ.get("TOPK_IMAGE_STORE", ROOT / "build/containers"))
        self.store.mkdir(parents=True, exist_ok=True)
        (self.store / "networks").mkdir(exist_ok=True)
        (self.store / "containers.conf").write_text(_CONTAINERS.format(store=self.store))
        (self.store / "storage.conf").write_text(_STORAGE.format(store=self.store))

    def run(self, *command: str, check: bool = True, seconds: float = 60, **variables: str) -> str:
        """Runs a command with this machine's settings.

        Returns:
            Its standard output.

        Raises:
            RuntimeError: it failed; with all that it said.
        """
        own = {
            "CONTAINERS_CONF": str(self.store / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(self.store / "storage.conf"),
        }
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **own, **variables},
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
        return done.stdout

    def podman(self, *arguments: str, **options: Any) -> str:
        """The same of podman."""
        return self.run("podman", *arguments, **options)

    def has(self, image: str) -> bool:
        """Whether there is an image of this name."""
        return bool(self.podman("images", "--quiet", image).strip())

    def make_python(self) -> None:
        """The base image, from Debian's packages: a minute or more of downloads."""
        if self.has(PYTHON_IMAGE):
            return
        root = self.store / "rootfs"
        shutil.rmtree(root, ignore_errors=True)
        self.run(
            *("debootstrap", "--variant=minbase", f"--include={','.join(_PYTHON)}", "bookworm", str(root)), seconds=1800
        )
        for each in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
            each.unlink()
        (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
        archive = self.store / "rootfs.tar"
        self.run("tar", "--numeric-owner", "--exclude=./dev/*", "-C", str(root), "-cf", str(archive), ".", seconds=300)
        self.podman("import", "--change", 'CMD ["python3"]', str(archive), PYTHON_IMAGE, seconds=300)
        archive.unlink()
        shutil.rmtree(root)

    def make_etcd(self, image: str) -> None:
        """An image with Debian's etcd, by the name that the manifests have."""
        if not self.has(image):
            context = self.store / "etcd"
            context.mkdir(exist_ok=True)
            (context / "Dockerfile").write_text(_ETCD)
            self.run(
                *("buildah", "bud", "--pull-never", "--isolation", "chroot", "-t", image, str(context)), seconds=600
            )

    def is_current(self, image: str) -> bool:
        """Whether there is an image of a commit since which nothing has changed that it is made of."""
        if not self.has(image):
            return False
        revision = self.podman("image", "inspect", "--format", f'{{{{index .Labels "{_REVISION}"}}}}', image).strip()
        changed = self.run("git", "diff", "--name-only", revision, "--", *_SOURCES, check=False)
        known = self.run("git", "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}", check=False)
        return bool(known) and not changed

    def size_bytes(self, image: str) -> int:
        """Of all its layers."""
        return int(self.podman("image", "inspect", "--format", "{{.Size}}", image))

    def make_image(self) -> float:
        """Builds the image as `make image` does.

        Returns:
            How long it took, in seconds.
        """
        began = time.monotonic()
        bundle = f" -v {_CERTIFICATES}:{_CERTIFICATES}:ro" if Path(_CERTIFICATES).exists() else ""
        self.run("make", "image", f"IMAGE_OPTIONS=--pull-never --isolation chroot{bundle}", seconds=1800)
        return time.monotonic() - began
