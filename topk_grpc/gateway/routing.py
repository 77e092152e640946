"""Who owns what, as this gateway believes: the last topology seen, in the form the kernels want.

A gateway may be behind. Shards tell it so (`not_owner_slots`, another shard's answer), and then `refresh` reads the
topology again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from topk_grpc.errors import TopKError
from topk_grpc.model import Topology
from topk_grpc.rpc import log
from topk_grpc.topology.store import TopologyStore


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
        self._task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        while True:
            try:
                async with aclosing(self._store.watch()) as topologies:
                    async for topology in topologies:
                        self._take(topology)
            except Exception as error:
                # Routing goes on with the last topology; it is enough as long as nothing moves.
                log.warning("topology_unreadable", error=error)
            await asyncio.sleep(1)

    def _take(self, topology: Topology) -> None:
        if topology.epoch > self.current.topology.epoch:
            self.current = Routing.of(topology)
            log.event("topology_changed", epoch=topology.epoch)
            self._on_change(topology)

    async def refresh(self) -> Routing:
        """Reads the store now; the last known routing if it cannot be read."""
        try:
            self._take(await self._store.read())
        except TopKError as error:
            log.warning("topology_unreadable", error=error)
        return self.current

    async def close(self) -> None:
        """Stops following."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
