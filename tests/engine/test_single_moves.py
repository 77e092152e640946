"""What single moves have to keep: sessions older than their buckets, grain, dropped plays, marks, rejects."""

from __future__ import annotations

import dataclasses
import random
from typing import Any, Final

import pytest

from tests.engine.engine_shard import NOW, EngineShard
from tests.engine.moving_cluster import SLOTS, Begin, Finish, MovingCluster
from tests.oracle import ModelPart, slot_of
from tests.window_traffic import MINUTE, SECOND, SONGS, TIERS, Recover, Snapshot, Stand
from topk_grpc.engine import query, transfer
from topk_grpc.engine.admission import Limits
from topk_grpc.engine.query import Scope
from topk_grpc.errors import (
    OutOfRangeError,
)
from topk_grpc.model import Bounds, ClusterSettings, Play, SessionWindow, SlidingWindow, TumblingWindow

CLUSTER: Final = ClusterSettings(SLOTS, "ring", SECOND)
ALL: Final = tuple(range(SLOTS))
TIERED: Final = "1s:10m,1m:1h,10m:*"


def shard(owned: bool = True, tiers: str = TIERED, cluster: ClusterSettings = CLUSTER) -> EngineShard:
    return EngineShard(cluster, 3, ALL if owned else (), tiers)


def send(to: EngineShard, sequence: int, *plays: Play, producer: str = "p", now_ms: int = NOW) -> Any:
    [said] = to.submit(ModelPart(producer, sequence, NOW, tuple(enumerate(plays))), limits=Limits(now_ms=now_ms))
    return said


def move(source: EngineShard, target: EngineShard, slots: tuple[int, ...] = ALL) -> None:
    image = transfer.read_image(transfer.export_slots(source.state, slots))
    transfer.can_import(target.state, image, 10_000, 0)
    transfer.import_slots(target.state, image)
    target.state.own(slots)
    source.state.owned[list(slots)] = 0
    transfer.drop_slots(source.state, slots)


def ranked(of: EngineShard, scope: Scope) -> list[tuple[str, int]]:
    best, _ = query.top_k(of.state, scope, 100)
    return list(zip(best.song_ids, best.counts, strict=True))


# --- Windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_a_standing_session_goes_on_for_longer_than_its_buckets_are_kept_wherever_it_moves(seed: int) -> None:
    """Songs are played all the time while their slots move about; never is the window refused, on any shard."""
    chance = random.Random(seed)
    window = SessionWindow(chance.choice((60, 150, 300)) * SECOND)
    cluster = MovingCluster(chance.choice(TIERS[1:3]), [window], 3)
    cluster.run(Stand((0,)))
    pause_ms = window.gap_ms * 6 // 10
    answered = 0
    for step in range(40 * MINUTE // pause_ms):
        for one in cluster.shards:
            bounds = query_bounds(window, cluster.now)
            if chance.random() < 0.8:
                one.state.move_standing(window, bounds)
        cluster.send(*(Play(song_id, cluster.now - chance.randrange(3000)) for song_id in ("a", "b", "z")))
        if chance.random() < 0.5:
            cluster.run(Begin(chance.randrange(3), chance.randrange(3), tuple(chance.sample(ALL, 4))))
            if chance.random() < 0.5:
                cluster.send(*(Play(song_id, cluster.now) for song_id in SONGS if song_id not in ("a", "b", "z")))
            cluster.run(Finish(chance.random() < 0.9))
        cluster.run(Snapshot(chance.random() < 0.5))
        if chance.random() < 0.1:
            cluster.run(Recover(3))
        truth = cluster.model.tally.truth(window, cluster.now)
        cluster.finish()
        cluster.ask(window, cluster.now, "", live=True)
        cluster.compare(Scope("", truth.bounds, window.gap_ms, window), truth.ranked, truth.sessions)
        first = min((span.start_ms for span in truth.sessions.values()), default=cluster.now)
        answered += first < cluster.model.tiers.first_fine_ms(cluster.model.tally.newest_ms())
        cluster.now += pause_ms if step % 30 else window.gap_ms * 2
    assert answered, "no session was older than its buckets"


def query_bounds(window: SessionWindow, at_ms: int) -> Bounds:
    bucket = at_ms // SECOND * SECOND
    return Bounds(bucket - window.gap_ms, bucket + SECOND)


def test_cells_that_the_source_has_rolled_up_are_not_cut_finer_by_the_target() -> None:
    """The target keeps seconds for a day, the source had them for ten minutes: minutes are left."""
    source, target = shard(), shard(owned=False, tiers="1s:1d,1m:*")
    minute = NOW // MINUTE * MINUTE
    send(source, 1, *(Play("a", minute - 40 * MINUTE + second * SECOND) for second in range(120)), Play("b", NOW))
    send_to = Play("c", minute - 40 * MINUTE + 5 * SECOND)
    move(source, target)
    send(target, 2, send_to)
    whole = Bounds(minute - 40 * MINUTE, minute - 39 * MINUTE)
    assert ranked(target, Scope("", whole)) == [("a", 60), ("c", 1)]
    with pytest.raises(OutOfRangeError) as refusal:
        ranked(target, Scope("", Bounds(whole.start_ms, whole.start_ms + 30 * SECOND)))
    assert Bounds(refusal.value.start_ms, refusal.value.end_ms) == whole
    assert ranked(target, Scope("", Bounds(NOW // SECOND * SECOND, NOW // SECOND * SECOND + SECOND))) == [("b", 1)]


def test_windows_of_both_sides_stand_and_those_that_cannot_be_cut_are_counted_anew() -> None:
    source, target = shard(), shard(owned=False)
    fine, coarse, sliding = SlidingWindow(40 * MINUTE, 0), TumblingWindow(30 * MINUTE, 0), SlidingWindow(5 * MINUTE, 0)
    source.let_stand((coarse,))
    target.let_stand((fine, sliding))
    send(source, 1, *(Play("a", NOW - minute * MINUTE) for minute in range(60)))
    for window, size in ((fine, 40), (sliding, 5)):
        bounds = Bounds(NOW + SECOND - size * MINUTE, NOW + SECOND)
        target.state.move_standing(window, bounds)
    pane = Bounds(NOW // (30 * MINUTE) * 30 * MINUTE, (NOW // (30 * MINUTE) + 1) * 30 * MINUTE)
    source.state.move_standing(coarse, pane)
    before = ranked(source, Scope("", pane, 0, coarse))
    move(source, target)
    assert set(target.state.standing) == {fine, coarse, sliding}
    target.state.move_standing(coarse, pane)
    assert ranked(target, Scope("", pane, 0, coarse)) == before
    assert ranked(target, Scope("", Bounds(NOW + SECOND - 5 * MINUTE, NOW + SECOND), 0, sliding)) == [("a", 5)]
    with pytest.raises(OutOfRangeError):
        ranked(target, Scope("", Bounds(NOW + SECOND - 40 * MINUTE, NOW + SECOND), 0, fine))


def test_plays_that_a_tier_has_dropped_count_for_all_time_only() -> None:
    source, target = shard(tiers="1s:5m,1m:20m"), shard(owned=False, tiers="1s:5m,1m:20m")
    send(source, 1, Play("a", NOW - 3 * 60 * MINUTE, 7, ("US",)), Play("a", NOW, 2, ("US",)))
    source.take_snapshot(use_blocks=True)
    move(source, target)
    for chart in ("", "US"):
        assert ranked(target, Scope(chart)) == [("a", 9)]
        assert ranked(target, Scope(chart, Bounds(NOW // MINUTE * MINUTE, NOW + MINUTE))) == [("a", 2)]
    move(target, source)
    assert ranked(source, Scope("US")) == [("a", 9)]
    assert not ranked(target, Scope("US"))


def test_a_chart_keeps_plays_of_a_song_that_has_none_in_the_global_chart() -> None:
    source, target = shard(), shard(owned=False)
    send(source, 1, Play("a", NOW, 2, ("US",)))
    send(source, 2, Play("a", NOW, -2))
    move(source, target)
    target.take_snapshot(use_blocks=True)
    target.recover()
    assert (ranked(target, Scope()), ranked(target, Scope("US"))) == ([], [("a", 2)])


# --- Producers --------------------------------------------------------------------------------------------------------


def test_a_resend_after_a_move_counts_nothing_and_repeats_the_rejects() -> None:
    source, target = shard(), shard(owned=False)
    early, late = Play("a", NOW), Play("b", NOW + 60 * MINUTE)
    first = send(source, 9, early, late)
    assert first.rejects == {1: "IN_FUTURE"}
    move(source, target)
    assert send(source, 9, early, late).not_owner_slots == {slot_of("a", SLOTS), slot_of("b", SLOTS)}
    again = send(target, 9, early, late)
    assert (again.duplicate, again.rejects) == (True, first.rejects)
    assert ranked(target, Scope()) == [("a", 1)]
    assert not send(target, 10, early).duplicate


def test_a_producer_known_on_both_sides_has_the_marks_and_rejects_of_both() -> None:
    source, target = shard(), shard()
    one, other = next((a, b) for a in SONGS for b in SONGS if slot_of(a, SLOTS) != slot_of(b, SLOTS))
    source.state.owned[slot_of(other, SLOTS)] = target.state.owned[slot_of(one, SLOTS)] = 0
    batch = (Play(one, NOW), Play(one, NOW + 60 * MINUTE), Play(other, NOW), Play(other, NOW + 60 * MINUTE))
    assert send(source, 5, *batch).rejects == {1: "IN_FUTURE"}
    assert send(target, 5, *batch).rejects == {3: "IN_FUTURE"}
    move(source, target, (slot_of(one, SLOTS),))
    again = send(target, 5, *batch)
    assert (again.duplicate, again.rejects, again.not_owner_slots) == (True, {1: "IN_FUTURE", 3: "IN_FUTURE"}, set())
    assert len(target.state.producers) == 1


def test_dropping_forgets_producers_without_other_marks_and_keeps_the_rest() -> None:
    one = shard()
    send(one, 1, Play("a", NOW), producer="only here")
    send(one, 1, *(Play(song_id, NOW) for song_id in SONGS), producer="everywhere")
    transfer.drop_slots(one.state, [slot_of("a", SLOTS)])
    assert one.state.producers.get(b"only here") is None
    assert one.state.producers.get(b"everywhere") is not None
    assert send(one, 1, Play("a", NOW), producer="everywhere").duplicate is False


def test_under_round_robin_marks_move_and_counts_stay() -> None:
    cluster = dataclasses.replace(CLUSTER, partitioner="round_robin")
    source, target = shard(cluster=cluster), shard(owned=False, cluster=cluster)
    send(source, 1, *(Play(song_id, NOW, 2, ("US",)) for song_id in SONGS))
    before = transfer.slot_totals(source.state, ALL)
    plays = ranked(source, Scope())
    move(source, target)
    assert any(before.marks)
    assert not any(before.entries)
    assert transfer.slot_totals(target.state, ALL) == before
    assert (ranked(source, Scope()), ranked(target, Scope())) == (plays, [])
    assert len(source.state.producers) == 0
