"""Who is in the cluster: it is made, shards come, drain, and leave. Each is one change of the topology.

    a shard is    new        it has a place and has never started       gets no slots
                  active     it has started                             gets slots by the next plan
                  draining   its slots are planned to go to the others  gets none
                  drained    it owns nothing, and nothing is on its way  can be removed

A shard that was removed leaves no trace but its data directory. That owns nothing, so one that comes back under its old
name, with the old directory or a new one, joins like any other.
"""

from __future__ import annotations

import re
import secrets
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Final

from topk_grpc.errors import InvalidArgumentError
from topk_grpc.migration.plan import eligible, planned
from topk_grpc.model import ClusterSettings, ShardInfo, Topology
from topk_grpc.ring.partitioners import partitioner_of
from topk_grpc.ring.plan import plan_owners

EPOCH_FIRST: Final = 1

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
"""Also the name of a directory, and of a host."""


class ShardState(StrEnum):
    """What a shard is to the cluster, whether it answers or not."""

    NEW = "new"
    ACTIVE = "active"
    DRAINING = "draining"
    DRAINED = "drained"


def state_of(topology: Topology, shard_id: str) -> ShardState:
    """What a shard of the topology is."""
    shard = topology.shard(shard_id)
    if shard is None or not shard.draining:
        return ShardState.ACTIVE if shard is not None and shard.address else ShardState.NEW
    return ShardState.DRAINING if _what_is_left(topology, shard) else ShardState.DRAINED


def _what_is_left(topology: Topology, shard: ShardInfo) -> str:
    """What a shard is still needed for; empty: nothing."""
    index = topology.shards.index(shard)
    owned = topology.owners.count(index)
    if owned or index in topology.wanted:
        return f"it owns {owned} slots, or is to own some"
    if any(shard.shard_id in {one.source, one.target} for one in topology.migrations):
        return "a migration of its slots is not settled yet"
    return ""


# --- A new cluster ----------------------------------------------------------------------------------------------------


def new_topology(shard_ids: Iterable[str], settings: ClusterSettings) -> Topology:
    """The first topology of a cluster, with an identity and a secret of its own.

    Raises:
        InvalidArgumentError: the shards cannot share the slots.
        SettingError: there is no such partitioner.
    """
    # Owners are places in the list of shards, which a topology has by name: "shard-10" before "shard-2".
    ordered = sorted(shard_ids)
    return Topology(
        cluster_id=uuid.uuid4().hex,
        epoch=EPOCH_FIRST,
        settings=settings,
        shards=tuple(map(ShardInfo, ordered)),
        owners=plan_owners(settings.partitioner, ordered, settings.slots),
        secret=secrets.token_hex(32),
    )


def free_names(topology: Topology, count: int, prefix: str = "shard-") -> list[str]:
    """The first names of the form `shard-N` that no shard has."""
    taken = {shard.shard_id for shard in topology.shards}
    numbers = range(len(taken) + count)
    return [name for name in (f"{prefix}{number}" for number in numbers) if name not in taken][:count]


# --- Changes ----------------------------------------------------------------------------------------------------------


def with_shard(topology: Topology, shard: ShardInfo) -> Topology:
    """The topology with one more shard, which owns nothing, or with a known one as it is now.

    Raises:
        InvalidArgumentError: its name is none, or there would be more shards than slots.
    """
    others = [each for each in topology.shards if each.shard_id != shard.shard_id]
    if len(others) == len(topology.shards):
        if not _NAME.fullmatch(shard.shard_id):
            raise InvalidArgumentError(
                f"{shard.shard_id!r} is no name for a shard: give 1 to 63 letters, digits, - and _, a letter or digit"
                " first"
            )
        if len(others) >= topology.settings.slots:
            raise InvalidArgumentError(
                f"the cluster has {len(others)} shards for its {topology.settings.slots} slots: there is none for"
                f" {shard.shard_id}"
            )
    return _with_shards(topology, [*others, shard])


def with_new_shards(topology: Topology, shard_ids: Sequence[str]) -> Topology:
    """The topology with places for shards; those that drain are kept after all.

    Raises:
        InvalidArgumentError: a shard of that name is in the cluster, or as `with_shard`.
    """
    changed = topology
    for shard_id in shard_ids:
        present = changed.shard(shard_id)
        if present is not None and not present.draining:
            raise InvalidArgumentError(f"the cluster has a shard {shard_id!r} already: give another name")
        changed = with_shard(changed, replace(present, draining=False) if present else ShardInfo(shard_id))
    return replace(changed, epoch=topology.epoch + 1)


def draining(topology: Topology, shard_ids: Sequence[str]) -> Topology:
    """The topology with a plan that leaves these shards nothing.

    Raises:
        InvalidArgumentError: there is no such shard, it has never started, or none would be left to take the slots.
        UnavailableError: another shard that owns slots has never started.
        UnsupportedError: the cluster's partitioner spreads songs: what a shard has counted cannot be moved.
    """
    partitioner_of(topology.settings.partitioner).require_whole_songs("draining a shard")
    changed = topology
    for shard_id in shard_ids:
        shard = _find(topology, shard_id)
        if not shard.address and _what_is_left(topology, shard):
            raise InvalidArgumentError(f"{shard_id} cannot drain before it has started for the first time: start it")
        changed = with_shard(changed, replace(shard, draining=True))
    if not eligible(changed):
        raise InvalidArgumentError(
            f"{', '.join(shard_ids)} cannot drain: no other shard that has started is left to take the slots. Add one"
            " first, and wait until it has joined"
        )
    return replace(planned(changed), epoch=topology.epoch + 1)


def without_shard(topology: Topology, shard_id: str) -> Topology:
    """The topology without a shard.

    Raises:
        InvalidArgumentError: there is no such shard, it is the last one, or it is still needed.
        UnsupportedError: the cluster's partitioner spreads songs: it may have plays though it owns no slots.
    """
    shard = _find(topology, shard_id)
    if shard.directory_id:
        partitioner_of(topology.settings.partitioner).require_whole_songs("removing a shard that has started")
    if left := _what_is_left(topology, shard):
        remedy = "wait until it is drained" if shard.draining else f"drain it first (`topk cluster drain {shard_id}`)"
        raise InvalidArgumentError(f"{shard_id} cannot be removed: {left}: {remedy}")
    return _with_shards(topology, [each for each in topology.shards if each is not shard])


def paused(topology: Topology, *, pause: bool) -> Topology | None:
    """The topology in which no move begins, or in which moves begin again; None: so it is already."""
    return None if topology.paused == pause else replace(topology, epoch=topology.epoch + 1, paused=pause)


def _find(topology: Topology, shard_id: str) -> ShardInfo:
    shard = topology.shard(shard_id)
    if shard is None:
        known = ", ".join(each.shard_id for each in topology.shards)
        raise InvalidArgumentError(f"the cluster has no shard {shard_id!r}, only {known}")
    return shard


def _with_shards(topology: Topology, shards: Iterable[ShardInfo]) -> Topology:
    # Owners are places among the shards, which stand by name: they shift.
    ordered = tuple(sorted(shards, key=lambda shard: shard.shard_id))
    place = {shard.shard_id: index for index, shard in enumerate(ordered)}
    ids = [shard.shard_id for shard in topology.shards]
    return replace(
        topology,
        epoch=topology.epoch + 1,
        shards=ordered,
        owners=tuple(place[ids[owner]] for owner in topology.owners),
        wanted=tuple(place[ids[owner]] for owner in topology.wanted),
    )
