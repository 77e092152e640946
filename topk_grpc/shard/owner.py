"""The single writer of a shard, seen from the event loop.

One coroutine, `_run`, owns the state: everything that touches it is done by one turn of its loop, one job after
another. A turn takes what has gathered meanwhile: first a group of requests (as many as `group_bytes_max` allows share
one fdatasync), then the queries that wait. Groups and scans run on the writer's thread, and while it is at them the
event loop reads the next messages, so the group grows with the load. Short queries, which cost less than the way to
another thread, run in the loop itself, whenever the writer is not at the state: a lock says so, which is free while a
group is read and while it is on its way to disk. The writer answers those that come while it counts, part by part, and
while it moves a standing window, step by step.

Bounds: `queue_requests_max` requests wait (then `append` does, and with it the gateways' streams), `scan_queue_max`
scanning queries wait (then one more is refused), and identical ones that wait together are answered by one scan.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from topk_grpc import metrics
from topk_grpc.config import ShardSettings
from topk_grpc.engine.copies import Room
from topk_grpc.errors import NotReadyError, ResourceExhaustedError, StorageError, WriteFailedError
from topk_grpc.kernels import compiled
from topk_grpc.model import Window
from topk_grpc.rpc import log
from topk_grpc.shard.core import ShardCore

T = TypeVar("T")

_EXPIRY_SECONDS = 600.0
_SNAPSHOT_AGAIN_SECONDS = 30.0
_STANDING_SECONDS = 1.0
_WRITER_NICE = 5
"""Where processors are short, plays wait in the writer's queue, which takes more at once then, and not in the loops of
gateways and shards, where queries would wait with them. Not where kernels are not compiled: the writer then holds the
interpreter's lock all the time, and the loop would wait for it, too."""
_SNAPSHOT_NICE = 19


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
        self._writer = ThreadPoolExecutor(1, "writer", _stand_back, (_WRITER_NICE if compiled() else 0,))
        self._snapshots = ThreadPoolExecutor(1, "snapshot", _stand_back, (_SNAPSHOT_NICE,))
        self._requests: deque[tuple[bytes, asyncio.Future[bytes]]] = deque()
        self._short: deque[tuple[Callable[[ShardCore], Any], asyncio.Future[Any]]] = deque()
        self._changes: deque[tuple[Callable[[ShardCore], Any], asyncio.Future[Any]]] = deque()
        self._long: deque[tuple[Callable[[ShardCore], Any], asyncio.Future[Any]]] = deque()
        self._scans: dict[Hashable, asyncio.Future[Any]] = {}
        self._room = asyncio.Semaphore(settings.queue_requests_max)
        self._state = threading.Lock()
        self._work = asyncio.Event()
        self._snapshot_due = time.monotonic() + settings.snapshot_seconds
        self._expiry_due = time.monotonic() + _EXPIRY_SECONDS
        self._snapshot_not_before = 0.0
        self._snapshot_at = time.monotonic()
        self._snapshotting = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self._stopping = asyncio.Event()
        self.failed: asyncio.Future[WriteFailedError] = asyncio.get_running_loop().create_future()
        self._background(self._keep_standing())
        self._event_loop = asyncio.get_running_loop()
        self._loop_task = asyncio.create_task(self._run())
        self._loop_task.add_done_callback(self._loop_ended)

    # --- For metrics, from any thread ---------------------------------------------------------------------------------

    @property
    def waiting_requests(self) -> int:
        """Requests that wait for a group."""
        return len(self._requests)

    @property
    def waiting_scans(self) -> int:
        """Scanning queries that wait or run."""
        return len(self._scans)

    @property
    def snapshot_age_seconds(self) -> float:
        """Since the last snapshot was taken, or since the start while there was none."""
        return time.monotonic() - self._snapshot_at

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

    def _queue(
        self, jobs: deque[tuple[Callable[[ShardCore], Any], asyncio.Future[Any]]], job: Callable[[ShardCore], T]
    ) -> asyncio.Future[T]:
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        jobs.append((job, future))
        self._work.set()
        return future

    def _check_serving(self) -> None:
        if self._closing or self.failed.done():
            raise NotReadyError("the shard is stopping: ask again, it is back soon")

    def stands(self, window: Window | None) -> bool:
        """Whether a window is kept up to date, as far as can be seen without waiting."""
        return window in self._core.state.standing

    async def read(self, query: Callable[[ShardCore], T]) -> T:
        """Runs a query of well under a millisecond between two groups."""
        self._check_serving()
        answer = self._queue(self._short, query)
        self._run_short()
        return await answer

    async def change(self, job: Callable[[ShardCore], T]) -> T:
        """Runs a change of what the shard owns, before the next group: plays of the slots wait for it.

        Raises:
            NotReadyError: the shard is stopping.
        """
        self._check_serving()
        return await self._queue(self._changes, job)

    async def scan(self, key: Hashable, query: Callable[[ShardCore], T]) -> T:
        """Runs a query that looks at all entries between two groups; those with equal keys that wait run once.

        Raises:
            ResourceExhaustedError: too many wait already.
        """
        waiting: asyncio.Future[T] | None = self._scans.get(key)
        if waiting is None:
            if len(self._scans) >= self._settings.scan_queue_max:
                raise ResourceExhaustedError(
                    f"{len(self._scans)} scanning queries wait on this shard already: ask again later, or less often"
                    " (--scan-queue-max)"
                )
            self._check_serving()
            waiting = self._queue(self._long, query)
            self._scans[key] = waiting
            waiting.add_done_callback(lambda _: self._scans.pop(key, None))
        return await asyncio.shield(waiting)

    # --- The loop -----------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while not (self._closing and not self._work_left):
            await self._work.wait()
            self._work.clear()
            while self._changes:
                if not await self._run_on_writer(self._changes):
                    return
            group = self._take_group()
            if group:
                try:
                    answers = await loop.run_in_executor(self._writer, self._commit, [request for request, _ in group])
                except Exception as error:
                    self._fail(error, group)
                    return
                for (_, future), answer in zip(group, answers, strict=True):
                    _settle(future, answer)
            self._run_short()
            # One a turn, so that the next group need not wait for all.
            if self._long and not await self._run_on_writer(self._long):
                return
            if self._work_left:
                self._work.set()
            self._housekeeping()

    @property
    def _work_left(self) -> bool:
        return bool(self._requests or self._short or self._changes or self._long)

    async def _run_on_writer(self, jobs: deque[tuple[Callable[[ShardCore], Any], asyncio.Future[Any]]]) -> bool:
        """Does the first of these jobs; returns whether the log can be trusted after that."""
        job, future = jobs.popleft()
        answer = await asyncio.get_running_loop().run_in_executor(self._writer, self._run_job, job)
        _settle(future, answer)
        if isinstance(answer, WriteFailedError):  # it wrote to the log
            self._fail(answer, [])
            return False
        return True

    def _commit(self, requests: list[bytes]) -> list[bytes | Exception]:
        """Takes a group through, on the writer's thread. Queries need not wait for all of it."""
        parsed = self._core.parse(requests)
        with self._state:
            group = self._core.admit(parsed, now_ms())
            self.answer_short()
        self._core.write(group)
        with self._state:
            began = time.perf_counter()
            answers = self._core.count(group, self.answer_short)
        metrics.APPLY_SECONDS.observe(time.perf_counter() - began)
        return answers

    def answer_short(self) -> None:
        """Answers the short queries that wait; for jobs on the writer's thread to call when the state can be read."""
        while self._short:
            job, future = self._short.popleft()
            self._event_loop.call_soon_threadsafe(_settle, future, _attempt(job, self._core))

    def _run_job(self, job: Callable[[ShardCore], Any]) -> Any:
        """Runs a long job, on the writer's thread."""
        with self._state:
            return _attempt(job, self._core)

    def _loop_ended(self, task: asyncio.Task[None]) -> None:
        """A loop that failed by a defect must not leave a shard behind that never answers."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error, [])

    def _run_short(self) -> None:
        """Answers the short queries, unless the writer is at the state: then it is called again."""
        if self._short and self._state.acquire(blocking=False):
            try:
                while self._short:
                    job, future = self._short.popleft()
                    _settle(future, _attempt(job, self._core))
            finally:
                self._state.release()

    def _take_group(self) -> list[tuple[bytes, asyncio.Future[bytes]]]:
        group: list[tuple[bytes, asyncio.Future[bytes]]] = []
        size = 0
        while self._requests and (not group or size + len(self._requests[0][0]) <= self._settings.group_bytes_max):
            group.append(self._requests.popleft())
            size += len(group[-1][0])
            self._room.release()
        if group:
            metrics.GROUP_REQUESTS.observe(len(group))
            metrics.GROUP_BYTES.observe(size)
        return group

    def _fail(self, error: BaseException, group: list[tuple[bytes, asyncio.Future[bytes]]]) -> None:
        """Answers nobody of the group: what became of it is unknown. The rest is told to come again."""
        fatal = (
            error
            if isinstance(error, WriteFailedError)
            else WriteFailedError(f"the group could not be taken through: {error!r}")
        )
        log.error("log_failed", error=error)
        if not self.failed.done():
            self.failed.set_result(fatal)
        for _, future in [*group, *self._requests, *self._short, *self._changes, *self._long]:
            if not future.done():
                future.set_exception(fatal)
                future.exception()  # nobody may be listening any more

    # --- Snapshots and expiry -----------------------------------------------------------------------------------------

    def _housekeeping(self) -> None:
        now = time.monotonic()
        if now >= self._expiry_due:
            self._expiry_due = now + _EXPIRY_SECONDS
            self._background(self._expire_producers())
        grown = self._core.snapshot_log_bytes
        due = grown >= self._settings.snapshot_log_bytes or (grown and now >= self._snapshot_due)
        if due and now >= self._snapshot_not_before and not self._snapshotting and not self._closing:
            self._snapshot_due = now + self._settings.snapshot_seconds
            self._snapshotting = True
            self._background(self._take_snapshot())

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _as_job(self, job: Callable[[ShardCore], T]) -> T:
        """Runs a job on the state: as a turn of the loop or, when that has ended, right away."""
        if self._loop_task.done():
            return job(self._core)
        return await self._queue(self._long, job)

    async def _keep_standing(self) -> None:
        """Moves the standing windows by the clock, whether plays arrive or not."""
        while not self._closing and not self.failed.done():
            if len(self._core.state.standing):
                try:
                    await self._as_job(lambda core: core.move_standing(now_ms(), self.answer_short))
                except StorageError as error:
                    log.warning("standing_windows_failed", error=error)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _STANDING_SECONDS)

    async def _expire_producers(self) -> None:
        try:
            forgotten = await self._as_job(lambda core: core.expire_producers(now_ms()))
        except StorageError as error:
            log.warning("expiry_failed", error=error)
            return
        if forgotten:
            log.event("producers_expired", producers=forgotten)

    async def _take_snapshot(self) -> None:
        started = time.monotonic()
        try:
            loop = asyncio.get_running_loop()
            room = await loop.run_in_executor(self._snapshots, Room, await self._as_job(ShardCore.snapshot_room))
            begun = time.monotonic()
            pending = await self._as_job(lambda core: core.begin_snapshot(room))
            copied = time.monotonic()
            blocks = await loop.run_in_executor(self._snapshots, self._core.write_snapshot, pending)
            await self._as_job(lambda core: core.end_snapshot(pending, blocks))
            await loop.run_in_executor(self._snapshots, self._core.clear_snapshot, pending, blocks)
        except StorageError as error:
            self._snapshot_not_before = time.monotonic() + _SNAPSHOT_AGAIN_SECONDS  # a full disk does not empty at once
            metrics.SNAPSHOTS_FAILED.inc()
            log.warning("snapshot_failed", error=error)
            return
        finally:
            self._snapshotting = False
        self._snapshot_at = begun
        seconds = time.monotonic() - started
        metrics.SNAPSHOT_SECONDS.observe(seconds)
        log.event(
            "snapshot_taken",
            position=pending.position,
            seconds=round(seconds, 3),
            writes_held_seconds=round(copied - begun, 3),
        )

    async def close(self, *, snapshot: bool, seconds: float | None = None, urgent: asyncio.Event | None = None) -> bool:
        """Takes what is queued through and, if asked, a last snapshot: a start then has no log to replay. Ends.

        Args:
            snapshot: whether to take one.
            seconds: how long all of it may take; a snapshot that takes longer is given up.
            urgent: when set, a snapshot is given up at once.

        Returns:
            Whether everything has ended. If not, a thread still waits for the disk: the process has to end without it.
            The log is sealed all the same, unless it is the log that waits.
        """
        until = None if seconds is None else asyncio.get_running_loop().time() + seconds
        self._closing = True
        self._stopping.set()
        self._work.set()
        if not await _end_in_time([self._loop_task], until):
            log.warning("stop_unfinished", consequence="the log waits for the disk: it is not sealed")
            return False
        tasks = list(self._tasks)
        if snapshot:
            tasks.append(asyncio.create_task(self._take_last_snapshot(list(self._tasks))))
        ended = await _end_in_time(tasks, until, urgent)
        if not ended:
            log.warning("snapshot_given_up", consequence="the next start replays more of the log")
        if not self.failed.done():
            self._core.seal()
        if ended:
            if not self.failed.done():
                self._core.close()
            self._writer.shutdown()
            self._snapshots.shutdown()
        return ended

    async def _take_last_snapshot(self, others: list[asyncio.Task[None]]) -> None:
        await asyncio.gather(*others)
        if not self.failed.done() and self._core.snapshot_log_bytes:
            await self._take_snapshot()


async def _end_in_time(
    tasks: Sequence[asyncio.Task[None]], until: float | None, urgent: asyncio.Event | None = None
) -> bool:
    """Waits for all of them; not beyond a time of the loop, nor when it has become urgent. Whether they have ended."""
    hurry = None if urgent is None else asyncio.ensure_future(urgent.wait())
    everything = asyncio.gather(*tasks)
    try:
        left = None if until is None else max(0.0, until - asyncio.get_running_loop().time())
        watched: list[asyncio.Future[Any]] = [everything] if hurry is None else [everything, hurry]
        await asyncio.wait(watched, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if everything.done():
            everything.result()
        return everything.done()
    finally:
        if hurry is not None:
            hurry.cancel()


def _stand_back(nice: int) -> None:
    """Lets other threads have the processor first: the more so, the nicer this one is."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)


def _settle(future: asyncio.Future[Any], answer: Any) -> None:
    if future.done():  # the caller has gone
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
        future.exception()  # a stream that has ended at the first failure asks for no more
    else:
        future.set_result(answer)


def _attempt(job: Callable[[ShardCore], Any], core: ShardCore) -> Any:
    try:
        return job(core)
    except Exception as error:
        return error
