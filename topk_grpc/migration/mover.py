"""Brings the slots to where the plan wants them, a few at a time.

One migration, step by step; each may be repeated, and a mover that begins anew finds in the topology how far it is:

1. a record is written, `moving`                       nothing has changed yet
2. the source freezes the slots                        from here on their plays wait at the gateways
3. the target fetches their image and keeps it
4. one change: the target owns them, `committed`       or, where 2 or 3 failed: `aborted`
5. the target counts the image and serves              the wait is over
6. the source drops what it had
7. the record goes                                     both have logged the outcome

Who dies meanwhile leaves a record that somebody finds: this mover or the next one. The source aborts by itself what is
left undecided for too long. A shard that is down at 5 or 6 keeps its record, and nothing else waits for it: it reads
the outcome when it starts.

Moves are made one after another, since each is a pause for its slots and work for two shards, with rests in between
(`share`). How many slots travel together follows from how long the last ones had to wait.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Final

from topk_grpc.errors import MigrationError, TopKError, TopologyConflictError
from topk_grpc.migration.calls import Fetched, ShardCalls
from topk_grpc.migration.plan import eligible, moves_left, planned
from topk_grpc.migration.records import Event, advance, begin
from topk_grpc.model import Migration, MigrationState, ShardInfo, Topology
from topk_grpc.rpc import log
from topk_grpc.topology.store import TopologyStore

_IDLE_SECONDS: Final = 0.5
_AGAIN_SECONDS: Final = (0.1, 5.0)
_SETTLE_SECONDS: Final = 2.0
_STALL_SECONDS: Final = (0.08, 0.2)
"""Slots that waited for less travel with more the next time; those that waited longer, with fewer."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast slots move.

    Attributes:
        share: the part of the time that moving may take, above 0, at most 1.
        slots_max: the most slots that travel together.
        move_seconds: a migration that is not decided after so long is aborted.
    """

    share: float = 0.5
    slots_max: int = 64
    move_seconds: float = 5.0


class Mover:
    """Moves the slots of one cluster. One at a time should do so; two do no harm, but hinder each other.

    Args:
        store: of the topology.
        shards: does what is asked of shards.
        pace: how fast.
        auto: whether to begin migrations; without, only those under way are brought to their end.

    Attributes:
        longest_stall_seconds: the longest that a slot's plays had to wait, by this mover's clock.
        moved: how many slots it has moved.
    """

    def __init__(
        self, store: TopologyStore, shards: ShardCalls, pace: Pace | None = None, *, auto: bool = True
    ) -> None:
        self._store = store
        self._shards = shards
        self._pace = pace or Pace()
        self._auto = auto
        self._together = 1
        self._changed = asyncio.Event()
        self._not_before: dict[tuple[str, str], tuple[float, float]] = {}
        self.longest_stall_seconds = 0.0
        self.moved = 0

    async def run(self) -> None:
        """Moves until it is cancelled. A topology that cannot be read, or a shard that is down, is waited for."""
        following = asyncio.create_task(self._follow())
        again, again_max = _AGAIN_SECONDS
        try:
            while True:
                self._changed.clear()
                try:
                    moved = await self.step()
                    again = _AGAIN_SECONDS[0]
                except TopKError as error:
                    log.warning("moving_waits", error=error)
                    await asyncio.sleep(again)
                    again = min(again_max, 2 * again)
                    continue
                if not moved:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._changed.wait(), _IDLE_SECONDS)
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

    async def _follow(self) -> None:
        while True:
            with suppress(TopKError):
                async with aclosing(self._store.watch()) as topologies:
                    async for _ in topologies:
                        self._changed.set()
            await asyncio.sleep(_IDLE_SECONDS)

    async def step(self) -> bool:
        """Brings what is under way to its end, or makes one more move. Returns whether there was anything to do.

        Raises:
            TopKError: the topology cannot be read or changed now.
        """
        topology = await self._store.read()
        for migration in topology.migrations:
            if migration.state is MigrationState.MOVING:
                await self._move(migration)
                return True
        settled = await asyncio.gather(*(self._settle(topology, one.migration_id) for one in topology.migrations))
        if any(settled):
            return True
        if topology.paused or not self._auto:
            return False
        if await self._plan(topology):
            return True
        chosen = self._choose(topology)
        if chosen is None:
            return False
        started = time.monotonic()
        changed, migration = begin(topology, *chosen)
        try:
            await self._store.compare_and_set(changed)
        except TopologyConflictError:
            return True  # read it and decide again
        await self._move(migration)
        await asyncio.sleep((time.monotonic() - started) * (1 / self._pace.share - 1))
        return True

    async def _plan(self, topology: Topology) -> bool:
        """Sets a plan for the shards that may own slots, where they have changed. Returns whether it was needed."""
        owning = set(topology.owners) | set(topology.wanted)
        if any(not topology.shards[owner].address and not topology.shards[owner].draining for owner in owning):
            return False  # a cluster that is starting: who has not come yet is not gone
        if not eligible(topology):
            return False  # all of them drain: there is nowhere to move to
        changed = planned(topology)
        if changed is topology:
            return False
        with suppress(TopologyConflictError):  # read it and decide again
            await self._store.compare_and_set(changed)
            slots = sum(len(move.slots) for move in moves_left(changed))
            log.event("moves_planned", epoch=changed.epoch, shards=len(eligible(changed)), slots=slots)
        return True

    def _choose(self, topology: Topology) -> tuple[str, str, tuple[int, ...]] | None:
        """The next move: source, target, slots. None: nothing is left, or all that is has to wait."""
        now = time.monotonic()
        moving = {slot for one in topology.migrations for slot in one.slots}
        for left in moves_left(topology):
            slots = [slot for slot in left.slots if slot not in moving]
            not_before, _ = self._not_before.get((left.source, left.target), (0.0, 0.0))
            if slots and now >= not_before:
                return left.source, left.target, tuple(sorted(slots[: self._together]))
        return None

    # --- One migration ------------------------------------------------------------------------------------------------

    async def _move(self, migration: Migration) -> None:
        """Takes an undecided migration to its end."""
        started = time.monotonic()
        fetched, problem = None, None
        try:
            async with asyncio.timeout(self._pace.move_seconds):
                fetched = await self._copy(migration)
        except TimeoutError:
            problem = f"it was not copied within {self._pace.move_seconds:g} s"
        except TopKError as error:
            problem = str(error)
        topology = await self._decide(migration.migration_id, Event.ABORT if problem else Event.COMMIT)
        decided = topology.migration(migration.migration_id)
        committed = decided is not None and decided.state is MigrationState.COMMITTED
        if committed and fetched is not None:
            await self._settle_target(topology, migration)
            stall = time.monotonic() - started
            self._take_pace(stall)
            self.moved += len(migration.slots)
            self._not_before.pop((migration.source, migration.target), None)
            log.event(
                "slots_moved",
                migration=migration.migration_id,
                source=migration.source,
                target=migration.target,
                slots=len(migration.slots),
                plays=fetched.plays,
                image_bytes=fetched.image_bytes,
                stall_seconds=round(stall, 4),
            )
        else:
            self._put_off(migration, problem or "its source or another coordinator aborted it")
        await self._settle(topology, migration.migration_id)

    async def _copy(self, migration: Migration) -> Fetched:
        topology = await self._store.read()
        seconds = self._pace.move_seconds
        await self._shards.freeze(_shard(topology, migration.source), migration.migration_id, seconds)
        return await self._shards.fetch(_shard(topology, migration.target), migration.migration_id, seconds)

    async def _decide(self, migration_id: int, event: Event) -> Topology:
        """Commits or aborts, unless somebody else has decided; returns the topology after that.

        Raises:
            TopKError: the topology cannot be read; a change of it that failed may have happened.
        """

        def decide(topology: Topology) -> Topology | None:
            found = topology.migration(migration_id)
            undecided = found is not None and found.state is MigrationState.MOVING
            return advance(topology, migration_id, event) if undecided else None

        return await self._change(decide)

    async def _change(self, change: Callable[[Topology], Topology | None]) -> Topology:
        """Changes the topology, however often others do so meanwhile; returns the one that holds then."""
        while True:
            topology = await self._store.read()
            changed = change(topology)
            if changed is None:
                return topology
            try:
                await self._store.compare_and_set(changed)
            except TopologyConflictError:
                continue
            return changed

    async def _settle_target(self, topology: Topology, migration: Migration) -> None:
        """Has the target serve at once; if that fails, it does so by itself as soon as it reads the topology."""
        with suppress(TopKError):
            await self._tell(topology, migration.target, migration.migration_id)

    async def _settle(self, topology: Topology, migration_id: int) -> bool:
        """Has both shards act on an outcome, and removes the record. Returns whether that is done."""
        migration = topology.migration(migration_id)
        if migration is None:
            return True
        for shard_id in (migration.target, migration.source):
            try:
                await self._tell(topology, shard_id, migration_id)
            except TopKError as error:
                log.warning("migration_unsettled", migration=migration_id, shard=shard_id, error=error)
                return False

        def remove(present: Topology) -> Topology | None:
            return advance(present, migration_id, Event.SETTLE) if present.migration(migration_id) else None

        await self._change(remove)
        return True

    async def _tell(self, topology: Topology, shard_id: str, migration_id: int) -> None:
        if not await self._shards.settle(_shard(topology, shard_id), migration_id, _SETTLE_SECONDS):
            log.error("not_conserved", migration=migration_id, shard=shard_id, consequence="nothing more is moved")
            await self._change(lambda present: None if present.paused else _paused(present))

    # --- Pace ---------------------------------------------------------------------------------------------------------

    def _take_pace(self, stall: float) -> None:
        self.longest_stall_seconds = max(self.longest_stall_seconds, stall)
        short, long = _STALL_SECONDS
        if stall < short:
            self._together = min(self._pace.slots_max, 2 * self._together)
        elif stall > long:
            self._together = max(1, self._together // 2)

    def _put_off(self, migration: Migration, problem: str) -> None:
        """Leaves these two shards alone for a while, longer each time."""
        pair = migration.source, migration.target
        low, high = _AGAIN_SECONDS
        _, waited = self._not_before.get(pair, (0.0, 0.0))
        wait = min(high, max(low, 2 * waited))
        self._not_before[pair] = (time.monotonic() + wait, wait)
        self._together = max(1, self._together // 2)
        log.warning(
            "migration_aborted",
            migration=migration.migration_id,
            source=migration.source,
            target=migration.target,
            slots=len(migration.slots),
            reason=problem,
            again_seconds=wait,
        )


def _shard(topology: Topology, shard_id: str) -> ShardInfo:
    found = topology.shard(shard_id)
    if found is None:
        raise MigrationError(f"the topology knows no shard {shard_id!r} any more")
    return found


def _paused(topology: Topology) -> Topology:
    return replace(topology, epoch=topology.epoch + 1, paused=True)
