"""Exactly once, whatever a server does: the real client over a real connection to a model of a gateway."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.client.model_server import Cluster, ModelServer, Script
from topk_grpc import (
    DeadlineError,
    DuplicateBatchError,
    InvalidArgumentError,
    ProducerExpiredError,
    TopKClient,
    TopKError,
    UnavailableError,
)
from topk_grpc.errors import NotReadyError, ResourceExhaustedError

CODES_TO_RETRY = [
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
]


def no_wait() -> float:
    return 0.0


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  # the client's counts are no events
            await asyncio.sleep(0.002)


async def play(client: TopKClient, plays: int, songs: int = 5) -> Counter[str]:
    tally: Counter[str] = Counter()
    for index in range(plays):
        song = f"song {index % songs}"
        await client.record(song, 1_000 + index, count=1 + index % 2)
        tally[song] += 1 + index % 2
    return tally


scripts = st.lists(
    st.builds(
        Script,
        batches=st.integers(0, 12),
        unacknowledged=st.integers(0, 6),
        lost=st.integers(0, 6),
        hold=st.integers(0, 8),
        ending=st.sampled_from(
            [grpc.StatusCode.OK, grpc.StatusCode.OK, "restart", NotReadyError("x"), *CODES_TO_RETRY]
        ),
    ),
    max_size=6,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schedule=scripts, batch_plays=st.integers(1, 9), in_flight=st.integers(1, 63), plays=st.integers(1, 200))
async def test_flush_means_every_play_counted_exactly_once(
    schedule: list[Script], batch_plays: int, in_flight: int, plays: int
) -> None:
    async with ModelServer(schedule) as server:
        # A server that restarts is found again within gRPC's own backoff, 0.1 s at first.
        client = TopKClient(
            server.targets, batch_plays=batch_plays, batches_in_flight=in_flight, random=lambda: 0.01, linger_ms=1
        )
        async with client:
            tally = await play(client, plays)
            await client.flush()
            assert server.cluster.counts() == tally
            assert client.stats.plays_accepted == plays
        assert server.cluster.counts() == tally
        assert client.stats.batches_acknowledged == len(server.cluster.batch_sizes)
        assert max(server.cluster.batch_sizes) <= batch_plays


@pytest.mark.parametrize("code", [grpc.StatusCode.OK, *CODES_TO_RETRY])
async def test_client_resends_in_order_after_every_retriable_end(code: grpc.StatusCode) -> None:
    async with ModelServer([Script(batches=3, unacknowledged=2, lost=1, ending=code)]) as server:
        async with TopKClient(server.targets, batch_plays=2, random=no_wait) as client:
            tally = await play(client, 20)
        assert server.cluster.counts() == tally
        assert server.streams == 2
        assert client.stats.reconnects == 1
        assert client.stats.batches_resent >= 3
        assert client.stats.batches_duplicate == 2  # counted but not acknowledged: expected, and no error


async def test_client_waits_as_long_as_retry_info_asks() -> None:
    refusal = ResourceExhaustedError("full")  # the table gives it one second
    async with ModelServer([Script(batches=0, ending=refusal)]) as server:
        start = time.monotonic()
        async with TopKClient(server.targets, random=no_wait) as client:
            await client.record("a", 1)
        assert time.monotonic() - start >= 1.0
        assert server.cluster.counts() == {"a": 1}


async def test_client_follows_a_server_to_another_address() -> None:
    async with ModelServer() as server, TopKClient(server.targets, batch_plays=3, random=no_wait) as client:
        tally = await play(client, 30)
        await client.flush()
        await server.restart()
        tally += await play(client, 30)
        await client.flush()
        assert server.cluster.counts() == tally


async def test_client_outlives_a_time_without_any_server() -> None:
    async with ModelServer() as server:
        await server.stop()
        async with TopKClient(server.targets, batch_plays=3, random=no_wait, linger_ms=0) as client:
            tally = await play(client, 30)
            await eventually(lambda: client.stats.reconnects >= 3)
            await server.start()
            await client.flush()
        assert server.cluster.counts() == tally


async def test_an_idle_client_does_not_reconnect_until_there_is_something_to_send() -> None:
    async with ModelServer([Script(batches=1)]) as server, TopKClient(server.targets, random=no_wait) as client:
        await client.record("a", 1)
        await client.flush()
        await asyncio.sleep(0.1)
        assert server.streams == 1
        await client.record("a", 1)
        await client.flush()
        assert server.streams == 2
        assert server.cluster.counts() == {"a": 2}


async def test_first_send_answered_duplicate_stops_the_producer() -> None:
    cluster = Cluster()
    async with ModelServer(cluster=cluster) as server:
        async with TopKClient(server.targets, producer_id="shared") as first:
            await first.record("a", 1)
        second = TopKClient(server.targets, producer_id="shared")
        await second.record("b", 1)
        with pytest.raises(DuplicateBatchError, match="another process uses this producer_id"):
            await second.flush()
        with pytest.raises(DuplicateBatchError):
            await second.record("b", 1)
        with pytest.raises(DuplicateBatchError):
            await second.close()
        assert cluster.counts() == {"a": 1}
        assert len(server.violations) == 1  # other bytes under the same number: the misuse that this test is about
        server.violations.clear()


async def test_a_replayed_source_may_expect_duplicates() -> None:
    cluster = Cluster()
    async with ModelServer(cluster=cluster) as server:
        for _ in range(2):
            async with TopKClient(
                server.targets, producer_id="file", expect_duplicates=True, first_sent_ms=0
            ) as client:
                await client.record("a", 1)
        assert client.stats.batches_duplicate == 1
        assert cluster.counts() == {"a": 1}
        assert cluster.first_sent_ms == [0]


async def test_a_kept_producer_goes_on_from_its_sequence() -> None:
    cluster = Cluster()
    async with ModelServer(cluster=cluster) as server:
        for sequence in (1, 2):
            async with TopKClient(server.targets, producer_id="kept", first_sequence=sequence) as client:
                await client.record("a", 1)
        assert cluster.counts() == {"a": 2}


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        (InvalidArgumentError("too many plays in a batch"), InvalidArgumentError),
        (ProducerExpiredError("forgotten"), ProducerExpiredError),
        (TopKError("internal error 1234: look for it in the server's log"), TopKError),
        (grpc.StatusCode.NOT_FOUND, TopKError),
        (grpc.StatusCode.UNIMPLEMENTED, TopKError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ResourceExhaustedError),
    ],
)
async def test_a_status_that_would_come_again_stops_the_producer(
    ending: TopKError | grpc.StatusCode, expected: type[TopKError]
) -> None:
    async with ModelServer([Script(batches=1, unacknowledged=1, ending=ending)]) as server:
        client = TopKClient(server.targets, batch_plays=1, batches_in_flight=2)
        with pytest.raises(expected) as raised:  # it surfaces at any of them
            for _ in range(10):
                await client.record("a", 1)
            await client.flush()
        assert type(raised.value) is expected
        with pytest.raises(expected):
            await client.record("a", 1)
        with pytest.raises(expected):
            await client.flush()
        with pytest.raises(expected):
            await client.close()
        assert server.streams == 1


async def test_record_waits_for_room_and_memory_stays_bounded() -> None:
    async with ModelServer([Script(ending="hang", batches=0)]) as server:
        client = TopKClient(server.targets, batch_plays=2, batches_in_flight=3, deadline_seconds=1.5, linger_ms=0)
        for _ in range(8):  # 3 batches in flight and one in the buffer
            await client.record("a", 1)
        with pytest.raises(UnavailableError, match="no room"):
            await client.record("a", 1)
        assert client.stats.plays_sent == 6
        # The silent stream was given up after the same time, the next one answers.
        await client.record("a", 1)
        await client.close()
        assert server.cluster.counts() == {"a": 9}


async def test_a_silent_stream_is_replaced() -> None:
    async with ModelServer([Script(batches=1, unacknowledged=1, ending="hang")]) as server:
        async with TopKClient(server.targets, deadline_seconds=0.4, random=no_wait) as client:
            await client.record("a", 1)
            with pytest.raises(DeadlineError, match="1 batches from 1 on are unacknowledged"):
                await client.flush()
            await client.flush()
        assert server.cluster.counts() == {"a": 1}
        assert client.stats.batches_duplicate == 1


async def test_flush_without_a_server_says_what_is_wrong() -> None:
    async with ModelServer() as server:
        await server.stop()
    client = TopKClient(server.targets[0], deadline_seconds=0.3)
    await client.record("a", 1)
    with pytest.raises(UnavailableError, match=r"Connection refused|[Ff]ailed to connect"):
        await client.flush()
    with pytest.raises(UnavailableError):
        await client.close()


async def test_flush_waits_only_for_what_was_recorded_before() -> None:
    async with ModelServer() as server, TopKClient(server.targets, batch_plays=1, random=no_wait) as client:
        stop = asyncio.Event()

        async def go_on() -> None:
            while not stop.is_set():
                await client.record("b", 1)
                await asyncio.sleep(0)

        task = asyncio.create_task(go_on())
        await client.record("a", 1)
        await client.flush()
        assert server.cluster.counts()["a"] == 1
        stop.set()
        await task


async def test_many_tasks_share_one_client() -> None:
    async with ModelServer([Script(batches=5, lost=2, ending=grpc.StatusCode.ABORTED)]) as server:
        async with TopKClient(server.targets, batch_plays=3, batches_in_flight=2, random=no_wait) as client:
            tallies = await asyncio.gather(*(play(client, 25) for _ in range(20)))
        assert server.cluster.counts() == sum(tallies, Counter())


async def test_stream_ends_politely_when_the_client_closes() -> None:
    ended = asyncio.Event()

    class Watching(ModelServer):
        async def StreamPlays(self, request_iterator: object, context: object) -> None:  # type: ignore[override]
            await super().StreamPlays(request_iterator, context)
            ended.set()  # not reached when the call is cancelled

    async with Watching() as server:
        async with TopKClient(server.targets) as client:
            await client.record("a", 1)
        async with asyncio.timeout(5):
            await ended.wait()
