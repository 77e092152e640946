"""The commands of docs/operations.md, and of the first steps in docs/kubernetes.md, as a program that runs on the node.

    python -m tests.kubernetes.runbooks DESCRIPTION    a JSON file, as story.py's `described` makes it

`topk` is this checkout's, `kubectl` is kubectl.py's. What is changed: the namespace and the overlay, which are those of
`dev` with three shards. Plays stream in and queries are asked meanwhile; for backup and restore they pause, as a volume
that is lost loses what it was sent since its backup. One line of JSON says how it went.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from tests.cluster.processes import environment
from tests.deploy.rendered import ROOT
from tests.kubernetes.cluster import Kubernetes, until
from tests.kubernetes.kubectl import Kubectl
from tests.kubernetes.story import (
    GATEWAYS,
    NEW_TAG,
    SETTLE_SECONDS,
    SHARDS,
    Crowd,
    run_described,
    until_shards,
)
from topk_grpc._version import VERSION
from topk_grpc.cli.failures import FINAL

FIRST_STEPS: Final = "A cluster to try"
FIRST_PLAYS: Final = {"Toto - Africa": 3, "Boston - More Than a Feeling": 2, "Björk - Jóga": 1}
_BLOCK: Final = re.compile(r"^```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_CHAPTER_SECONDS: Final = 300.0


def chapters() -> dict[str, str]:
    """The commands of each runbook, by its title; those before the first have the title of the section."""
    first = _section("docs/kubernetes.md", FIRST_STEPS)
    runbooks = _section("docs/operations.md", "Runbooks")
    found: dict[str, str] = {}
    for part in f"{FIRST_STEPS}\n{first}### Runbooks\n{runbooks}".split("### "):
        title, _, text = part.partition("\n")
        if blocks := _BLOCK.findall(text):
            found[title] = "".join(blocks)
    return found


def _section(document: str, title: str) -> str:
    text = (ROOT / document).read_text(encoding="utf-8")
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


class Operator:
    """Goes by the book.

    Args:
        kubernetes: the cluster.
        crowd: who plays and asks.
        kubectl: the operator's.
        folder: the operator's; has `deploy/`, in which there is a new release before an upgrade.
    """

    def __init__(self, kubernetes: Kubernetes, crowd: Crowd, kubectl: Kubectl, folder: Path) -> None:
        self._kubernetes = kubernetes
        self._crowd = crowd
        self._kubectl = kubectl
        self._folder = folder
        self._chapters = chapters()
        self._done: dict[str, float] = {}

    async def run(self) -> dict[str, Any]:
        """Every chapter, and what came of it."""
        self._write_first_plays()
        await self._chapter(FIRST_STEPS, self._is_complete, reached=False)
        await self._chapter("Runbooks", lambda: self._has_shards(3))
        async with self._crowd.present():
            await self._chapter("Scale out", lambda: self._has_shards(5))
            await self._chapter("Scale in", lambda: self._has_shards(3))
            self._release()
            await self._chapter("Upgrade", self._is_upgraded)
            await self._chapter("Replace a node", lambda: self._has_shards(3))
        await self._chapter("Back up", self._is_complete)
        await self._lose_volume(f"{SHARDS}-0")
        await self._chapter("Restore", self._is_complete)
        async with self._crowd.present():
            await asyncio.sleep(2)
        await self._is_complete()
        return {
            "plays": self._crowd.played.total(),
            "answers": self._crowd.answers,
            "wrong": self._crowd.wrong[:5],
            "seconds": {title: round(seconds, 1) for title, seconds in self._done.items()},
            "left_out": sorted(self._chapters.keys() - self._done.keys()),
            "commands": len(self._kubectl.asked),
        }

    def _write_first_plays(self) -> None:
        with (self._folder / "plays.csv").open("w", encoding="utf-8") as file:
            file.write("artist,title,time\n")
            for song, plays in FIRST_PLAYS.items():
                artist, _, title = song.partition(" - ")
                file.writelines(f"{artist},{title},2026-11-01T10:00:{second:02}Z\n" for second in range(plays))
        self._crowd.played.update(FIRST_PLAYS)

    async def _chapter(self, title: str, check: Callable[[], Awaitable[None]], *, reached: bool = True) -> None:
        """Runs its commands, and then looks. Unless it is `reached`, they find their own way to the gateways."""
        began = time.monotonic()
        said = await self._run(title, {"TOPK_GATEWAY": self._crowd.gateway} if reached else {})
        print(f"=== {title}\n{said}", file=sys.stderr, flush=True)
        await self._kubernetes.until_settled(SETTLE_SECONDS)
        await check()
        self._done[title] = time.monotonic() - began

    async def _run(self, title: str, settings: Mapping[str, str]) -> str:
        script = self._chapters[title].replace("-n topk ", "-n topk-dev ").replace("/production", "/dev")
        written = self._folder / "said"
        with written.open("w") as output:
            process = await asyncio.create_subprocess_exec(
                "bash", "-euo", "pipefail", "-c", script,
                cwd=self._folder, stdout=output, stderr=output, start_new_session=True,
                env=environment() | self._kubectl.environment | {"PYTHONPATH": str(ROOT), **settings},
            )  # fmt: skip
        try:
            async with asyncio.timeout(_CHAPTER_SECONDS):
                status = await process.wait()
        except TimeoutError:
            raise AssertionError(f"{title}: {written.read_text()}\n{self._kubernetes.tell()}") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it left in the background
        said = written.read_text()
        assert status == 0, f"{title}: {said}"
        return said

    async def _has_shards(self, count: int) -> None:
        await until_shards(self._kubernetes, self._crowd.gateway, count)

    def _release(self) -> None:
        """The next release is another tag of our image."""
        kustomization = self._folder / "deploy/kubernetes/base/kustomization.yaml"
        text = kustomization.read_text(encoding="utf-8")
        changed = text.replace(f"newTag: {VERSION}", f"newTag: {NEW_TAG}")
        assert changed != text
        kustomization.write_text(changed, encoding="utf-8")

    async def _is_upgraded(self) -> None:
        for pod in self._kubernetes.pods():
            image = pod.container.manifest["image"]
            assert not pod.container.is_topk or image.endswith(f":{NEW_TAG}"), f"{pod.name} runs {image}"
        await self._has_shards(3)

    async def _lose_volume(self, pod: str) -> None:
        """The pod is made again, with an empty volume, and does not start."""
        self._kubernetes.delete_claim(f"data-{pod}")
        await self._kubernetes.delete_pod(pod, SETTLE_SECONDS)
        await until(lambda: any(each.name == pod and each.ended for each in self._kubernetes.pods()), SETTLE_SECONDS)
        assert set(self._kubernetes.pod(pod).ended) == {FINAL}, self._kubernetes.pod(pod).log_tail()

    async def _is_complete(self) -> None:
        lost, double = await self._crowd.differences()
        assert not lost, f"lost: {lost}"
        assert not double, f"double: {double}"


async def live(kubernetes: Kubernetes, crowd: Crowd) -> dict[str, Any]:
    """Runs them all."""
    root = kubernetes.machine.root
    kubectl = Kubectl(kubernetes, kubernetes.manifests.the("Service", GATEWAYS)["metadata"]["namespace"], root)
    await kubectl.start()
    try:
        return await Operator(kubernetes, crowd, kubectl, root).run()
    finally:
        await kubectl.close()


if __name__ == "__main__":
    run_described(live)
