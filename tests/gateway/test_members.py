"""A gateway while shards come and go: its links, its reads of the topology, and what it says of the cluster."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import grpc
import pytest

from tests.engine.engine_shard import NOW
from tests.gateway.cluster import SLOTS, Cluster, batch, record
from topk_grpc.errors import InvalidArgumentError, UnavailableError
from topk_grpc.gateway.link import Part
from topk_grpc.gateway.routing import RoutingWatch
from topk_grpc.migration.members import with_shard, without_shard
from topk_grpc.model import Play, ShardInfo, Topology
from topk_grpc.pb.topk.v1 import admin_service_pb2 as admin_pb
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.rpc.status import from_rpc_error
from topk_grpc.topology.change import change


async def test_links_follow_the_members_and_nothing_hangs_on_one_that_is_gone(cluster: Cluster) -> None:
    await cluster.begin()
    gateway = await cluster.gateway()
    await change(cluster.store, lambda now: with_shard(now, ShardInfo("shard-2", "127.0.0.1:1")), "a shard")
    await gateway.watch.refresh()
    part = Part(1, (b"",), 0, asyncio.get_running_loop().create_future(), "shard-2")
    await gateway.links["shard-2"].submit(part)
    await change(cluster.store, lambda now: without_shard(now, "shard-2"), "no shard")
    await gateway.watch.refresh()
    with pytest.raises(UnavailableError, match="shard-2 is gone"):
        await asyncio.wait_for(part.outcome, 10)
    with pytest.raises(UnavailableError, match="has left the cluster"):
        gateway.links["shard-2"]
    assert (await record(gateway, batch(1, [Play("a", NOW)]))).accepted == 1


class CountingStore:
    """Counts reads, which take their time."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.reads = 0

    async def read(self) -> Topology:
        self.reads += 1
        await asyncio.sleep(0.01)
        topology: Topology = await self._store.read()
        return topology

    async def watch(self) -> Any:
        await asyncio.Event().wait()
        yield  # never


async def test_those_who_wait_for_the_next_epoch_share_the_reads_and_hear_of_it_at_once(cluster: Cluster) -> None:
    await cluster.begin()
    store: Any = CountingStore(cluster.store)
    topology = await cluster.store.read()
    watch = RoutingWatch(store, topology, lambda _: None)
    try:
        assert (await watch.newer(topology.epoch - 1, 10)).topology == topology
        assert store.reads == 0
        waiting = [asyncio.create_task(watch.newer(topology.epoch, 20)) for _ in range(50)]
        async with asyncio.timeout(20):
            while store.reads < 4:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        assert store.reads < 50
        await cluster.store.compare_and_set(replace(topology, epoch=topology.epoch + 1))
        found = await asyncio.wait_for(asyncio.gather(*waiting), 10)
        assert {routing.topology.epoch for routing in found} == {topology.epoch + 1}
        assert (await watch.newer(topology.epoch + 1, 0.05)).topology.epoch == topology.epoch + 1
    finally:
        await watch.close()


async def test_what_is_asked_of_the_cluster_is_answered_by_the_topology(cluster: Cluster) -> None:
    await cluster.begin(shards=3)
    gateway = await cluster.gateway()
    added = await gateway.admin.AddShards(admin_pb.AddShardsRequest(shard_ids=["x"], count=2))
    assert list(added.shard_ids) == ["x", "shard-3", "shard-4"]
    drained = await gateway.admin.DrainShards(admin_pb.DrainShardsRequest(shard_ids=["shard-1"]))
    described = await gateway.stub.DescribeCluster(pb.DescribeClusterRequest())
    assert described.epoch == drained.epoch
    assert described.slots_left == drained.slots > 0
    states = {shard.shard_id: pb.ShardState.Name(shard.state) for shard in described.shards}
    assert states == {
        "shard-0": "SHARD_STATE_ACTIVE",
        "shard-1": "SHARD_STATE_DRAINING",
        "shard-2": "SHARD_STATE_ACTIVE",
        "shard-3": "SHARD_STATE_NEW",
        "shard-4": "SHARD_STATE_NEW",
        "x": "SHARD_STATE_NEW",
    }
    assert sum(shard.slots_wanted for shard in described.shards) == SLOTS
    assert described.skew.slots == pytest.approx(
        max(described.shards[0].slots, described.shards[2].slots)
        * 2
        / (described.shards[0].slots + described.shards[2].slots)
    )
    assert not described.controller
    plan = await gateway.admin.Rebalance(admin_pb.RebalanceRequest(dry_run=True))
    assert {move.source for move in plan.moves} == {"shard-1"}
    assert sum(move.slots for move in plan.moves) == plan.slots_min == drained.slots
    epoch = (await gateway.admin.PauseMoves(admin_pb.PauseMovesRequest())).epoch
    assert (await gateway.admin.PauseMoves(admin_pb.PauseMovesRequest())).epoch == epoch
    assert (await gateway.admin.ResumeMoves(admin_pb.ResumeMovesRequest())).epoch == epoch + 1
    kept = await gateway.admin.AddShards(admin_pb.AddShardsRequest(shard_ids=["shard-1"]))
    assert kept.epoch == epoch + 2
    described = await gateway.stub.DescribeCluster(pb.DescribeClusterRequest())
    assert described.shards[1].state == pb.SHARD_STATE_ACTIVE
    await gateway.admin.RemoveShard(admin_pb.RemoveShardRequest(shard_id="x"))
    for call, request in (
        ("AddShards", admin_pb.AddShardsRequest()),
        ("DrainShards", admin_pb.DrainShardsRequest()),
        ("RemoveShard", admin_pb.RemoveShardRequest(shard_id="x")),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await getattr(gateway.admin, call)(request)
        assert isinstance(from_rpc_error(refused.value), InvalidArgumentError)
