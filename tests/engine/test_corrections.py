"""Plays taken back, one by one or all of a song: single cases, and any traffic against the naive shard."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from tests.engine.engine_shard import DAY, NOW, EngineShard, append_request, check_answers
from tests.engine.test_against_oracle import SLOTS, Group, Recover, Send, Snapshot, Traffic
from tests.oracle import ModelPart
from topk_grpc.engine import cells, query
from topk_grpc.engine.admission import Limits
from topk_grpc.engine.deletion import Deleted
from topk_grpc.engine.query import Scope
from topk_grpc.kernels import compiled
from topk_grpc.model import COUNT_MAX, Bounds, ClusterSettings, Play

SONGS = ("a", "b", "é", "\0")
CHARTS = ("US", "DE", "rock")


LATER = Limits(now_ms=NOW + 4 * DAY)


def new_shard(tiers: str = "") -> EngineShard:
    return EngineShard(ClusterSettings(SLOTS, "ring", 1000), 10, range(SLOTS), tiers)


def part(sequence: int, *plays: Play, producer: str = "p") -> ModelPart:
    return ModelPart(producer, sequence, NOW, tuple(enumerate(plays)))


def play(song_id: str = "a", count: int = 1, *charts: str, at: int = NOW) -> Play:
    return Play(song_id, at, count, charts)


def count(shard: EngineShard, song_id: str, chart: str = "", bounds: Bounds | None = None) -> int:
    return query.counts_of(shard.state, Scope(chart, bounds), [song_id])[0].counts[0]


def rejects(shard: EngineShard, *parts: ModelPart) -> list[dict[int, str]]:
    return [outcome.rejects for outcome in shard.submit(*parts)]


def refused(*indexes: int) -> dict[int, str]:
    return dict.fromkeys(indexes, "NEGATIVE_BUCKET")


# --- Single cases -----------------------------------------------------------------------------------------------------


def test_corrections_come_after_the_plays_of_their_batch_and_in_their_order() -> None:
    shard = new_shard()
    batch = part(1, play("a", -2), play("a", -2), play("a", 3), play("a", -1), play("a", -1))
    assert rejects(shard, batch) == [refused(1, 4)]
    for _ in range(2):
        assert count(shard, "a") == 0
        assert query.totals(shard.state, Scope()) == query.Totals(0, 0)
        assert rejects(shard, batch) == [refused(1, 4)]  # a resend: as it was decided then
        shard.recover()
    assert len(shard.log) == 1


def test_a_correction_may_take_back_all_and_not_one_more() -> None:
    shard = new_shard()
    assert rejects(shard, part(1, play("a", 5)), part(2, play("a", -6)), part(3, play("a", -5))) == [{}, refused(0), {}]
    assert rejects(shard, part(4, play("a", -1))) == [refused(0)]
    assert query.top_k(shard.state, Scope(), 10)[0].song_ids == []


def test_only_the_correction_s_own_bucket_counts() -> None:
    shard = new_shard()
    shard.submit(part(1, play("a", 3, at=NOW + 999), play("a", 3, at=NOW + 1000)))
    assert rejects(shard, part(2, play("a", -4, at=NOW), play("a", -3, at=NOW))) == [refused(0)]
    assert rejects(shard, part(3, play("a", -1, at=NOW - 1), play("a", -1, at=NOW))) == [refused(0, 1)]
    assert [count(shard, "a", "", Bounds(NOW + after, NOW + after + 1000)) for after in (0, 1000)] == [0, 3]


def test_all_charts_or_none() -> None:
    shard = new_shard()
    shard.submit(part(1, play("a", 2, "US"), play("a", 3, "DE"), play("b", 9, "rock")))
    wrong = [play("a", -1, "US", "rock"), play("a", -3, "US"), play("a", -1, "US", "never heard of"), play("a", -6)]
    assert rejects(shard, part(2, *wrong)) == [refused(0, 1, 2, 3)]
    assert [count(shard, "a", chart) for chart in ("", "US", "DE")] == [5, 2, 3]
    assert rejects(shard, part(3, play("a", -2, "US", "DE"))) == [{}]
    assert [count(shard, "a", chart) for chart in ("", "US", "DE")] == [3, 0, 1]
    # Taken back globally only, plays stay in their charts.
    assert rejects(shard, part(4, play("a", -3), play("a", -1, "DE"))) == [refused(1)]
    shard.recover()
    assert [count(shard, "a", chart) for chart in ("", "US", "DE")] == [0, 0, 1]
    assert [(name, totals.plays) for name, totals in query.charts(shard.state)] == [("DE", 1), ("rock", 9)]


def test_what_a_correction_names_is_not_taken_into_the_tables() -> None:
    shard = new_shard()
    unknown = part(1, play("unheard", -1), play("unheard", -1, "nowhere"), play("a", 1), play("a", -1, "nowhere"))
    assert rejects(shard, unknown) == [refused(0, 1, 3)]
    for _ in range(2):
        assert (len(shard.state.songs), len(shard.state.charts), len(shard.state.pairs)) == (1, 1, 0)
        shard.recover()


def test_charts_have_the_same_numbers_after_replay_where_a_correction_names_them_first() -> None:
    shard = new_shard()
    assert rejects(shard, part(1, play("a", -1, "US", "rock"), play("a", 2, "rock", "US"))) == [{}]
    names = [shard.state.charts.text(number) for number in range(1, 3)]
    shard.recover()
    assert [shard.state.charts.text(number) for number in range(1, 3)] == names == ["rock", "US"]


def test_a_correction_sees_what_came_in_its_group_and_request() -> None:
    shard = new_shard()
    requests = [
        append_request([part(1, play("a", 3, "US")), part(2, play("a", 1), play("b", 1))]),
        append_request([part(3, play("a", -2, "US")), part(4, play("a", -2, "US"), play("a", -2), play("c", 5))]),
        append_request([part(5, play("c", -4), play("a", 2)), part(6, play("a", -2), play("c", -2), play("c", -1))]),
    ]
    responses = shard.commit(requests, Limits(now_ms=NOW))
    assert [list(one.rejected_indexes) for response in responses for one in response.outcomes] == [
        [], [], [], [0], [], [1],
    ]  # fmt: skip
    shard.recover()
    assert [count(shard, song) for song in ("a", "b", "c")] == [0, 1, 0]


def test_corrections_are_late_ahead_and_huge_like_plays() -> None:
    shard = new_shard()
    old, ahead = NOW - 4000 * DAY, NOW + 301_000
    shard.submit(part(1, play("a", 2, at=old), play("b", COUNT_MAX - 2)))
    batch = part(2, play("a", -1, at=old), play("a", -1, at=ahead), play("b", -COUNT_MAX), play("b", 1), play("b", -2))
    assert rejects(shard, batch) == [{1: "IN_FUTURE", 2: "NEGATIVE_BUCKET", 3: "TOTAL_OVERFLOW"}]
    assert [count(shard, "a"), count(shard, "b")] == [1, COUNT_MAX - 4]
    # What was taken back makes room again.
    assert rejects(shard, part(3, play("c", 3), play("c", 1))) == [{1: "TOTAL_OVERFLOW"}]
    huge = [play("c", -COUNT_MAX)] * 40
    assert rejects(shard, part(4, *huge)) == [refused(*range(40))]
    shard.recover()
    assert query.totals(shard.state, Scope()).plays == COUNT_MAX


def test_a_chart_may_come_to_more_than_the_largest_total_and_is_recovered_so() -> None:
    shard = new_shard()
    assert rejects(shard, part(1, play("a", COUNT_MAX, "US")), part(2, play("a", -1))) == [{}, {}]
    assert rejects(shard, part(3, play("a", 1, "US"))) == [{}]
    shard.take_snapshot(use_blocks=True)
    shard.recover()
    assert [count(shard, "a"), count(shard, "a", "US")] == [COUNT_MAX, COUNT_MAX + 1]


def test_a_full_shard_takes_corrections_and_rejects_those_of_unknown_songs_for_what_they_are() -> None:
    shard = new_shard()
    shard.submit(part(1, play("a", 2)))
    (outcome,) = shard.submit(
        part(2, play("a", -1), play("new", -1), play("new", 1)), limits=Limits(now_ms=NOW, memory_bytes_max=1)
    )
    assert outcome.rejects == {1: "NEGATIVE_BUCKET", 2: "MEMORY_LIMIT"}
    assert count(shard, "a") == 1


def test_a_correction_does_not_count_on_a_play_that_was_rejected() -> None:
    shard = new_shard()
    limits = Limits(now_ms=NOW, charts_max=1)
    batch = part(1, play("a", 1, "US", "DE"), play("a", 1, "US"), play("a", -1, "DE"), play("a", -1, "US", "DE"))
    (outcome,) = shard.submit(batch, part(2, play("a", -2, "US")), part(3, play("a", -1, "US")), limits=limits)[:1]
    assert outcome.rejects == {0: "CHART_LIMIT", 2: "NEGATIVE_BUCKET", 3: "NEGATIVE_BUCKET"}
    assert [count(shard, "a", chart) for chart in ("", "US")] == [0, 0]


@pytest.mark.timeout(30)
def test_a_whole_batch_of_corrections_takes_no_pass_each() -> None:
    shard = new_shard()
    many = 60_000 if compiled() else 6_000
    plays = [play(f"song {i % 20_000}", 3, "US", at=NOW - 1000 * (i % 7)) for i in range(many)]
    shard.submit(part(1, *plays))
    back = [play(one.song_id, -2 if i % 2 else -3, "US", at=one.played_at_ms) for i, one in enumerate(plays)]
    assert rejects(shard, part(2, *back), part(3, *back)) == [{}, refused(*range(many))]
    assert query.totals(shard.state, Scope()).plays == query.totals(shard.state, Scope("US")).plays == many // 2


def test_the_bucket_is_that_of_the_tier_which_covers_the_time_whether_rolled_up_or_not() -> None:
    for snapshots in (False, True):
        shard = new_shard(tiers="1s:1h,1m:1d,1h:*")
        minute = NOW // 60_000 * 60_000
        early = [play("a", 3, "US", at=minute + 5_000), play("a", 3, at=minute + 40_000)]
        shard.submit(part(1, *early))
        # Within the hour buckets are seconds.
        assert rejects(shard, part(2, play("a", -1, at=minute + 20_000), play("a", -4, at=minute + 40_000))) == [
            refused(0, 1)
        ]
        # A play of the same batch moves the border beyond them: it comes first.
        back = [play("a", -4, at=minute + 20_000), play("a", -2, "US", at=minute), play("a", -1, at=minute + 59_999)]
        if snapshots:
            shard.submit(part(3, play("b", at=minute + 2 * 3_600_000), producer="q"), limits=LATER)
            shard.take_snapshot(use_blocks=True)
        else:
            back.append(play("b", at=minute + 2 * 3_600_000))
        (outcome,) = shard.submit(part(3, *back), limits=LATER)
        assert outcome.rejects == refused(2)
        for _ in range(2):
            assert [count(shard, "a"), count(shard, "a", "US")] == [0, 1]
            assert count(shard, "a", "US", Bounds(minute, minute + 60_000)) == 1
            shard.take_snapshot(use_blocks=True)
            shard.recover()


def test_plays_that_are_not_kept_by_time_any_more_are_only_taken_back_with_their_song() -> None:
    shard = new_shard(tiers="1s:1h,1m:1d")
    shard.submit(part(1, play("a", 3, "US"), play("a", 2), play("b", 1, "US")))
    shard.submit(part(2, play("a", 4, at=NOW + 3 * DAY), play("b", at=NOW + 3 * DAY)), limits=LATER)
    for turn in range(2):  # at the second they are gone from the cells
        (outcome,) = shard.submit(part(3 + turn, play("a", -1), play("a", -1, "US")), limits=LATER)
        assert outcome.rejects == refused(0, 1)
        assert [count(shard, "a"), count(shard, "a", "US")] == [9, 3]
        shard.take_snapshot(use_blocks=True)
    assert shard.delete_song("a") == Deleted(9, 1)
    for _ in range(3):
        assert query.totals(shard.state, Scope()) == query.Totals(2, 1)
        assert query.charts(shard.state) == [("US", query.Totals(1, 1))]
        assert count(shard, "a", "", Bounds(NOW + 3 * DAY - 60_000, NOW + 3 * DAY + 60_000)) == 0
        shard.recover()
        shard.take_snapshot(use_blocks=True)


# --- Whole songs ------------------------------------------------------------------------------------------------------


def test_a_deleted_song_is_gone_and_comes_back_with_new_plays_only() -> None:
    shard = new_shard()
    batch = part(1, play("a", 2, "US"), play("a", 3, at=NOW - DAY), play("b", 1, "US"))
    shard.submit(batch)
    shard.take_snapshot(use_blocks=True)
    shard.submit(part(2, play("a", 1, "DE")))
    assert shard.delete_song("a") == Deleted(6, 2)
    for _ in range(2):
        assert [count(shard, "a", chart) for chart in ("", "US", "DE")] == [0, 0, 0]
        assert [name for name, _ in query.charts(shard.state)] == ["US"]
        for bounds in (None, Bounds(NOW, NOW + 1000), Bounds(NOW - DAY, NOW - DAY + 1000)):
            assert "a" not in query.top_k(shard.state, Scope("", bounds), 10)[0].song_ids
        shard.recover()
    assert shard.delete_song("a") == Deleted(0, 0)
    (again,) = shard.submit(batch)
    assert again.duplicate
    assert rejects(shard, part(3, play("a", 1, "US"), play("a", -2, "US"))) == [refused(1)]
    assert [count(shard, "a", chart) for chart in ("", "US", "DE")] == [1, 1, 0]


def test_a_song_that_is_left_in_charts_only_can_be_deleted() -> None:
    shard = new_shard()
    shard.submit(part(1, play("a", 2, "US"), play("a", -2)))
    assert shard.delete_song("a") == Deleted(0, 1)
    assert shard.delete_song("never heard of") == Deleted(0, 0)
    assert query.charts(shard.state) == []


# --- Any traffic ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Delete:
    song_id: str


COUNTS = st.one_of(*[st.integers(1, 4)] * 4, *[st.integers(-4, -1)] * 3, st.sampled_from([COUNT_MAX, -COUNT_MAX]))
PLAYS = st.builds(
    Play,
    st.sampled_from(SONGS),
    st.one_of(st.integers(NOW - 2_500, NOW + 500), st.sampled_from([NOW - 400 * DAY, NOW + 301_000])),
    COUNTS,
    st.lists(st.sampled_from(CHARTS), unique=True, max_size=2).map(tuple),
)
SENDS = st.builds(
    Send,
    st.integers(0, 1),
    st.sampled_from([1, 1, 1, 1, 0, -1]),
    st.just(False),
    st.lists(PLAYS, min_size=1, max_size=8).map(tuple),
    st.just(frozenset(range(SLOTS))),
)
GROUPS = st.builds(
    Group, st.lists(st.lists(SENDS, min_size=1, max_size=3).map(tuple), min_size=1, max_size=3).map(tuple)
)
STEPS = st.one_of(
    GROUPS,
    GROUPS,
    GROUPS,
    st.builds(Delete, st.sampled_from(SONGS)),
    st.builds(Snapshot, st.booleans()),
    st.builds(Recover, st.sampled_from([1, 3])),
)


class CorrectingTraffic(Traffic):
    def delete(self, song_id: str) -> None:
        tally = self.model.tally
        held = tally.counts()
        charts = sum(1 for chart in tally.charts() if song_id in tally.counts(chart))
        assert self.shard.delete_song(song_id) == Deleted(held.get(song_id, 0), charts)
        event("deleted" if song_id in held else "nothing to delete")
        own = [play for play in tally.plays if play.song_id == song_id]
        tally.plays += [Play(song_id, play.played_at_ms, -play.count, play.charts) for play in own]

    def panes(self) -> Iterable[Bounds]:
        step = self.model.resolution_ms
        first = (NOW - 3_000) // step * step
        yield from (Bounds(start, start + step) for start in range(first, NOW + 1_000, step))
        yield Bounds((NOW - 500 * DAY) // step * step, NOW // step * step)


@settings(max_examples=80, deadline=None)
@given(
    steps=st.lists(STEPS, min_size=1, max_size=10),
    resolution_ms=st.sampled_from([1000, 60_000]),
    heap_size=st.sampled_from([1, 3, 50]),
    charts_max=st.sampled_from([10_000, 2]),
    chunk_cells=st.sampled_from([3, 1 << 10]),
)
def test_any_traffic_with_corrections_is_decided_and_counted_as_the_naive_shard_does(
    steps: list[Group | Delete | Snapshot | Recover],
    resolution_ms: int,
    heap_size: int,
    charts_max: int,
    chunk_cells: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "CHUNK_CELLS", chunk_cells)
        traffic = CorrectingTraffic(resolution_ms, heap_size, frozenset(range(SLOTS)), charts_max)
        for step in steps:
            if isinstance(step, Delete):
                traffic.delete(step.song_id)
            else:
                traffic.run(step)
        for _ in range(2):
            check_answers(traffic.shard.state, traffic.model.tally, traffic.panes())
            traffic.run(Snapshot(True))
            traffic.run(Recover(heap_size))
        for board in traffic.shard.state.boards.values():
            assert all(block.counts.all() for block in board.cells.blocks.values())
            assert (board.counts() >= 0).all()


def test_settings_of_an_empty_shard_do_not_age_plays_of_before_1970() -> None:
    shard = new_shard(tiers="1s:5m,20s:20m")
    shard.let_stand(())
    early = play("a", 2, "US", at=-NOW)
    shard.submit(part(1, early))
    assert rejects(shard, part(2, play("a", -2, "US", at=-NOW), play("a", -1, at=-NOW))) == [refused(1)]
    assert count(shard, "a") == 0
