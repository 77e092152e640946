"""Plans of who owns which slot: bounds, movement, drain, determinism."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Sequence

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from topk_grpc.errors import InvalidArgumentError, SettingError
from topk_grpc.ring.plan import load_max, plan_owners
from topk_grpc.ring.slots import slot_of

SLOTS = 1024


def names(count: int) -> list[str]:
    return sorted(f"shard-{index}" for index in range(count))


def plan(shard_ids: Sequence[str], current: Sequence[str | None] | None = None, slots: int = SLOTS) -> list[str]:
    return [shard_ids[owner] for owner in plan_owners("ring", shard_ids, slots, current)]


def moved(before: Sequence[str | None], after: Sequence[str]) -> int:
    return sum(one != other for one, other in zip(before, after, strict=True))


def naive_bound(slots: int, shards: int) -> int:
    ceiling = slots // shards + (slots % shards > 0)
    return max(ceiling, (slots * 105) // (shards * 100))


@pytest.mark.parametrize("shards", [*range(1, 20), 31, 32, 33, 64, 100, 127, 128, 200, 254, 255])
def test_new_cluster_is_even(shards: int) -> None:
    load = Counter(plan(names(shards)))
    assert len(load) == shards
    assert max(load.values()) <= load_max(SLOTS, shards) == naive_bound(SLOTS, shards)
    assert min(load.values()) >= SLOTS // shards


@pytest.mark.parametrize("shards", [*range(1, 17), 31, 63, 100, 127, 200, 254])
def test_join_moves_little_and_only_to_the_joiner(shards: int) -> None:
    before = plan(names(shards))
    for joiner in ("shard-00", "shard-new"):  # its place in the order of names plays no part
        after = plan([*names(shards), joiner], before)
        assert moved(before, after) <= 1.1 * SLOTS / (shards + 1)
        assert all(new in {old, joiner} for old, new in zip(before, after, strict=True))
        load = Counter(after)
        assert load[joiner] == SLOTS // (shards + 1)
        assert max(load.values()) <= load_max(SLOTS, shards + 1)


def test_a_cluster_grown_one_by_one_stays_within_bounds() -> None:
    owners = plan(names(1))
    for shards in range(2, 48):
        grown = plan([f"shard-{index}" for index in range(shards)], owners)
        assert moved(owners, grown) <= 1.1 * SLOTS / shards
        assert max(Counter(grown).values()) <= load_max(SLOTS, shards)
        owners = grown


@pytest.mark.parametrize("shards", [2, 3, 8, 50, 255])
def test_drain_moves_the_leavers_slots_alone(shards: int) -> None:
    before = plan(names(shards))
    leaver = names(shards)[shards // 2]
    after = plan([name for name in names(shards) if name != leaver], before)
    assert all(new == old for old, new in zip(before, after, strict=True) if old != leaver)
    assert max(Counter(after).values()) <= load_max(SLOTS, shards - 1)


def test_nothing_moves_where_nothing_changed() -> None:
    before = plan(names(7))
    assert plan(names(7), before) == before


def test_orphans_spread_over_many_shards() -> None:
    before = plan(names(10))
    after = plan(names(10)[1:], before)
    takers = {new for old, new in zip(before, after, strict=True) if old == "shard-0"}
    assert len(takers) >= 5


shard_sets = st.sets(st.text(min_size=1, max_size=6), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.lists(shard_sets, min_size=1, max_size=5), st.sampled_from([12, 64, 100, 257]))
def test_any_history_keeps_the_bound(data: st.DataObject, history: list[set[str]], slots: int) -> None:
    owners: list[str] | None = None
    for shard_ids in history:
        ordered = data.draw(st.permutations(sorted(shard_ids)))
        after = plan(ordered, owners, slots)
        load = Counter(after)
        assert set(load) <= shard_ids
        assert max(load.values()) <= naive_bound(slots, len(shard_ids))
        assert after == plan(sorted(shard_ids), owners, slots), "the order of the names plays a part"
        if owners is not None:
            # Whatever stays in bounds stays where it is, unless a joiner takes it.
            joiners = shard_ids - set(owners)
            before = Counter(owner for owner in owners if owner in shard_ids)
            overfull = {name for name, count in before.items() if count > naive_bound(slots, len(shard_ids))}
            for old, new in zip(owners, after, strict=True):
                assert new == old or old not in shard_ids or new in joiners or old in overfull
            for joiner in joiners:
                assert load[joiner] >= slots // len(shard_ids)
        owners = after


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 8))
def test_any_present_owners_are_taken_as_they_are(data: st.DataObject, shards: int) -> None:
    owners = data.draw(st.lists(st.sampled_from([None, "gone", *names(shards)]), min_size=60, max_size=60))
    after = plan(names(shards), owners, 60)
    assert set(after) <= set(names(shards))
    assert max(Counter(after).values()) <= naive_bound(60, shards)


def test_plans_are_equal_in_every_process() -> None:
    code = (
        "from topk_grpc.ring.plan import plan_owners;print(list(plan_owners('ring', ['a', 'b', 'c', 'd', 'e'], 1024)))"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, check=True, capture_output=True
        ).stdout
        for seed in ("1", "2")
    }
    assert runs == {f"{list(plan_owners('ring', ['a', 'b', 'c', 'd', 'e'], 1024))}\n".encode()}


def test_plan_of_this_release_is_the_plan_of_the_next() -> None:
    """A changed digest means that upgraded gateways and controllers plan other moves than the old ones."""
    owners = bytes(plan_owners("ring", names(5), SLOTS))
    assert xxhash.xxh64_hexdigest(owners) == "676c99ec833627df"


def test_modulo_is_modulo() -> None:
    assert plan_owners("modulo", ["b", "a", "c"], 7) == (1, 0, 2, 1, 0, 2, 1)
    before = plan_owners("modulo", names(4), SLOTS)
    after = plan_owners("modulo", names(5), SLOTS, [names(4)[owner] for owner in before])
    assert sum(one != other for one, other in zip(before, after, strict=True)) > SLOTS * 0.7


@pytest.mark.parametrize(
    ("shard_ids", "slots", "current"),
    [([], 8, None), (["a", "a"], 8, None), (["a", "b", "c"], 2, None), (["a"], 8, ["a"] * 7)],
)
def test_impossible_plans_are_refused(shard_ids: list[str], slots: int, current: list[str | None] | None) -> None:
    with pytest.raises(InvalidArgumentError):
        plan_owners("ring", shard_ids, slots, current)


def test_unknown_partitioner_is_refused() -> None:
    with pytest.raises(SettingError, match="ring, modulo"):
        plan_owners("random", ["a"], 8)


@given(st.text(max_size=200), st.integers(1, 1 << 20))
def test_slots_are_xxh64_of_utf8(song_id: str, slots: int) -> None:
    assert slot_of(song_id, slots) == xxhash.xxh64_intdigest(song_id.encode(), seed=0) % slots
