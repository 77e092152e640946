"""An audit counts what slots that come and go leave behind, from any snapshot and the log behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.engine.engine_shard import NOW
from tests.shard.cores import CLUSTER, abandon, batch, commit, open_core, take_snapshot
from topk_grpc.engine.account import account, copy_state, listed
from topk_grpc.model import ClusterSettings, Play
from topk_grpc.shard.audit import Served, audit_live, audit_stopped
from topk_grpc.shard.core import ShardCore

MOVING = (2, 3, 5)
SPREAD = ClusterSettings(slots=CLUSTER.slots, partitioner="round_robin")


class Pair:
    """Shards `a` and `b`: the lower slots and the upper ones."""

    def __init__(self, root: Path, cluster: ClusterSettings) -> None:
        half = cluster.slots // 2
        own = {"a": range(half), "b": range(half, cluster.slots)}
        self.cluster = cluster
        self.paths = {name: root / name for name in own}
        self.cores = {
            name: open_core(self.paths[name], cluster=cluster, slots=slots, standing_windows="tumbling:1h")
            for name, slots in own.items()
        }
        self._sent = 0

    def send(self, batches: int) -> None:
        """To both: each counts what it owns."""
        for _ in range(batches):
            self._sent += 1
            plays = [Play(f"song-{n}", NOW - 1000 * n, 1 + n % 3, ("x",) if n % 2 else ()) for n in range(30)]
            for core in self.cores.values():
                commit(core, batch(self._sent, *plays, producer=f"p{self._sent % 3}"))

    def move(self, number: int, source: str, target: str, slots: Sequence[int]) -> None:
        self.cores[source].freeze(number, slots, target)
        self.cores[target].take_in(number, slots, source, self.cores[source].export(number))

    def settle(self, number: int, *, committed: bool) -> None:
        for core in self.cores.values():
            assert core.settle(number, committed=committed)

    def check(self) -> None:
        """Both agree with their disks; what they have together is everything."""
        for name, core in self.cores.items():
            report = audit_live(self.paths[name], lambda slots, core=core: served(core, slots))  # type: ignore[misc]
            assert report.differences == [], name
            assert report.plays > 0, name


def served(core: ShardCore, slots: Sequence[int]) -> Served:
    copied = copy_state(core.state)
    return Served(core.counted_position, account(copied), listed(copied, slots, 1000) if slots else {})


@pytest.fixture(params=[CLUSTER, SPREAD], ids=["ring", "round_robin"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path, request.param)
    yield made
    for core in made.cores.values():
        abandon(core)


def test_an_audit_agrees_at_every_step_of_moves(pair: Pair) -> None:
    pair.send(5)
    pair.check()
    pair.move(1, "a", "b", MOVING)
    pair.check()
    take_snapshot(pair.cores["b"])  # which holds the image
    pair.send(2)
    pair.check()
    pair.settle(1, committed=True)
    pair.check()
    take_snapshot(pair.cores["a"])
    pair.send(4)
    pair.move(2, "b", "a", MOVING[:2])
    pair.settle(2, committed=False)
    pair.move(3, "b", "a", MOVING[1:])
    pair.settle(3, committed=True)
    pair.send(3)
    pair.check()
    for name in pair.cores:
        abandon(pair.cores[name])
        report = audit_stopped(pair.paths[name], pair.cluster)
        assert report.differences == []


def test_an_audit_finds_plays_that_got_lost_on_the_way(pair: Pair) -> None:
    pair.send(5)
    pair.move(1, "a", "b", MOVING)
    pair.settle(1, committed=True)
    board = pair.cores["b"].state.boards["global"]
    entry = int(np.flatnonzero(board._rows[:, 0])[-1])
    board._rows[entry, 0] -= 1
    report = audit_live(pair.paths["b"], lambda slots: served(pair.cores["b"], slots))
    assert any("were counted" in one for one in report.differences)
