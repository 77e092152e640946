"""Shards that join and leave one after another, from 1 to 256 and back: what moves, and how even it stays."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest

from topk_grpc.ring import plan_owners

SLOTS = 1024
SHARDS_MAX = 256


def names(count: int) -> list[str]:
    return [f"shard-{index}" for index in range(count)]


def bound(shards: int) -> int:
    """The most slots that a shard may own, written out: ceil(mean), or 1.05 × mean where that is more."""
    return max(-(-SLOTS // shards), SLOTS * 105 // (100 * shards))


def plan(partitioner: str, shards: int, current: list[str] | None) -> list[str]:
    ids = names(shards)
    return [ids[owner] for owner in plan_owners(partitioner, ids, SLOTS, current)]


@cache
def grown(partitioner: str = "ring") -> list[list[str]]:
    """The owners with 1, 2, … shards, each planned from the ones before."""
    history = [plan(partitioner, 1, None)]
    for shards in range(2, SHARDS_MAX + 1):
        history.append(plan(partitioner, shards, history[-1]))
    return history


def moved(before: list[str], after: list[str]) -> int:
    return sum(one != other for one, other in zip(before, after, strict=True))


def test_growing_by_one_moves_at_most_a_tenth_more_than_its_share_for_every_number_of_shards() -> None:
    history = grown()
    for shards in range(1, SHARDS_MAX):
        before, after = history[shards - 1], history[shards]
        assert moved(before, after) <= 1.1 * SLOTS / (shards + 1), shards
        joiner = f"shard-{shards}"
        assert all(new in {old, joiner} for old, new in zip(before, after, strict=True)), shards
        assert Counter(after)[joiner] == SLOTS // (shards + 1)


def test_no_shard_has_more_than_the_bound_for_every_number_of_shards() -> None:
    for shards, owners in enumerate(grown(), 1):
        load = Counter(owners)
        assert max(load.values()) <= bound(shards), shards
        assert len(load) == shards


def test_shrinking_by_one_moves_what_the_leaver_had_and_no_more_for_every_number_of_shards() -> None:
    owners = grown()[-1]
    for shards in range(SHARDS_MAX - 1, 0, -1):
        leaver = f"shard-{shards}"
        left = plan("ring", shards, owners)
        assert max(Counter(left).values()) <= bound(shards), shards
        over = sum(max(0, load - bound(shards)) for name, load in Counter(owners).items() if name != leaver)
        assert moved(owners, left) <= Counter(owners)[leaver] + over, shards
        owners = left


def test_round_robin_gives_slots_to_shards_as_the_ring_does() -> None:
    """Only what is hashed to a slot differs."""
    assert grown("round_robin")[:40] == grown()[:40]


@pytest.mark.parametrize("shards", [2, 3, 10, 100, 255])
def test_modulo_moves_nearly_everything(shards: int) -> None:
    """A slot stays where its remainder by both numbers names one shard."""
    ids = sorted(names(shards))
    before, after = plan("modulo", shards, None), plan("modulo", shards + 1, None)
    grown_ids = sorted(names(shards + 1))
    plain = sum(ids[slot % shards] != grown_ids[slot % (shards + 1)] for slot in range(SLOTS))
    assert moved(before, after) == plain
    assert plain > SLOTS // 2
