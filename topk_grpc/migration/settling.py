"""Has both shards of a decided migration act on the outcome, and takes its record out of the topology.

A shard that is down, or hangs, holds nobody up: each record that is left over has a task of its own, which asks again
until both have answered. Who has heard of an outcome may be told of it again.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Final

from topk_grpc.errors import MigrationError, TopKError
from topk_grpc.migration.calls import ShardCalls
from topk_grpc.migration.members import paused
from topk_grpc.migration.records import Event, advance
from topk_grpc.model import Migration, MigrationState, ShardInfo, Topology
from topk_grpc.rpc import log
from topk_grpc.topology.change import change
from topk_grpc.topology.store import TopologyStore

_SETTLE_SECONDS: Final = 2.0
_AGAIN_SECONDS: Final = (0.2, 5.0)
_SAY_AGAIN_SECONDS: Final = 60.0


class Settling:
    """The decided migrations of one coordinator. Belongs to one event loop.

    Args:
        store: of the topology.
        shards: does what is asked of shards.
    """

    def __init__(self, store: TopologyStore, shards: ShardCalls) -> None:
        self._store = store
        self._shards = shards
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def begin(self, migration: Migration) -> None:
        """Sees to it that a decided migration is settled, however long that takes."""
        number = migration.migration_id
        if number not in self._tasks:
            task = self._tasks[number] = asyncio.create_task(self._until_settled(migration))
            task.add_done_callback(lambda _: self._tasks.pop(number, None))

    async def attempt(self, migration: Migration, stall_seconds: float = 0.0) -> None:
        """Tries once; what fails is said, and left to `begin`.

        Args:
            migration: decided.
            stall_seconds: how long plays of its slots had to wait.
        """
        try:
            await self._settle(migration, stall_seconds)
        except TopKError as error:
            log.warning("migration_unsettled", migration=migration.migration_id, reason=str(error))

    async def _until_settled(self, migration: Migration) -> None:
        again, again_max = _AGAIN_SECONDS
        say_at = 0.0
        while True:
            try:
                await self._settle(migration, 0.0)
                return
            except TopKError as error:
                if time.monotonic() >= say_at:
                    say_at = time.monotonic() + _SAY_AGAIN_SECONDS
                    log.warning("migration_unsettled", migration=migration.migration_id, reason=str(error))
            await asyncio.sleep(again)
            again = min(again_max, 2 * again)

    async def _settle(self, migration: Migration, stall_seconds: float) -> None:
        """Tells both shards, and removes the record.

        Raises:
            TopKError: a shard does not answer, or the topology cannot be changed.
        """
        number = migration.migration_id
        topology = await self._store.read()
        for shard_id in (migration.target, migration.source):
            shard = topology.shard(shard_id)
            if shard is None:
                raise MigrationError(f"the topology knows no shard {shard_id!r} any more")
            await self.tell(shard, number)

        def remove(present: Topology) -> Topology | None:
            found = present.migration(number)
            if found is None:
                return None
            moved = len(found.slots) if found.state is MigrationState.COMMITTED else 0
            return replace(
                advance(present, number, Event.SETTLE),
                moved_slots=present.moved_slots + moved,
                longest_stall_ms=max(present.longest_stall_ms, round(stall_seconds * 1000)),
            )

        await change(self._store, remove, f"the end of migration {number}")

    async def tell(self, shard: ShardInfo, migration_id: int) -> None:
        """Has one shard act on an outcome.

        Raises:
            TopKError: it does not answer.
        """
        if not await self._shards.settle(shard, migration_id, _SETTLE_SECONDS):
            log.error(
                "not_conserved", migration=migration_id, shard=shard.shard_id, consequence="nothing more is moved"
            )
            await change(self._store, lambda present: paused(present, pause=True), "that moves are paused")

    async def close(self) -> None:
        """Leaves what is not settled to the next coordinator."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
