"""Queries through a gateway over real shards, against the list of all plays; and what an answer says of itself."""

from __future__ import annotations

import asyncio
import random
import threading
from typing import Any

import grpc
import pytest

from tests.engine.engine_shard import DAY, NOW
from tests.gateway.cluster import SLOTS, Cluster, Gateway, Line, batch, record
from tests.oracle import Tally, slot_of, tumbling
from topk_grpc import TopKClient
from topk_grpc.errors import InvalidArgumentError, ResourceExhaustedError, UnavailableError, WindowError
from topk_grpc.model import Bounds, GlobalWindow, Play, TumblingWindow, Window
from topk_grpc.pb.topk.v1 import query_pb2, shard_service_pb2
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.rpc import convert
from topk_grpc.rpc.status import from_rpc_error

ALL = GlobalWindow()
DAILY = TumblingWindow(DAY)
SONGS = [f"song-{number}" for number in range(60)] + ["é", "e\u0301", "日本", "\U0001d11e", "\uffee"]


def request(window: Window = ALL, k: int = 10, chart: str = "", as_of: Any = None, **more: Any) -> Any:
    return pb.GetTopKRequest(
        window=convert.window_to_pb(window), k=k, chart=chart, as_of=convert.as_of_to_pb(as_of), **more
    )


def songs_request(songs: list[str], window: Window = ALL, chart: str = "", as_of: Any = None, **more: Any) -> Any:
    return pb.GetSongsRequest(
        window=convert.window_to_pb(window), song_ids=songs, chart=chart, as_of=convert.as_of_to_pb(as_of), **more
    )


def raw_request(size_ms: int, **more: Any) -> Any:
    window = query_pb2.Window(tumbling=query_pb2.TumblingWindow(size_ms=size_ms))
    return pb.GetTopKRequest(window=window, k=1, **more)


def entries(response: Any) -> list[tuple[int, str, int]]:
    return [(entry.rank, entry.song_id, entry.count) for entry in response]


def ranks(ranked: list[tuple[str, int]], first: int = 1) -> list[tuple[int, str, int]]:
    return [(rank, song, count) for rank, (song, count) in enumerate(ranked, first)]


async def load(gateway: Gateway, plays: list[Play], sequence: int = 1) -> Tally:
    response = await record(gateway, batch(sequence, plays))
    assert response.accepted == len(plays)
    return Tally(list(plays))


def random_plays(seed: int, many: int = 600) -> list[Play]:
    """With ties, many songs of few plays, some days, two charts."""
    chance = random.Random(seed)
    return [
        Play(
            chance.choice(SONGS[: chance.choice([3, 20, 65])]),
            NOW - chance.choice([0, 5_000, DAY, 3 * DAY]) - chance.randrange(100_000),
            chance.choice([1, 1, 1, 2, 10]),
            tuple(chance.sample(["US", "é"], chance.randrange(3))),
        )
        for _ in range(many)
    ]


@pytest.mark.parametrize("shards", [1, 3])
async def test_top_k_ranks_and_neighbours_are_exact(cluster: Cluster, shards: int) -> None:
    await cluster.begin(shards)
    gateway = await cluster.gateway()
    tally = await load(gateway, random_plays(shards))
    windows: list[tuple[Window, int | None, Bounds | None]] = [(GlobalWindow(), None, None)]
    for size, offset, at in (
        (DAY, 0, NOW),
        (DAY, 0, NOW - DAY),
        (7 * DAY, 4 * DAY, NOW),
        (60_000, 7_000, NOW - 70_000),
    ):
        windows.append((TumblingWindow(size, offset), at, tumbling(size, offset, at)))
    for window, as_of, bounds in windows:
        for chart in ("", "US", "é", "never heard of"):
            ranked = tally.ranked(chart, bounds)
            for k in (1, 7, 20, 21, 50, 10_000):  # heaps hold 20
                response = await gateway.stub.GetTopK(request(window, k, chart, as_of))
                assert entries(response.entries) == ranks(ranked[:k])
                assert convert.bounds_from_pb(response.bounds if response.HasField("bounds") else None) == bounds
                assert response.certificate.total_plays == sum(count for _, count in ranked)
                assert response.certificate.distinct_songs == len(ranked)
            asked = [*SONGS[::5], "unheard of", SONGS[0]]
            answer = await gateway.stub.GetSongs(songs_request(asked, window, chart, as_of, neighbours=3))
            check_songs(answer, asked, ranked, 3)
            assert answer.certificate.total_plays == sum(count for _, count in ranked)
            assert answer.certificate.distinct_songs == len(ranked)
    charts = await gateway.stub.ListCharts(pb.ListChartsRequest())
    expected = sorted(tally.charts().items(), key=lambda chart: (-chart[1][0], chart[0]))
    assert [(one.chart, (one.total_plays, one.distinct_songs)) for one in charts.charts] == expected
    assert charts.certificate.complete


def check_songs(answer: Any, asked: list[str], ranked: list[tuple[str, int]], neighbours: int) -> None:
    places = {song: at for at, (song, _) in enumerate(ranked)}
    assert [one.song_id for one in answer.songs] == asked
    for one in answer.songs:
        at = places.get(one.song_id)
        if at is None:
            assert (one.count, one.HasField("rank"), len(one.above), len(one.below)) == (0, False, 0, 0)
            continue
        assert (one.count, one.rank) == (ranked[at][1], at + 1)
        before, behind = ranked[max(0, at - neighbours) : at], ranked[at + 1 : at + 1 + neighbours]
        assert entries(one.above) == ranks(before, at + 1 - len(before))
        assert entries(one.below) == ranks(behind, at + 2)


async def test_neighbours_from_none_to_all(cluster: Cluster) -> None:
    await cluster.begin(3)
    gateway = await cluster.gateway()
    tally = await load(gateway, random_plays(5))
    for neighbours in (0, 1, 100):
        answer = await gateway.stub.GetSongs(songs_request(SONGS, neighbours=neighbours))
        check_songs(answer, SONGS, tally.ranked(), neighbours)


# --- Certificates -----------------------------------------------------------------------------------------------------


async def test_an_empty_cluster_answers(cluster: Cluster) -> None:
    await cluster.begin(2)
    gateway = await cluster.gateway()
    for asked in (request(), request(DAILY), request(DAILY, as_of="latest"), request(chart="x")):
        response = await gateway.stub.GetTopK(asked)
        assert list(response.entries) == []
        certificate = response.certificate
        assert (certificate.complete, certificate.watermark_ms, certificate.total_plays) == (True, 0, 0)
        assert certificate.finality == query_pb2.FINALITY_PRELIMINARY
    # Without plays `latest` is the gateway's clock.
    response = await gateway.stub.GetTopK(request(DAILY, as_of="latest"))
    assert convert.bounds_from_pb(response.bounds) == tumbling(DAY, 0, NOW)


async def test_finality_comes_when_the_watermark_has_passed_the_end_and_the_lateness(cluster: Cluster) -> None:
    await cluster.begin(2)
    gateway = await cluster.gateway(allowed_lateness_seconds=300.0)
    minute = TumblingWindow(60_000)
    end = tumbling(60_000, 0, NOW - DAY).end_ms
    await load(gateway, [Play("a", end - 1)])
    for sequence, newest, final in ((2, end, False), (3, end + 299_999, False), (4, end + 300_000, True)):
        await load(gateway, [Play("b", newest)], sequence)
        response = await gateway.stub.GetTopK(request(minute, as_of=end - 1))
        assert entries(response.entries) == [(1, "a", 1)]
        assert response.certificate.watermark_ms == newest
        assert response.certificate.finality == query_pb2.FINALITY_FINAL - (not final)
        assert (await gateway.stub.GetTopK(request())).certificate.finality == query_pb2.FINALITY_PRELIMINARY


async def test_the_watermark_is_never_ahead_of_the_clock(cluster: Cluster) -> None:
    await cluster.begin(2)
    gateway = await cluster.gateway()
    await load(gateway, [Play("a", NOW + 299_000)])
    response = await gateway.stub.GetTopK(request(TumblingWindow(1000), as_of="latest"))
    assert response.certificate.watermark_ms == NOW
    assert convert.bounds_from_pb(response.bounds) == Bounds(
        NOW + 299_000, NOW + 300_000
    )  # but latest is the newest play
    assert response.certificate.finality == query_pb2.FINALITY_PRELIMINARY


async def test_as_of_names_the_pane(cluster: Cluster) -> None:
    await cluster.begin(2)
    gateway = await cluster.gateway()
    first, second = await cluster.songs_of(0, 1), await cluster.songs_of(1, 1)
    await load(gateway, [Play(first[0], NOW - 10 * DAY), Play(second[0], NOW - 5 * DAY), Play("before", -5_000)])

    async def found(as_of: Any, window: Window = DAILY) -> list[str]:
        response = await gateway.stub.GetTopK(request(window, as_of=as_of))
        return [entry.song_id for entry in response.entries]

    assert await found(None) == []  # the clock's day
    assert await found("latest") == second  # the newest of all shards
    assert await found(NOW - 10 * DAY) == first
    assert await found(-5_000) == ["before"]
    assert await found(0) == []
    assert await found(-5_001, TumblingWindow(5_000)) == []
    assert await found(-4_999, TumblingWindow(5_000)) == ["before"]
    answer = await gateway.stub.GetSongs(songs_request(second, DAILY, as_of="latest"))
    assert [(one.count, one.rank) for one in answer.songs] == [(1, 1)]


# --- Shards that are missing ------------------------------------------------------------------------------------------


async def test_a_missing_shard_fails_the_query_or_is_named(cluster: Cluster) -> None:
    await cluster.begin(3)
    gateway = await cluster.gateway(query_seconds=2)
    tally = await load(gateway, random_plays(9))
    owners = (await cluster.store.read()).owners
    await cluster.shards[1].kill()
    for asked in (request(), request(DAILY, as_of="latest")):
        with pytest.raises(grpc.RpcError) as caught:
            await gateway.stub.GetTopK(asked)
        assert isinstance(from_rpc_error(caught.value), UnavailableError)
        assert "shard-1 does not answer" in str(caught.value)
    with pytest.raises(grpc.RpcError):
        await gateway.stub.ListCharts(pb.ListChartsRequest())
    left = Tally([play for play in tally.plays if owners[slot_of(play.song_id, SLOTS)] != 1])
    for window, as_of in ((GlobalWindow(), None), (DAILY, "latest")):
        bounds = None if as_of is None else tumbling(DAY, 0, left.newest_ms())
        response = await gateway.stub.GetTopK(request(window, 100, as_of=as_of, allow_partial=True))
        assert entries(response.entries) == ranks(left.ranked("", bounds))
        certificate = response.certificate
        assert (certificate.complete, list(certificate.missing_shards)) == (False, ["shard-1"])
        assert certificate.finality == query_pb2.FINALITY_PRELIMINARY
        answer = await gateway.stub.GetSongs(
            songs_request(SONGS, window, as_of=as_of, neighbours=2, allow_partial=True)
        )
        check_songs(answer, SONGS, left.ranked("", bounds), 2)
        assert list(answer.certificate.missing_shards) == ["shard-1"]
    charts = await gateway.stub.ListCharts(pb.ListChartsRequest(allow_partial=True))
    assert {one.chart: (one.total_plays, one.distinct_songs) for one in charts.charts} == left.charts()
    described = await gateway.stub.DescribeCluster(pb.DescribeClusterRequest())
    assert [shard.reachable for shard in described.shards] == [True, False, True]


async def test_songs_of_a_shard_that_answered_only_once_are_left_out_and_it_is_named(cluster: Cluster) -> None:
    """Counts and ranks are read one after the other; a shard may come back, or go, in between."""
    await cluster.begin(3)
    gateway = await cluster.gateway(query_seconds=2)
    tally = await load(gateway, random_plays(7))
    owners = (await cluster.store.read()).owners
    left = Tally([play for play in tally.plays if owners[slot_of(play.song_id, SLOTS)] != 1])
    for phase in ("QueryCounts", "QueryRanks"):
        ask, asked = gateway.shard_queries.ask, set[str]()

        async def ask_once(
            shard: Any,
            method: str,
            request: Any,
            seconds: float,
            phase: str = phase,
            ask: Any = ask,
            asked: Any = asked,
        ) -> Any:
            asked.add(method)
            if shard.shard_id == "shard-1" and method == phase:
                raise UnavailableError("away")
            return await ask(shard, method, request, seconds)

        gateway.shard_queries.ask = ask_once  # type: ignore[method-assign]
        answer = await gateway.stub.GetSongs(songs_request(SONGS, neighbours=2, allow_partial=True))
        gateway.shard_queries.ask = ask  # type: ignore[method-assign]
        assert asked == {"QueryCounts", "QueryRanks"}
        check_songs(answer, SONGS, left.ranked(), 2)
        certificate = answer.certificate
        assert (certificate.complete, list(certificate.missing_shards)) == (False, ["shard-1"])
        assert certificate.total_plays == sum(count for _, count in left.ranked())
        assert certificate.other_plays == 0


async def test_a_query_connection_that_died_without_a_word_is_replaced(cluster: Cluster) -> None:
    await cluster.begin(2)
    gateway = await cluster.gateway(query_seconds=1)
    tally = await load(gateway, random_plays(8))
    assert entries((await _top(gateway)).entries) == ranks(tally.ranked()[:10])
    cluster.shards[1].line.forget()
    with pytest.raises(grpc.RpcError) as caught:
        await _top(gateway)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert entries((await _top(gateway)).entries) == ranks(tally.ranked()[:10])


@pytest.mark.slow
async def test_a_clients_connection_that_died_without_a_word_is_found_out_by_keepalive(cluster: Cluster) -> None:
    await cluster.begin(1)
    gateway = await cluster.gateway()
    line = Line()
    await line.open(gateway.address)
    try:
        async with TopKClient(line.address, deadline_seconds=1) as client:
            for number in range(50):  # gRPC pings to measure the line when much comes in
                await client.record(f"song {number}" * 10, NOW)
            await client.flush()
            await client.top_k("global", 50)
            line.forget()
            async with asyncio.timeout(40):  # not the minute that one of those pings may take by default
                while True:
                    try:
                        await client.top_k("global")
                        break
                    except UnavailableError:
                        assert line.connections
    finally:
        await line.close()


async def test_a_query_waits_for_a_shard_that_comes_back(cluster: Cluster) -> None:
    await cluster.begin(2)
    gateway = await cluster.gateway()
    tally = await load(gateway, random_plays(3))
    await cluster.shards[0].kill()
    asking = asyncio.create_task(_top(gateway))
    await asyncio.sleep(0.1)
    assert not asking.done()
    await cluster.shards[0].start()
    assert entries((await asking).entries) == ranks(tally.ranked()[:10])


async def _top(gateway: Gateway, **more: Any) -> Any:
    return await gateway.stub.GetTopK(request(**more))


async def test_answers_are_merged_only_when_they_cover_each_slot_once(cluster: Cluster) -> None:
    await cluster.begin(2)
    gateway = await cluster.gateway(query_seconds=0.7)
    await load(gateway, random_plays(4))
    owners = (await cluster.store.read()).owners
    (slot, other) = owners.index(0), owners.index(1)
    first = cluster.shards[0]
    # Nobody answers for a slot: with allow_partial, too, as there is no shard to be named for it.
    first.core.state.owned[slot] = 0
    for partial in (False, True):
        with pytest.raises(grpc.RpcError, match="1 slots are answered by no shard"):
            await _top(gateway, allow_partial=partial)
    first.core.state.own([slot])
    # Two answer for it.
    first.core.state.own([other])
    with pytest.raises(grpc.RpcError, match="two shards answer for the same slot"):
        await _top(gateway)
    waiting = asyncio.create_task(_top(gateway))
    await asyncio.sleep(0.1)
    first.core.state.owned[other] = 0
    assert (await waiting).certificate.complete


async def test_a_server_that_took_over_a_shards_port_is_not_believed(cluster: Cluster) -> None:
    await cluster.begin(2)
    gateway = await cluster.gateway(query_seconds=3)
    await cluster.shards[0].line.open(cluster.shards[1].address)
    await cluster.shards[0].register()
    with pytest.raises(grpc.RpcError, match="this is shard-1 of cluster cluster-1"):
        await _top(gateway)


# --- Limits -----------------------------------------------------------------------------------------------------------


async def failure(call: Any) -> Exception:
    with pytest.raises(grpc.RpcError) as caught:
        await call
    return from_rpc_error(caught.value)


async def test_limits_of_queries(cluster: Cluster) -> None:
    await cluster.begin(1)
    gateway = await cluster.gateway()
    stub = gateway.stub
    for k in (0, 10_001, (1 << 32) - 1):
        refused = await failure(stub.GetTopK(request(k=k)))
        assert isinstance(refused, InvalidArgumentError)
        assert f"k is {k}: ask for 1 to 10000" in str(refused)
    for asked, says in (
        (pb.GetTopKRequest(k=1), "names no window"),
        (request(as_of=NOW), "as_of has no meaning for the global window"),
        (request(as_of="latest"), "as_of has no meaning for the global window"),
        (request(TumblingWindow(1500)), "multiples of 1s"),
        (request(TumblingWindow(2000, 500)), "multiples of 1s"),
        (request(DAILY, as_of=1 << 62), "out of all reason"),
        (request(DAILY, as_of=-(1 << 63)), "out of all reason"),
        (raw_request(0), "above 0"),
        (raw_request(-DAY), "above 0"),
        (raw_request(DAY, as_of=query_pb2.AsOf()), "as_of is empty"),
    ):
        refused = await failure(stub.GetTopK(asked))
        assert isinstance(refused, InvalidArgumentError), says
        assert says in str(refused)
    assert isinstance(await failure(stub.GetTopK(request(TumblingWindow(1500)))), WindowError)
    for songs, neighbours in (([], 0), (["a"] * 101, 0), (["a"], 101)):
        assert isinstance(
            await failure(stub.GetSongs(songs_request(songs, neighbours=neighbours))), InvalidArgumentError
        )
    assert len((await stub.GetSongs(songs_request(["a"] * 100, neighbours=100))).songs) == 100


async def test_a_shards_full_queue_of_scans_is_told_at_once(cluster: Cluster) -> None:
    await cluster.begin(1, scan_queue_max=1)
    gateway = await cluster.gateway()
    await load(gateway, [Play("a", NOW)])
    gate = threading.Event()
    held = asyncio.create_task(cluster.shards[0].owner.scan("gate", lambda _: gate.wait(30)))
    await asyncio.sleep(0)
    try:
        refused = await failure(_top(gateway, window=DAILY))
        assert isinstance(refused, ResourceExhaustedError)
    finally:
        gate.set()
    await held
    assert entries((await _top(gateway, window=DAILY, as_of=NOW)).entries) == [(1, "a", 1)]


async def test_the_shard_refuses_bounds_that_end_before_they_start(cluster: Cluster) -> None:
    await cluster.begin(1)
    gateway = await cluster.gateway()
    scope = shard_service_pb2.Scope(bounds=query_pb2.WindowBounds(start_ms=5000, end_ms=4000))
    shard = (await cluster.store.read()).shards[0]
    with pytest.raises(InvalidArgumentError, match="before it starts"):
        await gateway.shard_queries.ask(shard, "QueryTopK", shard_service_pb2.QueryTopKRequest(scope=scope, k=1), 5)


async def test_a_cluster_describes_itself(cluster: Cluster) -> None:
    await cluster.begin(2)
    gateway = await cluster.gateway()
    await load(gateway, [Play(f"{number}", NOW - number, 2, ("x",)) for number in range(50)])
    described = await gateway.stub.DescribeCluster(pb.DescribeClusterRequest())
    topology = await cluster.store.read()
    assert (described.cluster_id, described.epoch, described.slots) == ("cluster-1", topology.epoch, SLOTS)
    assert (described.partitioner, described.resolution_ms, described.k_max) == ("ring", 1000, 10_000)
    assert sum(shard.slots for shard in described.shards) == SLOTS
    assert sum(shard.total_plays for shard in described.shards) == 100
    assert sum(shard.songs for shard in described.shards) == 50
    assert sum(shard.entries for shard in described.shards) == 100
    assert max(shard.newest_event_ms for shard in described.shards) == NOW
    assert [shard.address for shard in described.shards] == [shard.line.address for shard in cluster.shards]
    assert all(shard.reachable and shard.memory_bytes > 0 for shard in described.shards)


async def test_a_shard_that_is_still_recovering_says_so(cluster: Cluster) -> None:
    await cluster.begin(2)
    gateway = await cluster.gateway(query_seconds=3)
    service = cluster.shards[0].service
    service._recovered = None
    with pytest.raises(grpc.RpcError, match="shard-0 is recovering"):
        await _top(gateway)
    waiting = asyncio.create_task(record(gateway, batch(1, [Play(song, NOW) for song in SONGS])))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    service.open(cluster.shards[0].owner)
    assert (await waiting).accepted == len(SONGS)
