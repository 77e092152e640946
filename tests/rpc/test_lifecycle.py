"""A real server process and its end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from topk_grpc.rpc.channels import open_channel

SERVER = """
import asyncio, sys
from topk_grpc.rpc import log
from topk_grpc.rpc.server import *

async def forever(raw, context):
    log.event("called")
    await asyncio.sleep(600)
    return b""

async def main():
    log.configure("info", role="test")
    stop = StopRequest().install(stdin="stdin" in sys.argv)
    server, health = create_server(1 << 16), Health()
    add_raw_handlers(server, "test.Service", unary_unary={"Forever": forever})
    await health.register(server)
    log.event("ready", address=await bind(server, "127.0.0.1:0"))
    await server.start()
    if "delay" in sys.argv:
        stop.delay_by(float(sys.argv[-1]))
    await health.set(ready=True)
    await serve_until_stopped([server], health, stop, 60.0)

asyncio.run(main())
"""


class Process:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.address = ""

    async def line(self, event: str) -> dict[str, str]:
        """The next line with that event; other lines are passed over."""
        assert self.process.stderr is not None
        while True:
            raw = await asyncio.wait_for(self.process.stderr.readline(), 30)
            assert raw, f"the process ended before it logged {event}"
            found: dict[str, str] = json.loads(raw)
            if found["event"] == event:
                return found

    async def end(self) -> int:
        return await asyncio.wait_for(self.process.wait(), 30)


@asynccontextmanager
async def serving(*arguments: str) -> AsyncIterator[Process]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", SERVER, *arguments, stdin=pipe, stderr=pipe)
    it = Process(process)
    try:
        it.address = (await it.line("ready"))["address"]
        yield it
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        if process.stdin is not None:
            process.stdin.close()


def interrupt(process: asyncio.subprocess.Process) -> None:
    process.send_signal(signal.SIGINT)


def close_stdin(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None
    process.stdin.close()


@pytest.mark.parametrize(
    ("reason", "stop"),
    [("SIGTERM", asyncio.subprocess.Process.terminate), ("SIGINT", interrupt), ("stdin", close_stdin)],
)
async def test_process_ends_when_asked(reason: str, stop: Callable[[asyncio.subprocess.Process], None]) -> None:
    async with serving("stdin") as it:
        stop(it.process)
        stopping = await it.line("stopping")
        assert (stopping["reason"], stopping["role"]) == (reason, "test")
        await it.line("stopped")
        assert await it.end() == 0


async def test_process_outlives_its_stdin_unless_asked() -> None:
    async with serving() as it:
        close_stdin(it.process)
        it.process.terminate()
        assert (await it.line("stopping"))["reason"] == "SIGTERM"
        assert await it.end() == 0


async def test_second_signal_cuts_calls_under_way() -> None:
    async with serving() as it, open_channel(it.address) as channel:
        forever: Any = channel.unary_unary("/test.Service/Forever")
        call = forever(b"")
        await it.line("called")
        os.kill(it.process.pid, signal.SIGTERM)
        await it.line("stopping")
        os.kill(it.process.pid, signal.SIGTERM)
        assert await it.end() == 0, "60 seconds of grace were cut short"
        call.cancel()


async def readiness(address: str) -> int:
    async with open_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service="readiness")
        answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=10)
    return int(answer.status)


async def test_a_server_that_leaves_is_not_ready_and_serves_on_for_a_while() -> None:
    async with serving("delay", "3") as it:
        assert await readiness(it.address) == health_pb2.HealthCheckResponse.SERVING
        it.process.terminate()
        assert (await it.line("leaving"))["reason"] == "SIGTERM"
        assert await readiness(it.address) == health_pb2.HealthCheckResponse.NOT_SERVING
        async with open_channel(it.address) as channel:
            forever: Any = channel.unary_unary("/test.Service/Forever")
            call = forever(b"")
            await it.line("called")
            call.cancel()
        assert (await it.line("stopping"))["reason"] == "SIGTERM"
        assert await it.end() == 0


async def test_second_signal_cuts_the_delay_short() -> None:
    async with serving("delay", "600") as it:
        it.process.terminate()
        await it.line("leaving")
        it.process.terminate()
        await it.line("stopping")
        assert await it.end() == 0
