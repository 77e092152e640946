"""Consistent hashing with bounded load: which shard owns which slot, under `ring` and `round_robin`.

Mirrokni, Thorup, Zadimoghaddam: Consistent Hashing with Bounded Loads, SODA 2018. Shards stand at 160 points each on a
ring of 32 bits, slots at one; the points are those of uhashring's ketama, the same in every process and version. A slot
walks the ring upwards to the first shard with room, and room ends at

    max(ceil(mean), floor(1.05 × mean))       mean = slots / shards

A plan starts from the present owners, for a slot that changes its owner has to be moved with all its plays. Computed
from nothing for the new set of shards, the walks displace each other and up to 3.25 times as many slots move as needed.
So, in this order:

1. Slots without an owner (all of them at first, later those of a shard that leaves) walk the ring.
2. A shard that owned nothing takes, from shards that have more than the new bound first, then from those that have more
   than the mean, the slots that meet its points first, until it has floor(mean).
3. Where a shard still has more than the bound, its slots walk on, those first that are farthest from its points.

For one shard that joins n, step 2 moves floor(slots / (n + 1)) slots, which is the least that evens out; step 3 has
something to do only where the owners before were uneven.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Final

from uhashring import HashRing

VNODES: Final = 40
"""Virtual nodes of a shard; ketama makes four points of each."""

LOAD_PERCENT_MAX: Final = 105
"""How much of the mean a shard may own."""

_RING_SIZE: Final = 1 << 32


# Neither depends on who else is there, and computing them is most of what a plan costs.


@lru_cache(maxsize=512)
def _points_of(shard_id: str) -> tuple[int, ...]:
    """The points of a shard, ascending."""
    ring = HashRing(nodes={shard_id: {"vnodes": VNODES, "weight": 1}}, hash_fn="ketama")
    return tuple(sorted({key for key, _ in ring.get_points()}))


@lru_cache(maxsize=4)
def _places_of(slots: int) -> tuple[int, ...]:
    """The place of each slot."""
    ring = HashRing(nodes={}, hash_fn="ketama")
    return tuple(ring.hashi(f"slot-{slot}") for slot in range(slots))


class _Ring:
    """The points of the shards, and the places of the slots among them."""

    def __init__(self, shard_ids: Sequence[str], slots: int) -> None:
        # By name: should two points fall together, the last name has it, whoever asks.
        points = sorted({key: name for name in sorted(shard_ids) for key in _points_of(name)}.items())
        self._keys = [key for key, _ in points]
        self._names = [name for _, name in points]
        self._keys_of: dict[str, list[int]] = {name: [] for name in shard_ids}
        for key, name in points:
            self._keys_of[name].append(key)
        self.places = _places_of(slots)

    def walk(self, slot: int) -> Iterator[str]:
        """The shards in the order that the slot meets their points; a shard comes once for each point."""
        start = bisect_left(self._keys, self.places[slot])
        yield from self._names[start:]
        yield from self._names[:start]

    def distance(self, slot: int, shard_id: str) -> int:
        """How far the slot walks until it meets the shard's next point."""
        keys, place = self._keys_of[shard_id], self.places[slot]
        index = bisect_left(keys, place)
        key = keys[index] if index < len(keys) else keys[0] + _RING_SIZE
        return key - place


def load_max(slots: int, shards: int) -> int:
    """The most slots that a shard may own: max(ceil(mean), floor(1.05 × mean))."""
    return max(-(-slots // shards), LOAD_PERCENT_MAX * slots // (100 * shards))


def plan_bounded_load(shard_ids: Sequence[str], slots: int, current: Sequence[str | None] | None) -> list[str]:
    """The owner of each slot by the rules above.

    Args:
        shard_ids: those to share the slots, distinct.
        slots: how many there are, at least as many as shards.
        current: the present owner of each slot, who need not be among shard_ids; None for nobody.
    """
    ring = _Ring(shard_ids, slots)
    bound, mean = load_max(slots, len(shard_ids)), slots // len(shard_ids)
    load = dict.fromkeys(shard_ids, 0)
    owners: list[str | None] = [owner if owner in load else None for owner in current or [None] * slots]
    for owner in owners:
        if owner is not None:
            load[owner] += 1
    joiners = sorted(name for name, owned in load.items() if not owned)

    def give(slot: int, to: str) -> None:
        before = owners[slot]
        if before is not None:
            load[before] -= 1
        owners[slot] = to
        load[to] += 1

    def walk_on(slot: int) -> None:
        give(slot, next(name for name in ring.walk(slot) if load[name] < bound))

    for slot in range(slots):
        if owners[slot] is None:
            walk_on(slot)

    for joiner in joiners:
        nearest = sorted(range(slots), key=lambda slot: (ring.distance(slot, joiner), slot))
        for floor in (bound, mean):  # from the overfull first, else step 3 moves more on top
            for slot in nearest:
                owner = owners[slot]
                if load[joiner] < mean and owner is not None and owner != joiner and load[owner] > floor:
                    give(slot, joiner)

    for name in sorted(load):
        if load[name] > bound:
            own = sorted(
                (slot for slot in range(slots) if owners[slot] == name),
                key=lambda slot: (-ring.distance(slot, name), slot),
            )
            for slot in own[: load[name] - bound]:
                walk_on(slot)

    return [owner for owner in owners if owner is not None]
