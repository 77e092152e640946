"""A start that waits for a store that is away, instead of failing for good.

A server that runs needs the store for changes alone. One that starts cannot do without it: the topology says who owns
what, and holds the secret by which it knows its own cluster.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from topk_grpc.errors import TopologyError, UnavailableError
from topk_grpc.rpc import log
from topk_grpc.rpc.lifecycle import StopRequest

T = TypeVar("T")
_AGAIN_SECONDS: Final = (0.2, 5.0)


class StorePatience:
    """Waits for the store.

    Args:
        seconds: for so long.
        stop: ends the process where it is asked to stop meanwhile. What is on disk is left as after a crash.
    """

    def __init__(self, seconds: float, stop: StopRequest) -> None:
        self._seconds = seconds
        self._stop = stop

    async def wait_for(self, ask: Callable[[], Awaitable[T]], *, made: bool = True) -> T:
        """Asks until the store answers.

        Args:
            ask: may be asked twice, whatever became of the first time.
            made: there has to be a topology already; else somebody may make it while this waits.

        Raises:
            UnavailableError, TopologyError: the time is over.
            TopKError: what the store answers.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._seconds
        again, again_max = _AGAIN_SECONDS
        while True:
            try:
                return await ask()
            except (UnavailableError, TopologyError) as error:
                left = deadline - loop.time()
                if isinstance(error, TopologyError) and (made or left <= 0):
                    raise
                if left <= 0:
                    raise UnavailableError(
                        f"the topology store was waited for {self._seconds:g} s (--topology-wait-seconds): {error}"
                    ) from error
                event = "topology_awaited" if isinstance(error, TopologyError) else "waiting_for_topology_store"
                log.warning(event, reason=str(error), seconds_left=round(left, 1))
            await self._sleep(min(again, left))
            again = min(again_max, 2 * again)

    async def _sleep(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                reason = await self._stop.wait()
        except TimeoutError:
            return
        log.event("stopped", reason=reason, waiting_for_topology_store=True)
        self._stop.end_now()
