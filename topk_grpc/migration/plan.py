"""Who is to own what, and which slots have to move for it.

The plan stands in the topology (`wanted`), made when the shards that may own slots have changed, and kept until they
change again. It is not made anew from the present owners after each move: a shard that has got its first slots would
not be taken for one that joins any more, and the rest would go elsewhere. A plan that replaces one under way begins
from what that one wanted, for the same reason.

Shards may own slots from their first start on, until they are to drain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from topk_grpc.errors import InvalidArgumentError
from topk_grpc.model import ShardInfo, Topology
from topk_grpc.ring.partitioners import partitioner_of
from topk_grpc.ring.plan import load_max, plan_owners


@dataclass(frozen=True, slots=True)
class Move:
    """Slots that are to go from one shard to another; not all at once.

    Attributes:
        source, target: shard ids.
        slots: ascending.
    """

    source: str
    target: str
    slots: tuple[int, ...]


def eligible(topology: Topology) -> tuple[str, ...]:
    """The shards that may own slots, ascending."""
    return tuple(shard.shard_id for shard in topology.shards if shard.address and not shard.draining)


def planned(topology: Topology, *, anew: bool = False) -> Topology:
    """The topology with a plan for the shards that may own slots; the same one if it has that already.

    Args:
        topology: the present one.
        anew: make a plan even if the shards are the same: evens out what earlier changes have left.

    Raises:
        InvalidArgumentError: no shard may own slots, or more than there are slots.
    """
    names = eligible(topology)
    if not names:
        raise InvalidArgumentError("no shard is left that may own slots: start one, or let one drain no more")
    ids = [shard.shard_id for shard in topology.shards]
    current = topology.wanted or topology.owners
    if {ids[owner] for owner in current} == set(names) and not anew:
        return topology
    settings = topology.settings
    wanted = plan_owners(settings.partitioner, names, settings.slots, [ids[owner] for owner in current])
    place = {name: index for index, name in enumerate(ids)}
    owners = tuple(place[names[owner]] for owner in wanted)
    return topology if owners == current else replace(topology, epoch=topology.epoch + 1, wanted=owners)


def moves_left(topology: Topology) -> list[Move]:
    """What has to move until the plan is reached: those that drain first, then the fullest shards first."""
    found: dict[tuple[int, int], list[int]] = {}
    for slot, (owner, wanted) in enumerate(zip(topology.owners, topology.wanted or topology.owners, strict=True)):
        if owner != wanted:
            found.setdefault((owner, wanted), []).append(slot)
    load = Counter(topology.owners)
    shards = topology.shards
    # A target that has little comes first, so that joiners fill evenly.
    order = sorted(found, key=lambda pair: (not shards[pair[0]].draining, -load[pair[0]], load[pair[1]], pair))
    return [
        Move(shards[source].shard_id, shards[target].shard_id, tuple(found[source, target])) for source, target in order
    ]


def fewest(topology: Topology) -> int:
    """The least number of slots that have to move until every shard that may own slots has what it is allowed.

    Raises:
        InvalidArgumentError: no shard may own slots.
    """
    names = eligible(topology)
    if not names:
        raise InvalidArgumentError("no shard is left that may own slots: start one, or let one drain no more")
    slots = topology.settings.slots
    load = Counter(topology.shards[owner].shard_id for owner in topology.owners)
    out = sum(load[name] for name in load if name not in names)
    bound, mean = load_max(slots, len(names)), slots // len(names)
    over = out + sum(max(0, load[name] - bound) for name in names)
    joins = sum(mean for name in names if not load[name])
    return max(over, joins)


def check_drain(topology: Topology) -> None:
    """Whether shards can be drained at all.

    Raises:
        UnsupportedError: they cannot: the slots of a shard would move, and what it has counted would stay there.
    """
    partitioner_of(topology.settings.partitioner).require_whole_songs("draining a shard")


# --- Members ----------------------------------------------------------------------------------------------------------


def with_shard(topology: Topology, shard: ShardInfo) -> Topology:
    """The topology with one more shard, which owns nothing, or with a known one as it is now."""
    others = [each for each in topology.shards if each.shard_id != shard.shard_id]
    return _with_shards(topology, [*others, shard])


def without_shard(topology: Topology, shard_id: str) -> Topology:
    """The topology without a shard.

    Raises:
        InvalidArgumentError: it owns slots, or is to; or a migration concerns it; or there is none of that name.
        UnsupportedError: it may have plays though it owns no slots.
    """
    shard = topology.shard(shard_id)
    if shard is None:
        raise InvalidArgumentError(f"the cluster has no shard {shard_id!r}")
    if shard.directory_id:
        check_drain(topology)
    index = topology.shards.index(shard)
    owned = sum(owner == index for owner in topology.owners)
    if owned or index in topology.wanted:
        raise InvalidArgumentError(
            f"{shard_id} owns {owned} slots, or is to own some: drain it, and wait until its slots have moved"
        )
    if any(shard_id in {one.source, one.target} for one in topology.migrations):
        raise InvalidArgumentError(f"a migration of {shard_id} is not settled yet: wait for it")
    return _with_shards(topology, [each for each in topology.shards if each is not shard])


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
