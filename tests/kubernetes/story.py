"""What a cluster on Kubernetes goes through in its life, as a program that runs on the node.

    python -m tests.kubernetes.story DESCRIPTION    a JSON file, as `described` makes it

It applies an overlay; then, while plays stream in and queries are asked through the Service: a rolling update of
everything, shards scaled from 2 to 4 and back to 2, a shard's pod deleted, gateways scaled. In the end every count is
compared. One line of JSON says how it went.
"""

from __future__ import annotations

import asyncio
import copy
import json
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.deploy.rendered import Manifests, pod
from tests.kubernetes.api import KubernetesApi
from tests.kubernetes.cluster import NODE, Kubernetes, Machine
from topk_grpc import TopKClient
from topk_grpc.errors import TopKError, UnavailableError

SHARDS: Final = "topk-shard"
GATEWAYS: Final = "topk-gateway"
NEW_TAG: Final = "0.0.0-next"

SETTLE_SECONDS: Final = 240.0
DEADLINE_SECONDS: Final = 180.0
SONGS: Final = 500
BATCH_PLAYS: Final = 100
PRODUCERS: Final = 2
_PAUSE_SECONDS: Final = 0.02


def described(root: Path, rendered: str, within: Mapping[str, Sequence[str]],
              addresses: Mapping[str, str], hosts: Path) -> dict[str, Any]:  # fmt: skip
    """What the program is told."""
    return {
        "root": str(root),
        "rendered": rendered,
        "within": {name: list(command) for name, command in within.items()},
        "addresses": dict(addresses),
        "hosts": str(hosts),
    }


@dataclass
class Crowd:
    """Those who play and ask, all through the gateways' Service.

    Attributes:
        played: acknowledged plays, by song.
        longest_seconds: that a batch of plays took to be acknowledged.
        answers: queries that were answered.
        refused: queries that were not, by what was said.
        wrong: what cannot be.
    """

    gateway: str
    played: Counter[str] = field(default_factory=Counter)
    longest_seconds: float = 0.0
    answers: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    _ended: asyncio.Event = field(default_factory=asyncio.Event)

    @asynccontextmanager
    async def present(self) -> AsyncIterator[None]:
        """They play and ask as long as this is open."""
        self._ended.clear()
        async with asyncio.TaskGroup() as group:
            for number in range(PRODUCERS):
                group.create_task(self.play(number))
            group.create_task(self.ask())
            yield
            self._ended.set()

    async def play(self, number: int) -> None:
        """One producer, until the end."""
        async with TopKClient(self.gateway, deadline_seconds=DEADLINE_SECONDS) as client:
            turn = 0
            while not self._ended.is_set():
                songs = [f"song {(number + 7 * turn + index * index) % SONGS}" for index in range(BATCH_PLAYS)]
                turn += 1
                began = time.monotonic()
                for song in songs:
                    await client.record(song, time.time_ns() // 1_000_000)
                await client.flush()
                self.longest_seconds = max(self.longest_seconds, time.monotonic() - began)
                self.played.update(songs)
                await asyncio.sleep(_PAUSE_SECONDS)

    async def ask(self) -> None:
        """One who asks for the best all the time: plays are never fewer than those that had been acknowledged."""
        async with TopKClient(self.gateway, deadline_seconds=DEADLINE_SECONDS) as client:
            while not self._ended.is_set():
                before = self.played.total()
                try:
                    answer = await client.top_k("global", 2 * SONGS)
                except UnavailableError as error:
                    self.refused[str(error)] += 1
                else:
                    self.answers += 1
                    total = sum(entry.count for entry in answer.entries)
                    if not answer.certificate.complete or total != answer.certificate.total_plays or total < before:
                        self.wrong.append(f"{total} plays where there were {before} at least: {answer.certificate}")
                await asyncio.sleep(5 * _PAUSE_SECONDS)

    async def differences(self) -> tuple[Counter[str], Counter[str]]:
        """Plays that are lost, and that count twice, by song; to be asked while nobody plays."""
        async with TopKClient(self.gateway, deadline_seconds=DEADLINE_SECONDS) as client:
            answer = await client.top_k("global", 2 * SONGS)
        counts = Counter({entry.song_id: entry.count for entry in answer.entries})
        return self.played - counts, counts - self.played


class Story:
    """The cluster's life."""

    def __init__(self, kubernetes: Kubernetes, crowd: Crowd) -> None:
        self._kubernetes = kubernetes
        self._crowd = crowd
        self.seconds: dict[str, float] = {}

    async def run(self) -> dict[str, Any]:
        """From the first `kubectl apply` to the last count."""
        kubernetes, crowd = self._kubernetes, self._crowd
        self.seconds["applied"] = await kubernetes.until_settled(SETTLE_SECONDS)
        async with crowd.present():
            await self._live()
        lost, double = await crowd.differences()
        ready = [pod.ready_seconds for pod in kubernetes.every_pod() if pod.ready_seconds is not None]
        return {
            "plays": crowd.played.total(),
            "lost": lost.total(),
            "double": double.total(),
            "answers": crowd.answers,
            "refused": dict(crowd.refused),
            "wrong": crowd.wrong[:5],
            "longest_ack_seconds": round(crowd.longest_seconds, 2),
            "longest_ready_seconds": round(max(ready), 2),
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
            "ended": {pod.name: pod.ended for pod in kubernetes.every_pod() if any(pod.ended)},
            "hooks_failed": [pod.name for pod in kubernetes.every_pod() if pod.hooks_failed],
            "killed": [pod.name for pod in kubernetes.every_pod() if pod.killed],
        }

    async def _live(self) -> None:
        kubernetes = self._kubernetes
        await asyncio.sleep(2)
        kubernetes.apply(_updated(kubernetes.manifests))
        await self._settled("rolling update")
        kubernetes.scale(SHARDS, 4)
        await self._settled("scaled to 4 shards")
        await self._until_shards(4)
        kubernetes.scale(SHARDS, 2)
        await self._settled("scaled to 2 shards")
        await self._until_shards(2)
        kubernetes.workloads[SHARDS].delete(f"{SHARDS}-1")
        kubernetes.scale(GATEWAYS, 2)
        await self._settled("a shard deleted, 2 gateways")
        await self._until_shards(2)
        kubernetes.scale(GATEWAYS, 1)
        await self._settled("1 gateway")
        await asyncio.sleep(2)

    async def _settled(self, what: str) -> None:
        self.seconds[what] = await self._kubernetes.until_settled(SETTLE_SECONDS)
        print(f"{what}: {self.seconds[what]:.1f} s", file=sys.stderr, flush=True)

    async def _until_shards(self, count: int) -> None:
        self.seconds[f"{count} shards have their slots"] = await until_shards(
            self._kubernetes, self._crowd.gateway, count
        )


async def until_shards(kubernetes: Kubernetes, gateway: str, count: int) -> float:
    """Waits until so many shards are in the topology, each with its share, and nothing moves; how long that took.

    Raises:
        AssertionError: it took too long.
    """
    began = time.monotonic()
    async with TopKClient(gateway, deadline_seconds=DEADLINE_SECONDS) as client:
        while True:
            try:
                cluster = await client.describe()
            except TopKError as error:
                said = str(error)
            else:
                shares = [shard.slots for shard in cluster.shards]
                said = f"slots {shares}, {cluster.slots_left} left"
                if len(shares) == count and min(shares) > 0 and not cluster.slots_left and not cluster.migrations:
                    return time.monotonic() - began
            if time.monotonic() - began > SETTLE_SECONDS:
                raise AssertionError(f"not {count} shards with slots: {said}\n{kubernetes.tell()}")
            await asyncio.sleep(0.2)


def _updated(manifests: Manifests) -> Manifests:
    """The next release: another tag of our image."""
    changed = copy.deepcopy(manifests)
    for workload in changed.workloads():
        for container in pod(workload)["containers"]:
            name, _, _ = container["image"].rpartition(":")
            if name.endswith("/topk-grpc"):
                container["image"] = f"{name}:{NEW_TAG}"
    return changed


def run_described(live: Callable[[Kubernetes, Crowd], Awaitable[dict[str, Any]]]) -> None:
    """The program: starts what the file in its argument describes, lets it be lived in, and prints what that tells."""
    description = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(json.dumps(asyncio.run(_run_described(description, live)), ensure_ascii=False))


async def _run_described(
    description: Mapping[str, Any], live: Callable[[Kubernetes, Crowd], Awaitable[dict[str, Any]]]
) -> dict[str, Any]:
    manifests = Manifests(description["rendered"])
    gateway = manifests.the("Service", GATEWAYS)
    namespace = gateway["metadata"]["namespace"]
    root, addresses = Path(description["root"]), description["addresses"]
    api = KubernetesApi(root / "api", namespace, addresses[NODE])
    machine = Machine(root, description["within"], addresses, Path(description["hosts"]), api)
    crowd = Crowd(f"{GATEWAYS}.{namespace}:{gateway['spec']['ports'][0]['port']}")
    try:
        async with Kubernetes(machine, manifests) as kubernetes:
            return await live(kubernetes, crowd)
    finally:
        api.close()


if __name__ == "__main__":
    run_described(lambda kubernetes, crowd: Story(kubernetes, crowd).run())
