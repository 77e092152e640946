"""Watching: one list over many streams, whatever happens to them."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from contextlib import aclosing

import grpc
import pytest

from tests.client.model_server import ModelServer, WatchScript
from tests.client.test_blocking import model_server
from topk_grpc import (
    BlockingTopKClient,
    ChangeKind,
    Entry,
    InvalidArgumentError,
    TopKClient,
    TopKError,
    UnavailableError,
    WatchUpdate,
    WindowError,
)
from topk_grpc.changes import apply
from topk_grpc.errors import NotReadyError


def shown(update: WatchUpdate) -> list[tuple[int, str, int]]:
    return [(entry.rank, entry.song_id, entry.count) for entry in update.answer.entries]


def kinds(update: WatchUpdate) -> list[tuple[ChangeKind, str]]:
    return [(change.kind, change.entry.song_id) for change in update.changes]


def play(server: ModelServer, song: str, count: int) -> None:
    server.cluster.plays.append((song, 1, count, ()))


def calm(server: ModelServer, **options: float) -> TopKClient:
    return TopKClient(server.targets, random=lambda: 0.0, **options)  # type: ignore[arg-type]


async def test_the_list_comes_at_once_and_whenever_it_changes() -> None:
    async with ModelServer() as server, calm(server) as client:
        play(server, "a", 3)
        async with aclosing(client.watch("global", 2)) as updates:
            first = await anext(updates)
            assert shown(first) == [(1, "a", 3)]
            assert kinds(first) == [(ChangeKind.ENTERED, "a")]
            assert (first.reset, first.answer.entries[0].share, first.answer.bounds) == (False, 1.0, None)
            play(server, "b", 1)
            assert shown(await anext(updates)) == [(1, "a", 3), (2, "b", 1)]
            server.cluster.plays += [("b", 1, 4, ()), ("c", 1, 4, ())]
            third = await anext(updates)
            assert shown(third) == [(1, "b", 5), (2, "c", 4)]
            assert kinds(third) == [(ChangeKind.LEFT, "a"), (ChangeKind.MOVED, "b"), (ChangeKind.ENTERED, "c")]
            assert [entry.share for entry in third.answer.entries] == [5 / 12, 4 / 12]


async def test_every_end_of_a_stream_is_gone_on_from_with_the_last_token() -> None:
    endings = [None, NotReadyError("it starts"), grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL]
    told: list[TopKError] = []
    async with ModelServer() as server, calm(server) as client:
        server.watch_scripts = [WatchScript(2, ending) for ending in endings]
        play(server, "a", 1)
        list_so_far: tuple[Entry, ...] = ()
        async with aclosing(client.watch("global", 3, on_interrupted=told.append)) as updates:
            seen = 0
            async for update in updates:
                assert (
                    apply(list_so_far, update.changes, update.answer.certificate.total_plays) == update.answer.entries
                )
                assert not update.reset
                list_so_far = update.answer.entries
                seen += 1
                if seen == 9:
                    break
                play(server, f"song {seen % 5}", seen)
        assert server.watch_tokens[0] == ""
        assert all(server.watch_tokens[1:])
        assert [type(error) for error in told] == [NotReadyError, UnavailableError, TopKError]


async def test_a_gateway_that_forgot_sends_a_reset_and_the_changes_still_hold() -> None:
    async with ModelServer() as server, calm(server) as client:
        server.watch_scripts = [WatchScript(1)]
        play(server, "a", 3)
        async with aclosing(client.watch("global", 2)) as updates:
            await anext(updates)
            server.watched.clear()
            play(server, "b", 9)
            again = await anext(updates)
            assert (again.reset, shown(again)) == (True, [(1, "b", 9), (2, "a", 3)])
            assert kinds(again) == [(ChangeKind.ENTERED, "b"), (ChangeKind.MOVED, "a")]


async def test_changes_of_another_list_are_not_applied() -> None:
    async with ModelServer() as server, calm(server) as client:
        server.watch_scripts = [WatchScript(1)]
        play(server, "a", 3)
        async with aclosing(client.watch("global", 2)) as updates:
            await anext(updates)
            # The same number, another list: as if a gateway mistook one watch for another.
            server.watched[0] = server._ranked(server.cluster.counts())[:0]
            server.watched.append([])
            server.cluster.plays[:] = [("x", 1, 1, ()), ("y", 1, 1, ())]
            again = await anext(updates)
            assert shown(again) == [(1, "x", 1), (2, "y", 1)]
        assert server.watch_tokens == ["", "0", ""]


async def test_what_is_refused_for_good_is_raised() -> None:
    async with ModelServer() as server, calm(server) as client:
        server.refuse_next_query(InvalidArgumentError("k is 0"))
        with pytest.raises(InvalidArgumentError, match="k is 0"):
            await anext(client.watch("global", 0))
        with pytest.raises(WindowError):
            client.watch("sometimes")
        with pytest.raises(InvalidArgumentError):
            client.watch("global", -1)


async def test_a_gateway_that_is_not_there_is_waited_for_only_at_the_start() -> None:
    told: list[TopKError] = []
    server = ModelServer()
    async with calm(server, deadline_seconds=0.5) as client:
        with pytest.raises(UnavailableError):
            await anext(client.watch("global", on_interrupted=told.append))
        async with server:
            play(server, "a", 1)
            async with aclosing(client.watch("global", on_interrupted=told.append)) as updates:
                await anext(updates)
                told.clear()
                await server.stop()
                waiting = asyncio.ensure_future(anext(updates))
                await asyncio.sleep(0.7)  # longer than the deadline
                assert not waiting.done()
                assert told
                await server.start()
                assert shown(await waiting) == [(1, "a", 1)]


async def test_a_silent_gateway_is_given_up_at_the_start() -> None:
    async with ModelServer() as server, calm(server, deadline_seconds=0.2) as client:
        server.watch_scripts = [WatchScript(0, "hang")]
        with pytest.raises(UnavailableError, match="nothing came"):
            await anext(client.watch("global"))


async def test_closing_the_client_ends_its_watches() -> None:
    async with ModelServer() as server:
        client = calm(server)
        updates = client.watch("global")
        await anext(updates)
        waiting = asyncio.ensure_future(anext(updates, None))
        await asyncio.sleep(0)
        await client.close()
        assert await waiting is None
        with pytest.raises(InvalidArgumentError, match="closed"):
            await anext(client.watch("global"))


async def test_cancelling_a_watch_cancels_its_call() -> None:
    async with ModelServer() as server, calm(server) as client:
        for closed in (False, True):
            updates = client.watch("global")
            await anext(updates)
            assert server.watching == 1
            if closed:
                await updates.aclose()
            else:
                waiting = asyncio.ensure_future(anext(updates))
                await asyncio.sleep(0.01)
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
            async with asyncio.timeout(10):
                while server.watching:  # noqa: ASYNC110
                    await asyncio.sleep(0.002)


# --- The blocking face ------------------------------------------------------------------------------------------------


def test_blocking_watch_is_an_ordinary_iterator() -> None:
    with model_server() as server, BlockingTopKClient(server.targets) as client:
        play(server, "a", 1)
        for number, update in enumerate(client.watch("global", 5)):
            assert len(update.answer.entries) == number + 1
            if number == 3:
                break
            play(server, f"b{number}", 1)
        with pytest.raises(WindowError):
            client.watch("sometimes")


def test_ctrl_c_leaves_a_blocking_watch_and_the_client_goes_on() -> None:
    with model_server() as server, BlockingTopKClient(server.targets) as client:
        updates = client.watch("global")
        next(updates)
        timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            next(updates)
        timer.join()
        updates.close()
        assert next(client.watch("global")).answer.entries == ()
