"""Another process at the same store: `python -m tests.topology.other URL race|lead|announce …`.

It says on standard output when it has begun, and ends with its standard input.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from topk_grpc.errors import TopologyConflictError
from topk_grpc.model import ShardInfo
from topk_grpc.topology import TopologyStore, open_store

ROOT: Final = Path(__file__).parents[2]


class Other:
    """One that runs."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, url: str, *arguments: str) -> Other:
        """Returns at once."""
        pipe = asyncio.subprocess.PIPE
        command = (sys.executable, "-m", "tests.topology.other", url, *arguments)
        return cls(await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, cwd=ROOT))

    async def said(self, seconds: float = 30) -> str:
        """The next line that it says."""
        assert self._process.stdout is not None
        return (await asyncio.wait_for(self._process.stdout.readline(), seconds)).decode().strip()

    async def finish(self, seconds: float = 60) -> str:
        """Tells it to go on to its end; the rest of what it says."""
        output, _ = await asyncio.wait_for(self._process.communicate(b"go\n"), seconds)
        assert self._process.returncode == 0
        return output.decode()

    async def kill(self) -> None:
        """kill -9."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()


async def _told_to_go_on() -> None:
    await asyncio.to_thread(sys.stdin.readline)


async def race(store: TopologyStore, name: str, last: str) -> None:
    """Replaces each epoch as soon as it is there, up to the last; says which ones it has won."""
    won = []
    print("ready", flush=True)
    await _told_to_go_on()
    while (present := await store.read()).epoch < int(last):
        mine = replace(present, epoch=present.epoch + 1, shards=(ShardInfo("a", name), *present.shards[1:]))
        try:
            await store.compare_and_set(mine)
        except TopologyConflictError:
            continue
        won.append(mine.epoch)
    print(*won)


async def lead(store: TopologyStore, name: str) -> None:
    async with store.lead(name):
        print("leads", flush=True)
        await _told_to_go_on()


async def announce(store: TopologyStore, name: str, text: str) -> None:
    async with store.announce(name, text):
        print("lives", flush=True)
        await _told_to_go_on()


_DOES: Final[dict[str, Callable[..., Coroutine[Any, Any, None]]]] = {
    "race": race,
    "lead": lead,
    "announce": announce,
}


async def main(url: str, what: str, *arguments: str) -> None:
    store = open_store(url)
    try:
        await _DOES[what](store, *arguments)
    finally:
        await store.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
