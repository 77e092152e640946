"""hadolint and checkov: what they advise is done, or stands in deploy/checkov.toml with the reason why it is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, Final

import pytest

from tests.deploy.rendered import OVERLAYS, ROOT, text_of

HADOLINT: Final = Path(sys.executable).with_name("hadolint")
CHECKOV: Final = ROOT / "build/checkov/bin/checkov"
DOCKERFILE: Final = ROOT / "deploy/Dockerfile"

needs_checkov = pytest.mark.skipif(
    not CHECKOV.exists(), reason="there is no checkov: make checkov installs and runs it"
)


def _hadolint(path: Path) -> list[dict[str, Any]]:
    # Its own settings alone: none of whoever runs the test.
    done = subprocess.run(
        [str(HADOLINT), "--config", "/dev/null", "--format", "json", str(path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_hadolint_finds_nothing() -> None:
    assert _hadolint(DOCKERFILE) == []


def test_hadolint_finds_what_is_wrong(tmp_path: Path) -> None:
    changed = tmp_path / "Dockerfile"
    text = DOCKERFILE.read_text()
    changed.write_text(
        text.replace("python:3.11-slim-bookworm", "python:latest").replace("# hadolint ignore=DL3008\n", "")
    )
    assert {each["code"] for each in _hadolint(changed)} == {"DL3007", "DL3008"}


Failure = tuple[str, str]


def _checkov(framework: str, path: Path) -> set[Failure]:
    """Each check that fails, with the resource that it fails for (KIND.NAME, without the namespace)."""
    done = subprocess.run(
        [str(CHECKOV), "--skip-download", "--framework", framework, "--output", "json", "--file", str(path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "LOG_LEVEL": "ERROR"},
    )
    report = json.loads(done.stdout)
    assert report["summary"]["passed"] > 10, "checkov has looked at next to nothing"
    return {(each["check_id"], _resource(each["resource"])) for each in report["results"]["failed_checks"]}


def _resource(name: str) -> str:
    parts = name.lstrip("/").split(".")
    return f"{parts[0]}.{parts[2]}" if len(parts) == 3 else ".".join(parts)


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> set[Failure]:
    scratch = tmp_path_factory.mktemp("checkov")
    found = _checkov("dockerfile", Path("deploy/Dockerfile"))
    for overlay in OVERLAYS:
        rendered = scratch / f"{overlay}.yaml"
        rendered.write_text(text_of(overlay))
        found |= _checkov("kubernetes", rendered)
    return found


def _exceptions() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = tomllib.loads((ROOT / "deploy/checkov.toml").read_text())["exception"]
    return found


@needs_checkov
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_checkov_finds_nothing_but_the_exceptions(failures: set[Failure]) -> None:
    unexcused = {
        (check, resource)
        for check, resource in failures
        if not any(check == each["check"] and {resource, "*"} & set(each["resources"]) for each in _exceptions())
    }
    assert unexcused == set()


@needs_checkov
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_exception_is_still_one(failures: set[Failure]) -> None:
    for each in _exceptions():
        found = {resource for check, resource in failures if check == each["check"]}
        assert found, f"{each['check']} does not fail any more: take it out of deploy/checkov.toml"
        assert each["resources"] == ["*"] or set(each["resources"]) == found


@needs_checkov
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_checkov_finds_what_is_wrong(tmp_path: Path) -> None:
    changed = tmp_path / "dev.yaml"
    changed.write_text(text_of("dev").replace("readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false"))
    assert ("CKV_K8S_22", "StatefulSet.topk-shard") in _checkov("kubernetes", changed)


def test_every_exception_has_a_reason() -> None:
    for each in _exceptions():
        assert set(each) == {"check", "title", "resources", "reason"}
        assert len(each["reason"]) > 40
