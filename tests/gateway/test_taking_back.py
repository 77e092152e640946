"""Corrections and deleted songs through gateways to real shards, also while slots and shards move."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from tests.engine.engine_shard import NOW
from tests.gateway.cluster import SLOTS, Cluster, Gateway, batch, record, rejects
from tests.oracle import slot_of
from topk_grpc.errors import InvalidArgumentError, TopKError, UnavailableError
from topk_grpc.model import Play
from topk_grpc.pb.topk.v1 import admin_service_pb2
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.pb.topk.v1.query_pb2 import GlobalWindow, Window
from topk_grpc.rpc.status import from_rpc_error


async def delete(gateway: Gateway, song_id: str) -> tuple[int, int]:
    """Plays and charts that it had."""
    request = admin_service_pb2.ClusterAdminServiceDeleteSongRequest(song_id=song_id)
    answer = await gateway.admin.DeleteSong(request)
    return answer.plays, answer.charts


async def refusal(gateway: Gateway, song_id: str) -> TopKError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await delete(gateway, song_id)
    return from_rpc_error(raised.value)


async def listed(gateway: Gateway, chart: str = "") -> list[tuple[str, int]]:
    window = Window(**{"global": GlobalWindow()})  # type: ignore[arg-type]
    answer = await gateway.stub.GetTopK(pb.GetTopKRequest(window=window, k=100, chart=chart))
    return [(entry.song_id, entry.count) for entry in answer.entries]


async def test_corrections_take_back_from_every_shard_and_are_acknowledged_like_plays(cluster: Cluster) -> None:
    await cluster.begin(shards=3)
    gateway, other = await cluster.gateway(), await cluster.gateway()
    songs = [song for shard in range(3) for song in await cluster.songs_of(shard, 4)]
    await record(gateway, batch(1, [Play(song, NOW, 3, ("x",)) for song in songs]))
    back = [Play(song, NOW, -2, ("x",)) for song in songs] * 2 + [Play(song, NOW, 4) for song in songs[:2]]
    again = [Play(song, NOW, -1) for song in songs]
    response = await record(other, batch(2, back + again))
    # One of each two, and after those also one that names no chart. Plays of the batch come first.
    refused = dict.fromkeys(range(len(songs), 2 * len(songs)), "NEGATIVE_BUCKET")
    assert rejects(response) == refused
    assert response.accepted == len(back + again) - len(refused)
    for each in (gateway, other):
        resent = await record(each, batch(2, back + again))
        assert (resent.duplicate, rejects(resent), resent.accepted) == (True, refused, response.accepted)
    assert sorted(await listed(gateway)) == sorted((song, 4) for song in songs[:2])
    assert await listed(gateway, "x") == sorted((song, 1) for song in songs)


async def test_a_deleted_song_is_gone_everywhere_and_its_old_batches_stay_counted(cluster: Cluster) -> None:
    await cluster.begin(shards=2)
    gateway, other = await cluster.gateway(), await cluster.gateway()
    (mine,) = await cluster.songs_of(0, 1)
    (others,) = await cluster.songs_of(1, 1)
    plays = [Play(mine, NOW, 2, ("x", "y")), Play(mine, NOW - 10_000_000, 3), Play(others, NOW, 1, ("x",))]
    await record(gateway, batch(1, plays))
    assert await delete(other, mine) == (5, 2)
    for each in (gateway, other):
        assert await listed(each) == await listed(each, "x") == [(others, 1)]
        assert await listed(each, "y") == []
        assert (await record(each, batch(1, plays))).duplicate
        assert await delete(each, mine) == (0, 0)
    assert await listed(gateway) == [(others, 1)]
    await record(gateway, batch(2, [Play(mine, NOW, 2)]))
    assert await listed(other) == [(mine, 2), (others, 1)]


async def test_what_is_no_song_is_refused(cluster: Cluster) -> None:
    await cluster.begin()
    gateway = await cluster.gateway()
    for song_id in ("", "x" * 129, "é" * 65):
        assert isinstance(await refusal(gateway, song_id), InvalidArgumentError)
    assert await delete(gateway, "é" * 64) == (0, 0)


async def test_a_song_that_moves_is_deleted_where_it_lives(cluster: Cluster) -> None:
    await cluster.begin(shards=2)
    gateway = await cluster.gateway()
    (song,) = await cluster.songs_of(0, 1)
    slot = slot_of(song, SLOTS)
    cluster.shards[0].core.state.owned[slot] = 0
    cluster.shards[1].core.state.own([slot])
    line = cluster.shards[0].line
    before = line.requests_bytes
    deletion = asyncio.create_task(delete(gateway, song))
    async with asyncio.timeout(20):
        while line.requests_bytes == before:  # noqa: ASYNC110  # it asks the wrong shard first
            await asyncio.sleep(0.005)
    owners = list((await cluster.store.read()).owners)
    owners[slot] = 1
    assert not deletion.done()
    await cluster.change_owners(owners)
    await record(gateway, batch(1, [Play(song, NOW, 2)]))
    assert await deletion in ((0, 0), (2, 0))
    await delete(gateway, song)
    assert cluster.counted([song]) == [0]


async def test_a_deletion_waits_for_a_shard_that_starts_and_gives_up_in_time(cluster: Cluster) -> None:
    await cluster.begin(shards=2)
    gateway, hasty = await cluster.gateway(), await cluster.gateway(record_seconds=0.5)
    (song,) = await cluster.songs_of(1, 1)
    await record(gateway, batch(1, [Play(song, NOW, 2, ("x",))]))
    await cluster.shards[1].kill()
    failure = await refusal(hasty, song)
    assert isinstance(failure, UnavailableError)
    assert "ask again" in str(failure)
    deletion = asyncio.create_task(delete(gateway, song))
    await cluster.shards[1].start()
    assert await deletion == (2, 1)
    await cluster.shards[1].kill()
    await cluster.shards[1].start()
    assert cluster.counted([song]) == cluster.counted([song], "x") == [0]
