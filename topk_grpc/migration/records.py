"""The record of a migration in the topology, as a table of states and events.

    state \\ event    begin      commit      abort      settle
    (none)           moving     ·           ·          ·
    moving           ·          committed   aborted    ·
    committed        ·          ·           ·          (none)
    aborted          ·          ·           ·          (none)

Everything else is refused. Each event is one compare-and-set of the topology, so of two who decide about the same
migration one reads what the other has decided. A commit replaces the owner of the slots in the same change. What the
two shards do meanwhile stands in engine/ownership.py; what drives them in migration/mover.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from topk_grpc.errors import MigrationError
from topk_grpc.model import Migration, MigrationState, Topology


class Event(StrEnum):
    """What happens to a record."""

    BEGIN = "begin"
    COMMIT = "commit"
    ABORT = "abort"
    SETTLE = "settle"


TRANSITIONS: Final[Mapping[tuple[MigrationState | None, Event], MigrationState | None]] = MappingProxyType({
    (None, Event.BEGIN): MigrationState.MOVING,
    (MigrationState.MOVING, Event.COMMIT): MigrationState.COMMITTED,
    (MigrationState.MOVING, Event.ABORT): MigrationState.ABORTED,
    (MigrationState.COMMITTED, Event.SETTLE): None,
    (MigrationState.ABORTED, Event.SETTLE): None,
})  # fmt: skip
"""What each event makes of each state; None: no record."""


def begin(topology: Topology, source: str, target: str, slots: Sequence[int]) -> tuple[Topology, Migration]:
    """The topology with one more migration, and that.

    Args:
        topology: the present one.
        source: owns the slots.
        target: takes them.
        slots: distinct.

    Raises:
        MigrationError: the source does not own them all, one of them moves already, or a shard is not known.
    """
    moving = {slot for one in topology.migrations for slot in one.slots}
    if source == target or topology.shard(source) is None or topology.shard(target) is None:
        raise MigrationError(f"slots cannot move from {source!r} to {target!r}: name two shards of the cluster")
    if not slots or moving & set(slots) or not set(slots) <= set(topology.slots_of(source)):
        raise MigrationError(f"{source} does not own all of the slots, or one of them moves already")
    migration = Migration(topology.next_migration_id, source, target, tuple(sorted(slots)))
    changed = replace(
        topology,
        epoch=topology.epoch + 1,
        migrations=(*topology.migrations, migration),
        next_migration_id=topology.next_migration_id + 1,
    )
    return changed, migration


def advance(topology: Topology, migration_id: int, event: Event) -> Topology:
    """The topology after an event.

    Raises:
        MigrationError: the state of the migration does not allow it.
    """
    found = topology.migration(migration_id)
    state = found.state if found else None
    if found is None or (state, event) not in TRANSITIONS:
        raise MigrationError(f"migration {migration_id} is {state or 'not under way'}: it cannot {event}")
    after = TRANSITIONS[state, event]
    changed = replace(found, state=after) if after else None
    migrations = tuple(
        each for each in (changed if one is found else one for one in topology.migrations) if each is not None
    )
    owners = list(topology.owners)
    if after is MigrationState.COMMITTED:
        target = next(index for index, shard in enumerate(topology.shards) if shard.shard_id == found.target)
        for slot in found.slots:
            owners[slot] = target
    return replace(topology, epoch=topology.epoch + 1, migrations=migrations, owners=tuple(owners))
