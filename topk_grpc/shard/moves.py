"""A shard's part in migrations: what it is asked to do, and what it does by itself.

A request to freeze or fetch is held against the topology, read anew: a coordinator that was deposed long ago changes
nothing. How a migration ends is read from there as well, whoever asks, and on every change that is seen: so it ends
without a coordinator too, and after a restart. Three rules make that safe:

- a topology older than the newest one seen is not looked at: it may lack a record that had begun since;
- a record that is gone was settled by both shards, or never concerned this one: its slots are where their owner is, and
  an image that still lies here is of no use to anybody;
- a source that hears nothing for `frozen_seconds_max` aborts by itself. Its change of the topology and the commit of
  the coordinator replace the same epoch: one of them is refused, and reads what the other decided.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing, suppress
from typing import Any, Final

import grpc

from topk_grpc import metrics
from topk_grpc.config import ShardSettings
from topk_grpc.engine.indexing import forget_indexes, unindexed, use_indexes
from topk_grpc.engine.ownership import Held
from topk_grpc.engine.transfer import image_totals, read_image
from topk_grpc.errors import (
    MigrationError,
    TopKError,
    TopologyConflictError,
    UnavailableError,
)
from topk_grpc.migration.members import ShardState, state_of
from topk_grpc.migration.plan import moves_left
from topk_grpc.migration.records import Event, advance
from topk_grpc.model import Migration, MigrationState, Topology
from topk_grpc.pb.topk.v1 import shard_service_pb2 as pb
from topk_grpc.pb.topk.v1.shard_service_pb2_grpc import ShardServiceStub
from topk_grpc.rpc import log
from topk_grpc.rpc.shard_channels import ShardChannels
from topk_grpc.rpc.status import from_rpc_error
from topk_grpc.shard.core import ShardCore
from topk_grpc.shard.owner import ShardOwner
from topk_grpc.topology.store import TopologyStore

_LOOK_SECONDS: Final = 0.5


class ShardMoves:
    """The migrations of one shard. Belongs to one event loop.

    Args:
        owner: of the shard's core.
        store: of the topology.
        channels: the way to other shards.
        settings: of the shard.
    """

    def __init__(
        self, owner: ShardOwner, store: TopologyStore, channels: ShardChannels, settings: ShardSettings
    ) -> None:
        self._owner = owner
        self._store = store
        self._channels = channels
        self._shard_id = settings.shard_id
        self._settings = settings
        self._newest: Topology | None = None
        self._held_since: dict[int, float] = {}
        self._said = ""
        self._preparing: asyncio.Task[None] | None = None
        self._indexed = False
        self._turn = asyncio.Lock()
        self._tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self._keep_looking())]

    # --- What a coordinator asks --------------------------------------------------------------------------------------

    async def freeze(self, migration_id: int) -> float:
        """Takes no more plays of a migration's slots, durably; before that, sees to it that they are found quickly.

        Returns:
            How long plays of them have been waiting, in seconds.

        Raises:
            MigrationError: the topology has no such migration of this shard's, or its outcome is decided.
        """
        await self._prepare()
        async with self._turn:
            _, migration = await self._read_migration(migration_id, source=self._shard_id)
            since = time.monotonic()

            def freeze(core: ShardCore) -> None:
                nonlocal since
                since = time.monotonic()
                core.freeze(migration_id, migration.slots, migration.target)

            await self._owner.change(freeze)
            return time.monotonic() - self._held_since.setdefault(migration_id, since)

    async def export(self, migration_id: int) -> bytes:
        """The image of frozen slots; from here on no queries are answered until the outcome is known.

        Raises:
            MigrationError: they are not frozen.
        """
        return await self._owner.change(lambda core: core.export(migration_id))

    async def fetch(self, migration_id: int) -> tuple[int, int]:
        """Gets the image of a migration's slots from their source, and keeps it durably.

        Returns:
            Its size in bytes, and its plays in the global chart.

        Raises:
            MigrationError: the topology has no such migration to this shard, or its outcome is decided.
            UnavailableError: the source cannot be reached.
            InvalidArgumentError, ResourceExhaustedError: this shard cannot take the slots.
        """
        topology, migration = await self._read_migration(migration_id, target=self._shard_id)
        image = await self._fetch_image(topology, migration)
        plays = sum(image_totals(read_image(image)).plays)
        async with self._turn:
            await self._read_migration(migration_id, target=self._shard_id)  # it may have been aborted meanwhile
            await self._owner.change(lambda core: core.take_in(migration_id, migration.slots, migration.source, image))
        return len(image), plays

    async def settle(self, migration_id: int) -> bool:
        """Acts on the outcome of a migration as the topology has it; returns whether all was conserved.

        Raises:
            MigrationError: it is not decided.
        """
        async with self._turn:
            topology = self._note(await self._store.read())
            held = await self._owner.read(lambda core: core.state.ownership.held.get(migration_id))
            if held is None:
                return True
            committed = self._outcome(held, topology)
            if committed is None:
                raise MigrationError(f"migration {migration_id} is not decided: commit or abort it first")
            return await self._settle(held, committed=committed)

    # --- Finding slots ------------------------------------------------------------------------------------------------

    async def _prepare(self) -> None:
        """Has all closed cells indexed by slot. It goes on if whoever waits for it gives up."""
        if self._preparing is None or self._preparing.done():
            self._preparing = asyncio.create_task(self._index())
        await asyncio.shield(self._preparing)

    async def _index(self) -> None:
        cells = await self._owner.read(lambda core: unindexed(core.state))
        if cells:
            made = await asyncio.to_thread(lambda: [(one, one.index()) for one in cells])
            await self._owner.change(lambda core: use_indexes(core.state, made))
            self._indexed = True

    async def _tidy(self, topology: Topology) -> None:
        """Lets go of the indexes when no slot of this shard is to move any more."""
        moving = any(self._shard_id in {one.source, one.target} for one in topology.migrations)
        if self._indexed and not moving and not any(move.source == self._shard_id for move in moves_left(topology)):
            self._indexed = False
            await self._owner.change(lambda core: forget_indexes(core.state))

    # --- What it does by itself ---------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Looks at every topology that the store tells of."""
        while True:
            with suppress(TopKError):
                async with aclosing(self._store.watch()) as topologies:
                    async for topology in topologies:
                        async with self._turn:
                            await self._look(self._note(topology))
            await asyncio.sleep(_LOOK_SECONDS)

    async def _keep_looking(self) -> None:
        """Looks again while something is held, for changes that were missed, and at the time that has passed."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            with suppress(TopKError):
                async with self._turn:
                    if await self._owner.read(lambda core: bool(core.state.ownership.held)):
                        await self._look(self._note(await self._store.read()))

    async def _look(self, topology: Topology) -> None:
        """Settles what is decided, and aborts what has taken too long."""
        self._say_place(topology)
        held = await self._owner.read(lambda core: list(core.state.ownership.held.values()))
        self._held_since = {one.migration_id: self._held_since.get(one.migration_id, time.monotonic()) for one in held}
        for one in held:
            committed = self._outcome(one, topology)
            if committed is not None:
                await self._settle(one, committed=committed)
            elif not one.incoming and self._waited(one) >= self._settings.frozen_seconds_max:
                await self._abort(one, topology)
        await self._tidy(topology)

    def _say_place(self, topology: Topology) -> None:
        """Says when this shard drains, is drained, or has been removed."""
        known = topology.shard(self._shard_id) is not None
        place = state_of(topology, self._shard_id) if known else "removed"
        before, self._said = self._said, place
        if place == before:
            return
        if place == ShardState.DRAINING:
            log.event("draining", slots=len(topology.slots_of(self._shard_id)))
        elif place == ShardState.DRAINED:
            log.event("drained", next=f"it can be removed: topk cluster remove {self._shard_id}")
        elif place == "removed" and before:
            log.warning("removed_from_cluster", remedy="stop this process: it serves nobody any more")

    def _waited(self, held: Held) -> float:
        return time.monotonic() - self._held_since[held.migration_id]

    async def _abort(self, held: Held, topology: Topology) -> None:
        aborted = advance(topology, held.migration_id, Event.ABORT)
        try:
            await self._store.compare_and_set(aborted)
        except TopologyConflictError:
            return  # somebody was quicker: looked at again soon
        log.warning(
            "migration_aborted",
            migration=held.migration_id,
            slots=len(held.slots),
            target=held.other,
            reason=f"nothing was heard for {self._settings.frozen_seconds_max:g} s (--frozen-seconds-max)",
        )
        await self._settle(held, committed=False)

    # --- Steps --------------------------------------------------------------------------------------------------------

    def _note(self, topology: Topology) -> Topology:
        """The newest topology seen."""
        if self._newest is None or topology.epoch > self._newest.epoch:
            self._newest = topology
            metrics.TOPOLOGY_EPOCH.set(topology.epoch)
        return self._newest

    def _outcome(self, held: Held, topology: Topology) -> bool | None:
        """Whether a migration was committed; None while that is not decided."""
        record = topology.migration(held.migration_id)
        if record is not None:
            return None if record.state is MigrationState.MOVING else record.state is MigrationState.COMMITTED
        own = set(topology.slots_of(self._shard_id))
        return not held.incoming and not own & set(held.slots)

    async def _settle(self, held: Held, *, committed: bool) -> bool:
        migration_id = held.migration_id
        conserved = await self._owner.change(lambda core: core.settle(migration_id, committed=committed))
        waited = self._held_since.pop(migration_id, None)
        tell: Callable[..., None] = log.event if conserved else log.error
        tell(
            "migration_settled" if conserved else "migration_not_conserved",
            migration=migration_id,
            slots=len(held.slots),
            outcome="committed" if committed else "aborted",
            **{"source" if held.incoming else "target": held.other},
            **({} if waited is None else {"seconds": round(time.monotonic() - waited, 3)}),
        )
        return conserved

    async def _read_migration(
        self, migration_id: int, *, source: str | None = None, target: str | None = None
    ) -> tuple[Topology, Migration]:
        """The topology now, and an undecided migration in it."""
        topology = self._note(await self._store.read())
        found = topology.migration(migration_id)
        if found is None or found.state is not MigrationState.MOVING:
            state = found.state if found else "not under way"
            raise MigrationError(f"migration {migration_id} is {state}: read the topology again")
        if (source or found.source, target or found.target) != (found.source, found.target):
            raise MigrationError(f"migration {migration_id} goes from {found.source} to {found.target}: ask these")
        return topology, found

    async def _fetch_image(self, topology: Topology, migration: Migration) -> bytes:
        source = topology.shard(migration.source)
        if source is None or not source.address:
            raise UnavailableError(f"{migration.source} has not started yet")
        async with self._channels.open(source.address) as channel:
            stub: Any = ShardServiceStub(channel)
            request = pb.ExportSlotsRequest(migration_id=migration.migration_id)
            call = stub.ExportSlots(request, metadata=self._channels.metadata(migration.source))
            try:
                async with asyncio.timeout(self._settings.frozen_seconds_max):
                    return b"".join([answer.piece async for answer in call])
            except TimeoutError as error:
                raise UnavailableError(
                    f"the image of migration {migration.migration_id} did not come from {migration.source} within"
                    f" {self._settings.frozen_seconds_max:g} s"
                ) from error
            except grpc.RpcError as error:
                raise from_rpc_error(error) from error

    async def close(self) -> None:
        """Stops following."""
        tasks = [*self._tasks, *([self._preparing] if self._preparing else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
