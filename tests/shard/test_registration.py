"""How shards take their place in the topology: races, restarts, and directories that are not theirs."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from topk_grpc.errors import ForeignDirectoryError, TopologyConflictError, TopologyError
from topk_grpc.model import ClusterSettings, ShardInfo, Topology
from topk_grpc.shard.registration import check_directory, find_shard, register
from topk_grpc.topology.store import TopologyStore, open_store

SHARDS = tuple(f"shard-{number}" for number in range(4))


async def new_store(path: Path) -> TopologyStore:
    store = open_store(f"file:{path / 'topology.json'}")
    owners = tuple(slot % len(SHARDS) for slot in range(16))
    infos = tuple(ShardInfo(name) for name in SHARDS)
    await store.compare_and_set(Topology("c", 1, ClusterSettings(16), infos, owners))
    return store


async def test_a_first_start_is_written_and_the_next_one_changes_the_address_only(tmp_path: Path) -> None:
    store = await new_store(tmp_path)
    topology = await register(store, "shard-1", "127.0.0.1:1", "a" * 32, "dir")
    assert topology == await store.read()
    assert topology.epoch == 2
    assert topology.shard("shard-1") == ShardInfo("shard-1", "127.0.0.1:1", "a" * 32)
    assert (await register(store, "shard-1", "127.0.0.1:1", "a" * 32, "dir")).epoch == 2  # nothing new, no epoch
    topology = await register(store, "shard-1", "127.0.0.1:2", "a" * 32, "dir")
    assert (topology.epoch, topology.shards[1].address) == (3, "127.0.0.1:2")
    assert [info.address for info in topology.shards] == ["", "127.0.0.1:2", "", ""]


async def test_shards_that_race_are_all_written(tmp_path: Path) -> None:
    store = await new_store(tmp_path)
    others = [open_store(f"file:{tmp_path / 'topology.json'}") for _ in SHARDS]
    tasks = [
        register(other, name, f"127.0.0.1:{at}", name * 4, "dir")
        for at, (other, name) in enumerate(zip(others, SHARDS, strict=True), 1)
    ]
    await asyncio.gather(*tasks)
    topology = await store.read()
    assert topology.epoch == 1 + len(SHARDS)
    assert topology.shards == tuple(ShardInfo(name, f"127.0.0.1:{at}", name * 4) for at, name in enumerate(SHARDS, 1))


async def test_of_two_first_starts_of_one_shard_only_one_keeps_its_directory(tmp_path: Path) -> None:
    store = await new_store(tmp_path)
    results = await asyncio.gather(
        *(register(store, "shard-0", f"127.0.0.1:{at}", str(at) * 32, f"dir-{at}") for at in (1, 2, 3)),
        return_exceptions=True,
    )
    (kept,) = [result for result in results if isinstance(result, Topology)]
    assert sum(isinstance(result, ForeignDirectoryError) for result in results) == 2
    assert (await store.read()).shards[0] == kept.shards[0]


async def test_another_directory_is_refused_by_name(tmp_path: Path) -> None:
    store = await new_store(tmp_path)
    await register(store, "shard-0", "127.0.0.1:1", "a" * 32, "dir")
    with pytest.raises(ForeignDirectoryError, match=r"other-dir .*is not the directory that shard-0 began with"):
        await register(store, "shard-0", "127.0.0.1:2", "b" * 32, "other-dir")
    assert (await store.read()).epoch == 2
    check_directory(ShardInfo("shard-0"), "b" * 32, "first start")


async def test_an_unknown_shard_is_told_which_ones_there_are(tmp_path: Path) -> None:
    store = await new_store(tmp_path)
    with pytest.raises(TopologyError, match=r"shard-9.*shard-0, shard-1, shard-2, shard-3"):
        find_shard(await store.read(), "shard-9")
    with pytest.raises(TopologyError):
        await register(store, "shard-9", "127.0.0.1:1", "a" * 32, "dir")


async def test_a_topology_that_changes_all_the_time_ends_in_a_conflict(tmp_path: Path) -> None:
    store = await new_store(tmp_path)

    class Busy:
        """Somebody else is always first."""

        async def read(self) -> Topology:
            return await store.read()

        async def compare_and_set(self, topology: Topology) -> None:
            present = await store.read()
            await store.compare_and_set(replace(present, epoch=present.epoch + 1))
            await store.compare_and_set(topology)

    with pytest.raises(TopologyConflictError, match=r"the address of shard-0 could not be written"):
        await register(Busy(), "shard-0", "127.0.0.1:1", "a" * 32, "dir")  # type: ignore[arg-type]
