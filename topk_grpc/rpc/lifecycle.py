"""How a server's process comes to its end: signals, the parent's going, and a stop within a given time."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from typing import Final, Never

import grpc

from topk_grpc.rpc import log
from topk_grpc.rpc.health import Health

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Somebody wants this process to end.

    Install it before anything that takes long, so that a signal during recovery is heard too. A second signal means
    "now": `urgent` is set, and `graceful_stop` waits no longer.

    After `delay_by` the process is `leaving` for so long before it is asked to end: it says that it is not ready, and
    serves on, so that whoever sends it calls has time to hear of it.

    Whatever hangs, the process has ended `seconds` after the first one: a thread of its own sees to that, since one
    that waits for a disk cannot be told to stop, and holds up the interpreter's own end.
    """

    def __init__(self) -> None:
        self.leaving = asyncio.Event()
        self.urgent = asyncio.Event()
        self._delay = 0.0
        self._asked = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._seconds: float | None = None
        self._until = 0.0
        self.reason = ""

    @property
    def asked(self) -> bool:
        """Whether the process shall end."""
        return self._asked.is_set()

    @property
    def event(self) -> asyncio.Event:
        """Set when the process shall end: what `rpc.streams.messages` takes as its drain."""
        return self._asked

    def ask(self, reason: str) -> None:
        """Asks; the second time means now. From the event loop's thread."""
        if self.leaving.is_set():
            self.urgent.set()
            self._end()
            return
        self.reason = reason
        self.leaving.set()
        if self._delay:
            self._loop.call_later(self._delay, self._end)
        else:
            self._end()

    def _end(self) -> None:
        if self._asked.is_set():
            return
        if self._seconds is not None:
            self._until = self._loop.time() + self._seconds
            threading.Thread(target=self._end_late, args=(self._seconds,), name="stop", daemon=True).start()
        self._asked.set()

    def delay_by(self, seconds: float) -> None:
        """From here on others send this process calls: it is leaving for so long before it is asked to end."""
        self._delay = seconds

    @property
    def seconds_left(self) -> float | None:
        """How long the process may still take to end, once it was asked to; None: as long as it likes."""
        return None if self._seconds is None else max(0.0, self._until - self._loop.time())

    def install(self, *, stdin: bool = False, seconds: float | None = None) -> StopRequest:
        """Listens for SIGTERM and SIGINT and, if asked, for the end of standard input.

        Args:
            stdin: the parent holds the other end of a pipe and thereby lets this process end with it, however it ends.
            seconds: this long after it was asked to the process has ended, with status 0; None: there is no bound.

        Returns:
            Itself.
        """
        for each in _SIGNALS:
            self._loop.add_signal_handler(each, self.ask, each.name)
        if stdin:
            # A thread, as not everything that can be standard input can be waited for by an event loop.
            threading.Thread(target=self._watch_stdin, name="stdin", daemon=True).start()
        return self

    def uninstall(self) -> None:
        """Gives the signals back."""
        for each in _SIGNALS:
            self._loop.remove_signal_handler(each)

    async def wait(self) -> str:
        """Waits until somebody asks.

        Returns:
            Who: `SIGTERM`, `SIGINT`, `stdin` or what `ask` was given.
        """
        await self._asked.wait()
        return self.reason

    @staticmethod
    def end_now() -> Never:
        """Ends the process with status 0 and waits for no thread. What it holds on disk must be safe to leave so."""
        sys.stderr.flush()
        os._exit(0)

    def _end_late(self, seconds: float) -> None:
        time.sleep(seconds)
        log.warning(
            "stop_given_up",
            consequence="what was not finished is left to the next start",
            stop_seconds=seconds,
        )
        self.end_now()

    def _watch_stdin(self) -> None:
        try:
            # The descriptor, as the buffered reader's lock must not be held when the interpreter ends.
            while os.read(sys.__stdin__.fileno() if sys.__stdin__ else 0, 4096):
                pass
        except (OSError, ValueError):
            pass
        try:
            self._loop.call_soon_threadsafe(self._stdin_ended)
        except RuntimeError:
            return  # the loop is closed: the process ends anyway

    def _stdin_ended(self) -> None:
        if not self.leaving.is_set():  # its end after a signal is no second wish
            self.ask("stdin")


async def graceful_stop(
    servers: Iterable[grpc.aio.Server], health: Health, seconds: float, urgent: asyncio.Event | None = None
) -> None:
    """Stops servers: no new calls, those under way may end, then they are cut.

    Handlers of long streams have to be told beforehand, by the drain event they wait for.

    Args:
        servers: the main server and, where there is one, the health server.
        health: answers not ready from here on; its watches end.
        seconds: how long calls may take to end.
        urgent: when set, calls are cut at once.
    """
    await health.close()
    servers = list(servers)
    hurry = None if urgent is None else asyncio.ensure_future(urgent.wait())
    stopping = asyncio.gather(*(server.stop(seconds) for server in servers))
    try:
        if hurry is not None:
            await asyncio.wait((stopping, hurry), return_when=asyncio.FIRST_COMPLETED)
            if hurry.done():
                await asyncio.gather(*(server.stop(None) for server in servers))
        await stopping
    finally:
        if hurry is not None:
            hurry.cancel()


async def serve_until_stopped(
    servers: Iterable[grpc.aio.Server], health: Health, stop: StopRequest, drain_seconds: float
) -> None:
    """Waits for the request to stop, not ready any more while the process is leaving; then stops within a time.

    Streams that read by `rpc.streams.messages(requests, stop.event)` come to their end by themselves.

    Args:
        servers: started ones.
        health: of these servers.
        stop: installed.
        drain_seconds: how long calls may take to end.
    """
    await stop.leaving.wait()
    await health.set(ready=False)
    if not stop.asked:
        log.event("leaving", reason=stop.reason)
    reason = await stop.wait()
    log.event("stopping", reason=reason, drain_seconds=drain_seconds)
    await graceful_stop(servers, health, drain_seconds, stop.urgent)
    log.event("stopped")
