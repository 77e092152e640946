"""The partitioners through a gateway over real shards: the same plays give the same answers, byte for byte.

Under `round_robin` a song's plays are spread, so that its answers are the ones to be doubted: they are held against the
tally, also while plays arrive, while shards come back, and where the plain merge of the shards' best is wrong.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path

import grpc
import numpy as np
import pytest
import xxhash

from tests.engine.engine_shard import DAY, NOW
from tests.gateway.cluster import SLOTS, Cluster, Gateway, batch, frozen_clock, record, rejects
from tests.gateway.test_queries import random_plays, request, songs_request
from tests.oracle import Ranked, Tally, Truth, by_count
from topk_grpc import TopKClient
from topk_grpc.errors import ResourceExhaustedError, UnavailableError, UnsupportedError
from topk_grpc.model import (
    GlobalWindow,
    Play,
    RangeWindow,
    SessionWindow,
    SlidingWindow,
    TumblingWindow,
    Window,
)
from topk_grpc.pb.topk.v1 import admin_service_pb2 as admin_pb
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.ring import PARTITIONERS, partitioner_of
from topk_grpc.rpc.status import from_rpc_error

SPREAD = "round_robin"
WINDOWS: tuple[tuple[Window, int | str | None], ...] = (
    (GlobalWindow(), None),
    (TumblingWindow(DAY), NOW),
    (TumblingWindow(7 * DAY, 4 * DAY), NOW - DAY),
    (TumblingWindow(60_000, 7_000), "latest"),
    (SlidingWindow(60_000, 10_000), NOW),
    (SlidingWindow(2 * DAY), NOW),
    (SlidingWindow(90_000), None),
    (RangeWindow(NOW // 1000 * 1000 - 2 * DAY, NOW // 1000 * 1000 - 3_000), None),
)


async def send(gateway: Gateway, plays: list[Play], size: int = 20, producer: str = "p") -> None:
    """In batches, so that they go round."""
    for sequence, start in enumerate(range(0, len(plays), size), 1):
        response = await record(gateway, batch(sequence, plays[start : start + size], producer))
        assert (response.accepted, response.duplicate) == (len(plays[start : start + size]), False)


async def test_the_same_plays_give_the_same_answers_byte_for_byte(tmp_path: Path) -> None:
    plays = random_plays(7, 900)
    tally = Tally(plays)
    answers: dict[str, list[bytes]] = {}
    for name in PARTITIONERS:
        cluster = Cluster(tmp_path / name)
        (tmp_path / name).mkdir()
        with frozen_clock():
            try:
                await cluster.begin(3, partitioner=name)
                gateway = await cluster.gateway()
                await send(gateway, plays)
                answers[name] = await all_answers(gateway, tally)
                counted = [shard.counted(["song-0"])[0] for shard in cluster.shards]
                assert (sum(map(bool, counted)) == 1) == partitioner_of(name).whole_songs
            finally:
                await cluster.end()
    assert answers["ring"] == answers["modulo"] == answers[SPREAD]


async def all_answers(gateway: Gateway, tally: Tally) -> list[bytes]:
    found = []
    for window, as_of in WINDOWS:
        at_ms = tally.newest_ms() if as_of == "latest" else NOW
        at_ms = as_of if isinstance(as_of, int) else at_ms
        for chart in ("", "US", "never heard of"):
            truth = tally.truth(window, at_ms, chart)
            for k in (1, 4, 20, 33, 10_000):  # heaps hold 20
                response = await gateway.stub.GetTopK(request(window, k, chart, as_of))
                assert [(entry.song_id, entry.count) for entry in response.entries] == truth.ranked[:k]
                assert response.certificate.total_plays == truth.total
                response.certificate.ClearField("distinct_songs")
                found.append(response.SerializeToString(deterministic=True))
    return found


async def test_a_certificate_says_that_the_number_of_songs_is_unknown(cluster: Cluster) -> None:
    await cluster.begin(2, partitioner=SPREAD)
    gateway = await cluster.gateway()
    await send(gateway, [Play("a", NOW, 2, ("US",)), Play("b", NOW), Play("a", NOW, 1, ("US",))], 1)
    response = await gateway.stub.GetTopK(request())
    assert not response.certificate.HasField("distinct_songs")
    charts = await gateway.stub.ListCharts(pb.ListChartsRequest())
    assert [(one.chart, one.total_plays, one.HasField("distinct_songs")) for one in charts.charts] == [("US", 3, False)]
    async with TopKClient(gateway.address) as client:
        assert (await client.top_k("global", 1)).certificate.distinct_songs is None
        assert (await client.charts())[0].distinct_songs is None


# --- Where the plain merge is wrong -----------------------------------------------------------------------------------


def slot_of_batch(producer: str, sequence: int) -> int:
    """Where a batch goes, in plain integers."""
    hashed: int = xxhash.xxh64_intdigest(producer.encode(), seed=0)
    return (hashed + sequence) % SLOTS


@pytest.mark.parametrize("slots", [1, 16, 100, 1024, 65_536])
def test_the_slot_of_a_batch_is_its_producers_hash_and_its_sequence(slots: int) -> None:
    for producer in ("p", "é", "x" * 128):
        for sequence in (1, 2, 63, 1 << 40, (1 << 64) - 1):
            keys = partitioner_of(SPREAD).slot_keys(np.zeros(3, np.uint64), producer.encode(), sequence, slots)
            plain = (xxhash.xxh64_intdigest(producer.encode(), seed=0) + sequence) % slots
            assert (keys % np.uint64(slots)).tolist() == [plain] * 3


def everywhere(owners: tuple[int, ...], producer: str) -> list[list[Play]]:
    """Batches that give each shard five songs of its own, which beat there the one song that all have: it is first."""
    batches = []
    for sequence in range(1, SLOTS + 1):
        shard = owners[slot_of_batch(producer, sequence)]
        batches.append(
            [*(Play(f"only-{shard}-{number}", NOW, 100) for number in range(5)), Play("everywhere", NOW, 90)]
        )
    return batches


async def test_three_phases_find_a_song_that_the_plain_merge_does_not_see(cluster: Cluster) -> None:
    await cluster.begin(4, partitioner=SPREAD)
    gateway = await cluster.gateway()
    owners = (await cluster.store.read()).owners
    tally = Tally()
    for sequence, plays in enumerate(everywhere(owners, "p"), 1):
        tally.plays += plays
        await record(gateway, batch(sequence, plays))
    plain: Counter[str] = Counter()
    for shard in cluster.shards:
        named = [f"only-{number}-{song}" for number in range(4) for song in range(5)] + ["everywhere"]
        counts = dict(zip(named, shard.counted(named), strict=True))
        assert counts["everywhere"] > 0
        plain.update(dict(by_count({song: count for song, count in counts.items() if count})[:5]))
    truth = tally.ranked()
    assert truth[0] == ("everywhere", 90 * SLOTS)
    assert "everywhere" not in plain
    response = await gateway.stub.GetTopK(request(k=5))
    assert [(entry.song_id, entry.count) for entry in response.entries] == truth[:5]


# --- What it does not do ----------------------------------------------------------------------------------------------


async def test_what_needs_a_songs_whole_count_is_refused_and_says_what_to_do(cluster: Cluster) -> None:
    await cluster.begin(2, partitioner=SPREAD)
    gateway = await cluster.gateway()
    await send(gateway, [Play("a", NOW)])
    delete = admin_pb.ClusterAdminServiceDeleteSongRequest(song_id="a")
    for call in (
        gateway.stub.GetTopK(request(SessionWindow(60_000))),
        gateway.stub.GetSongs(songs_request(["a"])),
        gateway.admin.DeleteSong(delete),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            await call
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
        error = from_rpc_error(refused.value)
        assert isinstance(error, UnsupportedError)
        assert "round_robin" in str(error)
        assert "--partitioner ring" in str(error)
    with pytest.raises(grpc.RpcError) as refused:
        async for _ in gateway.stub.WatchTopK(pb.WatchTopKRequest(window=request(SessionWindow(60_000)).window, k=1)):
            pass
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_correction_is_rejected_alone_and_a_resend_repeats_that(cluster: Cluster) -> None:
    await cluster.begin(2, partitioner=SPREAD)
    gateway = await cluster.gateway()
    message = batch(1, [Play("a", NOW, 3), Play("a", NOW, -1), Play("b", NOW)])
    for duplicate in (False, True):
        response = await record(gateway, message)
        assert rejects(response) == {1: "CORRECTION_UNSUPPORTED"}
        assert (response.accepted, response.duplicate) == (2, duplicate)
    assert cluster.counted(["a", "b"]) == [3, 1]


async def test_watches_and_chart_history_are_exact(cluster: Cluster) -> None:
    await cluster.begin(3, partitioner=SPREAD)
    gateway = await cluster.gateway(watch_interval_seconds=0.02)
    plays = random_plays(3)
    await send(gateway, plays)
    tally = Tally(plays)
    async with TopKClient(gateway.address) as client:
        async with asyncio.timeout(20):
            async for update in client.watch("global", 5):
                assert [(entry.song_id, entry.count) for entry in update.answer.entries] == tally.ranked()[:5]
                break
        answer = await client.top_k("tumbling:1d", 5, as_of=NOW, history_panes=3)
        panes = [tally.truth(TumblingWindow(DAY), NOW - back * DAY).ranked[:5] for back in range(3)]
        for entry in answer.entries:
            ranks = [
                [song for song, _ in pane].index(entry.song_id) + 1 for pane in panes if entry.song_id in dict(pane)
            ]
            assert entry.history is not None
            assert (entry.history.peak_rank, entry.history.panes_on_chart) == (min(ranks), len(ranks))


async def test_a_query_that_would_have_to_look_at_too_much_is_refused(cluster: Cluster) -> None:
    await cluster.begin(2, partitioner=SPREAD)
    gateway = await cluster.gateway(threshold_entries_max=10)
    await send(gateway, [Play(f"song-{number:03d}", NOW) for number in range(200)])
    with pytest.raises(grpc.RpcError) as refused:
        await gateway.stub.GetTopK(request(k=5))
    error = from_rpc_error(refused.value)
    assert isinstance(error, ResourceExhaustedError)
    assert "--threshold-entries-max" in str(error)


async def test_pages_of_an_answer_are_put_together(cluster: Cluster) -> None:
    """One shard has more songs at the threshold than fit a page."""
    await cluster.begin(2, partitioner=SPREAD)
    gateway = await cluster.gateway()
    many = [f"song-{number:05d}" for number in range(20_000)]
    await send(gateway, [Play(song, NOW) for song in many] + [Play(song, NOW) for song in many[::7]], 9_000)
    truth = by_count(Counter([*many, *many[::7]]))
    response = await gateway.stub.GetTopK(request(k=3000))
    assert [(entry.song_id, entry.count) for entry in response.entries] == truth[:3000]


# --- Counting once ----------------------------------------------------------------------------------------------------


async def test_a_batch_goes_to_one_shard_whole_and_counts_once_through_any_gateway(cluster: Cluster) -> None:
    await cluster.begin(3, partitioner=SPREAD)
    gateways = [await cluster.gateway() for _ in range(2)]
    owners = (await cluster.store.read()).owners
    plays = [Play(f"song-{number}", NOW) for number in range(30)]
    names = [play.song_id for play in plays]
    tally: Counter[int] = Counter()
    for sequence in range(1, 40):
        tally[owners[slot_of_batch("p", sequence)]] += 1
        for turn, gateway in enumerate(gateways):
            response = await record(gateway, batch(sequence, plays))
            assert (response.accepted, response.duplicate) == (30, bool(turn))
        assert [shard.counted(names) for shard in cluster.shards] == [[tally[shard]] * 30 for shard in range(3)]


async def test_shards_that_come_back_know_what_they_have_counted(cluster: Cluster) -> None:
    await cluster.begin(3, partitioner=SPREAD)
    gateway = await cluster.gateway()
    plays = random_plays(5)
    await send(gateway, plays, 25)
    for number, shard in enumerate(cluster.shards):
        if number:
            await shard.kill()
        else:
            await shard.stop()  # with a snapshot
        await shard.start()
    for sequence, start in enumerate(range(0, len(plays), 25), 1):
        response = await record(gateway, batch(sequence, plays[start : start + 25]))
        assert response.accepted == len(plays[start : start + 25])
    truth = Truth(None, Tally(plays).ranked())
    response = await gateway.stub.GetTopK(request(k=40))
    assert [(entry.song_id, entry.count) for entry in response.entries] == truth.ranked[:40]


async def test_without_a_shard_an_answer_fails_or_is_partial_and_exact_for_the_rest(cluster: Cluster) -> None:
    await cluster.begin(3, partitioner=SPREAD)
    gateway = await cluster.gateway(query_seconds=1)
    await send(gateway, random_plays(6))
    names = sorted({play.song_id for play in random_plays(6)})
    await cluster.shards[1].kill()
    with pytest.raises(grpc.RpcError) as refused:
        await gateway.stub.GetTopK(request())
    assert isinstance(from_rpc_error(refused.value), UnavailableError)
    response = await gateway.stub.GetTopK(request(k=10, allow_partial=True))
    assert list(response.certificate.missing_shards) == ["shard-1"]
    left = [cluster.shards[number].counted(names) for number in (0, 2)]
    counts = {song: sum(each) for song, each in zip(names, zip(*left, strict=True), strict=True) if sum(each)}
    assert [(entry.song_id, entry.count) for entry in response.entries] == by_count(counts)[:10]


# --- While plays arrive -----------------------------------------------------------------------------------------------


class Live:
    """What has been sent and what has been acknowledged, by song."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self.acknowledged: Counter[str] = Counter()

    def check(self, entries: Ranked, k: int, before: Counter[str], after: Counter[str]) -> None:
        """Each count lies within what it can be, and nobody who is not listed would have to be."""
        assert entries == by_count(dict(entries))
        for song, count in entries:
            assert before[song] <= count <= after[song], (song, before[song], count, after[song])
        if len(entries) < k:
            assert set(before) <= set(dict(entries))
        else:
            last = (-entries[-1][1], entries[-1][0])
            missed = [song for song, count in before.items() if song not in dict(entries) and (-count, song) < last]
            assert not missed


@pytest.mark.parametrize("window", ["global", "tumbling:1d"])
async def test_answers_are_exact_while_plays_arrive(cluster: Cluster, window: str) -> None:
    """Skewed and with many ties, so that the k-th place changes all the time; a song comes up out of nothing."""
    await cluster.begin(4, partitioner=SPREAD)
    gateways = [await cluster.gateway() for _ in range(2)]
    live = Live()
    until = asyncio.get_running_loop().time() + 4
    counted = 0

    async def produce(number: int) -> None:
        chance = random.Random(number)
        sequence = 0
        while asyncio.get_running_loop().time() < until:
            sequence += 1
            names = [f"song-{int(40 * chance.random() ** 2):02d}" for _ in range(30)]
            names += [f"new-{sequence // 20}"] * chance.randrange(4)
            plays = [Play(name, NOW) for name in names]
            live.sent.update(names)
            response = await record(gateways[number % 2], batch(sequence, plays, f"p{number}"))
            assert response.accepted == len(names)
            live.acknowledged.update(names)

    async def ask(number: int) -> None:
        nonlocal counted
        chance = random.Random(number)
        async with TopKClient(gateways[number % 2].address) as client:
            while asyncio.get_running_loop().time() < until:
                k = chance.choice([1, 3, 10, 25])
                before = Counter(live.acknowledged)
                answer = await client.top_k(window, k)
                after = Counter(live.sent)
                live.check([(entry.song_id, entry.count) for entry in answer.entries], k, before, after)
                counted += 1

    async with asyncio.TaskGroup() as group:
        for number in range(3):
            group.create_task(produce(number))
            group.create_task(ask(number))
    assert counted >= 20
    async with TopKClient(gateways[0].address) as client:
        answer = await client.top_k(window, 10_000)
        truth = Truth(answer.bounds, by_count(dict(live.acknowledged)))
        assert [(entry.song_id, entry.count) for entry in answer.entries] == truth.ranked
