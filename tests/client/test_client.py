"""The client's face: batches, rejects, queries, and what it refuses itself."""

from __future__ import annotations

import asyncio
import socket
import time
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

import topk_grpc
from tests.client.model_server import ModelServer, Script
from topk_grpc import (
    Bounds,
    DeadlineError,
    Entry,
    InvalidArgumentError,
    Play,
    Rejected,
    RejectedPlaysError,
    TopKClient,
    TumblingWindow,
    UnavailableError,
    WindowError,
)
from topk_grpc.client.buffer import BATCH_BYTES_MAX
from topk_grpc.errors import NotReadyError, SettingError

DAY_MS = 86_400_000


async def test_ten_lines_stream_plays_and_ask_for_a_top_k() -> None:
    async with ModelServer() as server:
        gateway = server.targets[0]
        # As in the README.
        async with topk_grpc.TopKClient(gateway) as client:
            for song in ["Toto - Africa", "Boston - More Than a Feeling", "Toto - Africa"]:
                await client.record(song, datetime(2014, 6, 16, 18, 28, tzinfo=UTC), charts=["KSEG"])
            await client.flush()
            answer = await client.top_k("tumbling:1d", k=10, chart="KSEG", as_of="2014-06-16T20:00:00Z")
            lines = [f"{entry.rank}. {entry.song_id}: {entry.count}" for entry in answer.entries]
        assert lines == ["1. Toto - Africa: 2", "2. Boston - More Than a Feeling: 1"]


async def test_a_batch_goes_when_it_is_full() -> None:
    async with ModelServer() as server:
        async with TopKClient(server.targets, batch_plays=4, linger_ms=3_600_000) as client:
            for _ in range(10):
                await client.record("a", 1)
        assert server.cluster.batch_sizes == [4, 4, 2]


async def test_a_batch_goes_when_it_has_many_bytes() -> None:
    async with ModelServer() as server:
        async with TopKClient(server.targets, batch_plays=65_536, linger_ms=3_600_000) as client:
            for _ in range(2 * BATCH_BYTES_MAX // 16_000):
                await client.record("x" * 16_000, 1)
        assert len(server.cluster.batch_sizes) == 2 + (
            sum(server.cluster.batch_sizes) > 2 * server.cluster.batch_sizes[0]
        )


async def test_a_batch_goes_when_it_has_lingered() -> None:
    async with ModelServer() as server, TopKClient(server.targets, linger_ms=20) as client:
        await client.record("a", 1)
        async with asyncio.timeout(10):
            while client.stats.batches_acknowledged == 0:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        assert server.cluster.counts() == {"a": 1}


async def test_every_field_of_a_play_arrives() -> None:
    now = 1_700_000_000.0
    async with ModelServer() as server:
        async with TopKClient(server.targets, clock=lambda: now) as client:
            await client.record("plain", 5)
            await client.record("counted", 6, count=3)
            await client.record("Beyoncé", datetime(2020, 1, 1, tzinfo=UTC), charts=["US", "é"])
            await client.record("naive", datetime(2020, 1, 1))  # naive means UTC
            await client.record("now")
            await client.record("numpy", np.int64(7), count=np.int64(2))  # type: ignore[arg-type]  # anything integral
        new_year = 1_577_836_800_000
        assert server.cluster.plays == [
            ("plain", 5, 1, ()),
            ("counted", 6, 3, ()),
            ("Beyoncé", new_year, 1, ("US", "é")),
            ("naive", new_year, 1, ()),
            ("now", 1_700_000_000_000, 1, ()),
            ("numpy", 7, 2, ()),
        ]
        assert server.cluster.first_sent_ms == [1_700_000_000_000]


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((7, 1), {}),
        ((b"bytes", 1), {}),
        (("a", "2020-01-01"), {}),
        (("a", 1.5), {}),
        (("a", 1 << 63), {}),
        (("a", 1), {"count": 1 << 63}),
        (("a", 1), {"count": 1.0}),
        (("\ud800", 1), {}),
        (("x" * 100_000, 1), {}),
        (("a", 1), {"charts": "US"}),
        (("a", 1), {"charts": [1]}),
        (("a", 1), {"charts": ["\ud800"]}),
        (("a", 1), {"charts": ["x"] * 100_000}),
    ],
)
async def test_a_play_that_cannot_be_encoded_is_refused_and_spoils_no_other(
    arguments: tuple[str, int], options: dict[str, int]
) -> None:
    async with ModelServer() as server:
        async with TopKClient(server.targets) as client:
            await client.record("good", 1)
            with pytest.raises(InvalidArgumentError):
                await client.record(*arguments, **options)  # type: ignore[arg-type]
            await client.record("good", 1)
        assert server.cluster.counts() == {"good": 2}


@pytest.mark.parametrize(
    "options",
    [
        {"batches_in_flight": 0},
        {"batches_in_flight": 64},
        {"batch_plays": 0},
        {"batch_plays": 65_537},
        {"linger_ms": -1},
        {"first_sequence": 0},
        {"first_sent_ms": -1},
        {"deadline_seconds": 0},
        {"producer_id": ""},
        {"producer_id": "x" * 129},
        {"producer_id": "\ud800"},
        {"target": []},
        {"target": ""},
    ],
)
def test_an_option_out_of_range_is_refused_at_once(options: dict[str, int]) -> None:
    with pytest.raises(SettingError):
        TopKClient(**options)  # type: ignore[arg-type]


# --- Rejected plays ---------------------------------------------------------------------------------------------------


async def test_flush_raises_the_plays_that_did_not_count_once() -> None:
    async with ModelServer() as server, TopKClient(server.targets) as client:
        await client.record("a", 1)
        await client.record("", 2, count=3, charts=["US"])
        with pytest.raises(RejectedPlaysError, match=r"1 plays were not counted.*EMPTY_SONG_ID") as raised:
            await client.flush()
        play = Play("", 2, 3, ("US",))
        assert raised.value.rejected == (Rejected(1, "EMPTY_SONG_ID", "song_id is empty: name the song", 1, play),)
        assert raised.value.count == 1
        await client.flush()
        assert server.cluster.counts() == {"a": 1}
        assert (client.stats.plays_accepted, client.stats.plays_rejected) == (1, 1)


async def test_rejected_plays_are_bounded_but_all_counted() -> None:
    async with ModelServer() as server:
        client = TopKClient(server.targets)
        for _ in range(1500):
            await client.record("", 1)
        with pytest.raises(RejectedPlaysError) as raised:
            await client.close()
        assert (len(raised.value.rejected), raised.value.count) == (1000, 1500)


async def test_a_callback_is_told_of_each_rejected_play() -> None:
    told: list[Rejected] = []
    async with ModelServer() as server:
        async with TopKClient(server.targets, batch_plays=2, on_rejected=told.append) as client:
            for song in ["a", "", "", "b"]:
                await client.record(song, 1)
        assert [(each.sequence, each.index) for each in told] == [(1, 1), (2, 0)]


async def test_a_resend_repeats_the_rejects_of_the_first_send() -> None:
    told: list[Rejected] = []
    async with ModelServer([Script(batches=1, unacknowledged=1)]) as server:
        async with TopKClient(server.targets, on_rejected=told.append, random=lambda: 0.0) as client:
            await client.record("", 1)
        assert len(told) == 1


async def test_a_callback_that_fails_stops_nothing() -> None:
    failures: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))

    def fail(_: Rejected) -> None:
        raise ValueError("the caller's mistake")

    async with ModelServer() as server:
        async with TopKClient(server.targets, on_rejected=fail) as client:
            await client.record("", 1)
            await client.record("a", 1)
        assert server.cluster.counts() == {"a": 1}
    assert [context["message"] for context in failures] == ["on_rejected failed"]


# --- Columns ----------------------------------------------------------------------------------------------------------


def offsets(texts: list[bytes]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.cumsum([0, *map(len, texts)], dtype=np.int64)


async def test_columns_are_one_batch_each() -> None:
    songs, charts = [b"a", "é".encode(), b"ccc"], [b"US", b"", b"KSEG"]
    times = np.array([10, 20, 30], dtype=np.int64)
    async with ModelServer() as server:
        async with TopKClient(server.targets) as client:
            first = await client.record_columns(b"".join(songs), offsets(songs), times)
            second = await client.record_columns(
                np.frombuffer(b"".join(songs), dtype=np.uint8),
                offsets(songs),
                times,
                np.array([1, 2, 3], dtype=np.int32),  # widened
                b"".join(charts),
                offsets(charts),
            )
            assert (first, second) == (1, 2)
            await client.flush()
        assert server.cluster.batch_sizes == [3, 3]
        assert server.cluster.plays[3:] == [("a", 10, 1, ("US",)), ("é", 20, 2, ()), ("ccc", 30, 3, ("KSEG",))]


async def test_columns_may_be_read_only() -> None:
    numbers = np.frombuffer(np.array([0, 1, 2], dtype=np.int64).tobytes(), dtype=np.int64)
    assert not numbers.flags.writeable
    async with ModelServer() as server:
        async with TopKClient(server.targets) as client:
            await client.record_columns(memoryview(b"ab"), numbers, numbers[1:], numbers[1:], b"US", numbers // 2 * 2)
        assert server.cluster.plays == [("a", 1, 1, ()), ("b", 2, 2, ("US",))]


async def test_columns_wait_for_room() -> None:
    one = np.array([0, 1], dtype=np.int64)
    async with ModelServer([Script(batches=0, ending="hang")]) as server:
        client = TopKClient(server.targets, batches_in_flight=2, deadline_seconds=0.2)
        for _ in range(2):
            await client.record_columns(b"a", one, one[1:])
        with pytest.raises(UnavailableError, match="no room for another batch"):
            await client.record_columns(b"a", one, one[1:])
        await client.close()
        assert server.cluster.counts() == {"a": 2}


@pytest.mark.parametrize(
    "columns",
    [
        (b"", [0], []),
        (b"aaaaa", [0, 1, 2, 3, 4, 5], [1, 1, 1, 1, 1]),
        (b"ab", [0, 1], [1, 1]),
        (b"ab", [0, 2, 1], [1, 1]),
        (b"ab", [0, 1, 3], [1, 1]),
        (b"ab", [-1, 1, 2], [1, 1]),
        (b"ab", [0, 1, 2], [1.5, 1]),
        (b"ab", [0, 1, 2], [[1, 1]]),
        (b"ab", [0, 1, 2], [1, 1], [1]),
        (b"ab", [0, 1, 2], [1, 1], None, b"x"),
        (b"ab", [0, 1, 2], [1, 1], None, b"x", [0, 1]),
    ],
)
async def test_columns_that_do_not_fit_are_refused(columns: tuple[object, ...]) -> None:
    arrays = [np.array(each) if isinstance(each, list) else each for each in columns]
    client = TopKClient(batch_plays=4)
    with pytest.raises(InvalidArgumentError):
        await client.record_columns(*arrays)  # type: ignore[arg-type]
    await client.close()


# --- Closing ----------------------------------------------------------------------------------------------------------


async def test_a_closed_client_refuses_everything() -> None:
    async with ModelServer() as server:
        client = TopKClient(server.targets)
        await client.record("a", 1)
        await client.close()
        await client.close()
        for call in (client.record("a", 1), client.flush(), client.top_k("global"), client.describe()):
            with pytest.raises(InvalidArgumentError, match="closed"):
                await call
        assert server.cluster.counts() == {"a": 1}


async def test_a_client_that_was_never_used_closes() -> None:
    await TopKClient().close()
    async with TopKClient():
        pass


async def test_a_body_that_fails_keeps_its_error_and_its_plays() -> None:
    async with ModelServer() as server:
        with pytest.raises(ZeroDivisionError):
            async with TopKClient(server.targets) as client:
                await client.record("a", 1)
                _ = 1 / 0
        assert server.cluster.counts() == {"a": 1}


async def test_a_body_that_fails_without_a_cluster_says_both() -> None:
    with pytest.raises(ZeroDivisionError) as raised:
        async with TopKClient("127.0.0.1:1", deadline_seconds=0.1) as client:
            await client.record("a", 1)
            _ = 1 / 0
    assert "closing the client failed as well" in raised.value.__notes__[0]


async def test_a_cancelled_body_does_not_wait_for_the_cluster() -> None:
    entered = asyncio.Event()

    async def body() -> None:
        async with TopKClient("127.0.0.1:1", deadline_seconds=60) as client:
            await client.record("a", 1)
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(body())
    await entered.wait()
    task.cancel()
    start = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - start < 5


# --- Asking -----------------------------------------------------------------------------------------------------------


async def test_queries_ask_and_read_everything() -> None:
    async with ModelServer() as server, TopKClient(server.targets) as client:
        for song, plays, day in [("a", 3, 1), ("b", 5, 1), ("c", 5, 1), ("a", 9, 2)]:
            await client.record(song, day * DAY_MS, count=plays, charts=["US"] if song != "c" else ["DE"])
        await client.flush()

        answer = await client.top_k("global", 2)
        assert answer.bounds is None
        assert answer.entries == (Entry(1, "a", 12), Entry(2, "b", 5))
        assert (answer.certificate.total_plays, answer.certificate.distinct_songs) == (22, 3)

        second_day = Bounds(DAY_MS, 2 * DAY_MS)
        for window in ("tumbling:1d", TumblingWindow(DAY_MS)):
            for as_of in (DAY_MS, "1970-01-02T10:00:00Z", datetime(1970, 1, 2, tzinfo=UTC) + timedelta(hours=1)):
                answer = await client.top_k(window, k=10, as_of=as_of)
                assert (answer.bounds, answer.entries[0]) == (second_day, Entry(1, "b", 5))
        latest = await client.top_k("tumbling:1d", as_of="latest", chart="US", allow_partial=True)
        assert latest.entries == (Entry(1, "a", 9),)

        songs = await client.songs(["c", "nobody"], neighbours=1)
        assert songs.songs[0] == topk_grpc.SongStanding("c", 5, 3, above=(Entry(2, "b", 5),))
        assert (songs.songs[1].count, songs.songs[1].rank) == (0, None)

        charts = await client.charts()
        assert charts == (topk_grpc.ChartSummary("US", 17, 2), topk_grpc.ChartSummary("DE", 5, 1))
        assert (await client.describe()).k_max == 10_000


async def test_queries_refuse_what_cannot_be_asked() -> None:
    async with TopKClient() as client:
        with pytest.raises(WindowError):
            await client.top_k("daily")
        for call in (
            client.top_k("global", -1),
            client.top_k("global", "ten"),  # type: ignore[arg-type]
            client.top_k(7),  # type: ignore[arg-type]
            client.top_k("tumbling:1d", as_of="yesterday"),
            client.top_k("tumbling:1d", as_of=1 << 63),
            client.songs("a"),
            client.songs([7]),  # type: ignore[list-item]
        ):
            with pytest.raises(InvalidArgumentError):
                await call


async def test_queries_raise_what_the_server_raised_and_are_tried_again_where_that_helps() -> None:
    async with ModelServer() as server, TopKClient(server.targets) as client:
        server.refuse_next_query(WindowError("offset is no multiple of the resolution"))
        with pytest.raises(WindowError, match="resolution"):
            await client.top_k("tumbling:1d")
        server.refuse_next_query(NotReadyError("the server drains"))
        await client.top_k("global")
        assert server.calls["GetTopK"] == 3


async def test_a_query_without_a_server_raises_within_the_deadline() -> None:
    async with TopKClient("127.0.0.1:1", deadline_seconds=0.5) as client:
        start = time.monotonic()
        with pytest.raises(UnavailableError):
            await client.top_k("global")
        assert time.monotonic() - start < 5


async def test_a_query_that_nobody_answers_says_how_long_it_waited_and_where_to_look() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with TopKClient(f"127.0.0.1:{silent.getsockname()[1]}", deadline_seconds=0.5) as client:
            with pytest.raises(DeadlineError, match=r"no answer within 0\.5 s: .*topk cluster status"):
                await client.top_k("global")
