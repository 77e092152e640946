"""Two shards on simulated disks between which slots move, with the topology and the producers beside them.

The shards' cores are real; what a mover does is done here step by step, so that power can be lost between any two. A
crash takes one shard's disk as it may be found, and the other's as it is; both start again, whatever was under way is
brought to its end, every batch is sent again, and every play has to count once, at the one shard that owns its slot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from tests.engine.engine_shard import NOW
from tests.oracle import ModelOutcome, ModelPart, slot_of
from tests.shard.cores import abandon, commit, settings_of, take_snapshot
from tests.storage.simulated_disk import SimulatedDisk
from topk_grpc.engine import query
from topk_grpc.engine.query import Scope
from topk_grpc.migration.records import Event, advance, begin
from topk_grpc.model import Bounds, ClusterSettings, MigrationState, Play, ShardInfo, Topology
from topk_grpc.shard.core import Identity, ShardCore

CLUSTER: Final = ClusterSettings(slots=8)
NAMES: Final = ("a", "b")
SONGS: Final = tuple(f"song-{number}" for number in range(40))
EVERY: Final = Bounds(NOW - 86_400_000, NOW + 86_400_000)
SEGMENT_BYTES: Final = 6000
"""Far below what the setting allows, so that a few groups fill a segment."""


def path_of(name: str) -> Path:
    return Path(f"/data/{name}")


def new_disk(name: str) -> SimulatedDisk:
    disk = SimulatedDisk()
    disk.make_directory(path_of(name).parent)
    disk.sync_directory(Path("/"))
    disk.operations.clear()
    return disk


def plays_of(sequence: int) -> list[Play]:
    """Of a batch: half of the songs, in one chart or none, some of them taken back by the next batch but one."""
    chosen = [song for number, song in enumerate(SONGS) if (number + sequence) % 2]
    plays = [
        Play(song, NOW + 1000 * (sequence % 7), 1 + (number + sequence) % 3, ("x",) if number % 3 else ())
        for number, song in enumerate(chosen)
    ]
    if sequence % 3 == 0:
        plays += [Play(play.song_id, play.played_at_ms, -1, play.charts) for play in plays[:4]]
    return plays


@dataclass
class TwoShards:
    """The cluster. `topology` is the store: a change of it is durable at once."""

    disks: dict[str, SimulatedDisk]
    topology: Topology
    sent: int = 0
    acknowledged: int = 0
    cores: dict[str, ShardCore] = field(default_factory=dict)
    step: str = ""

    @classmethod
    def new(cls) -> TwoShards:
        owners = tuple(slot % 2 for slot in range(CLUSTER.slots))
        topology = Topology("cluster-1", 1, CLUSTER, tuple(map(ShardInfo, NAMES)), owners)
        return cls({name: new_disk(name) for name in NAMES}, topology)

    def copy(self, crashed: str, disk: SimulatedDisk) -> TwoShards:
        """As it is found after a crash: one disk as it may be, the other as it was written."""
        disks = {name: disk if name == crashed else other.copy() for name, other in self.disks.items()}
        return replace(self, disks=disks, cores={})

    def start(self, name: str) -> ShardCore:
        settings = replace(
            settings_of(path_of(name), standing_windows="session:20s,tumbling:1m"), shard_id=name
        )  # fmt: skip
        object.__setattr__(settings, "segment_bytes", SEGMENT_BYTES)
        core = ShardCore(settings, CLUSTER, self.disks[name])
        core.recover()
        core.own(Identity("cluster-1", name), self.topology.slots_of(name))
        core.configure(NOW)
        self.cores[name] = core
        return core

    # --- Producers ----------------------------------------------------------------------------------------------------

    def send(self, sequence: int) -> set[int]:
        """Sends a batch to whom it belongs; returns the slots that nobody took."""
        left = {slot_of(play.song_id, CLUSTER.slots) for play in plays_of(sequence)}
        every = tuple(enumerate(plays_of(sequence)))
        for name, core in self.cores.items():
            mine = left & set(self.topology.slots_of(name))
            part = tuple(one for one in every if slot_of(one[1].song_id, CLUSTER.slots) in mine)
            if not part:
                continue
            (outcome,) = commit(core, ModelPart("p", sequence, NOW, part), now_ms=NOW)
            assert isinstance(outcome, ModelOutcome), outcome
            assert not outcome.rejects, outcome
            left -= mine - outcome.not_owner_slots
        return left

    def send_next(self) -> set[int]:
        self.sent += 1
        left = self.send(self.sent)
        if not left:
            self.acknowledged = self.sent
        return left

    def send_again(self) -> None:
        """All batches, in order."""
        for sequence in range(1, self.sent + 1):
            assert not self.send(sequence), sequence
        self.acknowledged = self.sent

    # --- Moving -------------------------------------------------------------------------------------------------------

    def begin(self, source: str, target: str, slots: Sequence[int]) -> int:
        self.topology, migration = begin(self.topology, source, target, slots)
        return migration.migration_id

    def freeze(self, number: int) -> None:
        migration = self.topology.migration(number)
        assert migration is not None
        self.cores[migration.source].freeze(number, migration.slots, migration.target)

    def copy_image(self, number: int) -> None:
        migration = self.topology.migration(number)
        assert migration is not None
        image = self.cores[migration.source].export(number)
        self.cores[migration.target].take_in(number, migration.slots, migration.source, image)

    def decide(self, number: int, event: Event) -> None:
        self.topology = advance(self.topology, number, event)

    def settle(self, number: int, *, source_first: bool = False) -> None:
        migration = self.topology.migration(number)
        assert migration is not None
        committed = migration.state is MigrationState.COMMITTED
        shards = (migration.target, migration.source)
        for name in reversed(shards) if source_first else shards:
            assert self.cores[name].settle(number, committed=committed)
        self.topology = advance(self.topology, number, Event.SETTLE)

    # --- Crashes ------------------------------------------------------------------------------------------------------

    def recover(self, *, abort: bool) -> None:
        """Starts both, and brings what is under way to its end: goes on with it, or aborts it."""
        for name in NAMES:
            self.start(name)
        for migration in self.topology.migrations:
            number = migration.migration_id
            if migration.state is MigrationState.MOVING:
                if abort:
                    self.decide(number, Event.ABORT)
                else:
                    self.freeze(number)
                    self.copy_image(number)
                    self.decide(number, Event.COMMIT)
            self.settle(number)

    def check(self, where: str) -> None:
        """Every slot has one owner, and every batch that was sent counts once."""
        owners = {name: core.state.owned for name, core in self.cores.items()}
        for name in NAMES:
            assert set(owners[name].nonzero()[0].tolist()) == set(self.topology.slots_of(name)), where
            assert not self.cores[name].state.ownership.held, where
        counts: dict[str, Counter[str]] = {"": Counter(), "x": Counter()}
        for sequence in range(1, self.sent + 1):
            for play in plays_of(sequence):
                for chart in ("", *play.charts):
                    counts[chart][play.song_id] += play.count
        for chart, expected in counts.items():
            for scope in (Scope(chart), Scope(chart, EVERY)):
                found: Counter[str] = Counter()
                for name, core in self.cores.items():
                    ranked, totals = query.top_k(core.state, scope, 10_000)
                    own = {song: count for song, count in expected.items() if self._owner(song) == name and count}
                    assert dict(zip(ranked.song_ids, ranked.counts, strict=True)) == own, (where, name, scope)
                    assert totals.plays == sum(own.values()), (where, name, scope)
                    found.update(own)
                assert found == +expected, where

    def _owner(self, song: str) -> str:
        return NAMES[self.topology.owners[slot_of(song, CLUSTER.slots)]]

    def restart(self) -> None:
        """Kills both, and starts them again."""
        for name in NAMES:
            abandon(self.cores[name])
            self.disks[name].end_of_process()
            self.start(name)

    # --- The life -----------------------------------------------------------------------------------------------------

    def live(self) -> Iterator[str]:
        """Everything that moving writes, with plays and snapshots between; yields the name of each step before it."""
        for name in NAMES:
            yield f"start {name}"
            self.start(name)
        yield "plays before"
        self.send_next()
        self.send_next()
        there = list(self.topology.slots_of("a"))[:2]
        yield "freeze"
        first = self.begin("a", "b", there)
        self.freeze(first)
        yield "plays while frozen"
        left = self.send_next()
        assert left
        assert left <= set(there)
        yield "snapshot of frozen slots"
        take_snapshot(self.cores["a"])
        yield "import"
        self.copy_image(first)
        yield "plays while imported"
        left = self.send_next()
        assert left
        assert left <= set(there)
        yield "snapshot of an image"
        take_snapshot(self.cores["b"])
        yield "commit"
        self.decide(first, Event.COMMIT)
        yield "settle"
        self.settle(first)
        yield "plays after"
        self.send_again()
        self.send_next()
        yield "freeze to abort"
        second = self.begin("b", "a", [there[0], self.topology.slots_of("b")[-1]])
        self.freeze(second)
        yield "import to abort"
        self.copy_image(second)
        yield "abort"
        self.decide(second, Event.ABORT)
        self.settle(second, source_first=True)
        yield "plays after the abort"
        self.send_next()
        yield "back again"
        third = self.begin("b", "a", there)
        self.freeze(third)
        self.copy_image(third)
        self.decide(third, Event.COMMIT)
        self.settle(third, source_first=True)
        yield "plays at home"
        self.send_next()
        yield "snapshots"
        for name in NAMES:
            take_snapshot(self.cores[name])
        yield "end"
        self.send_next()
        for name in NAMES:
            self.cores[name].close()
