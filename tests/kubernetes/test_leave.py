"""`topk leave` against an API that says how many replicas there are to be, and a test that moves the slots."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.processes import environment
from tests.kubernetes.api import KubernetesApi
from topk_grpc.migration.members import new_topology, state_of
from topk_grpc.model import ClusterSettings, ShardInfo, Topology
from topk_grpc.topology import TopologyStore, open_store
from topk_grpc.topology.change import change

SET = "topk-shard"
SLOTS = 12


@pytest.fixture
def api(tmp_path: Path) -> Iterator[KubernetesApi]:
    it = KubernetesApi(tmp_path / "kubernetes", "music")
    it.allowed.add(SET)
    yield it
    it.close()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[TopologyStore]:
    """Four shards that have started."""
    it = open_store(f"file:{tmp_path / 'topology.json'}")
    names = [f"{SET}-{number}" for number in range(4)]
    topology = new_topology(names, ClusterSettings(slots=SLOTS))
    shards = tuple(ShardInfo(name, f"{name}:1", name) for name in names)
    await it.compare_and_set(replace(topology, shards=shards))
    yield it
    await it.close()


class Leaving:
    """A hook that runs."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, shard_id: str, api: KubernetesApi, tmp_path: Path, **variables: str) -> Leaving:
        settings = {
            "TOPK_TOPOLOGY": f"file:{tmp_path / 'topology.json'}",
            "TOPK_SHARD_ID": shard_id,
            "TOPK_STATEFULSET": SET,
            "TOPK_KUBERNETES_CREDENTIALS": str(api.account),
            "TOPK_KUBERNETES_WAIT_SECONDS": "3",
        }
        pipe = asyncio.subprocess.PIPE
        command = (sys.executable, "-m", "topk_grpc", "leave")
        env = environment() | api.environment | settings | variables
        return cls(await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe, env=env))

    async def end(self) -> tuple[int, str]:
        """Its status, and what it said."""
        async with asyncio.timeout(60):
            _, said = await self._process.communicate()
        assert self._process.returncode is not None
        return self._process.returncode, said.decode()


async def until(store: TopologyStore, wanted: Any) -> Topology:
    async with asyncio.timeout(30), aclosing(store.watch()) as topologies:
        async for topology in topologies:
            if wanted(topology):
                return topology
    raise AssertionError("the store was closed")


async def move_all(store: TopologyStore) -> None:
    """What a controller does."""

    def moved(topology: Topology) -> Topology | None:
        if not topology.wanted:
            return None
        return replace(topology, owners=topology.wanted, wanted=(), epoch=topology.epoch + 1)

    await change(store, moved, "a move")


async def test_a_pod_that_is_to_be_back_keeps_its_slots(
    store: TopologyStore, api: KubernetesApi, tmp_path: Path
) -> None:
    api.sets[SET] = {"spec": {"replicas": 4}}
    before = await store.read()
    status, said = await (await Leaving.start(f"{SET}-3", api, tmp_path)).end()
    assert (status, await store.read()) == (0, before)
    assert "to be back" in said
    api.sets[SET] = {"spec": {"replicas": 2, "ordinals": {"start": 2}}}
    assert (await (await Leaving.start(f"{SET}-3", api, tmp_path)).end())[0] == 0
    assert await store.read() == before


async def test_pods_beyond_the_replicas_are_drained_together_and_taken_out(
    store: TopologyStore, api: KubernetesApi, tmp_path: Path
) -> None:
    api.sets[SET] = {"spec": {"replicas": 2}}
    hooks = [await Leaving.start(f"{SET}-{number}", api, tmp_path) for number in (2, 3)]
    planned = await until(store, lambda topology: topology.wanted)
    stay = {planned.shards.index(shard) for shard in planned.shards if not shard.draining}
    assert {planned.shards[index].shard_id for index in stay} == {f"{SET}-0", f"{SET}-1"}
    assert set(planned.wanted) == stay, "no slot goes to a shard that goes itself"
    await move_all(store)
    for status, said in await asyncio.gather(*(hook.end() for hook in hooks)):
        assert status == 0, said
        assert "out of the cluster" in said
    assert [shard.shard_id for shard in (await store.read()).shards] == [f"{SET}-0", f"{SET}-1"]


async def test_a_set_that_is_scaled_up_again_keeps_its_shard(
    store: TopologyStore, api: KubernetesApi, tmp_path: Path
) -> None:
    api.sets[SET] = {"spec": {"replicas": 3}}
    hook = await Leaving.start(f"{SET}-3", api, tmp_path)
    await until(store, lambda topology: state_of(topology, f"{SET}-3") == "draining")
    api.sets[SET] = {"spec": {"replicas": 4}}
    status, said = await hook.end()
    assert status == 0, said
    assert "stay after all" in said
    assert state_of(await store.read(), f"{SET}-3") == "active"


async def test_a_set_that_stops_as_a_whole_keeps_everything(
    store: TopologyStore, api: KubernetesApi, tmp_path: Path
) -> None:
    api.sets[SET] = {"spec": {"replicas": 0}}
    before = await store.read()
    for status, said in await asyncio.gather(
        *[(await Leaving.start(f"{SET}-{number}", api, tmp_path)).end() for number in range(2)]
    ):
        assert status == 0, said
        assert "stops with all others" in said
    assert await store.read() == before


async def test_the_last_shards_cannot_drain_and_lose_nothing(
    store: TopologyStore, api: KubernetesApi, tmp_path: Path
) -> None:
    """Those that are to stay have never started."""
    api.sets[SET] = {"spec": {"replicas": 2}}
    started = await store.read()
    shards = tuple(shard if shard.shard_id[-1] in "23" else ShardInfo(shard.shard_id) for shard in started.shards)
    await store.compare_and_set(replace(started, shards=shards, epoch=started.epoch + 1))
    before = await store.read()
    status, said = await (await Leaving.start(f"{SET}-3", api, tmp_path)).end()
    assert (status, await store.read()) == (1, before)
    assert said.splitlines()[-1].startswith("error: "), said
    assert "no other shard" in said


@pytest.mark.parametrize(
    ("variables", "wrong"),
    [
        ({"TOPK_STATEFULSET": "topk-other"}, "topk-other"),
        ({"TOPK_SHARD_ID": f"{SET}-x"}, f"{SET}-x is no pod"),
        ({"TOPK_KUBERNETES_CREDENTIALS": "/nowhere"}, "/nowhere"),
        ({"KUBERNETES_SERVICE_HOST": ""}, "KUBERNETES_SERVICE_HOST is not set"),
        ({"KUBERNETES_SERVICE_PORT": "1"}, "does not answer"),
    ],
)
async def test_a_hook_that_cannot_know_does_nothing_and_says_why(
    store: TopologyStore, api: KubernetesApi, tmp_path: Path, variables: dict[str, str], wrong: str
) -> None:
    api.sets[SET] = {"spec": {"replicas": 1}}
    before = await store.read()
    status, said = await (await Leaving.start(f"{SET}-3", api, tmp_path, **variables)).end()
    assert (status, await store.read()) == (1, before), said
    assert wrong in said
    assert "Traceback" not in said


async def test_a_token_or_a_role_that_is_not_enough(store: TopologyStore, api: KubernetesApi, tmp_path: Path) -> None:
    api.sets[SET] = {"spec": {"replicas": 1}}
    api.allowed.clear()
    status, said = await (await Leaving.start(f"{SET}-3", api, tmp_path)).end()
    assert (status, "403" in said, "Role" in said) == (1, True, True), said
    (api.account / "token").write_text("another")
    status, said = await (await Leaving.start(f"{SET}-3", api, tmp_path)).end()
    assert (status, "401" in said) == (1, True), said


@pytest.mark.parametrize("answer", [{}, {"spec": None}, {"spec": {"replicas": "x"}}, [], json.loads("null")])
async def test_an_api_that_says_something_else(
    store: TopologyStore, api: KubernetesApi, tmp_path: Path, answer: Any
) -> None:
    api.sets[SET] = answer
    before = await store.read()
    status, said = await (await Leaving.start(f"{SET}-3", api, tmp_path, TOPK_KUBERNETES_WAIT_SECONDS="0.1")).end()
    assert (status, await store.read()) == (1, before), said
    assert "does not say" in said
