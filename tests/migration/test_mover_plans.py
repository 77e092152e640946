"""The mover makes the plan itself, once the shards that may own slots have changed, and not before."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from topk_grpc.migration import mover as mover_module
from topk_grpc.migration.calls import Fetched
from topk_grpc.migration.members import with_shard
from topk_grpc.migration.mover import Mover, Pace
from topk_grpc.migration.plan import fewest
from topk_grpc.model import ClusterSettings, ShardInfo, Topology
from topk_grpc.ring.plan import plan_owners
from topk_grpc.topology.file import FileTopologyStore

SLOTS = 64


class WillingShards:
    """Do what they are asked, at once."""

    async def probe(self, shard: ShardInfo, seconds: float) -> None:
        pass

    async def freeze(self, source: ShardInfo, migration_id: int, seconds: float) -> float:
        return 0.0

    async def fetch(self, target: ShardInfo, migration_id: int, seconds: float) -> Fetched:
        return Fetched(0, 0)

    async def settle(self, shard: ShardInfo, migration_id: int, seconds: float) -> bool:
        return True


def started(name: str, *, draining: bool = False) -> ShardInfo:
    return ShardInfo(name, f"{name}:1", f"directory of {name}", draining)


def cluster(*shards: ShardInfo) -> Topology:
    owners = plan_owners("ring", [shard.shard_id for shard in shards], SLOTS)
    return Topology("c", 1, ClusterSettings(SLOTS, "ring"), shards, owners)


async def moved(path: Path, *steps: Topology, auto: bool = True) -> tuple[Topology, int]:
    """The topology after a mover has done all it can, and how many slots it has moved."""
    store = FileTopologyStore(path / "topology")
    for topology in steps:
        await store.compare_and_set(topology)
    mover = Mover(store, WillingShards(), Pace(share=1.0), auto=auto)
    while await mover.step():
        pass
    return await store.read(), mover.moved


async def test_a_shard_that_joins_gets_its_slots_with_the_fewest_moves(tmp_path: Path) -> None:
    before = cluster(started("a"), started("b"))
    joined = with_shard(before, started("c"))
    after, slots = await moved(tmp_path, before, joined)
    assert slots == fewest(joined)
    assert Counter(after.owners)[2] == slots


async def test_a_shard_that_drains_loses_all_its_slots(tmp_path: Path) -> None:
    before = cluster(started("a"), started("b"))
    after, slots = await moved(tmp_path, before, with_shard(before, started("b", draining=True)))
    assert slots == len(before.slots_of("b")) > 0
    assert not after.slots_of("b")


@pytest.mark.parametrize("auto", [True, False])
async def test_nothing_is_planned_while_paused_or_without_auto(tmp_path: Path, auto: bool) -> None:
    before = cluster(started("a"), started("b"))
    joined = replace(with_shard(before, started("c")), paused=auto)
    assert await moved(tmp_path, before, joined, auto=auto) == (joined, 0)


async def test_slots_of_shards_that_have_yet_to_start_stay_theirs(tmp_path: Path) -> None:
    before = cluster(started("a"), ShardInfo("b"))
    assert await moved(tmp_path, before) == (before, 0)


async def test_nothing_moves_when_every_shard_drains(tmp_path: Path) -> None:
    before = cluster(started("a", draining=True), started("b", draining=True))
    assert await moved(tmp_path, before) == (before, 0)


@pytest.mark.parametrize(("image_bytes", "slots"), [(1000, 1 + 2 + 4 + 8 + 16), (1 << 20, 5)])
async def test_only_large_images_make_slots_travel_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image_bytes: int, slots: int
) -> None:
    """Each move here takes longer than it should: with a small image that is the machine's doing, not the slots'."""

    class SlowShards(WillingShards):
        async def fetch(self, target: ShardInfo, migration_id: int, seconds: float) -> Fetched:
            return Fetched(image_bytes, 0)

    monkeypatch.setattr(mover_module, "_STALL_SECONDS", (0.0, 0.0))
    store = FileTopologyStore(tmp_path / "topology")
    before = cluster(started("a"), started("b"))
    for topology in (before, with_shard(before, started("b", draining=True))):
        await store.compare_and_set(topology)
    mover = Mover(store, SlowShards(), Pace(share=1.0))
    assert await mover.step()  # the plan
    for _ in range(5):
        assert await mover.step()
    assert mover.moved == slots
