"""The record of a migration: every event in every state, and what the topology looks like after random ones."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from topk_grpc.errors import MigrationError
from topk_grpc.migration.records import TRANSITIONS, Event, advance, begin
from topk_grpc.model import ClusterSettings, MigrationState, ShardInfo, Topology
from topk_grpc.topology import codec

FIRST = Topology(
    "cluster", 1, ClusterSettings(slots=6), tuple(map(ShardInfo, ("a", "b", "c"))), (0, 0, 0, 0, 1, 1)
)  # fmt: skip


def owner(topology: Topology, slot: int) -> str:
    return topology.shards[topology.owners[slot]].shard_id


def in_state(state: MigrationState | None) -> Topology:
    topology, _ = begin(FIRST, "a", "b", [2, 0])
    match state:
        case None:
            return FIRST
        case MigrationState.COMMITTED:
            return advance(topology, 1, Event.COMMIT)
        case MigrationState.ABORTED:
            return advance(topology, 1, Event.ABORT)
    return topology


@pytest.mark.parametrize(("state", "event"), list(itertools.product([None, *MigrationState], Event)))
def test_every_event_in_every_state(state: MigrationState | None, event: Event) -> None:
    topology = in_state(state)
    if event is Event.BEGIN:
        if state is None:
            begin(topology, "a", "b", [2, 0])
        else:
            with pytest.raises(MigrationError):
                begin(topology, "a", "b", [0])
        return
    if (state, event) not in TRANSITIONS:
        with pytest.raises(MigrationError, match=f"cannot {event}"):
            advance(topology, 1, event)
        return
    after = advance(topology, 1, event)
    assert after.epoch == topology.epoch + 1
    found = after.migration(1)
    assert (found.state if found else None) == TRANSITIONS[state, event]
    moved = MigrationState.COMMITTED in {state, TRANSITIONS[state, event]}
    assert {owner(after, slot) for slot in (0, 2)} == {"b" if moved else "a"}
    assert {owner(after, slot) for slot in (1, 3)} == {"a"}


@pytest.mark.parametrize(
    ("source", "target", "slots"),
    [("a", "a", [0]), ("a", "d", [0]), ("d", "a", [0]), ("a", "b", []), ("a", "b", [4]), ("a", "b", [9])],
)
def test_what_cannot_move_is_refused(source: str, target: str, slots: list[int]) -> None:
    with pytest.raises(MigrationError):
        begin(FIRST, source, target, slots)


@given(st.data())
def test_after_any_events_the_topology_is_whole_and_each_slot_is_where_the_last_commit_took_it(
    data: st.DataObject,
) -> None:
    topology, owners = FIRST, [owner(FIRST, slot) for slot in range(6)]
    begun = 0
    for _ in range(data.draw(st.integers(0, 15))):
        before = topology
        if not topology.migrations or data.draw(st.booleans()):
            source, target = data.draw(st.permutations("abc"))[:2]
            slots = data.draw(st.lists(st.integers(0, 5), unique=True, max_size=3))
            try:
                topology, migration = begin(topology, source, target, slots)
            except MigrationError:
                continue
            begun += 1
            assert migration.migration_id == begun  # never one that was used before
        else:
            migration = data.draw(st.sampled_from(topology.migrations))
            event = data.draw(st.sampled_from([Event.COMMIT, Event.ABORT, Event.SETTLE]))
            try:
                topology = advance(topology, migration.migration_id, event)
            except MigrationError:
                continue
            if event is Event.COMMIT:
                for slot in migration.slots:
                    owners[slot] = migration.target
        assert topology.epoch == before.epoch + 1
        assert [owner(topology, slot) for slot in range(6)] == owners
        assert codec.decode(codec.encode(topology), "here") == topology
    assert replace(topology, epoch=0, migrations=(), owners=(), next_migration_id=0) == replace(
        FIRST, epoch=0, owners=(), next_migration_id=0
    )
