"""Slots that move between shards, against the naive tally: whatever is asked of all shards together stays exact.

Several shards take the same random traffic as in the tests of windows; between its steps slots move, there and back,
while other plays go on, and shards are recovered from snapshots and logs.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.engine_shard import EngineShard
from tests.engine.moving_cluster import SHARDS, SLOTS, Begin, ClusterStep, Finish, MovingCluster, OnOne, Resend
from tests.window_traffic import STEPS, TIERS, WINDOWS, Ask, AskAround, Move, Recover, Snapshot, Stand
from topk_grpc.engine import cells
from topk_grpc.engine.account import Account, account, copy_state
from topk_grpc.model import Window

ALONE: Final = st.one_of(
    st.builds(Stand, st.lists(st.integers(0, 7), max_size=4).map(tuple)),
    st.builds(Snapshot, st.booleans()),
    st.builds(Recover, st.sampled_from([1, 3, 50])),
    st.just(Move()),
)
SHARD: Final = st.integers(0, SHARDS - 1)
SOME_SLOTS: Final = st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=SLOTS, unique=True).map(tuple)
CLUSTER_STEPS: Final[st.SearchStrategy[ClusterStep]] = st.one_of(
    STEPS,
    STEPS,
    *[st.builds(Begin, SHARD, SHARD, SOME_SLOTS | st.just(tuple(range(SLOTS))))] * 2,
    st.builds(Finish, st.sampled_from([True, True, True, False])),
    st.builds(OnOne, SHARD, ALONE),
    st.builds(Resend, st.integers(0, 30)),
)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(CLUSTER_STEPS, min_size=3, max_size=30),
    tiers=st.sampled_from(TIERS),
    windows=st.lists(WINDOWS, min_size=1, max_size=6, unique=True),
    heap_size=st.sampled_from([1, 3, 50]),
    chunk_cells=st.sampled_from([3, 1 << 10]),
)
def test_windows_say_what_the_tally_says_while_slots_move(
    steps: list[ClusterStep], tiers: str, windows: list[Window], heap_size: int, chunk_cells: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "CHUNK_CELLS", chunk_cells)
        cluster = MovingCluster(tiers, windows, heap_size)
        for step in steps:
            cluster.run(step)
        everything = tuple(range(len(windows)))
        for step in (Move(), Begin(0, 2, tuple(range(SLOTS))), Recover(heap_size), Snapshot(True), Recover(heap_size)):
            for chart in ("", "US"):
                cluster.run(Ask(True, None, everything, chart))
            cluster.run(step)
        cluster.run(Ask(True, None, everything, ""))
        for which in range(len(cluster.sent)):
            cluster.run(Resend(which))


def account_of(shard: EngineShard) -> Account:
    return account(copy_state(shard.state))


def same(one: Account, other: Account, *, windows: bool) -> None:
    for field in dataclasses.fields(Account):
        if field.name != "windows" or windows:
            left, right = getattr(one, field.name), getattr(other, field.name)
            assert np.array_equal(left, right) if isinstance(left, np.ndarray) else left == right, field.name


@pytest.mark.parametrize("snapshots", [True, False])
@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(CLUSTER_STEPS, min_size=6, max_size=30),
    tiers=st.sampled_from(TIERS),
    windows=st.lists(WINDOWS, min_size=1, max_size=4, unique=True),
)
def test_shards_that_are_recovered_after_every_step_are_the_same(
    snapshots: bool, steps: list[ClusterStep], tiers: str, windows: list[Window]
) -> None:
    """From a snapshot, windows included; and from nothing but the log, which does not know when windows were moved."""
    calm, shaken = MovingCluster(tiers, windows, 3), MovingCluster(tiers, windows, 3)
    for step in steps:
        if isinstance(step, Ask | AskAround | Recover | Snapshot | OnOne):
            continue
        for cluster in (calm, shaken):
            cluster.run(step)
        if snapshots:
            shaken.run(Snapshot(True))
        shaken.run(Recover(3))
    for cluster in (calm, shaken):
        cluster.finish()
        cluster.run(Move())
    for one, other in zip(calm.shards, shaken.shards, strict=True):
        same(account_of(one), account_of(other), windows=snapshots)
        assert (one.state.tiers.floors, one.state.past) == (other.state.tiers.floors, other.state.past)
        assert list(one.state.standing) == list(other.state.standing)
