"""A topology as JSON.

    {"format": 2, "cluster_id": "…", "epoch": 3, "secret": "…",
     "settings": {"slots": 1024, "partitioner": "ring", "resolution_ms": 1000},
     "shards": [{"shard_id": "shard-0", "address": "127.0.0.1:4711", "directory_id": "…"}, …],
     "owners": [0, 1, 1, …]}        the owner's index in shards, for each slot

Format 1 had no secret. A reader knows every format up to its own. Members that it does not know are left aside: what
must not be left aside raises the format.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Final

from topk_grpc.errors import CorruptError, InvalidArgumentError, VersionError
from topk_grpc.model import ClusterSettings, ShardInfo, Topology

FORMAT: Final = 2


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
    }
    # One line for each member: people read this file when something is wrong.
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in members.items())
    return f"{{\n{lines}\n}}\n".encode()


def _take(members: Any, name: str, kind: type, default: Any = None) -> Any:
    value = members.get(name, default) if isinstance(members, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} is missing or not of the kind expected")  # noqa: TRY004  # the bytes are at fault
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
                )
                for shard in _take(members, "shards", list)
            ),
            owners=tuple(_take({"owners": owner}, "owners", int) for owner in _take(members, "owners", list)),
            secret=_take(members, "secret", str, ""),
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
