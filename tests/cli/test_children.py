"""Child processes of a supervisor, under both event loops that have them."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable

import pytest
import uvloop

from topk_grpc.cli.children import Child

_READY = "print('ready: here', flush=True); input()"


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_child_is_out_of_reach_of_the_terminal_and_shares_its_parents_session(
    loop_factory: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def run() -> None:
        child = Child("one", [sys.executable, "-c", _READY], os.environ, lambda *_: None)
        ending = child.start()
        try:
            async with asyncio.timeout(20):
                await child.ready.wait()
                pid = child.pid
                assert pid is not None
                assert os.getpgid(pid) == pid  # Ctrl-C goes to the group in front
                assert os.getsid(pid) == os.getsid(0)  # the scheduler shares processors out among sessions first
                child.kill()
                while child.pid in {None, pid} or not child.ready.is_set():  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                assert child.starts == 2
        finally:
            await child.stop(10)
            await ending

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(run())
