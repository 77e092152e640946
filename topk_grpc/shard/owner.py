"""The single writer of a shard, seen from the event loop.

All that touches the state runs on one thread, one job after another; the event loop only hands over and waits. A turn of the loop
takes what has gathered meanwhile: first a group of requests (as many as `group_bytes_max` allows share one fdatasync), then the
queries that wait. While the thread is at it the event loop reads the next messages, so the group grows with the load.

Bounds: `queue_requests_max` requests wait (then `append` does, and with it the gateways' streams), `scan_queue_max` scanning queries
wait (then one more is refused), and identical ones that wait together are answered by one scan.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from topk_grpc.config import ShardSettings
from topk_grpc.errors import NotReadyError, ResourceExhaustedError, StorageError, WriteFailedError
from topk_grpc.rpc import log
from topk_grpc.shard.core import ShardCore

T = TypeVar("T")

_EXPIRY_SECONDS = 600.0


def now_ms() -> int:
    """The clock: milliseconds since the Unix epoch."""
    return time.time_ns() // 1_000_000


class ShardOwner:
    """Runs a core that has recovered. Belongs to the event loop it was made in.

    Attributes:
        failed: done when the log can no longer be trusted: the process must end.
    """

    def __init__(self, core: ShardCore, settings: ShardSettings) -> None:
        self._core = core
        self._settings = settings
        self._writer = ThreadPoolExecutor(1, "writer")
        self._snapshots = ThreadPoolExecutor(1, "snapshot")
        self._requests: deque[tuple[bytes, asyncio.Future[bytes]]] = deque()
        self._reads: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()
        self._scans: dict[Hashable, asyncio.Future[Any]] = {}
        self._room = asyncio.Semaphore(settings.queue_requests_max)
        self._work = asyncio.Event()
        self._snapshot_due = time.monotonic() + settings.snapshot_seconds
        self._expiry_due = time.monotonic() + _EXPIRY_SECONDS
        self._snapshot_task: asyncio.Task[None] | None = None
        self._closing = False
        self.failed: asyncio.Future[WriteFailedError] = asyncio.get_running_loop().create_future()
        self._loop_task = asyncio.create_task(self._run())

    # --- What others ask ----------------------------------------------------------------------------------------------

    async def append(self, request: bytes) -> asyncio.Future[bytes]:
        """Queues an AppendRequest; waits only while the queue is full.

        Returns:
            Its AppendResponse, once it is on disk and applied.
        """
        await self._room.acquire()
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        if self._closing or self.failed.done():
            self._room.release()
            raise NotReadyError("the shard is stopping: send the batch again, it is back soon")
        self._requests.append((request, future))
        self._work.set()
        return future

    async def read(self, query: Callable[[ShardCore], T]) -> T:
        """Runs a short query between two groups."""
        if self._closing or self.failed.done():
            raise NotReadyError("the shard is stopping: ask again, it is back soon")
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._reads.append((lambda: query(self._core), future))
        self._work.set()
        return await future

    async def scan(self, key: Hashable, query: Callable[[ShardCore], T]) -> T:
        """Runs a query that looks at all entries between two groups; those with equal keys that wait run once.

        Raises:
            ResourceExhaustedError: too many wait already.
        """
        waiting: asyncio.Future[T] | None = self._scans.get(key)
        if waiting is None:
            if len(self._scans) >= self._settings.scan_queue_max:
                raise ResourceExhaustedError(
                    f"{len(self._scans)} scanning queries wait on this shard already: ask again later, or less often (--scan-queue-max)"
                )
            waiting = asyncio.ensure_future(self.read(query))
            self._scans[key] = waiting
            waiting.add_done_callback(lambda _: self._scans.pop(key, None))
        return await asyncio.shield(waiting)

    # --- The loop -----------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while not (self._closing and not self._requests and not self._reads):
            await self._work.wait()
            self._work.clear()
            group = self._take_group()
            if group:
                try:
                    answers = await loop.run_in_executor(self._writer, self._core.commit, [request for request, _ in group], now_ms())
                except Exception as error:
                    self._fail(error, group)
                    return
                for (_, future), answer in zip(group, answers, strict=True):
                    _settle(future, answer)
            reads = list(self._reads)
            self._reads.clear()
            if reads:
                answers = await loop.run_in_executor(self._writer, _run_all, [query for query, _ in reads])
                for (_, future), answer in zip(reads, answers, strict=True):
                    _settle(future, answer)
            if self._requests or self._reads:
                self._work.set()
            await self._housekeeping()

    def _take_group(self) -> list[tuple[bytes, asyncio.Future[bytes]]]:
        group = []
        size = 0
        while self._requests and (not group or size + len(self._requests[0][0]) <= self._settings.group_bytes_max):
            group.append(self._requests.popleft())
            size += len(group[-1][0])
            self._room.release()
        return group

    def _fail(self, error: Exception, group: list[tuple[bytes, asyncio.Future[bytes]]]) -> None:
        """Answers nobody of the group: what became of it is unknown. The rest is told to come again."""
        fatal = error if isinstance(error, WriteFailedError) else WriteFailedError(f"the group could not be taken through: {error!r}")
        log.error("log_failed", error=error)
        if not self.failed.done():
            self.failed.set_result(fatal)
        for _, future in [*group, *self._requests, *self._reads]:
            if not future.done():
                future.set_exception(fatal)
                future.exception()  # nobody may be listening any more

    # --- Snapshots and expiry -----------------------------------------------------------------------------------------

    async def _housekeeping(self) -> None:
        now = time.monotonic()
        if now >= self._expiry_due:
            self._expiry_due = now + _EXPIRY_SECONDS
            forgotten = await self._on_writer(lambda: self._core.expire_producers(now_ms()))
            if forgotten:
                log.event("producers_expired", producers=forgotten)
        grown = self._core.snapshot_log_bytes
        if self._snapshot_task is None and (grown >= self._settings.snapshot_log_bytes or (grown and now >= self._snapshot_due)):
            self._snapshot_due = now + self._settings.snapshot_seconds
            self._snapshot_task = asyncio.create_task(self._take_snapshot())
            self._snapshot_task.add_done_callback(self._snapshot_done)

    def _snapshot_done(self, _: asyncio.Task[None]) -> None:
        self._snapshot_task = None

    async def _on_writer(self, job: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._writer, job)

    async def _take_snapshot(self) -> None:
        started = time.monotonic()
        try:
            pending = await self._on_writer(self._core.begin_snapshot)
            copied = time.monotonic()
            blocks = await asyncio.get_running_loop().run_in_executor(self._snapshots, self._core.write_snapshot, pending)
            await self._on_writer(lambda: self._core.end_snapshot(pending, blocks))
        except StorageError as error:
            log.warning("snapshot_failed", error=error)
            return
        log.event(
            "snapshot_taken", position=pending.position, seconds=round(time.monotonic() - started, 3), writes_held_seconds=round(copied - started, 3)
        )

    async def close(self, *, snapshot: bool) -> None:
        """Takes what is queued through, takes a last snapshot if asked (a start then has no log to replay), and ends."""
        self._closing = True
        self._work.set()
        await self._loop_task
        if self._snapshot_task is not None:
            await self._snapshot_task
        if snapshot and not self.failed.done() and self._core.snapshot_log_bytes:
            await self._take_snapshot()
        if not self.failed.done():
            await self._on_writer(self._core.close)
        self._writer.shutdown()
        self._snapshots.shutdown()


def _settle(future: asyncio.Future[Any], answer: Any) -> None:
    if future.done():  # the caller has gone
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(answer)


def _run_all(queries: list[Callable[[], Any]]) -> list[Any]:
    answers: list[Any] = []
    for query in queries:
        try:
            answers.append(query())
        except Exception as error:
            answers.append(error)
    return answers
