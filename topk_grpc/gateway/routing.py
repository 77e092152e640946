"""Who owns what, as this gateway believes: the last topology seen, in the form the kernels want.

A gateway may be behind. Shards tell it so: with the slots that a shard does not own it names the shards that they have
gone to, as far as it knows, and `learn` follows it, also while the store is away. Where nobody is named the topology is
read again: once, at `refresh`, or again and again until it has changed, at `newer`, while slots move. However many
wait, one read is under way at a time. What was learned holds until a newer topology is read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from topk_grpc import metrics
from topk_grpc.errors import TopKError, UnavailableError
from topk_grpc.model import ShardInfo, Topology
from topk_grpc.rpc import log
from topk_grpc.topology.store import TopologyStore

REFRESH_SECONDS: Final = 1.0
"""How long a play or a query waits for the store, before it goes on with the last topology."""

_LOOK_SECONDS: Final = 0.02


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """One epoch, and what was learned since.

    Attributes:
        topology: as the store has it.
        owners: the index of each slot's shard, int32[slots], with what was learned.
    """

    topology: Topology
    owners: NDArray[np.int32]

    @classmethod
    def of(cls, topology: Topology) -> Routing:
        """The routing of a topology."""
        return cls(topology, np.array(topology.owners, np.int32))

    @property
    def owning(self) -> list[ShardInfo]:
        """The shards that own slots."""
        return [self.topology.shards[index] for index in np.unique(self.owners)]

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
        metrics.TOPOLOGY_EPOCH.set(topology.epoch)
        metrics.SHARDS.read_from(lambda: sum(1 for shard in self.current.topology.shards if shard.directory_id))
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
            metrics.TOPOLOGY_EPOCH.set(topology.epoch)
            self._changed.set()
            self._changed = asyncio.Event()
            log.event("topology_changed", epoch=topology.epoch)
            self._on_change(topology)

    async def refresh(self) -> Routing:
        """Reads the store now; the last known routing if it cannot be read.

        Many may ask at once while slots move: they share one read. None waits for longer than REFRESH_SECONDS for it,
        while it goes on and may find another way to the store.
        """
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read())
        await asyncio.wait({self._reading}, timeout=REFRESH_SECONDS)
        return self.current

    async def _read(self) -> None:
        try:
            self.take(await self._store.read())
        except UnavailableError as error:  # the store is away, which it tells itself once
            log.debug("topology_unreadable", reason=str(error))
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

    def learn(self, shard_id: str, slots: Sequence[int], new_owners: Sequence[str]) -> bool:
        """Takes note of where slots have gone.

        Args:
            shard_id: who says so. It is believed of slots that are routed to it now: what others say is older.
            slots: that it does not own.
            new_owners: the shards that they have gone to, place by place; empty where that is not known.

        Returns:
            Whether each of the slots is routed to another shard now.
        """
        places = {shard.shard_id: index for index, shard in enumerate(self.current.topology.shards)}
        sender = places.get(shard_id, -1)
        owners = self.current.owners.copy()
        for slot, new_owner in zip(slots, new_owners, strict=False):
            if owners[slot] == sender and new_owner in places:
                owners[slot] = places[new_owner]
        changed = int(np.count_nonzero(owners != self.current.owners))
        if changed:
            self.current = replace(self.current, owners=owners)
            log.event("slots_rerouted", slots=changed, source=shard_id, epoch=self.current.topology.epoch)
        return bool(np.all(owners[list(slots)] != sender))

    async def close(self) -> None:
        """Stops following."""
        tasks = [task for task in (self._task, self._reading) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
