"""What a shard decides about parts of batches: single cases, each with its border."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

from tests.engine.engine_shard import DAY, NOW, EngineShard, append_request
from tests.oracle import ModelPart, slot_of
from topk_grpc.engine import query
from topk_grpc.engine.admission import Limits, admit, read_request
from topk_grpc.engine.query import Scope
from topk_grpc.engine.state import ShardState
from topk_grpc.errors import ForeignDirectoryError, InvalidArgumentError
from topk_grpc.model import COUNT_MAX, ClusterSettings, Play
from topk_grpc.pb.topk.v1 import shard_service_pb2 as pb

SLOTS = 16
SETTINGS = ClusterSettings(SLOTS, "ring", 1000)


def new_shard(owned: range | list[int] = range(SLOTS), resolution_ms: int = 1000) -> EngineShard:
    return EngineShard(ClusterSettings(SLOTS, "ring", resolution_ms), 10, owned)


def part(sequence: int, *plays: Play, producer: str = "p", first_sent_ms: int = NOW) -> ModelPart:
    return ModelPart(producer, sequence, first_sent_ms, tuple(enumerate(plays)))


def play(song_id: str = "a", at: int = NOW, count: int = 1, *charts: str) -> Play:
    return Play(song_id, at, count, charts)


def counts(shard: EngineShard, *song_ids: str, chart: str = "") -> list[int]:
    return query.counts_of(shard.state, Scope(chart), song_ids)[0].counts


def songs_in(slots: list[int], many: int) -> list[str]:
    found = [song for song in map("song-{}".format, range(10_000)) if slot_of(song, SLOTS) in slots]
    return found[:many]


@pytest.mark.parametrize("resolution_ms", [1, 1000, 60_000])
@pytest.mark.parametrize("now", [NOW, NOW + 999, NOW + 59_999])
def test_in_future_begins_at_the_first_bucket_that_starts_beyond_the_limit(now: int, resolution_ms: int) -> None:
    horizon = now + 300_000
    last_bucket = horizon // resolution_ms * resolution_ms
    shard = new_shard(resolution_ms=resolution_ms)
    last, first = play("last", last_bucket + resolution_ms - 1), play("first", last_bucket + resolution_ms)
    (outcome,) = shard.submit(part(1, last, first), limits=Limits(now_ms=now))
    assert outcome.rejects == {1: "IN_FUTURE"}
    assert counts(shard, "last", "first") == [1, 0]


def test_a_shards_total_ends_exactly_at_the_limit_also_within_a_group() -> None:
    shard = new_shard()
    requests = [
        append_request([part(1, play("a", NOW, COUNT_MAX - 10))]),
        append_request([part(2, play("b", NOW, 9)), part(3, play("c", NOW, 2), play("d", NOW, 1), play("e"))]),
        append_request([part(4, play("a"))]),
    ]
    responses = shard.commit(requests, Limits(now_ms=NOW))
    rejected = [list(outcome.rejected_indexes) for response in responses for outcome in response.outcomes]
    assert rejected == [[], [], [0, 2], [0]]
    assert query.totals(shard.state, Scope()).plays == COUNT_MAX
    shard.recover()
    assert query.totals(shard.state, Scope()).plays == COUNT_MAX
    (outcome,) = shard.submit(part(5, play("new")))
    assert outcome.rejects == {0: "TOTAL_OVERFLOW"}


def test_a_full_shard_rejects_new_songs_and_still_counts_known_ones() -> None:
    shard = new_shard()
    shard.submit(part(1, play("known")))
    full = Limits(now_ms=NOW, memory_bytes_max=1)
    (outcome,) = shard.submit(part(2, play("new"), play("known"), play("newer")), limits=full)
    assert outcome.rejects == {0: "MEMORY_LIMIT", 2: "MEMORY_LIMIT"}
    shard.recover()
    assert counts(shard, "known", "new", "newer") == [2, 0, 0]
    (again,) = shard.submit(part(2, play("new"), play("known"), play("newer")))  # there is room now, but it was decided
    assert (again.duplicate, again.rejects) == (True, outcome.rejects)
    assert shard.submit(part(3, play("new")), limits=Limits(now_ms=NOW, memory_bytes_max=1 << 40))[0].rejects == {}


def test_charts_are_limited_and_known_ones_go_on() -> None:
    shard = new_shard()
    limits = Limits(now_ms=NOW, charts_max=2)
    first = part(1, play("a", NOW, 1, "x"), play("a", NOW, 1, "x", "y", "z"), play("a", NOW, 1, "y"), play("b"))
    (outcome,) = shard.submit(first, limits=limits)
    assert outcome.rejects == {1: "CHART_LIMIT"}
    (outcome,) = shard.submit(part(2, play("c", NOW, 1, "z"), play("c", NOW, 1, "y", "x")), limits=limits)
    assert outcome.rejects == {0: "CHART_LIMIT"}
    shard.recover()
    assert [(name, totals.plays) for name, totals in query.charts(shard.state)] == [("x", 2), ("y", 2)]
    (outcome,) = shard.submit(part(3, play("c", NOW, 1, "z")), limits=limits)
    assert outcome.rejects == {0: "CHART_LIMIT"}


def test_a_play_that_does_not_count_takes_no_chart() -> None:
    shard = new_shard()
    limits = Limits(now_ms=NOW, charts_max=1)
    late, huge = play("a", NOW + DAY, 1, "future"), play("a", NOW, COUNT_MAX, "huge")
    (outcome,) = shard.submit(part(1, play("b")), part(2, late, huge, play("a", NOW, 1, "one")), limits=limits)[1:]
    assert outcome.rejects == {0: "IN_FUTURE", 1: "TOTAL_OVERFLOW"}
    shard.recover()
    (outcome,) = shard.submit(part(3, play("a", NOW, 1, "two"), play("a", NOW, 1, "one")), limits=limits)
    assert outcome.rejects == {0: "CHART_LIMIT"}
    assert counts(shard, "a", chart="one") == [2]


def test_rejects_of_several_kinds_are_repeated_after_replay_and_after_a_snapshot() -> None:
    shard = new_shard()
    limits = Limits(now_ms=NOW, charts_max=1)
    batch = part(1, play("a"), play("b", NOW + DAY), play("c", NOW, 1, "x", "y"), play("d", NOW, COUNT_MAX))
    (first,) = shard.submit(batch, limits=limits)
    assert first.rejects == {1: "IN_FUTURE", 2: "CHART_LIMIT", 3: "TOTAL_OVERFLOW"}
    for _ in range(2):
        (again,) = shard.submit(batch, limits=limits)
        assert (again.duplicate, again.rejects) == (True, first.rejects)
        shard.recover()
        (again,) = shard.submit(batch, limits=limits)
        assert (again.duplicate, again.rejects) == (True, first.rejects)
        shard.take_snapshot(use_blocks=True)
    assert len(shard.log) == 1


def test_a_slot_owned_by_another_shard_is_named_and_only_its_plays_are_left_out() -> None:
    mine, others = [0, 3, 5], [1, 2, 15]
    shard = new_shard(mine)
    owned, foreign = songs_in(mine, 4), songs_in(others, 5)
    (outcome,) = shard.submit(part(1, *map(play, owned + foreign)))
    assert outcome.not_owner_slots == {slot_of(song, SLOTS) for song in foreign}
    assert not outcome.duplicate
    shard.recover()
    assert counts(shard, *owned, *foreign) == [1] * 4 + [0] * 5
    # The slots move here: the same batch then counts in them, and only in them.
    shard.state.own(others)
    (outcome,) = shard.submit(part(1, *map(play, owned + foreign)))
    assert outcome.duplicate
    assert outcome.not_owner_slots == set()
    assert counts(shard, *owned, *foreign) == [1] * 9


def test_what_changes_nothing_is_not_logged_and_leaves_no_producer_behind() -> None:
    shard = new_shard([0])
    (foreign,) = songs_in([7], 1)
    limits = Limits(now_ms=NOW, producer_ttl_ms=1000)
    for producer in ("p", "q"):
        (outcome,) = shard.submit(part(1, play(foreign), producer=producer), limits=limits)
        assert outcome.not_owner_slots == {7}
    assert shard.log == []
    assert len(shard.state.producers) == 0
    # So the producer is as unknown as after a restart, and its old batches have expired.
    (own,) = songs_in([0], 1)
    (outcome,) = shard.submit(part(2, play(own), first_sent_ms=NOW - 1001), limits=limits)
    assert outcome.expired
    assert shard.submit(part(3, play(own), first_sent_ms=NOW - 1000), limits=limits)[0].rejects == {}


def test_an_expired_part_beside_one_that_counts_is_not_counted_by_replay() -> None:
    shard = new_shard()
    limits = Limits(now_ms=NOW, producer_ttl_ms=DAY)
    old = part(1, play("old"), producer="old", first_sent_ms=NOW - 2 * DAY)
    assert [one.expired for one in shard.submit(old, part(1, play("new")), limits=limits)] == [True, False]
    shard.recover()
    assert counts(shard, "old", "new") == [0, 1]
    assert shard.submit(old, limits=limits)[0].expired


@pytest.mark.parametrize("recover", [False, True])
def test_a_forgotten_producers_batches_are_refused_whichever_clock_was_ahead(recover: bool) -> None:
    """A client whose clock is ahead marks its batches later than the shard saw them: they must not count again."""
    shard = new_shard()
    ahead = 5_000
    batch = part(1, play("a"), first_sent_ms=NOW + ahead)
    assert not shard.submit(batch, limits=Limits(now_ms=NOW, producer_ttl_ms=DAY))[0].expired
    for later in range(0, 2 * ahead, 500):
        now = NOW + DAY + later
        shard.expire(now - DAY)
        (outcome,) = shard.submit(batch, limits=Limits(now_ms=now, producer_ttl_ms=DAY))
        assert outcome.duplicate or outcome.expired
        if recover:
            shard.recover()
    assert outcome.expired
    assert counts(shard, "a") == [1]


def test_permanent_producers_are_never_forgotten() -> None:
    shard = new_shard()
    shard.submit(part(1, play(), producer="kept", first_sent_ms=0), part(1, play(), producer="lost", first_sent_ms=NOW))
    assert shard.expire(NOW + 100 * DAY) == 1
    shard.recover()
    later = Limits(now_ms=NOW + 100 * DAY)
    again = shard.submit(
        part(1, play(), producer="kept", first_sent_ms=0), part(1, play(), producer="lost"), limits=later
    )
    assert (again[0].duplicate, again[1].expired) == (True, True)
    assert counts(shard, "a") == [2]


def test_a_mark_reaches_back_64_sequences() -> None:
    shard = new_shard()
    shard.submit(part(100, play()))
    said = {sequence: shard.submit(part(sequence, play()))[0].duplicate for sequence in (35, 36, 37, 99, 100, 36)}
    assert said == {35: True, 36: True, 37: False, 99: False, 100: True}  # the second 36 is the duplicate of the first
    assert counts(shard, "a") == [4]
    shard.recover()
    assert shard.submit(part(36, play()))[0].duplicate
    assert not shard.submit(part(38, play()))[0].duplicate
    assert not shard.submit(part((1 << 64) - 1, play()))[0].duplicate
    assert shard.submit(part(101, play()))[0].duplicate  # far behind the highest


def test_two_parts_of_one_batch_in_one_group_count_once() -> None:
    shard = new_shard()
    batch = part(1, play("a"), play("b"))
    requests = [append_request([batch, batch]), append_request([batch], 2)]
    responses = shard.commit(requests, Limits(now_ms=NOW))
    assert [[outcome.duplicate for outcome in one.outcomes] for one in responses] == [[False, True], [True]]
    assert [one.request_id for one in responses] == [1, 2]
    assert len(shard.log) == 1
    shard.recover()
    assert counts(shard, "a", "b") == [1, 1]


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\xff\xff\xff",
        b"\x1a\x05abc",
        pb.AppendRequest(batches=[pb.ShardBatch(sequence=1)]).SerializeToString(),
        pb.AppendRequest(batches=[pb.ShardBatch(producer_id="p")]).SerializeToString(),
        append_request([part(1, play("a")), part(2, play("a", 0))]),
        append_request([part(1, play("a")), part(2, play("x" * 129))]),
        append_request([part(1, play("a")), part(2, play("a", NOW, COUNT_MAX + 1))]),
        append_request([part(1, play("a")), part(2, play("a", NOW, 1, ""))]),
        append_request([part(1, play("a")), part(2, play("a", NOW, 1, *map(str, range(9))))]),
    ],
)
def test_a_request_that_no_gateway_sends_is_refused_and_changes_nothing(request_bytes: bytes) -> None:
    shard = new_shard()
    before = json.dumps(shard.state.to_snapshot()[0])
    with pytest.raises(InvalidArgumentError):
        admit(shard.state, read_request(request_bytes), Limits(now_ms=NOW))
    assert json.dumps(shard.state.to_snapshot()[0]) == before
    assert shard.state.pending_plays == 0
    (outcome,) = shard.submit(part(1, play("a")))
    assert not outcome.duplicate


def test_an_empty_request_and_an_empty_part_are_answered() -> None:
    shard = new_shard()
    assert shard.submit() == []
    (outcome,) = shard.submit(part(1))
    assert not outcome.duplicate
    assert shard.log == []
    assert not shard.submit(part(1, play()))[0].duplicate


def test_a_snapshot_does_not_change_with_the_state_it_was_taken_from() -> None:
    """It is written by another thread while the next groups are taken through."""
    mine, later = [0, 3], [5]
    shard = new_shard(mine)
    songs, foreign = songs_in(mine, 30), songs_in(later, 5)
    batch = part(1, *(play(song, NOW + DAY) for song in songs[:5] + foreign), play(songs[9], NOW, 1, "x"))
    shard.submit(batch)
    meta, arrays = shard.state.to_snapshot()
    chunks = {name: board.cells.take_chunks() for name, board in shard.state.boards.items()}
    kept = copy.deepcopy((meta, arrays, [cells.columns() for each in chunks.values() for cells in each]))
    shard.state.own(later)
    shard.submit(batch)  # more rejects of the same batch
    shard.submit(part(2, *(play(song, NOW, 3, "x", "y") for song in songs)))
    for sequence in range(3, 400):
        shard.submit(part(sequence, play(f"{sequence}" + songs[0]), play(songs[sequence % 30], NOW + sequence)))
    assert meta == kept[0]
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, kept[1][name], err_msg=name)
    for columns, known in zip((cells.columns() for each in chunks.values() for cells in each), kept[2], strict=True):
        for name, column in columns.items():
            np.testing.assert_array_equal(column, known[name], err_msg=name)


@pytest.mark.parametrize(
    "other",
    [ClusterSettings(32, "ring", 1000), ClusterSettings(16, "modulo", 1000), ClusterSettings(16, "ring", 60_000)],
)
def test_a_snapshot_of_other_settings_is_refused(other: ClusterSettings) -> None:
    meta, arrays = new_shard().state.to_snapshot()
    with pytest.raises(ForeignDirectoryError, match="start this shard with the topology"):
        ShardState.from_snapshot(other, 10, json.loads(json.dumps(meta)), arrays, {})


def test_memory_and_entries_are_accounted() -> None:
    shard = new_shard()
    empty = shard.state.memory_bytes
    shard.submit(part(1, *(play(f"{i:050}", NOW, 1, "x") for i in range(5000))))
    assert shard.state.entries == 10_000
    assert shard.state.memory_bytes > empty + 5000 * 60
