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
the outcome when it starts, and is told again and again beside the moves of others (`Settling`).

Moves are made one after another, since each is a pause for its slots and work for two shards, with rests in between
(`share`). How many slots travel together follows from how long the last ones had to wait: fewer, where their image was
so large that it took the time. A small one waits for disks and other programs as long as a smaller one would, and to
move fewer slots then would only be to wait more often. Before each both shards are asked whether they are there: slots
are not frozen for one that is down.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Final

from topk_grpc import metrics
from topk_grpc.errors import MigrationError, TopKError, TopologyConflictError
from topk_grpc.migration.calls import Fetched, ShardCalls
from topk_grpc.migration.plan import awaited, eligible, moves_left, planned
from topk_grpc.migration.records import Event, advance, begin
from topk_grpc.migration.settling import Settling
from topk_grpc.model import Migration, MigrationState, ShardInfo, Topology
from topk_grpc.rpc import log
from topk_grpc.topology.change import change
from topk_grpc.topology.store import TopologyStore

_IDLE_SECONDS: Final = 0.5
_AGAIN_SECONDS: Final = (0.1, 5.0)
_PROBE_SECONDS: Final = 0.5
_STALL_SECONDS: Final = (0.2, 0.35)
"""Slots that waited for less travel with more the next time; those that waited longer, with fewer."""
_SMALL_BYTES: Final = 256 << 10
"""An image up to this size takes two shards some hundredths of a second: more may travel the next time, however long it
took."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast slots move.

    Attributes:
        share: the part of the time that moving may take, above 0, at most 1.
        slots_max: the most slots that travel together.
        move_seconds: a migration that is not decided after so long is aborted.
    """

    share: float = 0.3
    slots_max: int = 64
    move_seconds: float = 5.0


class Mover:
    """Moves the slots of one cluster. One at a time should do so; two do no harm, but hinder each other.

    Args:
        store: of the topology.
        shards: does what is asked of shards.
        pace: how fast.
        auto: whether to plan when the shards that may own slots have changed; without, only plans that somebody else
            has made are carried out.

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
        self._ending = asyncio.Event()
        self._settling = Settling(store, shards)
        self._away = _Away()
        self.longest_stall_seconds = 0.0
        self.moved = 0
        for outcome in ("committed", "aborted"):
            metrics.MIGRATIONS.labels(outcome)

    def end(self) -> None:
        """Lets `run` return when the move under way has come to its end: no further one begins."""
        self._ending.set()
        self._changed.set()

    async def run(self) -> None:
        """Moves until `end`. A topology that cannot be read, or a shard that is down, is waited for."""
        following = asyncio.create_task(self._follow())
        again, again_max = _AGAIN_SECONDS
        try:
            while not self._ending.is_set():
                self._changed.clear()
                try:
                    moved = await self.step()
                    again = _AGAIN_SECONDS[0]
                except TopKError as error:
                    log.warning("moving_waits", reason=str(error), again_seconds=again)
                    await self._rest(again)
                    again = min(again_max, 2 * again)
                    continue
                if not moved:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._changed.wait(), _IDLE_SECONDS)
        finally:
            following.cancel()
            await asyncio.gather(following, self._settling.close(), return_exceptions=True)

    async def _rest(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._ending.wait(), seconds)

    async def _follow(self) -> None:
        while True:
            with suppress(TopKError):
                async with aclosing(self._store.watch()) as topologies:
                    async for _ in topologies:
                        self._changed.set()
            await asyncio.sleep(_IDLE_SECONDS)

    async def step(self) -> bool:
        """Brings what is undecided to its end, or makes one more move. Returns whether there was anything to do.

        Raises:
            TopKError: the topology cannot be read or changed now.
        """
        topology = await self._store.read()
        left = moves_left(topology)
        metrics.SLOTS_LEFT.set(sum(len(one.slots) for one in left))
        for migration in topology.migrations:
            if migration.state is MigrationState.MOVING:
                await self._move(migration)
                return True
            self._settling.begin(migration)
        if topology.paused:
            return False
        if self._auto and await self._plan(topology):
            return True
        chosen = await self._choose(topology)
        if chosen is None:
            return False
        started = time.monotonic()
        changed, migration = begin(topology, *chosen)
        try:
            await self._store.compare_and_set(changed)
        except TopologyConflictError:
            return True  # read it and decide again
        await self._move(migration)
        await self._rest((time.monotonic() - started) * (1 / self._pace.share - 1))
        return True

    async def _plan(self, topology: Topology) -> bool:
        """Sets a plan for the shards that may own slots, where they have changed. Returns whether it was needed."""
        # A cluster that is starting: who has not come yet is not gone. Or all of them drain: there is nowhere to go.
        if awaited(topology) or not eligible(topology):
            return False
        changed = planned(topology)
        if changed is topology:
            return False
        with suppress(TopologyConflictError):  # read it and decide again
            await self._store.compare_and_set(changed)
            slots = sum(len(move.slots) for move in moves_left(changed))
            log.event("moves_planned", epoch=changed.epoch, shards=len(eligible(changed)), slots=slots)
        return True

    async def _choose(self, topology: Topology) -> tuple[str, str, tuple[int, ...]] | None:
        """The next move: source, target, slots. None: nothing is left, or all that is has to wait."""
        moving = {slot for one in topology.migrations for slot in one.slots}
        for left in moves_left(topology):
            slots = [slot for slot in left.slots if slot not in moving]
            pair = left.source, left.target
            if not slots or self._away.concerns(pair):
                continue
            if await self._is_there(topology, left.source) and await self._is_there(topology, left.target):
                return left.source, left.target, tuple(sorted(slots[: self._together]))
        return None

    async def _is_there(self, topology: Topology, shard_id: str) -> bool:
        shard = _shard(topology, shard_id)
        where = f"{shard_id} at {shard.address}"  # one that comes back elsewhere is asked at once
        if self._away.concerns(where):
            return False
        try:
            await self._shards.probe(shard, _PROBE_SECONDS)
        except TopKError as error:
            tell = log.debug if self._away.knows(where) else log.warning  # once is enough
            tell("moves_wait_for_shard", shard=shard_id, reason=str(error))
            self._away.put_off(where)
            return False
        self._away.forget(where)
        return True

    # --- One migration ------------------------------------------------------------------------------------------------

    async def _move(self, migration: Migration) -> None:
        """Takes an undecided migration to its end."""
        seconds = self._pace.move_seconds
        frozen_at = time.monotonic()  # until the source says since when
        fetched, problem = None, ""
        try:
            async with asyncio.timeout(seconds):
                topology = await self._store.read()
                source, target = _shard(topology, migration.source), _shard(topology, migration.target)
                for_seconds = await self._shards.freeze(source, migration.migration_id, seconds)
                frozen_at = time.monotonic() - for_seconds
                fetched = await self._shards.fetch(target, migration.migration_id, seconds)
        except TimeoutError:
            problem = f"it was not copied within {seconds:g} s"
        except TopKError as error:
            problem = str(error)
        topology = await self._decide(migration.migration_id, Event.ABORT if problem else Event.COMMIT)
        decided = topology.migration(migration.migration_id)
        committed = decided is not None and decided.state is MigrationState.COMMITTED
        if decided is not None:
            # Plays have waited until the shard that owns the slots now has read so: it is told first.
            owner = _shard(topology, migration.target if committed else migration.source)
            with suppress(TopKError):  # if that fails, it does so by itself as soon as it reads the topology
                await self._settling.tell(owner, migration.migration_id)
        stall = time.monotonic() - frozen_at
        self.longest_stall_seconds = max(self.longest_stall_seconds, stall)
        metrics.LONGEST_STALL_SECONDS.set(self.longest_stall_seconds)
        if committed and fetched is not None:
            self._note_moved(migration, fetched, stall)
        else:
            self._put_off(migration, problem or "its source or another coordinator decided it", stall)
        if decided is not None:
            await self._settling.attempt(decided, stall)

    async def _decide(self, migration_id: int, event: Event) -> Topology:
        """Commits or aborts, unless somebody else has decided; returns the topology after that.

        Raises:
            TopKError: the topology cannot be read; a change of it that failed may have happened.
        """

        def decide(topology: Topology) -> Topology | None:
            found = topology.migration(migration_id)
            undecided = found is not None and found.state is MigrationState.MOVING
            return advance(topology, migration_id, event) if undecided else None

        return await change(self._store, decide, f"the outcome of migration {migration_id}")

    # --- Pace ---------------------------------------------------------------------------------------------------------

    def _note_moved(self, migration: Migration, fetched: Fetched, stall: float) -> None:
        short, long = _STALL_SECONDS
        if stall < short or fetched.image_bytes <= _SMALL_BYTES:
            self._together = min(self._pace.slots_max, 2 * self._together)
        elif stall > long:
            self._together = max(1, self._together // 2)
        self.moved += len(migration.slots)
        self._away.forget((migration.source, migration.target))
        metrics.MIGRATIONS.labels("committed").inc()
        metrics.SLOTS_MOVED.inc(len(migration.slots))
        log.event(
            "slots_moved",
            migration=migration.migration_id,
            source=migration.source,
            target=migration.target,
            slots=len(migration.slots),
            plays=fetched.plays,
            image_bytes=fetched.image_bytes,
            stall_seconds=round(stall, 4),
            longest_stall_seconds=round(self.longest_stall_seconds, 4),
        )

    def _put_off(self, migration: Migration, problem: str, stall: float) -> None:
        """Leaves these two shards alone for a while, longer each time."""
        again = self._away.put_off((migration.source, migration.target))
        self._together = max(1, self._together // 2)
        metrics.MIGRATIONS.labels("aborted").inc()
        log.warning(
            "migration_aborted",
            migration=migration.migration_id,
            source=migration.source,
            target=migration.target,
            slots=len(migration.slots),
            reason=problem,
            stall_seconds=round(stall, 4),
            again_seconds=again,
        )


class _Away:
    """Who is left alone for a while: a shard that does not answer, or a pair between which a move has failed."""

    def __init__(self) -> None:
        self._until: dict[str | tuple[str, str], tuple[float, float]] = {}

    def concerns(self, key: str | tuple[str, str]) -> bool:
        """Whether it is to be left alone now."""
        return time.monotonic() < self._until.get(key, (0.0, 0.0))[0]

    def knows(self, key: str | tuple[str, str]) -> bool:
        """Whether it has been left alone before, and was not there again since."""
        return key in self._until

    def put_off(self, key: str | tuple[str, str]) -> float:
        """Leaves it alone for longer each time; returns for how many seconds."""
        low, high = _AGAIN_SECONDS
        _, waited = self._until.get(key, (0.0, 0.0))
        wait = min(high, max(low, 2 * waited))
        self._until[key] = (time.monotonic() + wait, wait)
        return wait

    def forget(self, key: str | tuple[str, str]) -> None:
        """It is there again."""
        self._until.pop(key, None)


def _shard(topology: Topology, shard_id: str) -> ShardInfo:
    found = topology.shard(shard_id)
    if found is None:
        raise MigrationError(f"the topology knows no shard {shard_id!r} any more")
    return found
