"""The way of batches through a gateway to real shards, and what goes wrong on it: each play counts once."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cluster.processes import GLOBAL
from tests.engine.engine_shard import DAY, NOW, append_request
from tests.gateway.cluster import SLOTS, Cluster, Gateway, batch, record, rejects, stream_request
from tests.oracle import ModelPart, Tally, slot_of
from topk_grpc.errors import (
    DeadlineError,
    DiskFullError,
    InvalidArgumentError,
    ProducerExpiredError,
    ResourceExhaustedError,
)
from topk_grpc.gateway.routing import REFRESH_SECONDS, Routing
from topk_grpc.model import COUNT_MAX, Play
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.rpc.status import from_rpc_error, is_retriable

COMMON_SONGS = [f"song-{number}" for number in range(40)]


async def until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def plays_of(sequence: int) -> list[Play]:
    return [
        Play(f"batch-{sequence}", NOW + sequence),
        *(Play(song, NOW + sequence, 1, ("x",)) for song in COMMON_SONGS),
    ]


def check_counted(cluster: Cluster, sequences: int) -> None:
    """The batches 1 to `sequences` have counted, each once."""
    names = [f"batch-{sequence}" for sequence in range(1, sequences + 2)]
    assert cluster.counted(names) == [1] * sequences + [0]
    assert cluster.counted(COMMON_SONGS) == [sequences] * len(COMMON_SONGS)
    assert cluster.counted(COMMON_SONGS, "x") == [sequences] * len(COMMON_SONGS)


async def test_a_batch_is_split_over_the_shards_and_acknowledged_once_all_have_it(cluster: Cluster) -> None:
    await cluster.begin(shards=3)
    gateway = await cluster.gateway()
    for sequence in range(1, 4):
        response = await record(gateway, batch(sequence, plays_of(sequence)))
        assert (response.sequence, response.accepted, response.duplicate) == (sequence, 41, False)
        check_counted(cluster, sequence)
    assert all(sum(shard.counted(COMMON_SONGS)) > 0 for shard in cluster.shards)
    response = await record(gateway, batch(2, plays_of(2)))
    assert (response.sequence, response.accepted, response.duplicate) == (2, 41, True)
    other = await cluster.gateway()
    assert (await record(other, batch(3, plays_of(3)))).duplicate
    check_counted(cluster, 3)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    plays=st.lists(
        st.builds(
            Play,
            st.sampled_from(["a", "b", "é", "日本", "x" * 128, "\U0001d11e"]),
            st.one_of(st.integers(NOW - 2500, NOW + 2500), st.integers(-2000, -1), st.just(NOW + DAY)),
            st.one_of(st.integers(1, 3), st.just(COUNT_MAX // 1000)),
            st.lists(st.sampled_from(["US", "é"]), max_size=3).map(tuple),
        ),
        max_size=30,
    )
)
async def test_combined_and_split_plays_count_as_the_client_sent_them(cluster: Cluster, plays: list[Play]) -> None:
    if not cluster.shards:
        await cluster.begin(shards=3)
        await cluster.gateway()
        cluster.tally, cluster.sequence = Tally(), 0  # type: ignore[attr-defined]
    gateway, tally = cluster.gateways[0], cluster.tally  # type: ignore[attr-defined]
    cluster.sequence += 1  # type: ignore[attr-defined]
    response = await record(gateway, batch(cluster.sequence, plays))  # type: ignore[attr-defined]
    future = {index: "IN_FUTURE" for index, play in enumerate(plays) if play.played_at_ms > NOW + 300_000}
    assert rejects(response) == future
    assert response.accepted == len(plays) - len(future)
    tally.plays += [play for index, play in enumerate(plays) if index not in future]
    for chart in ("", "US", "é"):
        counts = tally.counts(chart)
        assert cluster.counted(["a", "b", "é", "日本", "x" * 128, "\U0001d11e"], chart) == [
            counts.get(song, 0) for song in ["a", "b", "é", "日本", "x" * 128, "\U0001d11e"]
        ]


async def test_rejects_reach_every_play_they_are_about_also_on_a_resend(cluster: Cluster) -> None:
    await cluster.begin(shards=2, charts_max=1)
    gateway = await cluster.gateway()
    (first,) = await cluster.songs_of(0, 1)
    (second,) = await cluster.songs_of(1, 1)
    early = NOW + 2 * DAY
    plays = [
        Play(first, NOW, 1, ("x",)),
        Play(first, early),  # combined with the two like it
        Play("", NOW),
        Play(second, early),
        Play(first, early, 5),
        Play(second, 0),
        Play(second, NOW, 1, ("x",)),
        Play(first, early + 1),
        Play(second, NOW, 1, ("y",)),
        Play(second, NOW, 1, ("y",)),
        Play(first, NOW, COUNT_MAX),
        Play(first, NOW),
        Play("x" * 129, NOW),
        Play(first, NOW, -1, ("x",)),
        Play(first, NOW, -1, ("x",)),
        Play(first, NOW, -2),
        Play(first, NOW, -(COUNT_MAX + 1)),
        Play(second, NOW, -1),
    ]
    expected = {
        **dict.fromkeys((1, 3, 4, 7), "IN_FUTURE"),
        **dict.fromkeys((8, 9), "CHART_LIMIT"),
        **{2: "EMPTY_SONG_ID", 5: "MISSING_TIME", 12: "SONG_ID_TOO_LONG", 16: "COUNT_TOO_LARGE"},
        **dict.fromkeys((14, 15), "NEGATIVE_BUCKET"),  # the huge play that comes first was rejected
    }
    response = await record(gateway, batch(1, plays))
    # The huge play and the one after it are not combined, as their sum would leave the range; the first to come fits.
    assert rejects(response) == expected | {10: "TOTAL_OVERFLOW"}
    assert response.accepted == len(plays) - len(expected) - 1
    for each in (gateway, await cluster.gateway()):
        again = await record(each, batch(1, plays))
        assert again.duplicate
        assert (rejects(again), again.accepted) == (rejects(response), response.accepted)
    assert cluster.counted([first, second]) == [1, 0]
    assert cluster.counted([first, second], "x") == [0, 1]


async def test_a_whole_batch_of_rejects_is_answered_soon(cluster: Cluster) -> None:
    await cluster.begin(shards=2)
    gateway = await cluster.gateway()
    plays = [Play(f"{number}", NOW + DAY + number) for number in range(20_000)]
    async with asyncio.timeout(10):
        response = await record(gateway, batch(1, plays))
    assert (response.accepted, len(response.rejected)) == (0, 20_000)


async def test_an_empty_batch_is_acknowledged(cluster: Cluster) -> None:
    await cluster.begin()
    response = await record(await cluster.gateway(), batch(1, []))
    assert (response.sequence, response.accepted, response.duplicate) == (1, 0, False)


# --- What is wrong as a whole -----------------------------------------------------------------------------------------


async def failure_of(call: Any) -> Exception:
    with pytest.raises(grpc.RpcError) as caught:
        await call
    return from_rpc_error(caught.value)


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (batch(0, [Play("a", NOW)]), "sequence is absent or 0"),
        (batch(1, [Play("a", NOW)], producer=""), "producer_id has 0 bytes"),
        (batch(1, [Play("a", NOW)], producer="p" * 129), "producer_id has 129 bytes"),
        (batch(1, [Play("a", NOW)], first_sent_ms=-1), "first_sent_ms is -1"),
        (batch(1, [Play("a", NOW)] * 101), "the batch has 101 plays, at most 100"),
    ],
)
async def test_a_batch_that_is_wrong_as_a_whole_is_refused(cluster: Cluster, message: Any, says: str) -> None:
    await cluster.begin(shards=1)
    gateway = await cluster.gateway(batch_plays_max=100)
    failure = await failure_of(record(gateway, message))
    assert isinstance(failure, InvalidArgumentError)
    assert says in str(failure)
    call = gateway.stub.StreamPlays(iter([stream_request(batch(1, [Play("good", NOW)])), stream_request(message)]))
    answers = []
    with pytest.raises(grpc.RpcError) as caught:
        async for answer in call:
            answers.append(answer.accepted)  # noqa: PERF401
    assert says in str(from_rpc_error(caught.value))
    assert answers == [1]  # what came before it is acknowledged


@pytest.mark.parametrize("raw", [b"\xff\xff\xff", b"\x0a\x05abc", b"", b"\x0a\x04\x22\x02\xff\xff", b"garbage"])
async def test_garbage_bytes_are_an_invalid_argument(cluster: Cluster, raw: bytes) -> None:
    await cluster.begin(shards=1)
    gateway = await cluster.gateway()
    raw_channel: Any = gateway.channel
    for method in ("RecordPlays", "GetTopK", "GetSongs"):
        failure = await failure_of(raw_channel.unary_unary(f"/topk.v1.TopKService/{method}")(raw))
        assert isinstance(failure, InvalidArgumentError), method
    call = raw_channel.stream_stream("/topk.v1.TopKService/StreamPlays")(iter([raw]))
    assert isinstance(await failure_of(call.read()), InvalidArgumentError)
    assert (await record(gateway, batch(1, [Play("good", NOW)]))).accepted == 1


async def test_an_expired_producer_is_told_so(cluster: Cluster) -> None:
    await cluster.begin()
    gateway = await cluster.gateway()
    failure = await failure_of(record(gateway, batch(1, plays_of(1), first_sent_ms=NOW - 31 * DAY)))
    assert isinstance(failure, ProducerExpiredError)
    assert cluster.counted(COMMON_SONGS) == [0] * 40
    assert (await record(gateway, batch(1, plays_of(1), first_sent_ms=0))).accepted == 41


async def test_append_garbage_from_a_gateway_is_refused_by_the_shard(cluster: Cluster) -> None:
    await cluster.begin(shards=1)
    address = cluster.shards[0].address
    metadata = (("topk-cluster-id", "cluster-1"), ("topk-shard-id", "shard-0"))
    async with grpc.aio.insecure_channel(address) as channel:
        append: Any = channel.stream_stream("/topk.v1.ShardService/Append")
        good = append_request([ModelPart("p", 1, NOW, ((0, Play("a", NOW)),))])
        call = append(iter([good, b"\xff\xff"]), metadata=metadata)
        assert await call.read() != grpc.aio.EOF
        assert isinstance(await failure_of(call.read()), InvalidArgumentError)
        for wrong in ((("topk-cluster-id", "other"), metadata[1]), (metadata[0], ("topk-shard-id", "shard-1")), ()):
            failure = await failure_of(append(iter([good]), metadata=wrong).read())
            assert "read the topology again" in str(failure)


# --- Lines that break -------------------------------------------------------------------------------------------------


class Producer:
    """A client's stream: batches in, acks out; `finish` says when all are acknowledged."""

    def __init__(self, gateway: Gateway, sequences: range, name: str = "p") -> None:
        self.acks: list[pb.StreamPlaysResponse] = []
        self._call = gateway.stub.StreamPlays(self._requests(sequences, name))
        self._task = asyncio.create_task(self._read())

    async def _requests(self, sequences: range, name: str) -> AsyncIterator[pb.StreamPlaysRequest]:
        for sequence in sequences:
            while sequence >= sequences.start + len(self.acks) + 30:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            yield stream_request(batch(sequence, plays_of(sequence), producer=name))

    async def _read(self) -> None:
        async for ack in self._call:
            self.acks.append(ack)

    async def finish(self) -> list[pb.StreamPlaysResponse]:
        async with asyncio.timeout(60):
            await self._task
        return self.acks


def check_acks(acks: list[pb.StreamPlaysResponse], sequences: range) -> None:
    assert [ack.sequence for ack in acks] == list(sequences)
    assert [ack.sequence for ack in acks if ack.duplicate] == []
    assert {ack.accepted for ack in acks} == {41}


async def test_lines_cut_again_and_again_lose_nothing_and_count_nothing_twice(cluster: Cluster) -> None:
    await cluster.begin(shards=2)
    gateway = await cluster.gateway()
    producer = Producer(gateway, range(1, 301))
    for turn in range(6):
        await until(lambda turn=turn: len(producer.acks) > 40 * turn)  # type: ignore[misc]
        cluster.shards[turn % 2].line.cut()
    acks = await producer.finish()
    check_acks(acks, range(1, 301))
    check_counted(cluster, 300)
    assert cluster.shards[0].line.connections > 1


async def test_answers_that_are_lost_make_no_false_duplicates(cluster: Cluster) -> None:
    """The shard counts, the gateway does not hear of it, sends again, and must not tell the client `duplicate`."""
    await cluster.begin(shards=2)
    gateway = await cluster.gateway()
    assert not (await record(gateway, batch(1, plays_of(1)))).duplicate
    shard = cluster.shards[0]
    shard.line.lose_answers = True
    waiting = [asyncio.create_task(record(gateway, batch(sequence, plays_of(sequence)))) for sequence in range(2, 6)]
    await until(lambda: cluster.counted(COMMON_SONGS)[0] >= 2 and shard.counted(COMMON_SONGS) != [0] * 40)
    await until(lambda: max(shard.counted(COMMON_SONGS)) >= 2)
    assert not any(task.done() for task in waiting)
    shard.line.lose_answers = False
    shard.line.cut()
    for response in await asyncio.gather(*waiting):
        assert not response.duplicate
        assert response.accepted == 41
    check_counted(cluster, 5)
    assert (await record(gateway, batch(3, plays_of(3)))).duplicate  # a true one is still told


async def test_a_connection_that_died_without_a_word_is_replaced_in_time(cluster: Cluster) -> None:
    await cluster.begin(shards=2)
    gateway = await cluster.gateway(record_seconds=1)
    producer = Producer(gateway, range(1, 2))
    await producer.finish()
    cluster.shards[0].line.forget()
    with pytest.raises(grpc.RpcError) as caught:  # what was under way has waited for as long as it may
        await record(gateway, batch(2, plays_of(2)))
    assert isinstance(from_rpc_error(caught.value), DeadlineError)
    async with asyncio.timeout(5):  # far less than keepalive takes
        assert (await record(gateway, batch(2, plays_of(2)))).accepted == 41
    check_counted(cluster, 2)


async def test_a_shard_killed_and_restarted_at_another_port_is_found_again(cluster: Cluster) -> None:
    await cluster.begin(shards=2)
    gateway = await cluster.gateway()
    producer = Producer(gateway, range(1, 201))
    for turn in range(3):
        await until(lambda turn=turn: len(producer.acks) > 50 * turn)  # type: ignore[misc]
        shard = cluster.shards[turn % 2]
        before = shard.line.address
        await shard.kill()
        await asyncio.sleep(0.05)
        await shard.start()
        assert shard.line.address != before
    check_acks(await producer.finish(), range(1, 201))
    check_counted(cluster, 200)


async def test_a_shard_that_stops_in_order_answers_what_it_owes(cluster: Cluster) -> None:
    await cluster.begin(shards=2)
    gateway = await cluster.gateway()
    producer = Producer(gateway, range(1, 101))
    await until(lambda: len(producer.acks) > 20)
    await cluster.shards[0].stop()
    await cluster.shards[0].start()
    check_acks(await producer.finish(), range(1, 101))
    check_counted(cluster, 100)


async def test_a_shard_that_stays_away_ends_the_wait_in_time_and_a_resend_counts_once(cluster: Cluster) -> None:
    await cluster.begin(shards=2)
    gateway = await cluster.gateway(record_seconds=0.5)
    await cluster.shards[1].kill()
    with pytest.raises(grpc.RpcError) as caught:
        await record(gateway, batch(1, plays_of(1)))
    assert isinstance(from_rpc_error(caught.value), DeadlineError)
    assert is_retriable(caught.value)
    patient = await cluster.gateway()
    waiting = asyncio.create_task(record(patient, batch(1, plays_of(1))))
    await cluster.shards[1].start()
    assert (await waiting).accepted == 41
    check_counted(cluster, 1)


async def test_an_answer_that_makes_no_sense_loses_no_parts(cluster: Cluster) -> None:
    """A shard of some other release, say: the stream is begun again, and what was under way goes with it."""
    await cluster.begin(shards=1)
    shard = cluster.shards[0]
    answer = shard.service._owner.append
    confused = [b"\x08\x63", b"\xff\xff", b""]

    async def append(request: bytes) -> asyncio.Future[bytes]:
        if not confused:
            return await answer(request)
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        future.set_result(confused.pop())
        return future

    shard.owner.append = append  # type: ignore[method-assign]
    gateway = await cluster.gateway()
    producer = Producer(gateway, range(1, 21))
    check_acks(await producer.finish(), range(1, 21))
    assert confused == []
    check_counted(cluster, 20)


async def test_a_topology_with_an_address_that_is_none_can_be_set_right(cluster: Cluster) -> None:
    await cluster.begin(shards=1)
    good = cluster.shards[0].line.address
    cluster.shards[0].line.address = "not an address"
    await cluster.shards[0].register()
    gateway = await cluster.gateway()
    waiting = asyncio.create_task(record(gateway, batch(1, plays_of(1))))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    cluster.shards[0].line.address = good
    await cluster.shards[0].register()
    assert (await waiting).accepted == 41


# --- Routing ----------------------------------------------------------------------------------------------------------


async def test_stale_routing_is_mended_and_each_play_counts_where_it_lives_now(cluster: Cluster) -> None:
    """Slots have new owners: the old one says so, and the gateway reads the topology again."""
    await cluster.begin(shards=2)
    gateway = await cluster.gateway()
    await record(gateway, batch(1, plays_of(1)))
    gateway.watch._task.cancel()  # it will not hear of the change by itself
    owners = list((await cluster.store.read()).owners)
    moved = [slot for slot, owner in enumerate(owners) if owner == 0][:3]
    for slot in moved:
        owners[slot] = 1
    before = [shard.counted(COMMON_SONGS) for shard in cluster.shards]
    cluster.shards[0].core.state.owned[moved] = 0
    waiting = asyncio.create_task(record(gateway, batch(2, plays_of(2))))
    await asyncio.sleep(0.1)
    assert not waiting.done()  # nobody owns them just now
    cluster.shards[1].core.state.own(moved)
    await cluster.change_owners(owners)
    response = await waiting
    assert (response.accepted, response.duplicate) == (41, False)
    after = [shard.counted(COMMON_SONGS) for shard in cluster.shards]
    for index, song in enumerate(COMMON_SONGS):
        where = owners[slot_of(song, SLOTS)]
        assert after[where][index] == before[where][index] + 1
        assert after[1 - where][index] == before[1 - where][index]
    assert gateway.watch.current.topology.epoch == (await cluster.store.read()).epoch


async def move_silently(cluster: Cluster, gateway: Gateway, slots: list[int]) -> None:
    """Slots go from the first shard to the second; the gateway hears nothing, and the store is gone."""
    gateway.watch._task.cancel()
    await until(gateway.watch._task.done)
    (cluster._path / "topology.json").unlink()
    first, second = cluster.shards
    first.core.state.owned[slots] = 0
    first.core.state.ownership.gone_to.update(dict.fromkeys(slots, "shard-1"))
    second.core.state.own(slots)


async def test_a_shard_names_the_new_owner_of_its_slots_and_the_store_is_not_needed(cluster: Cluster) -> None:
    await cluster.begin(shards=2)
    gateway = await cluster.gateway(record_seconds=10)
    owners = (await cluster.store.read()).owners
    moved = [slot for slot, owner in enumerate(owners) if owner == 0][:3]
    await move_silently(cluster, gateway, moved)
    for sequence in (1, 2):
        response = await record(gateway, batch(sequence, plays_of(sequence)))
        assert (response.accepted, response.duplicate) == (41, False)
    there = [song for song in COMMON_SONGS if slot_of(song, SLOTS) in moved]
    assert there
    assert cluster.shards[1].counted(there) == [2] * len(there)
    check_counted(cluster, 2)
    assert list(gateway.watch.current.topology.owners) == list(owners)
    assert [int(gateway.watch.current.owners[slot]) for slot in moved] == [1, 1, 1]


async def test_a_newer_topology_takes_the_place_of_what_was_learned(cluster: Cluster) -> None:
    await cluster.begin(shards=2)
    gateway = await cluster.gateway()
    topology = await cluster.store.read()
    slot = topology.owners.index(0)
    assert gateway.watch.learn("shard-1", [slot], ["shard-1"])  # it is not routed to that one
    assert not gateway.watch.learn("shard-0", [slot], [""])
    assert not gateway.watch.learn("shard-0", [slot], ["shard-9"])
    assert not gateway.watch.learn("shard-0", [slot], [])
    assert gateway.watch.current.owners.tolist() == list(topology.owners)
    assert gateway.watch.learn("shard-0", [slot], ["shard-1"])
    assert gateway.watch.current.owners[slot] == 1
    assert gateway.watch.learn("shard-0", [slot], ["shard-0"])  # said before it was learned
    assert gateway.watch.current.owners[slot] == 1
    await cluster.change_owners(topology.owners)
    assert (await gateway.watch.refresh()).owners.tolist() == list(topology.owners)


async def test_shards_that_name_each_other_are_not_asked_without_a_pause(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    await cluster.begin(shards=2)
    gateway = await cluster.gateway()
    owners = (await cluster.store.read()).owners
    slot = owners.index(0)
    (song,) = await cluster.songs_of(0, 1, slot)
    await move_silently(cluster, gateway, [slot])
    cluster.shards[1].core.state.owned[slot] = 0
    cluster.shards[1].core.state.ownership.gone_to[slot] = "shard-0"
    sends = 0
    send = gateway.recorder._send

    async def counted(*arguments: Any) -> Any:
        nonlocal sends
        sends += 1
        return await send(*arguments)

    monkeypatch.setattr(gateway.recorder, "_send", counted)
    waiting = asyncio.create_task(record(gateway, batch(1, [Play(song, NOW)])))
    await asyncio.sleep(0.5)
    assert not waiting.done()
    assert 3 < sends <= 2 * 0.5 / 0.02 + 2
    cluster.shards[1].core.state.own([slot])
    assert (await waiting).accepted == 1
    assert cluster.shards[1].counted([song]) == [1]


async def test_a_query_finds_slots_at_a_shard_that_should_own_none(cluster: Cluster) -> None:
    await cluster.begin(shards=2)
    first, second = cluster.shards
    second.core.state.owned[:] = 0
    first.core.state.own(range(SLOTS))
    await cluster.change_owners([0] * SLOTS)
    gateway = await cluster.gateway(query_seconds=5)
    moved = [slot_of(song, SLOTS) for song in COMMON_SONGS[:2]]
    await move_silently(cluster, gateway, moved)
    await record(gateway, batch(1, plays_of(1)))
    gateway.watch.current = Routing.of(gateway.watch.current.topology)  # it has learned nothing
    answer = await gateway.stub.GetTopK(pb.GetTopKRequest(window=GLOBAL, k=100))
    assert answer.certificate.complete
    assert {entry.song_id: entry.count for entry in answer.entries} == dict.fromkeys([*COMMON_SONGS, "batch-1"], 1)


async def test_a_store_that_hangs_holds_nobody_up_beyond_his_time(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    await cluster.begin(shards=2)
    gateway = await cluster.gateway(query_seconds=2)
    monkeypatch.setattr(cluster.store, "read", asyncio.Event().wait)
    await cluster.shards[0].kill()
    began = time.monotonic()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await gateway.stub.GetTopK(pb.GetTopKRequest(window=GLOBAL, k=1), timeout=30)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert time.monotonic() - began < 2 + 2 * REFRESH_SECONDS


async def test_a_part_that_was_counted_before_its_slot_moved_makes_no_false_duplicate(cluster: Cluster) -> None:
    await cluster.begin(shards=2)
    gateway = await cluster.gateway()
    owners = list((await cluster.store.read()).owners)
    slot = owners.index(0)
    song, warm = await cluster.songs_of(0, 2, slot)
    first, second = cluster.shards
    await record(gateway, batch(1, [Play(warm, NOW)], producer="warm"))  # the line stands
    first.line.lose_answers = True
    waiting = asyncio.create_task(record(gateway, batch(1, [Play(song, NOW)])))
    await until(lambda: first.counted([song]) == [1])
    # The slot moves, and its marks with it.
    first.core.state.owned[slot] = 0
    second.core.state.own([slot])
    moved = append_request([ModelPart("p", 1, NOW, ((0, Play(song, NOW)),))])
    await (await second.owner.append(moved))
    owners[slot] = 1
    await cluster.change_owners(owners)
    first.line.lose_answers = False
    first.line.cut()
    assert not (await waiting).duplicate
    assert second.counted([song]) == [1]


# --- Streams ----------------------------------------------------------------------------------------------------------


async def test_a_draining_gateway_sends_the_acks_it_owes_and_ends_with_ok(cluster: Cluster) -> None:
    await cluster.begin(shards=2)
    gateway = await cluster.gateway()
    line = cluster.shards[0].line
    line.lose_answers = True
    call = gateway.stub.StreamPlays()
    for sequence in range(1, 6):
        await call.write(stream_request(batch(sequence, plays_of(sequence))))
    await until(lambda: max(cluster.shards[1].counted(COMMON_SONGS)) == 5)
    gateway.drain.set()
    line.lose_answers = False
    line.cut()
    check_acks([ack async for ack in call], range(1, 6))
    assert await call.code() == grpc.StatusCode.OK
    check_counted(cluster, 5)


async def test_an_idle_stream_ends_at_once_when_drained(cluster: Cluster) -> None:
    await cluster.begin(shards=1)
    gateway = await cluster.gateway()
    call = gateway.stub.StreamPlays()
    await call.write(stream_request(batch(1, plays_of(1))))
    assert (await call.read()).sequence == 1
    gateway.drain.set()
    async with asyncio.timeout(10):
        assert await call.read() == grpc.aio.EOF
        assert await call.code() == grpc.StatusCode.OK


async def test_an_old_stream_ends_with_ok(cluster: Cluster) -> None:
    await cluster.begin(shards=1)
    gateway = await cluster.gateway(stream_age_seconds=1.0)
    call = gateway.stub.StreamPlays()
    await call.write(stream_request(batch(1, plays_of(1))))
    acks = []
    async with asyncio.timeout(10):
        async for ack in call:
            acks.append(ack.sequence)  # noqa: PERF401
        assert await call.code() == grpc.StatusCode.OK
    assert acks == [1]


async def test_a_client_that_vanishes_leaves_nothing_behind(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    await cluster.begin(shards=1)
    gateway = await cluster.gateway()
    shard = cluster.shards[0]
    await record(gateway, batch(1, [Play("warm", NOW)]))
    shard.line.lose_answers = True
    tasks = len(asyncio.all_tasks())
    calls = [gateway.stub.StreamPlays() for _ in range(3)]
    for number, call in enumerate(calls):
        await call.write(stream_request(batch(1, plays_of(1), producer=f"p{number}")))
    await until(lambda: shard.counted(["batch-1"]) != [0])
    for call in calls:
        call.cancel()
    del calls, call
    shard.line.lose_answers = False
    shard.line.cut()
    assert (await record(gateway, batch(1, plays_of(1), producer="last"))).accepted == 41
    await until(lambda: len(asyncio.all_tasks()) <= tasks + 6)
    assert "never retrieved" not in caplog.text
    assert "Traceback" not in caplog.text


async def test_a_shard_that_is_down_holds_back_streams_within_bounds(cluster: Cluster) -> None:
    """`pending_bytes_max` for each shard, `stream_batches_max` for each stream: then nothing more is read."""
    await cluster.begin(shards=2)
    gateway = await cluster.gateway(pending_bytes_max=1 << 16, stream_batches_max=4, part_bytes_max=1 << 14)
    await cluster.shards[0].kill()
    begun = 0
    begin = gateway.recorder.begin

    async def counted_begin(raw: bytes, leave: asyncio.Event | None = None) -> Any:
        nonlocal begun
        begun += 1
        return await begin(raw, leave)

    gateway.recorder.begin = counted_begin  # type: ignore[method-assign]

    async def requests(name: str) -> AsyncIterator[pb.StreamPlaysRequest]:
        for sequence in range(1, 21):
            filler = [Play(f"{name}-{sequence}-{number:0100}", NOW) for number in range(100)]
            yield stream_request(batch(sequence, [*plays_of(sequence), *filler], producer=name))

    calls = [gateway.stub.StreamPlays(requests(f"p{number}")) for number in range(5)]
    link = gateway.links["shard-0"]
    await until(lambda: link._waiting_bytes > 1 << 16)
    for _ in range(20):
        await asyncio.sleep(0.02)
        # One part beyond, and the three requests that came back unanswered: each of `part_bytes_max`.
        assert link._waiting_bytes <= (1 << 16) + 4 * (1 << 14)
    assert begun <= 5 * 4
    await cluster.shards[0].start()
    for call in calls:
        assert [ack.sequence async for ack in call] == list(range(1, 21))
    assert cluster.counted(COMMON_SONGS) == [100] * 40


async def test_a_full_disk_is_told_to_the_client_and_the_resend_counts(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    await cluster.begin(shards=2)
    gateway = await cluster.gateway()
    await record(gateway, batch(1, plays_of(1)))
    log = cluster.shards[0].core._open_log
    reserve = log.reserve

    def full(records: int, payload_bytes: int) -> None:
        raise DiskFullError("no room for the next group: free disk space")

    log.reserve = full  # type: ignore[method-assign]
    calls = [record(gateway, batch(sequence, plays_of(sequence))) for sequence in range(2, 8)]
    for failed in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(failed, grpc.RpcError)
        assert isinstance(from_rpc_error(failed), ResourceExhaustedError)
        assert is_retriable(failed)
    log.reserve = reserve  # type: ignore[method-assign]
    for sequence in range(2, 8):
        assert (await record(gateway, batch(sequence, plays_of(sequence)))).accepted == 41
    check_counted(cluster, 7)
    assert "never retrieved" not in caplog.text
