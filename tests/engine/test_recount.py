"""Counting anew comes to what the state came to, whatever traffic it had; and to something else once it is touched."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from tests.engine.engine_shard import NOW, EngineShard
from tests.engine.test_windows_against_oracle import Traffic
from tests.oracle import ModelPart
from tests.window_traffic import STEPS, TIERS, WINDOWS, Move, Snapshot, Stand, Step
from topk_grpc.engine import cells
from topk_grpc.engine.account import Account, account, copy_state, listed
from topk_grpc.engine.recount import Recount
from topk_grpc.engine.state import ShardState
from topk_grpc.model import ClusterSettings, GlobalWindow, Play, RangeWindow, Window


def recount(shard: EngineShard, snapshot: Any) -> Recount:
    """From a snapshot of the shard, or from nothing, and the log behind it."""
    counting, position = Recount(shard.settings), 0
    if snapshot is not None:
        position, meta, arrays, blocks = snapshot
        counting.begin(json.loads(meta), arrays, {board: list(one.values()) for board, one in blocks.items()})
    for record in shard.log[position:]:
        if isinstance(record, int):
            counting.forget_idle(record)
        elif isinstance(record, str):
            counting.delete_song(record)
        elif isinstance(record, bytes):
            counting.append(memoryview(record))
    assert counting.differences == []
    return counting


def same(one: Account, other: Account) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name)) if name in {"entries", "plays", "marks"}
        else getattr(one, name) == getattr(other, name)
        for name in Account.__slots__
    )  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    steps=st.lists(STEPS, min_size=3, max_size=25),
    tiers=st.sampled_from(TIERS),
    windows=st.lists(WINDOWS, min_size=1, max_size=8, unique=True),
    chunk_cells=st.sampled_from([3, 1 << 10]),
)
def test_a_recount_from_any_snapshot_comes_to_what_the_state_came_to(
    steps: list[Step], tiers: str, windows: list[Window], chunk_cells: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "CHUNK_CELLS", chunk_cells)
        traffic = Traffic(tiers, windows, 3)
        shard = traffic.shard
        snapshots: list[Any] = [None]
        standing = [at for at, one in enumerate(windows) if not isinstance(one, GlobalWindow | RangeWindow)]
        for step in [Stand(tuple(standing)), *steps, Move()]:
            traffic.run(step)
            if isinstance(step, Snapshot):
                snapshots.append(shard._snapshot)
        served = account(copy_state(shard.state))
        event(f"{len(served.windows)} windows, {len(snapshots)} snapshots")
        for snapshot in snapshots[-2:]:
            assert same(recount(shard, snapshot).account(served.windows), served)
        slots = range(shard.settings.slots)
        assert recount(shard, snapshots[-1]).listed(slots) == listed(copy_state(shard.state), slots, 1000)


def shard_with_plays() -> EngineShard:
    shard = EngineShard(ClusterSettings(4), 10, range(4))
    plays = [Play(song_id, NOW + at, 1 + at % 3, ("x", "y")[: at % 3]) for at, song_id in enumerate("abcdefgh" * 3)]
    shard.submit(ModelPart("p", 1, NOW, tuple(enumerate(plays))))
    return shard


def touch_count(state: ShardState) -> None:
    state.boards["global"]._rows[3, 0] += 1


def touch_chart(state: ShardState) -> None:
    state.boards["charts"]._rows[2, 0] -= 1


def touch_mark(state: ShardState) -> None:
    marks = state.producers.marks
    marks._bitmaps[np.flatnonzero(marks._keys)[0]] ^= np.uint64(1 << 9)


def touch_total(state: ShardState) -> None:
    state.boards["global"].all_time._totals[0, 0] += 1


def touch_heap(state: ShardState) -> None:
    ranking = state.boards["global"].all_time
    ranking._heap_keys[0, 1] += 1


def touch_producer(state: ShardState) -> None:
    producer = state.producers.get(b"p")
    assert producer is not None
    producer.permanent = True


@pytest.mark.parametrize(
    ("touch", "what"),
    [
        (touch_count, {"entries", "plays"}),
        (touch_chart, {"entries"}),
        (touch_mark, {"marks"}),
        (touch_total, {"charts"}),
        (touch_heap, {"best"}),
        (touch_producer, {"producers"}),
    ],
)
def test_a_state_that_was_touched_comes_to_something_else(touch: Any, what: set[str]) -> None:
    shard = shard_with_plays()
    expected = recount(shard, None).account({})
    assert same(account(copy_state(shard.state)), expected)
    touch(shard.state)
    served = account(copy_state(shard.state))
    differing = {
        name for name in Account.__slots__ if not np.array_equal(getattr(served, name), getattr(expected, name))
    }
    assert differing == what
    if "entries" in what:
        slots = np.flatnonzero(served.entries != expected.entries).tolist()
        assert len(slots) == 1
        assert listed(copy_state(shard.state), slots, 100) != recount(shard, None).listed(slots)
