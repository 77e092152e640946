"""Who owns what, as this gateway believes: the last topology seen, in the form the kernels want.

A gateway may be behind. Shards tell it so (`not_owner_slots`, another shard's answer), and then the topology is read
again: once, at `refresh`, or again and again until it has changed, at `newer`, while slots move. However many wait, one
read is under way at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from topk_grpc.errors import TopKError
from topk_grpc.model import Topology
from topk_grpc.rpc import log
from topk_grpc.topology.store import TopologyStore

_LOOK_SECONDS: Final = 0.02


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """One epoch.

    Attributes:
        topology: as the store has it.
        owners: the index of each slot's shard, int32[slots].
    """

    topology: Topology
    owners: NDArray[np.int32]

    @classmethod
    def of(cls, topology: Topology) -> Routing:
        """The routing of a topology."""
        return cls(topology, np.array(topology.owners, np.int32))

    def only(self, slots: list[int]) -> NDArray[np.int32]:
        """Owners of these slots; -1 for all others."""
        owners = np.full_like(self.owners, -1)
        owners[slots] = self.owners[slots]
        return owners


class RoutingWatch:
    """Follows the topology store. Belongs to one event loop.

    Attributes:
        current: the newest routing known.
    """

    def __init__(self, store: TopologyStore, topology: Topology, on_change: Callable[[Topology], None]) -> None:
        self._store = store
        self._on_change = on_change
        self.current = Routing.of(topology)
        self._changed = asyncio.Event()  # of the epoch after the current one
        self._reading: asyncio.Task[None] | None = None
        self._task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        while True:
            try:
                async with aclosing(self._store.watch()) as topologies:
                    async for topology in topologies:
                        self.take(topology)
            except Exception as error:
                # Routing goes on with the last topology; it is enough as long as nothing moves.
                log.warning("topology_unreadable", error=error)
            await asyncio.sleep(1)

    def take(self, topology: Topology) -> None:
        """Goes by a topology that the store holds, unless a newer one is known."""
        if topology.epoch > self.current.topology.epoch:
            self.current = Routing.of(topology)
            self._changed.set()
            self._changed = asyncio.Event()
            log.event("topology_changed", epoch=topology.epoch)
            self._on_change(topology)

    async def refresh(self) -> Routing:
        """Reads the store now, or waits for who is at it; the last known routing if it cannot be read."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read())
        await asyncio.shield(self._reading)
        return self.current

    async def _read(self) -> None:
        try:
            self.take(await self._store.read())
        except TopKError as error:
            log.warning("topology_unreadable", error=error)

    async def newer(self, epoch: int, seconds: float) -> Routing:
        """The routing as soon as its epoch is above the one given, and after that many seconds as it is."""
        deadline = asyncio.get_running_loop().time() + seconds
        while self.current.topology.epoch <= epoch:
            changed = self._changed
            await self.refresh()
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                break
            with suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), min(left, _LOOK_SECONDS))
        return self.current

    async def close(self) -> None:
        """Stops following."""
        tasks = [task for task in (self._task, self._reading) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
