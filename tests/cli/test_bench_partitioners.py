"""`topk bench partitioners`: real clusters of each, and what is computed without them."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

import pytest

from topk_grpc.cli.bench_partitioners import Options
from topk_grpc.cli.load import song_name
from topk_grpc.cli.placement import Traffic, place
from topk_grpc.ring import PARTITIONERS, slot_of

SMALL = Options(shards=3, slots=64, plays=20_000, songs=2000, batch_plays=100, producers=3, k=50)


@pytest.mark.cluster
def test_it_shows_that_the_plain_merge_is_wrong_and_the_clusters_are_right(run_topk: Any, run_json: Any) -> None:
    small = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(SMALL).items()]
    found = run_json("bench", "partitioners", *small, gateway="")["partitioners"]
    assert list(found) == list(PARTITIONERS)
    for name, one in found.items():
        query = one["query"]
        assert query["wrong"] == 0
        assert query["plain_messages"] == 6  # a question and an answer for each shard
        assert (query["plain_wrong"] > 0) == (name == "round_robin")
        assert (query["messages"] > 6) == (name == "round_robin")
        assert (query["bytes"] > query["plain_bytes"]) == (name == "round_robin")
    assert found["ring"]["placement"]["leaves"]["plays"] > 0
    assert found["round_robin"]["placement"]["joins"]["plays"] == 0
    assert found["round_robin"]["placement"]["leaves"]["plays"] is None
    done = run_topk("bench", "partitioners", *small)
    assert done.returncode == 0
    assert "refused" in done.stdout


def test_plays_by_slot_are_those_of_the_songs_or_the_batches() -> None:
    traffic = SMALL.traffic
    songs: Counter[int] = Counter()
    batches: Counter[int] = Counter()
    for batch in traffic.batches():
        songs.update(slot_of(song_name(song), 64) for song in batch.songs.tolist())
        batches[(slot_of(batch.producer_id.decode(), 1 << 64) + batch.sequence) % 64] += len(batch.songs)
    for name, expected in (("ring", songs), ("modulo", songs), ("round_robin", batches)):
        assert traffic.plays_by_slot(name, 64).tolist() == [expected[slot] for slot in range(64)]


def test_the_tally_of_the_generator_is_in_the_clusters_order() -> None:
    traffic = Traffic(5000, 100, 300, 0.5, 2, 7)
    counts = Counter(song_name(song) for batch in traffic.batches() for song in batch.songs.tolist())
    assert traffic.ranked == sorted(counts.items(), key=lambda place: (-place[1], place[0]))


def test_plays_move_with_their_slots_or_stay() -> None:
    ring, modulo, spread = (place(name, SMALL.traffic, 3, 64) for name in PARTITIONERS)
    assert ring.joins.slots == spread.joins.slots < modulo.joins.slots
    assert ring.joins.plays is not None
    assert 0 < ring.joins.plays < 0.5
    assert (spread.joins.plays, spread.leaves.plays) == (0.0, None)
