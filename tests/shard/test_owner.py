"""The owner: one writer seen from the event loop. What is queued, shared, refused, answered, and how it ends."""

from __future__ import annotations

import asyncio
import errno
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.engine.engine_shard import NOW, append_request, outcome_of
from tests.oracle import ModelOutcome
from tests.shard.cores import PATH, check_numbered, counted, new_disk, numbered, open_core, settings_of
from tests.storage.simulated_disk import fail_on
from topk_grpc.errors import (
    DiskFullError,
    InvalidArgumentError,
    NotReadyError,
    ResourceExhaustedError,
    WriteFailedError,
)
from topk_grpc.model import Play
from topk_grpc.pb.topk.v1 import shard_service_pb2 as pb
from topk_grpc.shard import owner as owner_module
from topk_grpc.shard.core import ShardCore
from topk_grpc.shard.owner import ShardOwner
from topk_grpc.storage import Files


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner_module, "now_ms", lambda: NOW)


async def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


class Gate:
    """Holds the writer's thread, as a long scan would."""

    def __init__(self, owner: ShardOwner) -> None:
        self._owner, self._open, self._entered = owner, threading.Event(), threading.Event()

    async def __aenter__(self) -> Gate:
        def hold(_: ShardCore) -> str:
            self._entered.set()
            assert self._open.wait(30)
            return "held"

        self._held = asyncio.create_task(self._owner.scan(("gate", id(self)), hold))
        await until(self._entered.is_set)
        return self

    async def open(self) -> None:
        self._open.set()
        assert await self._held == "held"

    async def __aexit__(self, *_: object) -> None:
        await self.open()


@asynccontextmanager
async def running(files: Files | None = None, path: Path = PATH, **changes: Any) -> AsyncIterator[ShardOwner]:
    core = open_core(path, files, **changes)
    owner = ShardOwner(core, settings_of(path, **changes))
    try:
        yield owner
    finally:
        await owner.close(snapshot=False)


async def submit(owner: ShardOwner, sequence: int) -> Awaitable[bytes]:
    return await owner.append(append_request([numbered(sequence)], sequence))


def outcome(answer: bytes) -> ModelOutcome:
    (message,) = pb.AppendResponse.FromString(answer).outcomes
    return outcome_of(message)


async def turns(many: int = 20) -> None:
    for _ in range(many):
        await asyncio.sleep(0)


async def test_what_gathers_while_the_writer_is_busy_shares_one_sync() -> None:
    disk = new_disk()
    async with running(disk) as owner:
        assert not outcome(await (await submit(owner, 1))).duplicate
        async with Gate(owner):
            disk.operations.clear()
            futures = [await submit(owner, sequence) for sequence in [*range(2, 12), 5]]
        answers = await asyncio.gather(*futures)
        assert [operation.split()[0] for operation in disk.operations] == ["write", "sync"]
        assert [pb.AppendResponse.FromString(answer).request_id for answer in answers] == [*range(2, 12), 5]
        assert [outcome(answer).duplicate for answer in answers] == [False] * 10 + [True]
        await owner.read(lambda core: check_numbered(core, set(range(1, 12)), 12))


async def test_a_group_ends_at_its_bytes() -> None:
    disk = new_disk()
    async with running(disk, group_bytes_max=1 << 16) as owner:
        large = numbered(1, songs=2000)
        request = append_request([large])
        assert 1 << 15 < len(request) < 1 << 16
        async with Gate(owner):
            disk.operations.clear()
            futures = [await owner.append(request) for _ in range(3)]
        await asyncio.gather(*futures)
        assert await owner.read(lambda core: counted(core, ["batch-1"])) == [1]


async def test_a_full_queue_makes_the_next_one_wait() -> None:
    async with running(new_disk(), queue_requests_max=2) as owner:
        async with Gate(owner):
            futures = [await submit(owner, 1), await submit(owner, 2)]
            third = asyncio.create_task(submit(owner, 3))
            await turns()
            assert not third.done()
        futures.append(await third)
        await asyncio.gather(*futures)
        await owner.read(lambda core: check_numbered(core, {1, 2, 3}, 3))


async def test_equal_scans_that_wait_run_once_and_one_too_many_is_refused() -> None:
    ran: list[str] = []

    def job(name: str) -> Callable[[ShardCore], str]:
        def run(_: ShardCore) -> str:
            ran.append(name)
            return name

        return run

    async with running(new_disk(), scan_queue_max=3) as owner:
        async with Gate(owner):
            waiting = [asyncio.create_task(owner.scan("a", job("a"))) for _ in range(5)]
            waiting.append(asyncio.create_task(owner.scan("b", job("b"))))
            await turns()
            with pytest.raises(ResourceExhaustedError, match="scan-queue-max"):
                await owner.scan("c", job("c"))
            waiting.append(asyncio.create_task(owner.scan("b", job("b"))))
            await turns()
            waiting[0].cancel()  # whose caller has gone; the others still want it
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(answers[0], asyncio.CancelledError)
        assert answers[1:] == ["a"] * 4 + ["b"] * 2
        assert ran == ["a", "b"]
        assert await owner.scan("a", job("a")) == "a"  # a later one runs anew
        assert ran == ["a", "b", "a"]


async def test_a_query_sees_all_that_was_acknowledged_before_it() -> None:
    async with running(new_disk()) as owner:
        for sequence in range(1, 20):
            await (await submit(owner, sequence))
            found = await asyncio.gather(
                owner.read(lambda core: counted(core, ["shared-0"])),
                owner.scan("same key", lambda core: counted(core, ["shared-0"])),
            )
            assert list(found) == [[sequence], [sequence]]


async def test_a_query_that_fails_hurts_nobody_else() -> None:
    async with running(new_disk()) as owner:
        for ask in (owner.read, lambda job: owner.scan("x", job)):
            with pytest.raises(ZeroDivisionError):
                await ask(lambda _: 1 // 0)
        with pytest.raises(InvalidArgumentError):
            await (await owner.append(b"\xff\xff"))
        assert not outcome(await (await submit(owner, 1))).duplicate


async def test_close_takes_through_what_is_queued_and_leaves_a_snapshot(tmp_path: Path) -> None:
    core = open_core(tmp_path)
    owner = ShardOwner(core, settings_of(tmp_path, queue_requests_max=3))
    async with Gate(owner):
        futures = [await submit(owner, sequence) for sequence in (1, 2, 3)]
        late = asyncio.create_task(submit(owner, 4))
        scan = asyncio.create_task(owner.scan("all", lambda core: counted(core, ["shared-0"])))
        await turns()
        closing = asyncio.create_task(owner.close(snapshot=True))
        await turns()
        assert not closing.done()
    await closing
    assert [outcome(await future).duplicate for future in futures] == [False] * 3
    assert await scan == [3]
    for refused in (late, submit(owner, 5), owner.read(len), owner.scan("x", len)):  # type: ignore[arg-type]
        with pytest.raises(NotReadyError, match="stopping"):
            await refused
    assert len(list((tmp_path / "snapshots").iterdir())) == 1
    core = open_core(tmp_path)
    check_numbered(core, {1, 2, 3}, 5)
    core.close()


async def test_a_failed_sync_answers_nobody_and_ends_the_owner(caplog: pytest.LogCaptureFixture) -> None:
    disk = new_disk()
    core = open_core(PATH, disk)
    owner = ShardOwner(core, settings_of(PATH))
    await (await submit(owner, 1))
    async with Gate(owner):
        group = [await submit(owner, sequence) for sequence in (2, 3)]
        scan = asyncio.create_task(owner.scan("later", len))  # type: ignore[arg-type]
        await turns()
        disk.fault = fail_on("sync", "", errno.EIO)
    for future in group:
        with pytest.raises(WriteFailedError):
            await future
    with pytest.raises(WriteFailedError):
        await scan
    assert isinstance(owner.failed.result(), WriteFailedError)
    for refused in (submit(owner, 4), owner.read(len), owner.scan("x", len)):  # type: ignore[arg-type]
        with pytest.raises(NotReadyError):
            await refused
    await owner.close(snapshot=True)
    assert not any("snapshots/" in operation for operation in disk.operations)  # of a state that may be wrong
    assert "log_failed" in caplog.text
    core._directory.close()
    for _, survivor in disk.survivors():
        again = open_core(PATH, survivor)
        assert counted(again, ["batch-1"]) == [1]
        assert counted(again, ["batch-2"]) == counted(again, ["batch-3"])
        again.close()


async def test_a_full_disk_is_told_and_the_owner_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    disk = new_disk()
    async with running(disk) as owner:
        await (await submit(owner, 1))
        disk.fault = fail_on("reserve", "", errno.ENOSPC, times=1000)
        async with Gate(owner):
            large = append_request([numbered(2, songs=3000)])
            futures = [await owner.append(large) for _ in range(3)]
        with pytest.raises(DiskFullError):
            await futures[0]
        del futures  # a stream that has ended looks at the first failure only
        await owner.read(lambda core: check_numbered(core, {1}, 3))
        disk.fault = None
        assert not outcome(await (await owner.append(large))).duplicate
    await turns()
    assert "never retrieved" not in caplog.text


async def test_snapshots_are_taken_as_the_log_grows_and_the_log_is_cut(tmp_path: Path) -> None:
    sequence = 0
    async with running(path=tmp_path, snapshot_log_bytes=1 << 16) as owner:
        while not (tmp_path / "snapshots/000003").exists() or (tmp_path / f"log/{0:020}.log").exists():
            sequence += 1
            await (await owner.append(append_request([numbered(sequence, songs=3 + 1000 * (sequence % 3 == 0))])))
            assert sequence < 2000
    core = open_core(tmp_path)
    expected = [int(number <= sequence) for number in range(1, sequence + 2)]
    assert counted(core, [f"batch-{number}" for number in range(1, sequence + 2)]) == expected
    core.close()


async def test_a_snapshot_that_fails_is_not_tried_again_with_every_group(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    disk = new_disk()
    disk.make_directory(PATH)
    async with running(disk, snapshot_log_bytes=1 << 16) as owner:

        def full(operation: str, path: Path) -> None:
            if operation == "create" and "log" not in path.parts:
                raise OSError(errno.ENOSPC, "full", str(path))

        disk.fault = full
        for sequence in range(1, 60):
            await (await owner.append(append_request([numbered(sequence, songs=1000)])))
        await until(lambda: "snapshot_failed" in caplog.text)
        assert caplog.text.count("snapshot_failed") == 1
        disk.fault = None


async def test_idle_producers_are_forgotten_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner_module, "_EXPIRY_SECONDS", 0.05)
    async with running(new_disk(), producer_ttl_seconds=60.0) as owner:
        await (await submit(owner, 1))
        monkeypatch.setattr(owner_module, "now_ms", lambda: NOW + 61_000)
        async with asyncio.timeout(20):
            while await owner.read(lambda core: len(core.state.producers)):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        assert outcome(await (await submit(owner, 1))).expired
        assert await owner.read(lambda core: counted(core, ["batch-1"])) == [1]


async def test_plays_alone_or_beside_snapshots_are_all_counted(tmp_path: Path) -> None:
    """Many streams at once, snapshots all the time, queries between."""
    async with running(path=tmp_path, snapshot_log_bytes=1 << 16, group_bytes_max=1 << 16) as owner:

        async def produce(producer: str) -> None:
            for sequence in range(1, 41):
                part = numbered(sequence, songs=100)
                part = type(part)(producer, part.sequence, part.first_sent_ms, part.plays)
                assert not outcome(await (await owner.append(append_request([part])))).duplicate

        await asyncio.gather(*(produce(f"p{number}") for number in range(6)))
        found = await owner.read(lambda core: counted(core, ["batch-1", "batch-40", "shared-0", "shared-99"]))
        assert found == [6, 6, 240, 24_000]
        (later,) = (numbered(41),)
        await (await owner.append(append_request([later])))
    core = open_core(tmp_path)
    assert counted(core, ["batch-1", "batch-41", "shared-0", "shared-99"]) == [6, 1, 241, 24_000]
    core.close()


def test_play_is_what_tests_think_it_is() -> None:
    assert numbered(1).plays[0][1] == Play("batch-1", NOW + 1, 1, ("x",))
