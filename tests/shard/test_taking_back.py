"""Corrections and deleted songs on a disk that fails: each is there whole or not at all, and what was said holds."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import pytest

from tests.engine.engine_shard import NOW
from tests.oracle import ModelOutcome, ModelPart, Tally
from tests.shard.cores import (
    PATH,
    abandon,
    batch,
    commit,
    counted,
    new_disk,
    open_core,
    pane,
    settings_of,
    take_snapshot,
)
from tests.storage.simulated_disk import PowerLossError, SimulatedDisk, crash_at, fail_on
from topk_grpc.engine.deletion import Deleted
from topk_grpc.errors import DiskFullError, WriteFailedError
from topk_grpc.model import Play
from topk_grpc.shard.core import ShardCore
from topk_grpc.shard.owner import ShardOwner

SONGS = ("a", "b", "c")
CHARTS = ("", "x", "y")

Held = dict[str, list[int]]
Group = list[ModelPart]  # each a request of its own
Step = Group | str  # "snapshot", or a song to be deleted


def play(song_id: str, count: int, *charts: str, after: int = 0) -> Play:
    return Play(song_id, NOW + after, count, charts)


STEPS: list[Step] = [
    [batch(1, play("a", 5, "x"), play("b", 3, "x", "y"), play("c", 1))],
    [
        batch(2, play("a", 2, "y", after=1000)),
        batch(3, play("a", -3, "x"), play("b", -3, "x"), play("b", -1, "x")),  # the last is refused
        batch(4, play("c", 4, "x"), play("c", -2, "x")),
        batch(5, play("a", -1, "y", after=1000)),
    ],
    "snapshot",
    "a",
    [batch(6, play("a", 1, "x"), play("a", -1, "x"), play("b", -1, "y"))],  # the last is refused
    [batch(7, play("a", 7, "y"), play("c", -2, "x"))],
    "snapshot",
    "c",
    [batch(8, play("c", 2), play("a", -7, "y"))],
]


def expected() -> list[Held]:
    """What is held after each request and deletion."""
    tally, held = Tally(), [{chart: [0, 0, 0] for chart in CHARTS}]
    for step in STEPS:
        for one in [step] if isinstance(step, str) else step:
            if isinstance(one, ModelPart):
                refused = {3: 2, 6: 2}.get(one.sequence)
                tally.plays += [each for index, each in one.plays if index != refused]
            elif one == "snapshot":
                continue
            else:
                tally.plays = [each for each in tally.plays if each.song_id != one]
            held.append({chart: [tally.counts(chart).get(song, 0) for song in SONGS] for chart in CHARTS})
    return held


HELD = expected()


def held_by(core: ShardCore) -> Held:
    """From the counts of all time and, the same, from the cells."""
    held = {chart: counted(core, SONGS, chart) for chart in CHARTS}
    for chart in CHARTS:
        every = pane(core, chart)
        assert [every.get(song, 0) for song in SONGS] == held[chart]
    return held


def run(core: ShardCore, steps: Sequence[Step], done: list[int]) -> None:
    """Appends to `done` how many requests and deletions each step that came to its end consists of."""
    for step in steps:
        if step == "snapshot":
            take_snapshot(core)
            done.append(0)
        elif isinstance(step, str):
            core.delete_song(step)
            done.append(1)
        else:
            outcomes = commit(core, *step)
            assert all(isinstance(outcome, ModelOutcome) for outcome in outcomes)
            done.append(len(step))


def test_what_is_held_after_each_step_also_after_a_restart() -> None:
    disk = new_disk()
    core = open_core(PATH, disk)
    done: list[int] = []
    for step in STEPS:
        run(core, [step], done)
        assert held_by(core) == HELD[sum(done)]
        abandon(core)
        core = open_core(PATH, disk)
        assert held_by(core) == HELD[sum(done)]
    assert sum(done) == len(HELD) - 1
    run(core, [step for step in STEPS if isinstance(step, list)], [])  # every batch again
    assert held_by(core) == HELD[-1]
    core.close()


def test_a_song_without_plays_leaves_no_record_and_one_of_another_shard_is_left_alone() -> None:
    disk = new_disk()
    core = open_core(PATH, disk)
    commit(core, batch(1, play("a", 3, "x")))
    position = core.position
    assert core.delete_song("never heard of") == Deleted(0, 0)
    core.state.owned[:] = 0
    assert core.delete_song("a") == Deleted(0, 0)
    assert (core.position, counted(core, ["a"])) == (position, [3])
    core.state.owned[:] = 1
    assert core.delete_song("a") == Deleted(3, 1)
    assert core.delete_song("a") == Deleted(0, 0)
    core.close()


def test_a_snapshot_of_cells_that_all_cancel_out_holds_no_block() -> None:
    disk = new_disk()
    core = open_core(PATH, disk)
    commit(core, batch(1, play("a", 3, "x")), batch(2, play("b", 3), play("b", -3)))
    core.delete_song("a")
    for _ in range(2):
        take_snapshot(core)
        assert all(not board.cells.blocks for board in core.state.boards.values())
        assert held_by(core) == HELD[0]
        abandon(core)
        core = open_core(PATH, disk)
    commit(core, batch(3, play("a", 3, "x")))
    take_snapshot(core)
    core.delete_song("a")
    take_snapshot(core)
    assert all(not board.cells.blocks for board in core.state.boards.values())
    core.close()


def test_a_full_disk_deletes_nothing() -> None:
    disk = new_disk()
    core = open_core(PATH, disk)
    songs = [f"{number:0120}" for number in range(400)]
    commit(core, batch(1, *(play(song, 3) for song in songs)))
    disk.fault = fail_on("reserve", "", errno.ENOSPC, times=1000)
    deleted = 0
    with pytest.raises(DiskFullError):
        for song in songs:
            assert core.delete_song(song) == Deleted(3, 0)
            deleted += 1
    left = [0] * deleted + [3] * (len(songs) - deleted)
    assert 0 < deleted < len(songs)
    assert counted(core, songs) == left
    abandon(core)
    core = open_core(PATH, disk.copy())
    assert counted(core, songs) == left
    core.close()


def test_power_lost_before_any_operation_leaves_each_whole_or_undone() -> None:
    whole = new_disk()
    run(open_core(PATH, whole), STEPS, [])
    on_log = [index for index, operation in enumerate(whole.operations) if "/log/" in operation]
    under_way: set[bool] = set()
    for turn, index in enumerate(sorted({*on_log, *range(0, len(whole.operations), 7)})):
        disk = new_disk()
        disk.fault = crash_at(index)
        done: list[int] = []
        with pytest.raises(PowerLossError):
            run(open_core(PATH, disk), STEPS, done)
        for number, (what, survivor) in enumerate(disk.survivors()):
            if number % 4 != turn % 4:
                continue
            core = open_core(PATH, survivor)
            step = STEPS[len(done)]
            more = 0 if step == "snapshot" else 1 if isinstance(step, str) else len(step)
            # Nothing that was answered is lost. What was under way is there up to some request, each as a whole.
            held = held_by(core)
            assert held in HELD[sum(done) : sum(done) + more + 1], (index, what)
            under_way.add(held != HELD[sum(done)])
            run(core, STEPS[len(done) :], [])
            assert held_by(core) == HELD[-1], (index, what)
            core.close()
    assert under_way == {True, False}


async def test_a_deletion_that_cannot_be_written_ends_the_owner() -> None:
    disk: SimulatedDisk = new_disk()
    core = open_core(PATH, disk)
    commit(core, batch(1, play("a", 3)))
    owner = ShardOwner(core, settings_of(PATH))
    disk.fault = fail_on("sync", "", errno.EIO)
    with pytest.raises(WriteFailedError):
        await owner.scan("delete", lambda core: core.delete_song("a"))
    assert isinstance(await owner.failed, WriteFailedError)
    await owner.close(snapshot=True)
