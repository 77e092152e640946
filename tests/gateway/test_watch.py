"""Watches through a gateway over real shards: exact, resumable, one evaluation a query, bounded, and drained."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
import pytest

from tests.engine.engine_shard import NOW
from tests.gateway.cluster import Cluster, Gateway, batch, record
from topk_grpc.changes import apply, diff
from topk_grpc.errors import InvalidArgumentError, ResourceExhaustedError, TopKError, UnavailableError, WindowError
from topk_grpc.gateway.watch import WatchHub, watch_query_from_pb
from topk_grpc.model import (
    Answer,
    Entry,
    GlobalWindow,
    Play,
    RangeWindow,
    SessionWindow,
    SlidingWindow,
    TumblingWindow,
    Window,
)
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.pb.topk.v1 import topk_service_pb2_grpc as pb_grpc
from topk_grpc.rpc import convert, steps
from topk_grpc.rpc.status import from_rpc_error

QUICK = {"watch_interval_seconds": 0.02}
ALL = GlobalWindow()
SLIDING = SlidingWindow(600_000)


def request(window: Window = ALL, k: int = 10, **more: Any) -> pb.WatchTopKRequest:
    return pb.WatchTopKRequest(window=convert.window_to_pb(window), k=k, **more)


def plays(seed: int, many: int = 50) -> list[Play]:
    chance = random.Random(seed)
    return [
        Play(
            f"song-{chance.randrange(40)}", NOW - chance.randrange(900_000), chance.randrange(1, 5), ("US",)[: seed % 2]
        )
        for _ in range(many)
    ]


class Follower:
    """Rebuilds the list out of the steps of one stream after the other, as a client has to."""

    def __init__(self, gateway: Gateway, asked: pb.WatchTopKRequest) -> None:
        self.gateway, self.asked = gateway, asked
        self.entries: tuple[Entry, ...] = ()
        self.number = -1
        self.steps: list[pb.WatchTopKResponse] = []
        self.call: Any = None

    def connect(self, gateway: Gateway | None = None) -> None:
        self.cut()
        self.call = (gateway or self.gateway).stub.WatchTopK(self.asked)

    def cut(self) -> None:
        if self.call is not None:
            self.call.cancel()

    async def step(self) -> pb.WatchTopKResponse:
        if self.call is None:
            self.connect()
        message = await asyncio.wait_for(self.call.read(), 20)
        assert isinstance(message, pb.WatchTopKResponse)
        self.take(message)
        return message

    def take(self, message: pb.WatchTopKResponse) -> None:
        total = message.certificate.total_plays
        if message.WhichOneof("step") == "snapshot":
            assert message.snapshot.reset == bool(self.asked.resume_token)
            self.entries = steps.entries_from_snapshot(message.snapshot)
        else:
            assert message.changes.previous_number == self.number
            assert message.number >= self.number
            self.entries = apply(self.entries, steps.changes_from_pb(message.changes), total)
        self.number = message.number
        self.asked.resume_token = message.resume_token
        self.steps.append(message)

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self.step()


async def error_of(call: Any) -> TopKError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while isinstance(await asyncio.wait_for(call.read(), 20), pb.WatchTopKResponse):
            pass
        assert await call.code() is None
    return from_rpc_error(caught.value)


async def present(gateway: Gateway, asked: pb.WatchTopKRequest) -> Answer:
    response = await gateway.stub.GetTopK(pb.GetTopKRequest(window=asked.window, k=asked.k, chart=asked.chart))
    return convert.answer_from_pb(response)


def counting(gateway: Gateway) -> list[str]:
    """Notes each evaluation of the gateway's queries."""
    asked: list[str] = []
    original = gateway.queries.top_k

    async def top_k(window: Window, *arguments: Any, **more: Any) -> Answer:
        asked.append(str(window))
        return await original(window, *arguments, **more)

    gateway.queries.top_k = top_k  # type: ignore[method-assign]
    return asked


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


# --- Exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "chart"),
    [
        (GlobalWindow(), ""),
        (GlobalWindow(), "US"),
        (TumblingWindow(600_000), ""),
        (SLIDING, "US"),
        (SlidingWindow(600_000, 60_000), ""),
        (SessionWindow(60_000), ""),
        (RangeWindow(NOW // 1000 * 1000 - 500_000, NOW // 1000 * 1000 - 100_000), ""),
    ],
)
async def test_a_watch_cut_and_resumed_at_random_numbers_rebuilds_the_list(
    cluster: Cluster, window: Window, chart: str
) -> None:
    await cluster.begin(2)
    gateway = await cluster.gateway(**QUICK)
    chance = random.Random(str(window) + chart)
    follower = Follower(gateway, request(window, 7, chart=chart))
    loaded = asyncio.Event()

    async def load() -> None:
        for sequence in range(1, 60):
            await record(gateway, batch(sequence, plays(sequence)))
        loaded.set()

    loading = asyncio.create_task(load())
    tokens: list[tuple[str, int, tuple[Entry, ...]]] = []
    while not loaded.is_set():
        step = await follower.step()
        tokens.append((step.resume_token, follower.number, follower.entries))
        if chance.random() < 0.5:
            # Back to any list seen so far, the last one or one long gone.
            follower.asked.resume_token, follower.number, follower.entries = chance.choice([tokens[-1], *tokens])
            follower.connect()
    await loading
    answer = await present(gateway, follower.asked)
    await follower.until(lambda: follower.entries == answer.entries)
    last = follower.steps[-1]
    assert steps.bounds_from_step(last) == answer.bounds
    assert convert.certificate_from_pb(last.certificate).total_plays == answer.certificate.total_plays
    assert not any(step.snapshot.reset for step in follower.steps if step.HasField("snapshot"))
    follower.cut()


async def test_a_window_moves_with_the_clock_without_plays(cluster: Cluster) -> None:
    await cluster.begin(1)
    gateway = await cluster.gateway(**QUICK)
    now = NOW
    gateway.queries._clock = lambda: now
    await record(gateway, batch(1, [Play("a", NOW), Play("b", NOW - 5000, 2)]))
    follower = Follower(gateway, request(SlidingWindow(10_000)))
    await follower.step()
    assert [entry.song_id for entry in follower.entries] == ["b", "a"]
    now += 6000
    await follower.until(lambda: [entry.song_id for entry in follower.entries] == ["a"])
    now += 6000
    await follower.until(lambda: not follower.entries)
    assert follower.steps[-1].changes.changes[0].kind == pb.CHANGE_KIND_LEFT
    follower.cut()


async def test_plays_beyond_the_list_change_its_totals(cluster: Cluster) -> None:
    await cluster.begin(2)
    gateway = await cluster.gateway(**QUICK)
    await record(gateway, batch(1, [Play("a", NOW, 5)]))
    follower = Follower(gateway, request(k=1))
    await follower.step()
    await record(gateway, batch(2, [Play("b", NOW, 3)]))
    step = await follower.step()
    assert (list(step.changes.changes), step.certificate.total_plays, step.certificate.other_plays) == ([], 8, 3)
    assert follower.entries == (Entry(1, "a", 5, 5 / 8),)
    follower.cut()


async def test_latest_takes_the_window_at_the_newest_play(cluster: Cluster) -> None:
    await cluster.begin(2)
    gateway = await cluster.gateway(**QUICK)
    await record(gateway, batch(1, [Play("old", NOW - 86_400_000)]))
    follower = Follower(gateway, request(SlidingWindow(10_000), latest=True))
    await follower.step()
    assert [entry.song_id for entry in follower.entries] == ["old"]
    follower.cut()


# --- Tokens -----------------------------------------------------------------------------------------------------------


async def test_resuming_where_nothing_changed_says_so(cluster: Cluster) -> None:
    await cluster.begin(1)
    gateway = await cluster.gateway(**QUICK)
    await record(gateway, batch(1, plays(1)))
    follower = Follower(gateway, request())
    await follower.step()
    follower.connect()
    step = await follower.step()
    assert step.WhichOneof("step") == "changes"
    assert (list(step.changes.changes), step.number, step.changes.previous_number) == ([], 1, 1)
    follower.cut()


async def test_unknown_tokens_get_the_list_with_reset(cluster: Cluster) -> None:
    await cluster.begin(1)
    gateway, other = await cluster.gateway(**QUICK), await cluster.gateway(**QUICK)
    await record(gateway, batch(1, plays(1)))
    follower = Follower(gateway, request())
    first = await follower.step()
    assert not first.snapshot.reset
    own = first.resume_token
    another_query = Follower(gateway, request(k=3))
    await another_query.step()
    for token in (another_query.asked.resume_token, "nonsense", "-", f"{own}9", f"{own[:-1]}{'9' * 5000}", "é-1"):
        follower.asked.resume_token = token
        follower.connect()
        step = await follower.step()
        assert step.snapshot.reset
        assert step.resume_token == own
        assert len(step.snapshot.entries) == 10
    follower.connect(other)
    assert (await follower.step()).snapshot.reset
    follower.cut()
    another_query.cut()


async def test_versions_are_forgotten_some_time_after_the_last_watcher(cluster: Cluster) -> None:
    await cluster.begin(1)
    gateway = await cluster.gateway(**QUICK, watch_linger_seconds=0.05)
    follower = Follower(gateway, request())
    await follower.step()
    follower.cut()
    await wait_until(lambda: not gateway.service._hub._evaluations)
    follower.connect()
    assert (await follower.step()).snapshot.reset
    follower.cut()


async def test_a_version_beyond_the_history_is_reset(cluster: Cluster) -> None:
    await cluster.begin(1)
    gateway = await cluster.gateway(**QUICK, watch_history_entries_max=4)
    follower = Follower(gateway, request())
    first = await follower.step()
    for sequence in range(1, 5):
        await record(gateway, batch(sequence, [Play(f"s{sequence}", NOW, sequence)]))
        await follower.until(lambda: len(follower.entries) == sequence)  # noqa: B023
    follower.asked.resume_token = first.resume_token
    follower.connect()
    assert (await follower.step()).snapshot.reset
    follower.cut()


# --- One evaluation a query -------------------------------------------------------------------------------------------


async def test_many_watchers_share_one_evaluation(cluster: Cluster) -> None:
    await cluster.begin(1)
    gateway = await cluster.gateway(watch_interval_seconds=0.2)
    asked = counting(gateway)
    followers = [Follower(gateway, request()) for _ in range(50)]
    await asyncio.gather(*(follower.step() for follower in followers))
    assert len(asked) <= 12  # some for those that came while one was under way
    asked.clear()
    await record(gateway, batch(1, plays(1)))
    await asyncio.gather(*(follower.step() for follower in followers))
    assert 1 <= len(asked) <= 3
    assert len({follower.entries for follower in followers}) == 1
    one_more = Follower(gateway, request(SLIDING))
    await one_more.step()
    assert set(asked) == {"global", "sliding:10m"}
    for follower in [*followers, one_more]:
        follower.cut()
    await wait_until(lambda: not gateway.service._hub._watchers)
    before = len(asked)
    await asyncio.sleep(0.5)  # more than two intervals
    assert len(asked) == before


async def test_the_first_list_holds_what_was_acknowledged_before(cluster: Cluster) -> None:
    await cluster.begin(1)
    gateway = await cluster.gateway(watch_interval_seconds=1)
    followers = [Follower(gateway, request())]
    await followers[0].step()
    loop = asyncio.get_running_loop()
    began = loop.time()
    for sequence in range(1, 6):
        await record(gateway, batch(sequence, [Play("a", NOW)]))
        followers.append(Follower(gateway, request()))
        assert (await followers[-1].step()).certificate.total_plays == sequence
    assert loop.time() - began < 4  # none waited for the interval
    for follower in followers:
        follower.cut()


async def test_slow_readers_pass_over_versions(cluster: Cluster) -> None:
    await cluster.begin(1)
    gateway = await cluster.gateway(**QUICK)
    hub = gateway.service._hub
    query = watch_query_from_pb(request(k=40))
    fast = Follower(gateway, request(k=40))
    async with aclosing(hub.follow(query, "")) as slow:
        first = await anext(slow)
        for sequence in range(1, 6):
            await record(gateway, batch(sequence, plays(sequence)))
            total = (await present(gateway, fast.asked)).certificate.total_plays
            await fast.until(lambda: any(step.certificate.total_plays == total for step in fast.steps))  # noqa: B023
        second = await anext(slow)
        assert first.number + 5 <= second.number == fast.number
        assert second.changes.previous_number == first.number
        assert steps.changes_from_pb(second.changes) == diff((), fast.entries)
    fast.cut()


async def test_a_reader_that_stops_reading_holds_nothing_up(cluster: Cluster) -> None:
    await cluster.begin(1)
    gateway = await cluster.gateway(**QUICK)
    many = [Play(f"{number:04d}" + "x" * 120, NOW, 1) for number in range(1000)]
    await record(gateway, batch(1, many))
    fast, slow = Follower(gateway, request(k=1000)), Follower(gateway, request(k=1000))
    # A connection that takes little ahead of its reader, as a far one does.
    channel = grpc.aio.insecure_channel(
        gateway.address, options=[("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]
    )
    slow.call = pb_grpc.TopKServiceStub(channel).WatchTopK(slow.asked)
    await asyncio.gather(fast.step(), slow.step())
    for sequence in range(2, 30):
        await record(gateway, batch(sequence, many))
        await fast.until(lambda: fast.entries[0].count == sequence)  # noqa: B023
    await slow.until(lambda: slow.number == fast.number)
    assert slow.entries == fast.entries
    assert len(slow.steps) < len(fast.steps)  # the connection holds some, and the rest were passed over
    fast.cut()
    await channel.close()


# --- Limits and refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "kind", "said"),
    [
        (request(k=0), InvalidArgumentError, "1 to 1000"),
        (request(k=1001), InvalidArgumentError, "1 to 1000"),
        (pb.WatchTopKRequest(k=1), InvalidArgumentError, "no window"),
        (request(latest=True), WindowError, "global"),
        (request(TumblingWindow(1500)), WindowError, "resolution"),
    ],
)
async def test_what_cannot_be_watched_is_refused_at_once(
    cluster: Cluster, asked: pb.WatchTopKRequest, kind: type[TopKError], said: str
) -> None:
    await cluster.begin(1)
    gateway = await cluster.gateway(**QUICK)
    error = await error_of(gateway.stub.WatchTopK(asked))
    assert type(error) is kind
    assert said in str(error)
    assert not gateway.service._hub._evaluations


async def test_streams_and_queries_have_bounds(cluster: Cluster) -> None:
    await cluster.begin(1)
    gateway = await cluster.gateway(**QUICK, watches_max=3, watch_queries_max=2)
    followers = [Follower(gateway, request(k=k)) for k in (1, 2)]
    for follower in followers:
        await follower.step()
    error = await error_of(gateway.stub.WatchTopK(request(k=3)))
    assert isinstance(error, ResourceExhaustedError)
    assert "--watch-queries-max" in str(error)
    third = Follower(gateway, request(k=1))
    await third.step()
    error = await error_of(gateway.stub.WatchTopK(request(k=1)))
    assert isinstance(error, ResourceExhaustedError)
    assert "--watches-max" in str(error)
    # A query that nobody watches any more makes room, however long it would linger.
    followers[1].cut()
    await wait_until(lambda: len(gateway.service._hub._watchers) == 2)
    followers[1] = Follower(gateway, request(k=3))
    await followers[1].step()
    for follower in [*followers, third]:
        follower.cut()


# --- Ends -------------------------------------------------------------------------------------------------------------


async def test_a_shard_that_is_away_ends_the_watch_and_the_token_lives_on(cluster: Cluster) -> None:
    await cluster.begin(2)
    gateway = await cluster.gateway(**QUICK, query_seconds=0.5)
    await record(gateway, batch(1, plays(1)))
    follower, partial = Follower(gateway, request()), Follower(gateway, request(allow_partial=True))
    await follower.step()
    await partial.step()
    await cluster.shards[0].kill()
    assert isinstance(await error_of(follower.call), UnavailableError)
    await partial.until(lambda: not partial.steps[-1].certificate.complete)
    assert list(partial.steps[-1].certificate.missing_shards) == ["shard-0"]
    assert isinstance(await error_of(gateway.stub.WatchTopK(follower.asked)), UnavailableError)
    await cluster.shards[0].start()
    await partial.until(lambda: partial.steps[-1].certificate.complete)
    follower.connect()
    step = await follower.step()
    assert step.WhichOneof("step") == "changes"
    assert follower.entries == partial.entries
    follower.cut()
    partial.cut()


async def test_a_draining_gateway_and_an_old_stream_end_with_ok(cluster: Cluster) -> None:
    await cluster.begin(1)
    old = await cluster.gateway(**QUICK, stream_age_seconds=1)
    call = old.stub.WatchTopK(request())
    assert isinstance(await call.read(), pb.WatchTopKResponse)
    assert await asyncio.wait_for(call.read(), 20) is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK
    gateway = await cluster.gateway(**QUICK)
    calls = [gateway.stub.WatchTopK(request()) for _ in range(3)]
    for call in calls:
        assert isinstance(await call.read(), pb.WatchTopKResponse)
    gateway.drain.set()
    for call in [*calls, gateway.stub.WatchTopK(request())]:
        assert await asyncio.wait_for(call.read(), 20) is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK


class Scripted:
    """Queries that answer as they are told."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.asked = 0

    async def top_k(self, *_: Any, **__: Any) -> Answer:
        self.asked += 1
        await asyncio.sleep(0)
        if self.failure is not None:
            raise self.failure
        raise AssertionError("unexpected")


@asynccontextmanager
async def hub_of(gateway: Gateway, queries: Any) -> AsyncIterator[WatchHub]:
    hub = WatchHub(gateway.settings, queries, asyncio.Event())
    yield hub
    await hub.close()


async def test_an_unexpected_error_reaches_every_watcher(cluster: Cluster) -> None:
    await cluster.begin(1)
    gateway = await cluster.gateway(**QUICK)
    queries = Scripted()
    queries.failure = RuntimeError("a defect")
    async with hub_of(gateway, queries) as hub:
        following = [hub.follow(watch_query_from_pb(request()), "") for _ in range(3)]
        for outcome in await asyncio.gather(*(anext(each) for each in following), return_exceptions=True):
            assert isinstance(outcome, RuntimeError)
        assert queries.asked == 1
        assert not hub._watchers
