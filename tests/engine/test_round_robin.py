"""Shards under `round_robin`: a batch is of one slot, whole; marks, replay, snapshots and the recount go by that."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.engine_shard import NOW, EngineShard, append_request, check_answers
from tests.engine.test_recount import recount, same
from tests.oracle import ModelPart, Tally
from topk_grpc.config import ShardSettings
from topk_grpc.engine import query, transfer
from topk_grpc.engine.account import account, copy_state
from topk_grpc.engine.query import Scope
from topk_grpc.engine.slots_image import read_image
from topk_grpc.errors import InvalidArgumentError, ResourceExhaustedError, UnsupportedError
from topk_grpc.model import Bounds, ClusterSettings, Play
from topk_grpc.pb.topk.v1 import shard_service_pb2 as pb
from topk_grpc.shard.core import Identity, ShardCore

SLOTS: Final = 8
CLUSTER: Final = ClusterSettings(SLOTS, "round_robin")
OWNED: Final = (0, 1, 2, 5)
SONGS: Final = ("a", "b", "é", "日本")


def slot_of(producer: str, sequence: int) -> int:
    hashed: int = xxhash.xxh64_intdigest(producer.encode(), seed=0)
    return (hashed + sequence) % SLOTS


@dataclass
class Model:
    """What the shard has to decide: a set of batches, and the plays of those that count."""

    seen: set[tuple[str, int]] = field(default_factory=set)
    highest: Counter[tuple[str, int]] = field(default_factory=Counter)
    tally: Tally = field(default_factory=Tally)

    def submit(self, part: ModelPart) -> tuple[bool, set[int]]:
        """Whether it is a duplicate, and the slot that is not this shard's."""
        slot = slot_of(part.producer_id, part.sequence)
        if slot not in OWNED:
            return False, {slot}
        key = (part.producer_id, part.sequence)
        if key in self.seen or part.sequence < self.highest[part.producer_id, slot] - 64:
            return True, set()
        self.seen.add(key)
        self.highest[part.producer_id, slot] = max(part.sequence, self.highest[part.producer_id, slot])
        self.tally.plays += [play for _, play in part.plays]
        return False, set()


PLAYS = st.builds(
    Play, st.sampled_from(SONGS), st.integers(NOW - 5_000, NOW), st.integers(1, 3), st.sampled_from([(), ("US",)])
)
PARTS = st.builds(
    lambda producer, sequence, plays: ModelPart(producer, sequence, NOW, tuple(enumerate(plays))),
    st.sampled_from(["p", "q"]),
    st.one_of(st.integers(1, 20), st.integers(1, 200)),
    st.lists(PLAYS, min_size=1, max_size=5),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(PARTS, st.sampled_from(["snapshot", "recover"])), max_size=40))
def test_batches_count_once_in_their_slot_live_and_after_recovery(steps: list[Any]) -> None:
    shard, model = EngineShard(CLUSTER, 3, OWNED), Model()
    snapshots: list[Any] = [None]
    for step in [*steps, "recover"]:
        match step:
            case "snapshot":
                shard.take_snapshot(use_blocks=True)
                snapshots.append(shard._snapshot)
            case "recover":
                shard.recover()
            case part:
                [said] = shard.submit(part)
                assert (said.duplicate, said.not_owner_slots) == model.submit(part)
    check_answers(shard.state, model.tally, [Bounds(NOW // 1000 * 1000 - 2000, NOW // 1000 * 1000)])
    served = account(copy_state(shard.state))
    for snapshot in snapshots[-2:]:
        assert same(recount(shard, snapshot).account({}), served)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(PLAYS, min_size=1, max_size=60),
    st.integers(1, 12),
    st.sets(st.sampled_from([*SONGS, "unheard of", ""])),
    st.sampled_from(["", "US", "never heard of"]),
    st.booleans(),
)
def test_entries_with_at_least_so_many_plays(
    plays: list[Play], count_min: int, asked: set[str], chart: str, bounded: bool
) -> None:
    shard = EngineShard(CLUSTER, 3, range(SLOTS))
    shard.submit(ModelPart("p", 1, NOW, tuple(enumerate(plays))))
    bounds = Bounds(NOW // 1000 * 1000 - 3000, NOW // 1000 * 1000) if bounded else None
    truth = dict(Tally(plays).ranked(chart, bounds))
    named = sorted(asked)
    counts, found, totals = query.at_least(shard.state, Scope(chart, bounds), count_min, named, 100)
    assert counts == [truth.get(song_id, 0) for song_id in named]
    expected = {song_id: count for song_id, count in truth.items() if count >= count_min and song_id not in asked}
    assert dict(zip(found.song_ids, found.counts, strict=True)) == expected
    assert len(found.song_ids) == len(expected)
    assert (totals.plays, totals.songs) == (sum(truth.values()), len(truth))
    if expected:
        with pytest.raises(ResourceExhaustedError, match="threshold-entries-max"):
            query.at_least(shard.state, Scope(chart, bounds), count_min, named, len(expected) - 1)


def test_a_shard_takes_nothing_back(tmp_path: Any) -> None:
    """Gateways reject corrections; a shard that was sent one all the same counts nothing of the request."""
    core = ShardCore(ShardSettings(topology="-", shard_id="s", data_dir=str(tmp_path)), CLUSTER)
    core.recover()
    core.own(Identity("c", "s"), range(SLOTS))
    plays = ((0, Play("a", NOW, 3)), (1, Play("a", NOW, -1)))
    refused, counted = core.commit(
        [append_request([ModelPart("p", 1, NOW, plays)]), append_request([ModelPart("p", 2, NOW, plays[:1])])], NOW
    )
    assert isinstance(refused, UnsupportedError)
    assert isinstance(counted, bytes)
    assert query.totals(core.state, Scope()).plays == 3
    core.close()


def test_an_image_with_songs_is_refused() -> None:
    """Counts stay where they were counted: songs in an image would count twice."""
    by_song = EngineShard(dataclasses.replace(CLUSTER, partitioner="ring"), 3, range(SLOTS))
    by_song.submit(ModelPart("p", 1, NOW, ((0, Play("a", NOW)),)))
    image = pb.SlotsImage.FromString(transfer.export_slots(by_song.state, range(SLOTS)))
    image.partitioner = "round_robin"
    with pytest.raises(InvalidArgumentError, match="counts stay where they are"):
        read_image(image.SerializeToString())
