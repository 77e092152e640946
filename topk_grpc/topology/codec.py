"""A topology as JSON.

    {"format": 3, "cluster_id": "…", "epoch": 3, "secret": "…",
     "settings": {"slots": 1024, "partitioner": "ring", "resolution_ms": 1000},
     "shards": [{"shard_id": "shard-0", "address": "127.0.0.1:4711", "directory_id": "…", "draining": false}, …],
     "owners": [0, 1, 1, …],        the owner's index in shards, for each slot
     "wanted": [0, 1, 0, …],        the same, as it is to become; empty: as it is
     "paused": false, "next_migration_id": 8, "moved_slots": 31, "longest_stall_ms": 84,
     "migrations": [{"migration_id": 7, "source": "shard-0", "target": "shard-1", "slots": [5, 9], "state": "moving"}]}

Format 1 had no secret, format 2 nothing that moves. A reader knows every format up to its own. Members that it does not
know are left aside: what must not be left aside raises the format.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Final

from topk_grpc.errors import CorruptError, InvalidArgumentError, VersionError
from topk_grpc.model import ClusterSettings, Migration, MigrationState, ShardInfo, Topology

FORMAT: Final = 3


def check(topology: Topology) -> None:
    """Holds a topology against the rules of model.Topology.

    Raises:
        InvalidArgumentError: it breaks one; the message says which.
    """
    names = [shard.shard_id for shard in topology.shards]
    count, slots = len(names), topology.settings.slots
    problem = None
    if not topology.cluster_id:
        problem = "cluster_id is empty"
    elif topology.epoch < 0:
        problem = f"the epoch is {topology.epoch}, below 0"
    elif not names or names != sorted(set(names)) or not names[0]:
        problem = "the shards are not in ascending order of distinct ids"
    elif slots < 1 or topology.settings.resolution_ms < 1:
        problem = f"slots is {slots} and resolution_ms {topology.settings.resolution_ms}: both have to be above 0"
    elif len(topology.owners) != slots:
        problem = f"there are {len(topology.owners)} owners for {slots} slots"
    elif not all(0 <= owner < count for owner in topology.owners):
        problem = f"an owner is no index of the {count} shards"
    elif topology.wanted and (
        len(topology.wanted) != slots or not all(0 <= owner < count for owner in topology.wanted)
    ):
        problem = "the plan is not one of the shards for each slot"
    elif topology.moved_slots < 0 or topology.longest_stall_ms < 0:
        problem = "moved_slots or longest_stall_ms is below 0"
    else:
        problem = _migrations_problem(topology)
    if problem is not None:
        raise InvalidArgumentError(f"the topology contradicts itself: {problem}")


def encode(topology: Topology) -> bytes:
    """Writes a topology.

    Raises:
        InvalidArgumentError: it breaks the rules of model.Topology.
    """
    check(topology)
    members = {
        "format": FORMAT,
        "cluster_id": topology.cluster_id,
        "epoch": topology.epoch,
        "secret": topology.secret,
        "settings": dataclasses.asdict(topology.settings),
        "shards": [dataclasses.asdict(shard) for shard in topology.shards],
        "owners": topology.owners,
        "wanted": topology.wanted,
        "paused": topology.paused,
        "next_migration_id": topology.next_migration_id,
        "moved_slots": topology.moved_slots,
        "longest_stall_ms": topology.longest_stall_ms,
        "migrations": [dataclasses.asdict(migration) for migration in topology.migrations],
    }
    # One line for each member: people read this file when something is wrong.
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in members.items())
    return f"{{\n{lines}\n}}\n".encode()


def _migrations_problem(topology: Topology) -> str | None:
    """What the migrations contradict; None: nothing."""
    ids = [0, *(migration.migration_id for migration in topology.migrations), topology.next_migration_id]
    if ids != sorted(set(ids)):
        return "the migrations are not in ascending order of distinct numbers from 1, below that of the next"
    moving: set[int] = set()
    for one in topology.migrations:
        where = f"migration {one.migration_id}"
        if one.source == one.target or not (topology.shard(one.source) and topology.shard(one.target)):
            return f"{where} is not between two shards"
        if not one.slots or list(one.slots) != sorted(set(one.slots)):
            return f"{where}: its slots are none, or not ascending and distinct"
        if one.slots[0] < 0 or one.slots[-1] >= topology.settings.slots:
            return f"{where} moves a slot that the cluster does not have"
        if moving & set(one.slots):
            return f"{where} moves a slot that another one moves"
        moving |= set(one.slots)
        owner = one.target if one.state is MigrationState.COMMITTED else one.source
        if any(topology.shards[topology.owners[slot]].shard_id != owner for slot in one.slots):
            return f"{where} is {one.state}, but {owner} does not own all of its slots"
    return None


def _take(members: Any, name: str, kind: type, default: Any = None) -> Any:
    value = members.get(name, default) if isinstance(members, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise ValueError(f"{name} is missing or not of the kind expected")  # the bytes are at fault
    return value


def decode(raw: bytes, where: str) -> Topology:
    """Reads a topology.

    Args:
        raw: the bytes.
        where: the file or key they come from, for messages.

    Raises:
        VersionError: a newer release wrote it.
        CorruptError: it is damaged.
    """
    try:
        members = json.loads(raw)
        written = _take(members, "format", int)
    except (ValueError, RecursionError) as error:  # covers malformed JSON, also too deep, and malformed UTF-8
        raise _damaged(where, error) from error
    if written > FORMAT:
        raise VersionError(
            f"the topology at {where} was written in format {written} by a newer release; this one reads up to "
            f"{FORMAT}: upgrade this process"
        )
    try:
        settings = _take(members, "settings", dict)
        defaults = ClusterSettings()
        topology = Topology(
            cluster_id=_take(members, "cluster_id", str),
            epoch=_take(members, "epoch", int),
            settings=ClusterSettings(
                slots=_take(settings, "slots", int, defaults.slots),
                partitioner=_take(settings, "partitioner", str, defaults.partitioner),
                resolution_ms=_take(settings, "resolution_ms", int, defaults.resolution_ms),
            ),
            shards=tuple(
                ShardInfo(
                    _take(shard, "shard_id", str),
                    _take(shard, "address", str, ""),
                    _take(shard, "directory_id", str, ""),
                    draining=_take(shard, "draining", bool, default=False),
                )
                for shard in _take(members, "shards", list)
            ),
            owners=tuple(_take({"owners": owner}, "owners", int) for owner in _take(members, "owners", list)),
            secret=_take(members, "secret", str, ""),
            migrations=tuple(
                Migration(
                    _take(migration, "migration_id", int),
                    _take(migration, "source", str),
                    _take(migration, "target", str),
                    tuple(_take({"slots": slot}, "slots", int) for slot in _take(migration, "slots", list)),
                    MigrationState(_take(migration, "state", str)),
                )
                for migration in _take(members, "migrations", list, [])
            ),
            next_migration_id=_take(members, "next_migration_id", int, 1),
            paused=_take(members, "paused", bool, default=False),
            wanted=tuple(_take({"wanted": owner}, "wanted", int) for owner in _take(members, "wanted", list, [])),
            moved_slots=_take(members, "moved_slots", int, 0),
            longest_stall_ms=_take(members, "longest_stall_ms", int, 0),
        )
        check(topology)
    except ValueError as error:  # InvalidArgumentError is one
        raise _damaged(where, error) from error
    return topology


def _damaged(where: str, error: Exception) -> CorruptError:
    return CorruptError(
        f"the topology at {where} is damaged ({error}): restore it from a copy; the shards' own data lies elsewhere",
        where,
    )
