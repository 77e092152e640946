"""What every kind of store promises, against each of them: real files, a real etcd, real processes, real kills."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from tests.topology.other import Other
from tests.topology.topologies import FIRST, at
from topk_grpc.errors import InvalidArgumentError, TopologyConflictError, TopologyError
from topk_grpc.model import Topology
from topk_grpc.topology import TopologyStore, open_store

Start = Callable[..., Awaitable[Other]]


@pytest.fixture
async def start(url: str) -> AsyncIterator[Start]:
    """Starts other processes at the store, and leaves none."""
    others = []

    async def start_one(*arguments: str) -> Other:
        others.append(await Other.start(url, *arguments))
        return others[-1]

    yield start_one
    for other in others:
        await other.kill()


async def until(condition: Callable[[], Awaitable[Any]], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


# --- Reading and replacing --------------------------------------------------------------------------------------------


async def test_an_absent_topology_is_named(any_store: TopologyStore, url: str) -> None:
    with pytest.raises(TopologyError, match=url.partition(":")[2].rpartition("/")[2]):
        await any_store.read()


async def test_each_epoch_replaces_the_one_before(any_store: TopologyStore) -> None:
    for epoch in (1, 2, 3):
        await any_store.compare_and_set(at(epoch))
        assert await any_store.read() == at(epoch)


async def test_the_first_epoch_may_be_0(any_store: TopologyStore) -> None:
    await any_store.compare_and_set(at(0))
    await any_store.compare_and_set(at(1))
    assert await any_store.read() == at(1)


@pytest.mark.parametrize("epoch", [0, 1, 2, 4, 5])
async def test_other_epochs_conflict(any_store: TopologyStore, epoch: int) -> None:
    for each in (1, 2):
        await any_store.compare_and_set(at(each))
    with pytest.raises(TopologyConflictError, match="but 2 is there"):
        await any_store.compare_and_set(at(epoch))
    assert await any_store.read() == at(2)


async def test_a_later_epoch_needs_one_to_replace(any_store: TopologyStore) -> None:
    with pytest.raises(TopologyConflictError, match="none"):
        await any_store.compare_and_set(at(2))


async def test_another_cluster_conflicts(any_store: TopologyStore) -> None:
    await any_store.compare_and_set(FIRST)
    with pytest.raises(TopologyConflictError, match="other"):
        await any_store.compare_and_set(replace(at(2), cluster_id="other"))


async def test_contradictions_are_not_written(any_store: TopologyStore) -> None:
    with pytest.raises(InvalidArgumentError, match="owners"):
        await any_store.compare_and_set(replace(FIRST, owners=(0,)))
    with pytest.raises(TopologyError):
        await any_store.read()


async def test_of_equal_changes_one_wins(any_store: TopologyStore, url: str) -> None:
    await any_store.compare_and_set(FIRST)
    others = [open_store(url) for _ in range(4)]
    results = await asyncio.gather(*(other.compare_and_set(at(2)) for other in others), return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["NoneType", *["TopologyConflictError"] * 3]
    for other in others:
        await other.close()


async def test_two_processes_race_and_one_wins_each_epoch(any_store: TopologyStore, url: str, start: Start) -> None:
    last = 60
    await any_store.compare_and_set(FIRST)
    racers = [await start("race", f"racer-{index}", str(last)) for index in range(2)]
    seen: list[Topology] = []
    watcher = open_store(url)

    async def watch() -> None:
        async with aclosing(watcher.watch()) as later:
            async for topology in later:
                seen.append(topology)
                if topology.epoch == last:
                    return

    watching = asyncio.create_task(watch())
    for racer in racers:
        assert await racer.said() == "ready"
    outputs = await asyncio.gather(*(racer.finish() for racer in racers))
    await asyncio.wait_for(watching, 10)
    await watcher.close()
    won = [{int(epoch) for epoch in output.split()} for output in outputs]
    assert sorted([*won[0], *won[1]]) == list(range(2, last + 1)), "an epoch was won twice, or by nobody"
    epochs = [topology.epoch for topology in seen]
    assert epochs == sorted(set(epochs))
    for topology in seen:
        if topology.epoch > 1:
            winner = topology.shards[0].address
            assert topology.epoch in won[int(winner.removeprefix("racer-"))]


# --- Watching ---------------------------------------------------------------------------------------------------------


async def test_watch_waits_for_the_first_and_sees_the_newest(any_store: TopologyStore) -> None:
    async with aclosing(any_store.watch()) as later:
        first = asyncio.ensure_future(anext(later))
        await any_store.compare_and_set(at(1))
        assert (await asyncio.wait_for(first, 10)).epoch == 1
        for epoch in range(2, 6):
            await any_store.compare_and_set(at(epoch, f"127.0.0.1:{epoch}"))
        async with asyncio.timeout(10):
            found = await anext(later)
            while found.epoch < 5:
                found = await anext(later)
        assert found == at(5, "127.0.0.1:5")


async def test_close_ends_watches(any_store: TopologyStore) -> None:
    await any_store.compare_and_set(FIRST)
    async with aclosing(any_store.watch()) as later:
        await asyncio.wait_for(anext(later), 10)
        ended = asyncio.ensure_future(anext(later, None))
        await asyncio.sleep(0)
        await any_store.close()
        assert await asyncio.wait_for(ended, 10) is None


# --- Leading ----------------------------------------------------------------------------------------------------------


async def test_one_leads_at_a_time(any_store: TopologyStore, url: str) -> None:
    second = open_store(url)
    async with any_store.lead("office") as leadership:
        waiting = asyncio.ensure_future(_enter_and_leave(second, "office"))
        async with second.lead("another"):  # an office of its own
            assert not waiting.done()
        assert not leadership.lost.is_set()
    await asyncio.wait_for(waiting, 15)
    await second.close()


async def _enter_and_leave(store: TopologyStore, name: str) -> None:
    async with store.lead(name) as leadership:
        assert not leadership.lost.is_set()


async def test_a_killed_leader_is_followed_by_one_of_those_that_wait(any_store: TopologyStore, start: Start) -> None:
    leader = await start("lead", "office")
    assert await leader.said() == "leads"
    waiting = {
        asyncio.ensure_future(other.said(60)): other
        for other in (await start("lead", "office"), await start("lead", "office"))
    }
    for _ in range(2):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await _enter_and_leave(any_store, "office")
        assert not any(saying.done() for saying in waiting)
        await leader.kill()
        said, _ = await asyncio.wait(waiting, timeout=30, return_when=asyncio.FIRST_COMPLETED)
        assert [saying.result() for saying in said] == ["leads"]
        leader = waiting.pop(said.pop())
    await leader.finish()


async def test_who_waits_to_lead_can_give_up(any_store: TopologyStore, url: str) -> None:
    second = open_store(url)
    async with any_store.lead("office"):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await _enter_and_leave(second, "office")
    await asyncio.wait_for(_enter_and_leave(any_store, "office"), 15)
    await second.close()


# --- Announcing -------------------------------------------------------------------------------------------------------


async def test_who_is_announced_is_alive(any_store: TopologyStore) -> None:
    assert await any_store.alive() == {}
    async with any_store.announce("shard-0", "127.0.0.1:1"), any_store.announce("../é /x.", "ü"):
        assert await any_store.alive() == {"shard-0": "127.0.0.1:1", "../é /x.": "ü"}
    assert await any_store.alive() == {}


async def test_the_killed_are_not_alive(any_store: TopologyStore, start: Start) -> None:
    others = [await start("announce", f"shard-{number}", f"127.0.0.1:{number}") for number in range(2)]
    for other in others:
        assert await other.said() == "lives"
    assert await any_store.alive() == {"shard-0": "127.0.0.1:0", "shard-1": "127.0.0.1:1"}
    await others[0].kill()
    await until(lambda: _are_alive(any_store, {"shard-1": "127.0.0.1:1"}))
    again = await start("announce", "shard-0", "127.0.0.1:5")
    assert await again.said() == "lives"
    assert await any_store.alive() == {"shard-0": "127.0.0.1:5", "shard-1": "127.0.0.1:1"}
    for other in (others[1], again):
        await other.finish()
    assert await any_store.alive() == {}


async def _are_alive(store: TopologyStore, them: dict[str, str]) -> bool:
    return await store.alive() == them


async def test_the_latest_of_a_name_is_seen(any_store: TopologyStore, url: str) -> None:
    second = open_store(url)
    async with any_store.announce("shard-0", "old"), second.announce("shard-0", "new"):
        assert await any_store.alive() == {"shard-0": "new"}
    assert await second.alive() == {}
    await second.close()
