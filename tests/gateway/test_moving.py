"""Queries while slots move: an answer holds every play of the slots that it covers, once, or names who is missing."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from tests.cluster.processes import GLOBAL
from tests.engine.engine_shard import NOW
from tests.gateway.cluster import Cluster, Gateway, batch, record
from topk_grpc.migration.records import Event, advance, begin
from topk_grpc.model import Play
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.shard.core import ShardCore
from topk_grpc.topology.change import change

SONGS = [f"song-{number}" for number in range(60)]


async def top_k(gateway: Gateway, *, partial: bool = False) -> pb.GetTopKResponse:
    answer: pb.GetTopKResponse = await gateway.stub.GetTopK(
        pb.GetTopKRequest(window=GLOBAL, k=100, allow_partial=partial)
    )
    return answer


class Move:
    """The slots of the first shard go to the second, step by step.

    Args:
        keep: so many stay.
    """

    def __init__(self, cluster: Cluster, gateway: Gateway, keep: int = 1) -> None:
        self._cluster, self._gateway, self._keep = cluster, gateway, keep
        self.source, self.target = (shard.owner for shard in cluster.shards[:2])

    async def begin(self) -> Move:
        await record(self._gateway, batch(1, [Play(song, NOW) for song in SONGS]))
        topology = await self._cluster.store.read()
        changed, migration = begin(topology, "shard-0", "shard-1", topology.slots_of("shard-0")[self._keep :])
        await self._cluster.store.compare_and_set(changed)
        self.number, self.slots = migration.migration_id, migration.slots
        await self.source.change(lambda core: core.freeze(self.number, self.slots, "shard-1"))
        return self

    async def export(self) -> bytes:
        return await self.source.change(lambda core: core.export(self.number))

    async def copy(self) -> None:
        image = await self.export()
        await self.target.change(lambda core: core.take_in(self.number, self.slots, "shard-0", image))

    async def decide(self, event: Event) -> None:
        await change(self._cluster.store, lambda found: advance(found, self.number, event), "the outcome")

    async def settle(self, *, committed: bool, at: str) -> None:
        def settle(core: ShardCore) -> bool:
            return core.settle(self.number, committed=committed)

        assert await (self.source if at == "source" else self.target).change(settle)


@pytest.mark.parametrize("first", ["source", "target"])
async def test_a_song_counts_once_whichever_shard_reads_the_outcome_first(cluster: Cluster, first: str) -> None:
    await cluster.begin(shards=2)
    gateway = await cluster.gateway()
    move = await Move(cluster, gateway).begin()
    frozen = await top_k(gateway)
    assert (frozen.certificate.complete, frozen.certificate.total_plays) == (True, len(SONGS))
    await move.copy()
    await move.decide(Event.COMMIT)
    await move.settle(committed=True, at=first)
    asked = asyncio.create_task(top_k(gateway))
    done, _ = await asyncio.wait([asked], timeout=0.5)
    assert not done, "one of the shards has not yet said whose the plays are"
    await move.settle(committed=True, at="target" if first == "source" else "source")
    answer = await asked
    assert {entry.song_id: entry.count for entry in answer.entries} == dict.fromkeys(SONGS, 1)
    assert (answer.certificate.complete, answer.certificate.total_plays) == (True, len(SONGS))


async def test_a_shard_that_has_given_all_away_is_not_counted_by_a_gateway_that_is_behind(cluster: Cluster) -> None:
    await cluster.begin(shards=2)
    gateway = await cluster.gateway()
    gateway.watch._task.cancel()
    move = await Move(cluster, gateway, keep=0).begin()
    await move.copy()
    await move.decide(Event.COMMIT)
    await move.settle(committed=True, at="target")
    assert gateway.watch.current.topology.slots_of("shard-0")
    answer = await top_k(gateway)
    assert (answer.certificate.complete, answer.certificate.total_plays) == (True, len(SONGS))


async def test_a_query_is_answered_again_after_an_abort(cluster: Cluster) -> None:
    await cluster.begin(shards=2)
    gateway = await cluster.gateway()
    move = await Move(cluster, gateway).begin()
    await move.export()
    asked = asyncio.create_task(top_k(gateway))
    done, _ = await asyncio.wait([asked], timeout=0.3)
    assert not done
    await move.decide(Event.ABORT)
    await move.settle(committed=False, at="source")
    assert (await asked).certificate.total_plays == len(SONGS)


async def test_a_shard_whose_slots_stay_undecided_is_named_as_missing(cluster: Cluster) -> None:
    await cluster.begin(shards=3)
    gateway = await cluster.gateway(query_seconds=1.0)
    move = await Move(cluster, gateway).begin()
    await move.export()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await top_k(gateway)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    answer = await top_k(gateway, partial=True)
    assert list(answer.certificate.missing_shards) == ["shard-0"]
    there = [song for shard in cluster.shards[1:] for song in SONGS if shard.counted([song]) == [1]]
    assert {entry.song_id for entry in answer.entries} == set(there)
    assert answer.certificate.total_plays == len(there) < len(SONGS)


async def test_a_partial_answer_lacks_nothing_that_it_does_not_name(cluster: Cluster) -> None:
    """One shard is down while slots of another move: they are waited for, and not left out without a word."""
    await cluster.begin(shards=3)
    gateway = await cluster.gateway(query_seconds=10)
    move = await Move(cluster, gateway).begin()
    await move.copy()
    await move.decide(Event.COMMIT)
    await cluster.shards[2].kill()
    lost = sum(cluster.shards[2].counted(SONGS))
    asked = asyncio.create_task(top_k(gateway, partial=True))
    done, _ = await asyncio.wait([asked], timeout=0.5)
    assert not done
    for shard in ("target", "source"):
        await move.settle(committed=True, at=shard)
    answer = await asked
    assert list(answer.certificate.missing_shards) == ["shard-2"]
    assert answer.certificate.total_plays == len(SONGS) - lost


async def test_an_answer_of_no_slots_is_not_merged(cluster: Cluster) -> None:
    """A shard that gives slots away has their plays among all others: what it says is of no use beside the target's."""
    await cluster.begin(shards=3)
    gateway = await cluster.gateway(query_seconds=1.0)
    move = await Move(cluster, gateway).begin()
    await move.copy()
    await move.decide(Event.COMMIT)
    await move.settle(committed=True, at="target")
    answer = await top_k(gateway, partial=True)
    assert list(answer.certificate.missing_shards) == ["shard-0"]
    assert answer.certificate.total_plays == sum(sum(shard.counted(SONGS)) for shard in cluster.shards[1:])
    assert gateway.watch.current.topology.slots_of("shard-0")  # it owns one still, which is missing
