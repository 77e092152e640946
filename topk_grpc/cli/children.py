"""A server process that is kept running: started by exec, started again when it dies, stopped when asked.
 Theory of operation. One task a child goes round and round:

    start → pass its stderr on line by line → it ends → wait (backoff) → start …

- The child's standard input is a pipe that nobody writes to. It ends when this process does, however that happens,
  and the child, told `--exit-with-stdin`, stops: so none outlives its supervisor, not even after kill -9.
- A session of its own keeps a terminal's Ctrl-C away from the child: the supervisor stops them in its own order.
- A child that was never ready and says by its exit status that starting it again cannot help (a damaged log, a wrong
  setting) has failed, with the last line it wrote as the reason; one that keeps ending otherwise (a port in use) has
  failed after `STARTS_MAX` starts. One that was ready once is started again for as long as the supervisor lives, at
  most every `BACKOFF_SECONDS_MAX`: whatever is wrong with it now, the others go on serving.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from topk_grpc.cli.failures import FINAL, USAGE
from topk_grpc.errors import ProcessFailedError

STARTS_MAX: Final = 5
"""Starts of a child that never gets ready, before it counts as failed."""

BACKOFF_SECONDS: Final = 0.2
BACKOFF_SECONDS_MAX: Final = 5.0
"""The wait before a child is started again doubles from the first to the second; short again after a long life."""

_LONG_LIFE_SECONDS: Final = 30.0
_LINE_BYTES_MAX: Final = 1 << 16
_KILL_SECONDS: Final = 5.0
_HOPELESS: Final = frozenset({USAGE, FINAL})

OnLine = Callable[[str, str], None]
"""Is called with a child's name and each line of its stderr."""


class Child:
    """One process that is kept running.

    Attributes:
        name: for messages.
        starts: how often it was started.
        ready: set while a process runs that has said so on its standard output, by a line `ready: …`.
        was_ready: set by whoever knows; see `STARTS_MAX`.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], on_line: OnLine) -> None:
        """Nothing runs before `start`."""
        self.name = name
        self.starts = 0
        self.was_ready = False
        self.ready = asyncio.Event()
        self._command = list(command)
        self._environment = dict(environment)
        self._on_line = on_line
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._last_line = ""
        self._code = 0

    @property
    def pid(self) -> int | None:
        """The process id, while one runs."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    def start(self) -> asyncio.Task[None]:
        """Starts it.

        Returns:
            A task that ends with a ProcessFailedError when the child failed for good, and without one after `stop`.
        """
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"child {self.name}")
        return self._task

    async def stop(self, seconds: float) -> None:
        """Sends SIGTERM and waits; SIGKILL when it takes longer. Returns when it has ended."""
        self._stopping = True
        task, process = self._task, self._process
        if task is None:
            return
        if process is None or process.returncode is not None:
            task.cancel()  # it waits for its next start
        else:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        await asyncio.wait({task}, timeout=seconds)
        if not task.done():
            self._on_line(self.name, f"did not stop within {seconds:g} s: killed")
            self.kill()
            await asyncio.wait({task}, timeout=_KILL_SECONDS)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal to the process, if one runs; it is started again unless `stop` was called."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _run(self) -> None:
        wait_seconds = BACKOFF_SECONDS
        while not self._stopping:
            began = time.monotonic()
            ending = await self._run_once()
            if self._stopping:
                return
            if not self.was_ready and (self._code in _HOPELESS or self.starts >= STARTS_MAX):
                times = f", {self.starts} times" if self.starts > 1 else ""
                raise ProcessFailedError(f"{self.name} does not start ({ending}{times}): {self._reason()}")
            if time.monotonic() - began > _LONG_LIFE_SECONDS:
                wait_seconds = BACKOFF_SECONDS
            self._on_line(self.name, f"{ending}; it is started again in {wait_seconds:g} s")
            await asyncio.sleep(wait_seconds)
            wait_seconds = min(2 * wait_seconds, BACKOFF_SECONDS_MAX)

    async def _run_once(self) -> str:
        """Runs the process to its end. Returns how it ended, in words."""
        self._last_line = ""
        self.ready.clear()
        self.starts += 1
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self._environment,
            # Ctrl-C is for the parent. A session of its own would shield it as well, but the scheduler shares out the
            # processors among sessions first (sched(7), autogroup): a query would wait with the plays of its shard.
            # uvloop knows no `process_group`; what it runs here is one system call.
            preexec_fn=os.setpgrp,
        )
        self._process = process
        if self._stopping:  # asked while it was being started
            process.terminate()
        if process.stdout is not None and process.stderr is not None:
            await asyncio.gather(
                self._pass_on(process.stderr, self._take_line), self._pass_on(process.stdout, self._take_output)
            )
        code = self._code = await process.wait()
        self.ready.clear()
        if code < 0:
            return f"ended by {signal.Signals(-code).name}"
        return f"ended with exit status {code}"

    async def _pass_on(self, stream: asyncio.StreamReader, take: Callable[[bytes], None]) -> None:
        rest = b""
        while chunk := await stream.read(_LINE_BYTES_MAX):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > _LINE_BYTES_MAX:
                lines, rest = [*lines, rest], b""
            for line in lines:
                take(line)
        if rest:
            take(rest)

    def _take_output(self, raw: bytes) -> None:
        if raw.startswith(b"ready: "):
            self.ready.set()

    def _take_line(self, raw: bytes) -> None:
        line = raw.decode(errors="replace").rstrip()
        if line:
            self._last_line = line
            self._on_line(self.name, line)

    def _reason(self) -> str:
        return self._last_line.removeprefix("error: ") or "it said nothing about the cause"
