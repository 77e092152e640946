"""Splitting a batch by shard and combining equal plays, against a dictionary."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.forms import Kernels, examples
from topk_grpc.pb.topk.v1 import shard_service_pb2

TIME_MAX = 1 << 60
COUNT_MAX = 1 << 55
TIME = 1_700_000_000_000


class Play(NamedTuple):
    song: str
    time: int = TIME
    plays: int = 1
    charts: tuple[str, ...] = ()


def split(
    kernels: Kernels, plays: list[Play], owners: list[int], shards: int, resolution: int, hashes: Any = None
) -> tuple[list[Any], list[int], list[int], int]:
    """Splits, and reads the parts with protobuf.

    Returns:
        The messages of each shard; stands_for; the slot of each play; how many were sent.
    """
    songs, times, counts, charts = zip(*plays, strict=True) if plays else ((), (), (), ())
    data = kernels.encode.encode_batch(b"p", 1, 0, songs, times, counts, charts)
    spans, _ = kernels.wire.message_spans(data, 0, len(data), 1)
    columns = kernels.wire.decode_batch(data, spans, 128, 8, 64, len(plays))
    if hashes is None:
        hashes = kernels.hash.hash_strings(data, columns.song_starts, columns.song_sizes)
    made = kernels.split.split_batch(data, columns, hashes, hashes, np.array(owners, np.int32), shards, resolution)
    header = kernels.encode.batch_header(b"p", 1, 0)
    parts = [shard_service_pb2.ShardBatch.FromString(header + bytes(part)) for part in made.parts]
    assert all(part.producer_id == "p" and part.sequence == 1 for part in parts)
    assert [len(part) == 0 for part in made.parts] == [not part.plays for part in parts]
    return (
        [list(part.plays) for part in parts],
        made.stands_for.tolist(),
        [int(one) % len(owners) for one in hashes],
        made.plays,
    )


def check(
    kernels: Kernels, plays: list[Play], owners: list[int], shards: int, resolution: int, hashes: Any = None
) -> list[Any]:
    parts, stands_for, slots, sent = split(kernels, plays, owners, shards, resolution, hashes)
    valid = [play.song != "" and play.plays != 0 and owners[slot] >= 0 for play, slot in zip(plays, slots, strict=True)]
    assert [one >= 0 for one in stands_for] == valid
    assert sent == sum(valid)

    def key(i: int) -> tuple[str, tuple[str, ...], int]:
        # Python's division rounds down, also before 1970.
        return plays[i].song, tuple(dict.fromkeys(plays[i].charts)), plays[i].time // resolution

    members = defaultdict(list)
    for i, first in enumerate(stands_for):
        if first >= 0:
            members[first].append(i)
            assert key(i) == key(first)
    expected: list[list[tuple[Any, ...]]] = [[] for _ in range(shards)]
    for first, combined in members.items():
        assert first == combined[0]
        assert len(combined) == 1 or all(plays[i].plays > 0 for i in combined), "a correction travels alone"
        song, charts, _ = key(first)
        total = sum(plays[i].plays for i in combined)
        assert total <= COUNT_MAX
        expected[owners[slots[first]]].append((song, charts, max(plays[i].time for i in combined), total, first))
    got = [
        [
            (one.song_id, tuple(one.charts), one.played_at_ms, one.count if one.HasField("count") else 1, one.index)
            for one in part
        ]
        for part in parts
    ]
    assert got == [sorted(part, key=lambda one: one[4]) for part in expected]

    sums: dict[Any, int] = defaultdict(int)
    pieces: dict[Any, int] = defaultdict(int)
    for i, is_valid in enumerate(valid):
        if is_valid and plays[i].plays > 0:
            sums[key(i)] += plays[i].plays
            pieces[key(i)] += stands_for[i] == i
    for one, total in sums.items():
        assert total > COUNT_MAX or pieces[one] == 1, "equal plays must travel as one"
    return parts


times = st.one_of(
    st.integers(TIME, TIME + 3000),
    st.integers(-3000, -1),
    st.integers(1, 3000),
    st.sampled_from([-TIME_MAX, 1 - TIME_MAX, TIME_MAX, TIME_MAX - 1]),
)
counts = st.one_of(
    st.just(1), st.integers(1, 9), st.sampled_from([0, -1, -3, -COUNT_MAX, COUNT_MAX, COUNT_MAX - 1, COUNT_MAX // 2])
)
charts = st.lists(st.sampled_from(["de", "fr", "d", "e"]), max_size=3).map(tuple)
play_lists = st.lists(
    st.builds(Play, st.sampled_from(["a", "b", "ab", "é", "", "song"]), times, counts, charts), max_size=40
)


@examples(200)
@given(data=st.data(), plays=play_lists, resolution=st.sampled_from([1, 2, 7, 1000, 3_600_000, 1 << 33]))
def test_parts_hold_every_play_once(kernels: Kernels, data: st.DataObject, plays: list[Play], resolution: int) -> None:
    shards = data.draw(st.integers(1, 4))
    slots = data.draw(st.sampled_from([1, 3, 8, 16]))
    owners = data.draw(st.lists(st.integers(-1, shards - 1), min_size=slots, max_size=slots))
    check(kernels, plays, owners, shards, resolution)


@examples(100)
@given(plays=play_lists, same=st.integers(0, (1 << 64) - 1))
def test_songs_with_equal_hashes_stay_apart(kernels: Kernels, plays: list[Play], same: int) -> None:
    check(kernels, plays, [0, 1, 0, 1], 2, 1000, np.full(len(plays), same, np.uint64))


def test_equal_plays_travel_as_one(kernels: Kernels) -> None:
    plays = [Play("b"), Play("a", TIME + 5, 3), Play("a", TIME + 999, 4), Play("a", TIME, 2), Play("a", TIME + 1000)]
    (part,), stands_for, _, sent = split(kernels, plays, [0], 1, 1000)
    assert stands_for == [0, 1, 1, 1, 4]
    assert sent == 5
    assert [(one.song_id, one.played_at_ms, one.count, one.index) for one in part] == [
        ("b", TIME, 0, 0),
        ("a", TIME + 999, 9, 1),
        ("a", TIME + 1000, 0, 4),
    ]
    assert [one.HasField("count") for one in part] == [False, True, False]  # absent means 1


def test_a_correction_is_combined_with_nothing(kernels: Kernels) -> None:
    plays = [Play("a", TIME, count) for count in (-2, 3, -2, 4, -(1 << 40), -COUNT_MAX)]
    (part,), stands_for, _, sent = split(kernels, plays, [0], 1, 1000)
    assert stands_for == [0, 1, 2, 1, 4, 5]
    assert sent == 6
    assert [(one.count, one.index) for one in part] == [(-2, 0), (7, 1), (-2, 2), (-(1 << 40), 4), (-COUNT_MAX, 5)]


def test_buckets_before_1970_round_down(kernels: Kernels) -> None:
    plays = [Play("a", time) for time in (-1, -1000, -1001, -999, 1, 999, -2000, 1000)]
    (part,), stands_for, _, _ = split(kernels, plays, [0], 1, 1000)
    assert stands_for == [0, 0, 2, 0, 4, 4, 2, 7]
    assert [(one.played_at_ms, one.count) for one in part] == [(-1, 3), (-1001, 2), (999, 2), (1000, 0)]


@pytest.mark.parametrize(
    ("last", "sums"),
    [
        (COUNT_MAX - 10, [COUNT_MAX, 1]),
        (COUNT_MAX - 9, [10, COUNT_MAX - 8]),
        (COUNT_MAX, [10, COUNT_MAX, 1]),
    ],
)
def test_combining_stays_within_a_plays_largest_count(kernels: Kernels, last: int, sums: list[int]) -> None:
    plays = [Play("a", TIME, 10), Play("a", TIME, last), Play("a", TIME, 1)]
    (part,) = check(kernels, plays, [0], 1, 1000)
    assert [one.count if one.HasField("count") else 1 for one in part] == sums


@pytest.mark.timeout(20)  # comparing each with each took longer
def test_plays_too_large_to_combine_do_not_slow_each_other_down(kernels: Kernels) -> None:
    rows = kernels.sized(60_000)
    (part,) = check(kernels, [Play("song", TIME, COUNT_MAX)] * rows, [0], 1, 1000)
    assert len(part) == rows


def test_charts_keep_plays_apart(kernels: Kernels) -> None:
    named: list[tuple[str, ...]] = [(), ("de",), ("fr",), ("de", "fr"), ("d", "efr"), ("de", "de"), ("def", "r")]
    _, stands_for, _, _ = split(kernels, [Play("a", TIME, 1, charts) for charts in named], [0], 1, 1000)
    assert stands_for == [0, 1, 2, 3, 4, 1, 6]


def test_plays_of_slots_without_owner_are_left_out(kernels: Kernels) -> None:
    plays = [Play(f"song {i}") for i in range(50)]
    parts, stands_for, slots, sent = split(kernels, plays, [-1, 0, -1, 2], 3, 1000)
    assert [one >= 0 for one in stands_for] == [slot in {1, 3} for slot in slots]
    assert sent == len(parts[0]) + len(parts[2]) == sum(slot in {1, 3} for slot in slots)
    assert parts[1] == []


def test_nobody_owns_anything(kernels: Kernels) -> None:
    assert split(kernels, [Play("a")], [-1], 2, 1000)[:2] == ([[], []], [-1])


def test_no_plays(kernels: Kernels) -> None:
    assert split(kernels, [], [0, 1], 2, 1000) == ([[], []], [], [], 0)


def test_many_plays(kernels: Kernels) -> None:
    random = np.random.default_rng(1)
    rows = kernels.sized(20_000)
    songs = (random.zipf(1.2, rows) % 5000).tolist()
    plays = [
        Play(f"song {song}", TIME + after, count, ("de",) if song % 3 else ())
        for song, after, count in zip(
            songs, random.integers(0, 5000, rows).tolist(), random.integers(1, 4, rows).tolist(), strict=True
        )
    ]
    check(kernels, plays, random.integers(-1, 5, 1024).tolist(), 5, 1000)


def test_plays_go_to_the_slot_of_their_key_and_are_combined_by_their_song(kernels: Kernels) -> None:
    """Where a batch has one slot, all of it goes to one shard."""
    data = kernels.encode.encode_batch(b"p", 1, 0, ("a", "b", "a", "c"), (TIME,) * 4, (1, 1, 2, 1), ((),) * 4)
    spans, _ = kernels.wire.message_spans(data, 0, len(data), 1)
    owners = np.array([0, 1, 2, 3, -1], np.int32)
    for slot in range(5):
        columns = kernels.wire.decode_batch(data, spans, 128, 8, 64, 4)
        hashes = kernels.hash.hash_strings(data, columns.song_starts, columns.song_sizes)
        keys = np.full(4, 5 * 7 + slot, np.uint64)
        made = kernels.split.split_batch(data, columns, hashes, keys, owners, 4, 1000)
        assert made.plays == (4 if slot < 4 else 0)
        assert made.stands_for.tolist() == ([0, 1, 0, 3] if slot < 4 else [-1] * 4)
        assert [bool(len(part)) for part in made.parts] == [shard == slot for shard in range(4)]
