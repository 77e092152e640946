"""Rates: streams wait, single calls are refused, nothing is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.cluster.processes import reason_of
from tests.engine.engine_shard import NOW
from tests.gateway.cluster import Cluster, batch, frozen_clock, stream_request
from topk_grpc.config import GatewaySettings
from topk_grpc.errors import RateLimitedError
from topk_grpc.gateway import rates
from topk_grpc.gateway.rates import RateLimits
from topk_grpc.model import Play
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.rpc.access import ANYBODY, Caller
from topk_grpc.rpc.status import retry_after_ms

TOKEN = Caller("importer", "ingest", 10.0)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def limits(clock: Clock, rate: float = 0.0, burst_seconds: float = 2.0) -> RateLimits:
    settings = GatewaySettings(topology="-", producer_plays_per_second=rate, rate_burst_seconds=burst_seconds)
    return RateLimits(settings, clock)


def test_a_burst_passes_and_then_the_rate_holds() -> None:
    clock = Clock()
    checked = limits(clock, rate=100)
    passed = 0
    for _ in range(3000):
        clock.now += 0.01
        try:
            checked.take(b"p", ANYBODY, 7)
            passed += 7
        except RateLimitedError:
            pass
    assert 100 * 30 <= passed <= 100 * 32 + 7


def test_a_batch_larger_than_a_burst_passes_and_is_paid_off() -> None:
    clock = Clock()
    checked = limits(clock, rate=100)
    checked.take(b"p", ANYBODY, 1200)
    with pytest.raises(RateLimitedError, match="the producer") as caught:
        checked.take(b"p", ANYBODY, 1)
    assert 10_000 <= caught.value.retry_after_ms <= 10_100
    checked.take(b"another", ANYBODY, 1)
    clock.now += caught.value.retry_after_ms / 1000
    checked.take(b"p", ANYBODY, 1)


def test_a_token_is_limited_whatever_producers_it_invents() -> None:
    clock = Clock()
    checked = limits(clock, rate=1e6)
    with pytest.raises(RateLimitedError, match="the token importer"):
        for number in range(100):
            checked.take(str(number).encode(), TOKEN, 1)
    checked.take(b"1", ANYBODY, 1)


def test_producers_are_remembered_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "PRODUCERS_MAX", 10)
    checked = limits(Clock(), rate=1)
    for number in range(100):
        checked.take(str(number).encode(), ANYBODY, 100)
    assert len(checked._producers) == 10
    with pytest.raises(RateLimitedError):
        checked.take(b"99", ANYBODY, 1)


async def test_a_stream_that_has_to_end_does_not_wait_for_its_rate() -> None:
    checked = limits(Clock(), rate=1)
    leave = asyncio.Event()
    assert await checked.wait(b"p", ANYBODY, 1000, leave)
    waiting = asyncio.create_task(checked.wait(b"p", ANYBODY, 1, leave))
    await asyncio.sleep(0.02)
    assert not waiting.done()
    leave.set()
    assert not await waiting


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    made = Cluster(tmp_path)
    with frozen_clock():
        try:
            yield made
        finally:
            await made.end()


async def test_a_stream_over_its_rate_is_slowed_down_and_loses_nothing(cluster: Cluster) -> None:
    await cluster.begin(shards=1)
    gateway = await cluster.gateway(producer_plays_per_second=100.0, rate_burst_seconds=0.1)

    async def requests() -> AsyncIterator[pb.StreamPlaysRequest]:
        for sequence in range(1, 12):
            yield stream_request(batch(sequence, [Play(f"song-{number}", NOW) for number in range(10)]))

    began = time.monotonic()
    call: Any = gateway.stub.StreamPlays(requests())
    acks = [ack async for ack in call]
    assert [ack.sequence for ack in acks] == list(range(1, 12))
    assert sum(ack.accepted for ack in acks) == 110
    assert 0.8 <= time.monotonic() - began < 20


async def test_a_single_batch_over_its_rate_is_refused_and_told_when_to_come_again(cluster: Cluster) -> None:
    await cluster.begin(shards=1)
    gateway = await cluster.gateway(producer_plays_per_second=50.0, rate_burst_seconds=0.1)
    first = pb.RecordPlaysRequest(batch=batch(1, [Play("song", NOW)] * 20))
    assert (await gateway.stub.RecordPlays(first)).accepted == 20
    second = pb.RecordPlaysRequest(batch=batch(2, [Play("song", NOW)]))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await gateway.stub.RecordPlays(second)
    assert (caught.value.code(), reason_of(caught.value)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED")
    wait_ms = retry_after_ms(caught.value)
    assert wait_ms is not None
    await asyncio.sleep(wait_ms / 1000)
    assert (await gateway.stub.RecordPlays(second)).accepted == 1
