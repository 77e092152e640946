"""The plan in the topology: made once for the shards there are, and carried out without a detour."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topk_grpc.errors import InvalidArgumentError
from topk_grpc.migration.members import with_shard, without_shard
from topk_grpc.migration.plan import fewest, moves_left, planned
from topk_grpc.migration.records import Event, advance, begin
from topk_grpc.model import ClusterSettings, ShardInfo, Topology
from topk_grpc.ring.plan import load_max, plan_owners
from topk_grpc.topology import codec

SLOTS = 64


def started(name: str, *, draining: bool = False) -> ShardInfo:
    return ShardInfo(name, f"{name}:1", f"directory of {name}", draining)


def cluster(*names: str, partitioner: str = "ring") -> Topology:
    owners = plan_owners(partitioner, names, SLOTS)
    return Topology("c", 1, ClusterSettings(SLOTS, partitioner), tuple(map(started, names)), owners)


def load(topology: Topology) -> Counter[str]:
    return Counter(topology.shards[owner].shard_id for owner in topology.owners)


def carry_out(topology: Topology, moves: int = 1_000_000, together: int = 5) -> tuple[Topology, int]:
    """Moves a few slots after the other; returns how many have moved."""
    moved = 0
    while moves > 0 and (left := moves_left(topology)):
        slots = left[0].slots[:together]
        topology, migration = begin(topology, left[0].source, left[0].target, slots)
        for event in (Event.COMMIT, Event.SETTLE):
            topology = advance(topology, migration.migration_id, event)
        assert planned(topology) is topology  # the plan stays as it is while it is carried out
        moved += len(slots)
        moves -= 1
    return topology, moved


def test_a_cluster_as_it_was_made_stays_as_it_is() -> None:
    topology = cluster("a", "b", "c")
    assert planned(topology) is topology
    assert not moves_left(topology)
    assert fewest(topology) == 0


def test_a_shard_gets_slots_when_it_has_started_and_not_before() -> None:
    topology = with_shard(cluster("a", "c"), ShardInfo("b"))
    assert load(topology) == load(cluster("a", "c"))
    assert planned(topology) is topology
    topology = planned(with_shard(topology, started("b")))
    assert fewest(topology) == SLOTS // 3
    after, moved = carry_out(topology)
    assert moved == fewest(topology)
    assert load(after)["b"] == SLOTS // 3
    assert planned(after) is after
    assert {slot for slot in range(SLOTS) if after.owners[slot] != topology.owners[slot]} == {
        slot for slot in range(SLOTS) if after.shards[after.owners[slot]].shard_id == "b"
    }


def test_a_shard_that_drains_loses_everything_and_can_then_be_removed() -> None:
    topology = with_shard(cluster("a", "b", "c"), started("b", draining=True))
    with pytest.raises(InvalidArgumentError, match="owns 21 slots"):
        without_shard(topology, "b")
    topology = planned(topology)
    before = load(topology)["b"]
    after, moved = carry_out(topology)
    assert moved == before == fewest(topology)
    assert set(load(after)) == {"a", "c"}
    gone = without_shard(after, "b")
    assert [shard.shard_id for shard in gone.shards] == ["a", "c"]
    assert load(gone) == load(after)
    assert planned(gone) is gone
    with pytest.raises(InvalidArgumentError, match="no shard 'b'"):
        without_shard(gone, "b")


def test_a_shard_of_a_migration_that_is_not_settled_cannot_be_removed() -> None:
    topology = planned(with_shard(cluster("a", "b"), started("b", draining=True)))
    (left,) = moves_left(topology)
    topology, migration = begin(topology, "b", "a", left.slots)
    topology = advance(topology, migration.migration_id, Event.COMMIT)
    with pytest.raises(InvalidArgumentError, match="not settled"):
        without_shard(topology, "b")
    without_shard(advance(topology, migration.migration_id, Event.SETTLE), "b")


def test_the_last_shard_cannot_drain() -> None:
    with pytest.raises(InvalidArgumentError, match="no shard is left"):
        planned(with_shard(cluster("a"), started("a", draining=True)))


def test_those_that_drain_go_first() -> None:
    topology = with_shard(with_shard(cluster("a", "b", "c"), started("c", draining=True)), started("d"))
    left = moves_left(planned(topology))
    assert left[0].source == "c"
    assert {one.source for one in left} > {"c"}


@settings(deadline=None)
@given(st.data())
def test_whatever_joins_and_drains_meanwhile_everybody_ends_within_the_bound(data: st.DataObject) -> None:
    """Plans replace each other while they are carried out, and the topology is whole all the time."""
    partitioner = data.draw(st.sampled_from(["ring", "ring", "modulo"]))
    topology = cluster("s0", "s1", "s2", partitioner=partitioner)
    for step in range(data.draw(st.integers(1, 5))):
        up = [shard for shard in topology.shards if not shard.draining]
        if len(up) > 1 and data.draw(st.booleans()):
            topology = with_shard(topology, replace(data.draw(st.sampled_from(up)), draining=True))
        else:
            topology = with_shard(topology, started(f"t{step}"))
        topology = planned(topology)
        topology, _ = carry_out(topology, data.draw(st.integers(0, 12)))
        for shard in topology.shards:
            if shard.draining and data.draw(st.booleans()):
                try:
                    topology = without_shard(topology, shard.shard_id)
                except InvalidArgumentError:
                    continue
        assert codec.decode(codec.encode(topology), "here") == topology
    topology, _ = carry_out(topology)
    names = [shard.shard_id for shard in topology.shards if not shard.draining]
    assert set(load(topology)) == set(names)
    if partitioner == "ring":
        assert max(load(topology).values()) <= load_max(SLOTS, len(names))
    else:
        assert [topology.shards[owner].shard_id for owner in topology.owners] == [
            sorted(names)[slot % len(names)] for slot in range(SLOTS)
        ]
