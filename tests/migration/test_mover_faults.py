"""The mover where shards are down, hang or fail in the middle: nobody waits for somebody else's shard."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from topk_grpc.errors import TopologyConflictError, UnavailableError
from topk_grpc.migration.calls import Fetched
from topk_grpc.migration.members import ShardState, draining, state_of, with_shard
from topk_grpc.migration.mover import Mover, Pace
from topk_grpc.migration.plan import moves_left, planned
from topk_grpc.migration.records import Event, advance, begin
from topk_grpc.model import ClusterSettings, ShardInfo, Topology
from topk_grpc.ring.plan import plan_owners
from topk_grpc.topology.change import change
from topk_grpc.topology.file import FileTopologyStore

SLOTS = 64


class Shards:
    """Do what they are asked, but those in `down`; calls in `failing` fail wherever they go.

    Attributes:
        calls: what was asked of whom, in order.
        conserves: what settling says.
    """

    def __init__(self) -> None:
        self.down: set[str] = set()
        self.failing: set[str] = set()
        self.calls: list[tuple[str, str]] = []
        self.conserves = True

    def _take(self, call: str, shard: ShardInfo) -> None:
        self.calls.append((call, shard.shard_id))
        if shard.shard_id in self.down or call in self.failing:
            raise UnavailableError(f"{shard.shard_id} does not answer")

    async def probe(self, shard: ShardInfo, seconds: float) -> None:
        self._take("probe", shard)

    async def freeze(self, source: ShardInfo, migration_id: int, seconds: float) -> float:
        self._take("freeze", source)
        return 0.0

    async def fetch(self, target: ShardInfo, migration_id: int, seconds: float) -> Fetched:
        self._take("fetch", target)
        return Fetched(0, 0)

    async def settle(self, shard: ShardInfo, migration_id: int, seconds: float) -> bool:
        self._take("settle", shard)
        return self.conserves


def started(name: str) -> ShardInfo:
    return ShardInfo(name, f"{name}:1", f"directory of {name}")


def cluster(*names: str) -> Topology:
    owners = plan_owners("ring", names, SLOTS)
    return Topology("c", 1, ClusterSettings(SLOTS, "ring"), tuple(map(started, names)), owners)


async def store_of(path: Path, *steps: Topology) -> FileTopologyStore:
    store = FileTopologyStore(path / "topology")
    for topology in steps:
        await store.compare_and_set(topology)
    return store


async def step_until(mover: Mover, store: FileTopologyStore, done: Callable[[Topology], bool]) -> Topology:
    async with asyncio.timeout(30):
        while not done(topology := await store.read()):
            await mover.step()
            await asyncio.sleep(0)
    return topology


async def test_slots_are_not_frozen_for_a_shard_that_is_down_and_the_others_get_theirs(tmp_path: Path) -> None:
    before = cluster("a", "b")
    store = await store_of(tmp_path, before, with_shard(before, started("c")))
    await change(store, lambda now: with_shard(now, started("d")), "a shard")
    shards = Shards()
    shards.down.add("c")
    mover = Mover(store, shards, Pace(share=1.0))

    def only_to_c(now: Topology) -> bool:
        return all(move.target == "c" for move in moves_left(now))

    after = await step_until(mover, store, lambda now: bool(now.wanted) and only_to_c(now))
    assert len(after.slots_of("d")) == SLOTS // 4
    assert not after.slots_of("c")
    assert not after.migrations
    assert ("fetch", "c") not in shards.calls
    shards.down.clear()
    after = await step_until(mover, store, lambda now: not moves_left(now))
    assert len(after.slots_of("c")) == SLOTS // 4


async def test_a_move_that_fails_is_aborted_and_made_again(tmp_path: Path) -> None:
    before = cluster("a", "b")
    store = await store_of(tmp_path, before, with_shard(before, started("c")))
    shards = Shards()
    shards.failing.add("fetch")
    mover = Mover(store, shards, Pace(share=1.0))
    tried = await step_until(mover, store, lambda now: now.next_migration_id > 3)
    assert tried.owners == before.owners
    assert not tried.migrations
    shards.failing.clear()
    after = await step_until(mover, store, lambda now: not moves_left(now))
    assert len(after.slots_of("c")) == mover.moved == after.moved_slots == SLOTS // 3


async def test_a_record_whose_shard_has_died_waits_for_it_and_nothing_else_does(tmp_path: Path) -> None:
    before = cluster("a", "b", "c")
    topology = planned(with_shard(before, replace(started("c"), draining=True)))
    (first, *_) = moves_left(topology)
    moving, migration = begin(topology, "c", first.target, first.slots[:2])
    committed = advance(moving, migration.migration_id, Event.COMMIT)
    store = await store_of(tmp_path, *(replace(each, epoch=n) for n, each in enumerate((before, committed), 1)))
    shards = Shards()
    shards.down.add("c")
    mover = Mover(store, shards, Pace(share=1.0))
    await change(store, lambda now: with_shard(now, started("d")), "a shard")

    def others_done(now: Topology) -> bool:
        """What is left is c's own, or what came from it and goes on to d when c has read so."""
        left = {slot for move in moves_left(now) if move.source != "c" for slot in move.slots}
        return bool(now.slots_of("d")) and left <= set(migration.slots)

    after = await step_until(mover, store, others_done)
    assert after.migration(migration.migration_id) is not None
    assert state_of(after, "c") is ShardState.DRAINING
    shards.down.clear()
    after = await step_until(mover, store, lambda now: not moves_left(now) and not now.migrations)
    assert state_of(after, "c") is ShardState.DRAINED


async def test_nothing_more_moves_when_plays_were_not_conserved(tmp_path: Path) -> None:
    before = cluster("a", "b")
    store = await store_of(tmp_path, before, with_shard(before, started("c")))
    shards = Shards()
    shards.conserves = False
    mover = Mover(store, shards, Pace(share=1.0))
    stopped = await step_until(mover, store, lambda now: now.paused)
    await mover.step()
    assert (await store.read()).next_migration_id == stopped.next_migration_id == 2


async def test_without_auto_a_plan_that_somebody_made_is_carried_out(tmp_path: Path) -> None:
    before = cluster("a", "b", "c")
    store = await store_of(tmp_path, before)
    mover = Mover(store, Shards(), Pace(share=1.0), auto=False)
    assert not await mover.step()
    await change(store, lambda now: draining(now, ["c"]), "a plan")
    after = await step_until(mover, store, lambda now: not moves_left(now))
    assert state_of(after, "c") is ShardState.DRAINED


async def test_a_mover_that_is_ended_begins_nothing_more(tmp_path: Path) -> None:
    before = cluster("a", "b")
    store = await store_of(tmp_path, before, with_shard(before, started("c")))
    shards = Shards()
    mover = Mover(store, shards, Pace(share=0.5))
    running = asyncio.create_task(mover.run())
    async with asyncio.timeout(30):
        while not mover.moved:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    mover.end()
    await asyncio.wait_for(running, 10)
    after = await store.read()
    assert moves_left(after)
    assert not after.migrations


async def test_a_change_is_decided_again_until_nobody_is_quicker(tmp_path: Path) -> None:
    store = await store_of(tmp_path, cluster("a"))
    asked = 0

    def decide(now: Topology) -> Topology:
        nonlocal asked
        asked += 1
        return replace(now, epoch=now.epoch + (1 if asked == 3 else 2))

    assert (await change(store, decide, "this")).epoch == 2
    with pytest.raises(TopologyConflictError, match="that could not be written"):
        await change(store, lambda now: replace(now, epoch=now.epoch + 2), "that")
    assert (await change(store, lambda _: None, "nothing")).epoch == 2
