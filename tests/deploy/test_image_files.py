"""What the image is built from, as far as that can be seen without building it: lock files, context, tags."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.deploy.rendered import ROOT, text_of
from topk_grpc._version import VERSION

PYPROJECT: Final[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS: Final = PYPROJECT["project"]["optional-dependencies"]
SERVERS: Final = [*PYPROJECT["project"]["dependencies"], *EXTRAS["etcd"], *EXTRAS["tracing"]]
BUILD: Final = PYPROJECT["build-system"]["requires"]
LOCKS: Final = [("requirements.lock", SERVERS), ("build-requirements.lock", BUILD)]


def _pinned(text: str) -> dict[str, Version]:
    """Name and version of each line of a lock file that pins; all lines have to, each with hashes."""
    found = {}
    for entry in re.split(r"\n(?=[\w])", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).strip()):
        match = re.fullmatch(r"([\w.-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\s*", entry)
        assert match is not None, entry[:80]
        found[str(canonicalize_name(match[1]))] = Version(match[2])
    return found


def _unmet(requirements: list[str], pinned: dict[str, Version]) -> list[str]:
    wanted = [Requirement(each) for each in requirements]
    return [
        str(each)
        for each in wanted
        if (version := pinned.get(str(canonicalize_name(each.name)))) is None or version not in each.specifier
    ]


@pytest.mark.parametrize(("name", "requirements"), LOCKS, ids=[name for name, _ in LOCKS])
def test_lock_file_meets_pyproject(name: str, requirements: list[str]) -> None:
    pinned = _pinned((ROOT / "deploy" / name).read_text())
    assert _unmet(requirements, pinned) == [], "run: make lock"
    assert _unmet(["grpcio>=999", "no-such-package"], pinned) == ["grpcio>=999", "no-such-package"]


def test_lock_file_without_a_hash_is_seen() -> None:
    with pytest.raises(AssertionError):
        _pinned("grpcio==1.85.1\n")


def test_build_and_runtime_agree() -> None:
    """Generated code refuses a runtime that is older than its generator."""
    runtime, build = (_pinned((ROOT / "deploy" / name).read_text()) for name, _ in LOCKS)
    for name in ("grpcio", "protobuf", "cython"):
        assert runtime[name] == build[name]


def test_context_is_what_the_wheel_needs() -> None:
    """Everything is kept out but for a list, and what is built or generated is kept out of that."""
    lines = [each for each in (ROOT / ".dockerignore").read_text().splitlines() if each and not each.startswith("#")]
    assert lines[0] == "*"
    let_in = {each[1:] for each in lines if each.startswith("!")}
    assert let_in == {
        *("CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"),
        *("protos", "topk_grpc", "deploy/*.lock"),
    }
    assert {"**/*.so", "**/*_pb2*", "**/_build_info.json"} <= set(lines)
    assert all(list(ROOT.glob(each)) for each in let_in)


def test_runtime_stage_is_another_one() -> None:
    text = (ROOT / "deploy/Dockerfile").read_text()
    runtime = text[text.rindex("\nFROM ") :]
    instructions = {line.split()[0] for line in runtime.splitlines() if re.match(r"[A-Z]+ ", line)}
    assert "RUN" not in instructions
    assert re.search(r"^USER 10001:10001$", runtime, re.MULTILINE)
    assert re.search(r'^ENTRYPOINT \["topk"\]$', runtime, re.MULTILINE)
    assert len(set(re.findall(r"^FROM (\S+)", text, re.MULTILINE))) == 1


def test_tags_are_of_versions() -> None:
    asked = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "image"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout  # fmt: skip
    tags = re.findall(r"-t \S+:(\S+)", asked)
    assert tags == [VERSION, VERSION.rpartition(".")[0]]
    assert f"--build-arg VERSION={VERSION} " in asked


def test_manifests_name_the_image_that_is_made() -> None:
    made = re.search(r"^IMAGE \?= (\S+)$", Path(ROOT / "Makefile").read_text(), re.MULTILINE)
    assert made is not None
    for manifest in yaml.safe_load_all(text_of("dev")):
        if manifest["kind"] == "Deployment":
            [container] = manifest["spec"]["template"]["spec"]["containers"]
            assert container["image"] == f"{made[1]}:{VERSION}"
