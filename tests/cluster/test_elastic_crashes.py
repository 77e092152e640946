"""kill -9 of everybody at every state of a moving slot, under load: one owner, and every play once.

The test is the coordinator. In each round it brings one migration to each state that there is (stages.py), all at the
same time, each with slots and songs of its own, while the controller is stopped. Then it kills the round's victim, or
cuts the network between the two shards; everybody goes on, and the controller takes over what it finds. In the end no
migration is left, each slot has one owner, and of each stage's songs every play counts once, in a chart of its own: one
batch before the migration began, one that was sent while it stood, and both sent again through the other gateway,
which have to be duplicates: so their marks have moved.

The producers and askers of the storms are at it all the while; what they say is compared with the oracle in the end.
The topology is in a real etcd, which is a victim like all others.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from collections.abc import AsyncIterator
from typing import Final

import pytest
import pytest_asyncio

from tests.cluster.coordinating import AGAIN_SECONDS, SEED, Bench, until
from tests.cluster.stages import STAGES, Stage, run_on_tables
from tests.faults.cluster import CONTROLLER, SHARDS
from tests.faults.comparison import Comparison
from tests.topology.etcd_server import EtcdServer, needs_etcd
from topk_grpc.engine import ownership
from topk_grpc.engine.ownership import Part, Step
from topk_grpc.migration import records
from topk_grpc.migration.members import draining, with_new_shards
from topk_grpc.model import MigrationState
from topk_grpc.topology.change import change

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    needs_etcd,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(240),
]

VICTIMS: Final = ("coordinator", "A", "B", "gateway", "etcd", "the line between A and B", "A and B", "everybody")
"""A is the source and B the target of most stages, and the other way round of those that only so can be had."""

KILLS: Final = int(os.environ.get("TOPK_CONTROLLER_KILLS", "2"))


# --- The stages are all there are -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
async def test_a_stage_is_where_the_tables_say_that_its_steps_lead(stage: Stage) -> None:
    assert run_on_tables(stage)[0] == (stage.record, stage.source, stage.target)


async def test_the_stages_take_every_row_of_both_tables() -> None:
    taken = set(itertools.chain.from_iterable(run_on_tables(stage)[1] for stage in STAGES))
    rows: set[tuple[str, object, object]] = {("record", *row) for row in records.TRANSITIONS}
    rows |= {("part", *row) for row in ownership.TRANSITIONS}
    # A source that was killed reads freeze and outcome from its log, and nothing of the export in between.
    assert rows - taken == {("part", Part.FROZEN, Step.COMMIT)}
    assert {stage.record for stage in STAGES} == {*MigrationState, None}
    assert {part for stage in STAGES for part in (stage.source, stage.target)} == {*Part, None}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    root = tmp_path_factory.mktemp("crashes")
    etcd = await asyncio.to_thread(EtcdServer(root / "etcd").start)
    made = Bench(root, etcd)
    try:
        await made.start()
        yield made
    finally:
        await made.close()
        etcd.kill()


# --- Rounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", VICTIMS)
async def test_every_play_counts_once_whoever_dies_at_whatever_state(bench: Bench, victim: str) -> None:
    number = VICTIMS.index(victim)
    a, b = random.Random(f"{SEED} {victim}").sample(SHARDS, 2)
    await bench.settled()
    bench.stop(CONTROLLER)
    everything = [await bench.begin(stage, f"round {number}, {stage.name}", a, b) for stage in STAGES]
    await bench.bring(everything, decided=False)
    await bench.bring([one for one in everything if not one.stage.waits_for], decided=True)
    bench.stop(a)
    await bench.bring([one for one in everything if one.stage.waits_for == 1], decided=True)
    bench.stop(b)
    await bench.bring([one for one in everything if one.stage.waits_for == 2], decided=True)
    for moving in everything:
        moving.sending = asyncio.create_task(bench.record(moving, 2))
    await bench.strike(victim, a, b)
    try:
        topology = await bench.settled()
    finally:
        bench.heal()
    owners = {moving.stage.name: await bench.check(moving, topology) for moving in everything}
    await bench.check_owners()
    print(f"seed {SEED}: from {a} to {b}, killed: {victim}; owners in the end: {owners}")
    assert not bench.findings, f"seed {SEED}\n" + "\n".join(bench.findings)


async def test_a_shard_drains_and_comes_back_whenever_the_controller_is_killed(bench: Bench) -> None:
    chance = random.Random(f"{SEED} kills")
    controller = bench.cluster.processes[CONTROLLER]
    gone = chance.choice(SHARDS)
    await bench.settled()
    await change(bench.store, lambda found: draining(found, [gone]), "that a shard drains")
    for _ in range(KILLS):
        leading = controller.events.get("leading", 0)
        await asyncio.sleep(chance.uniform(0.05, 1))
        starts = controller.starts
        assert controller.kill()
        assert await controller.ready_after(starts, AGAIN_SECONDS)

        async def leads_again(before: int = leading) -> bool:
            return controller.events.get("leading", 0) > before

        assert await until(leads_again)
    assert not (await bench.moved()).slots_of(gone)
    await change(bench.store, lambda found: with_new_shards(found, [gone]), "that a shard stays")

    async def has_slots_again() -> bool:
        return bool((await bench.moved()).slots_of(gone))

    assert await until(has_slots_again)
    await bench.check_owners()
    assert not bench.findings, f"seed {SEED}\n" + "\n".join(bench.findings)


async def test_everything_is_as_the_oracle_has_it_before_and_after_all_are_killed_at_once(bench: Bench) -> None:
    assert await bench.crowd.bring_home(AGAIN_SECONDS), bench.findings
    topology = await bench.moved()
    comparison = await asyncio.to_thread(
        Comparison, bench.ledger, bench.cluster.addresses, bench.findings.append, SEED, AGAIN_SECONDS
    )
    assert await comparison.counts() == (0, 0), bench.findings
    await comparison.windows()
    await bench.cluster.kill_everything()
    assert (await bench.store.read()).owners == topology.owners
    assert await comparison.counts() == (0, 0), bench.findings
    await bench.check_owners()
    assert not bench.findings, f"seed {SEED}\n" + "\n".join(bench.findings)
