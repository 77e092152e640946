"""The client for programs without an event loop: the same code, run on a loop of its own.

All blocking clients of a process share one thread with one event loop, started with the first of them: gRPC's
completion queue serves one loop well and several badly. Each method is the asynchronous one, handed to that loop and
waited for; the types are carried over by ParamSpec, so there is one signature and one docstring. Two have a body here:
`record` puts the play into the buffer from the caller's thread and troubles the loop once a batch, not once a play;
`watch` is a generator, which no coroutine can be handed over as.
"""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from topk_grpc.changes import WatchUpdate
from topk_grpc.client.aio import TopKClient
from topk_grpc.client.buffer import Added
from topk_grpc.client.recorder import Recorder
from topk_grpc.client.stats import ClientStats
from topk_grpc.errors import TopKError
from topk_grpc.model import Window

P = ParamSpec("P")
R = TypeVar("R")


class LoopThread:
    """A thread that runs an event loop until the process ends."""

    def __init__(self) -> None:
        """Starts the thread."""
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="topk-client", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        """Runs a coroutine on the loop; returns or raises what it does.

        Raises:
            RuntimeError: called from the loop's own thread, as in on_rejected, where it would wait for itself.
        """
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("a blocking call inside on_rejected would wait for itself: let another thread make it")
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C in the caller's thread: nobody waits for it any more
            raise


_shared: LoopThread | None = None
_shared_lock = threading.Lock()


def shared_loop() -> LoopThread:
    """The process's one loop for blocking clients, started when first asked for."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = LoopThread()
        return _shared


def _forget_after_fork() -> None:
    """A forked child has the object but not the thread."""
    global _shared, _shared_lock
    _shared = None
    _shared_lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_after_fork)


def _blocking(
    method: Callable[Concatenate[TopKClient, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[BlockingTopKClient, P], R]:
    """The blocking form of a method of TopKClient."""

    @functools.wraps(method)
    def call(self: BlockingTopKClient, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._loop_thread.run(method(self._client, *args, **kwargs))

    return call


def _same_arguments(
    _model: Callable[Concatenate[Any, P], Any],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, P], None]]:
    """Gives a constructor the signature of another, for type checkers and IDEs."""

    def keep(constructor: Callable[..., None]) -> Callable[Concatenate[Any, P], None]:
        return functools.wraps(_model)(constructor)

    return keep


class _Updates:
    """The updates of a watch, one call each. A call that was given up may still be ending when the next one comes."""

    def __init__(self, updates: AsyncGenerator[WatchUpdate, None]) -> None:
        self._updates = updates
        self._lock = asyncio.Lock()

    async def next(self) -> WatchUpdate | None:
        async with self._lock:
            return await anext(self._updates, None)

    async def close(self) -> None:
        async with self._lock:
            await self._updates.aclose()


async def _recorder_of(client: TopKClient) -> Recorder:
    return client._recording()


class BlockingTopKClient:
    """`TopKClient` for programs without an event loop; any number of threads may use one object.

        with BlockingTopKClient("127.0.0.1:50050") as client:
            client.record("Boston - More Than a Feeling", charts=["US"])
            client.flush()                            # on disk and counted
            answer = client.top_k("tumbling:1d", k=100, chart="US")

    Arguments and methods are those of `TopKClient`. on_rejected is called on the thread that all blocking clients
    share: it has to be quick, and may not call the client.
    """

    @_same_arguments(TopKClient.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._client = TopKClient(*args, **kwargs)
        self._loop_thread = shared_loop()
        self._recorder = self._loop_thread.run(_recorder_of(self._client))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop_thread.run(self._client.__aexit__(kind, error, traceback))

    @property
    def producer_id(self) -> str:
        """The name of this source of batches."""
        return self._client.producer_id

    @property
    def stats(self) -> ClientStats:
        """Counts so far; the same object all along."""
        return self._client.stats

    def record(
        self, song_id: str, played_at: int | datetime | None = None, *, count: int = 1, charts: Sequence[str] = ()
    ) -> None:
        """Takes a play into the batch that is being filled; as `TopKClient.record`."""
        recorder = self._recorder
        added = recorder.add(song_id, played_at, count, charts)
        if added is Added.QUIET:
            return
        if added is Added.REFUSED:
            self._loop_thread.run(recorder.record(song_id, played_at, count, charts))
        else:
            self._loop_thread.loop.call_soon_threadsafe(recorder.follow_up, added)

    record_columns = _blocking(TopKClient.record_columns)
    flush = _blocking(TopKClient.flush)
    close = _blocking(TopKClient.close)
    top_k = _blocking(TopKClient.top_k)

    def watch(
        self,
        window: str | Window,
        k: int = 10,
        *,
        chart: str | None = None,
        latest: bool = False,
        allow_partial: bool = False,
        on_interrupted: Callable[[TopKError], None] | None = None,
    ) -> Generator[WatchUpdate, None, None]:
        """The k songs with the most plays in a window, now and whenever they change; as `TopKClient.watch`.

            for update in client.watch("sliding:10m/1m", k=10):
                print(update.answer.entries[0])

        on_interrupted is called on the thread that all blocking clients share, and may not call the client.
        """
        return self._iterate(
            self._client.watch(
                window, k, chart=chart, latest=latest, allow_partial=allow_partial, on_interrupted=on_interrupted
            )
        )

    def _iterate(self, updates: AsyncGenerator[WatchUpdate, None]) -> Generator[WatchUpdate, None, None]:
        steps = _Updates(updates)
        try:
            while (update := self._loop_thread.run(steps.next())) is not None:
                yield update
        finally:
            self._loop_thread.run(steps.close())

    songs = _blocking(TopKClient.songs)
    charts = _blocking(TopKClient.charts)
    describe = _blocking(TopKClient.describe)
