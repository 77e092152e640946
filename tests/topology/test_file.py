"""The file store with real files, real processes, real kills."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from topk_grpc.errors import (
    CorruptError,
    InvalidArgumentError,
    StorageError,
    TopologyConflictError,
    TopologyError,
    UnavailableError,
    VersionError,
)
from topk_grpc.model import ClusterSettings, ShardInfo, Topology
from topk_grpc.topology import codec, file, open_store
from topk_grpc.topology.file import FileTopologyStore

FIRST = Topology(
    "cluster", 1, ClusterSettings(slots=4), (ShardInfo("a"), ShardInfo("b", "127.0.0.1:1", "d")), (0, 1, 1, 0)
)


MOVE = {"migration_id": 7, "source": "a", "target": "b", "slots": [0, 3], "state": "moving"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "topology.json"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[FileTopologyStore]:
    it = FileTopologyStore(path)
    yield it
    await it.close()


def at(epoch: int, address: str = "") -> Topology:
    return replace(FIRST, epoch=epoch, shards=(ShardInfo("a", address), ShardInfo("b")))


# --- Codec ------------------------------------------------------------------------------------------------------------

shards = st.lists(
    st.builds(ShardInfo, st.text(min_size=1, max_size=5), st.text(max_size=5), st.text(max_size=5), st.booleans()),
    min_size=1,
    max_size=5,
    unique_by=lambda shard: shard.shard_id,
).map(lambda them: tuple(sorted(them, key=lambda shard: shard.shard_id)))


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    them = draw(shards)
    owners = draw(st.lists(st.integers(0, len(them) - 1), min_size=1, max_size=20).map(tuple))
    chosen = ClusterSettings(len(owners), draw(st.sampled_from(["ring", "modulo"])), draw(st.integers(1, 60_000)))
    return Topology(draw(st.text(min_size=1)), draw(st.integers(0, 1 << 60)), chosen, them, owners)


@given(topologies())
def test_json_and_back(topology: Topology) -> None:
    assert codec.decode(codec.encode(topology), "here") == topology


@given(st.data())
def test_every_truncation_is_damage(data: st.DataObject) -> None:
    raw = codec.encode(FIRST)
    cut = data.draw(st.integers(0, len(raw) - 3))
    with pytest.raises(CorruptError, match="here"):
        codec.decode(raw[:cut], "here")


@pytest.mark.parametrize(
    "change",
    [
        {"owners": [0, 1, 1]},
        {"owners": [0, 1, 1, 2]},
        {"owners": [0, 1, 1, -1]},
        {"owners": [0, 1, 1, "0"]},
        {"owners": None},
        {"shards": []},
        {"shards": [{"shard_id": "b"}, {"shard_id": "a"}]},
        {"shards": [{"shard_id": "a"}, {"shard_id": "a"}]},
        {"shards": [{}, {}]},
        {"shards": ["a", "b"]},
        {"epoch": "1"},
        {"epoch": True},
        {"epoch": -1},
        {"cluster_id": ""},
        {"settings": {"slots": 0}},
        {"settings": []},
        {"paused": 1},
        {"shards": [{"shard_id": "a", "draining": "no"}, {"shard_id": "b"}]},
        {"next_migration_id": 0},
        {"wanted": [0, 1, 1]},
        {"wanted": [0, 1, 1, 2]},
        {"wanted": [0, 1, 1, -1]},
        {"migrations": [MOVE], "next_migration_id": 7},
        {"migrations": [MOVE | {"migration_id": 0}]},
        {"migrations": [MOVE | {"target": "a"}]},
        {"migrations": [MOVE | {"target": "c"}]},
        {"migrations": [MOVE | {"slots": []}]},
        {"migrations": [MOVE | {"slots": [3, 0]}]},
        {"migrations": [MOVE | {"slots": [0, 0]}]},
        {"migrations": [MOVE | {"slots": [0, 4]}]},
        {"migrations": [MOVE | {"slots": [1]}]},
        {"migrations": [MOVE | {"state": "committed"}]},
        {"migrations": [MOVE | {"state": "moved"}]},
        {"migrations": [MOVE, MOVE | {"migration_id": 8}]},
        {"migrations": [MOVE, MOVE]},
        {"migrations": [{}]},
        {"format": None},
        {"format": "1"},
    ],
)
def test_contradictions_are_damage(change: dict[str, object]) -> None:
    members = json.loads(codec.encode(FIRST)) | {"next_migration_id": 9} | change
    with pytest.raises(CorruptError, match="here"):
        codec.decode(json.dumps(members).encode(), "here")


@pytest.mark.parametrize("raw", [b"", b"null", b"[]", b"\xff\xfe", b"1", b'"x"'])
def test_what_is_no_topology_is_damage(raw: bytes) -> None:
    with pytest.raises(CorruptError):
        codec.decode(raw, "here")


def test_newer_formats_are_named() -> None:
    raw = json.dumps({"format": 4, "whatever": "it holds"}).encode()
    with pytest.raises(VersionError, match=r"format 4 .*newer.* 3"):
        codec.decode(raw, "here")


def test_a_topology_without_a_secret_is_read() -> None:
    members = json.loads(codec.encode(FIRST)) | {"format": 1}
    for name in ("secret", "wanted", "paused", "migrations", "next_migration_id"):
        del members[name]
    assert codec.decode(json.dumps(members).encode(), "here") == replace(FIRST, secret="")


def test_the_secret_is_kept_and_not_shown() -> None:
    known = replace(FIRST, secret="not to be shown")
    assert codec.decode(codec.encode(known), "here") == known
    assert known.secret not in repr(known)


def test_unknown_members_are_left_aside() -> None:
    members = json.loads(codec.encode(FIRST)) | {"migration": None}
    assert codec.decode(json.dumps(members).encode(), "here") == FIRST


# --- Reading and replacing --------------------------------------------------------------------------------------------


async def test_an_absent_topology_is_named(store: FileTopologyStore, path: Path) -> None:
    with pytest.raises(TopologyError, match=str(path)):
        await store.read()


async def test_each_epoch_replaces_the_one_before(store: FileTopologyStore) -> None:
    for epoch in (1, 2, 3):
        await store.compare_and_set(at(epoch))
        assert (await store.read()).epoch == epoch


@pytest.mark.parametrize("epoch", [0, 1, 2, 4, 5])
async def test_other_epochs_conflict(store: FileTopologyStore, epoch: int) -> None:
    for each in (1, 2):
        await store.compare_and_set(at(each))
    with pytest.raises(TopologyConflictError, match="but 2 is there"):
        await store.compare_and_set(at(epoch))
    assert (await store.read()) == at(2)


async def test_a_later_epoch_needs_one_to_replace(store: FileTopologyStore) -> None:
    with pytest.raises(TopologyConflictError, match="none"):
        await store.compare_and_set(at(2))


async def test_another_cluster_conflicts(store: FileTopologyStore) -> None:
    await store.compare_and_set(FIRST)
    with pytest.raises(TopologyConflictError, match="other"):
        await store.compare_and_set(replace(at(2), cluster_id="other"))


async def test_contradictions_are_not_written(store: FileTopologyStore, path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="owners"):
        await store.compare_and_set(replace(FIRST, owners=(0,)))
    assert not path.exists()


async def test_damage_is_not_replaced(store: FileTopologyStore, path: Path) -> None:
    path.write_bytes(b"{")
    with pytest.raises(CorruptError, match=str(path)):
        await store.compare_and_set(FIRST)
    assert path.read_bytes() == b"{"


async def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    missing = FileTopologyStore(tmp_path / "nowhere" / "topology.json")
    with pytest.raises(StorageError, match="nowhere"):
        await missing.compare_and_set(FIRST)
    (tmp_path / "directory").mkdir()
    with pytest.raises(StorageError, match="directory"):
        await FileTopologyStore(tmp_path / "directory").read()


async def test_a_lock_that_is_held_on_is_named(
    store: FileTopologyStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file, "LOCK_SECONDS", 0.05)
    with Path(f"{path}.lock").open("wb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(UnavailableError, match="lock"):
            await store.compare_and_set(FIRST)
    await store.compare_and_set(FIRST)


# --- Races and crashes ------------------------------------------------------------------------------------------------

RACER = """
import asyncio, sys
from dataclasses import replace
from pathlib import Path
from topk_grpc.errors import TopologyConflictError
from topk_grpc.model import ShardInfo
from topk_grpc.topology.file import FileTopologyStore

async def main(path, name, last):
    store, won = FileTopologyStore(Path(path)), []
    print("ready", flush=True)
    sys.stdin.readline()
    while (present := await store.read()).epoch < last:
        mine = replace(present, epoch=present.epoch + 1, shards=(ShardInfo("a", name), *present.shards[1:]))
        try:
            await store.compare_and_set(mine)
            won.append(mine.epoch)
        except TopologyConflictError:
            pass
    print(*won)

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


async def test_two_processes_race_and_one_wins_each_epoch(store: FileTopologyStore, path: Path) -> None:
    last = 60
    await store.compare_and_set(FIRST)
    pipe = asyncio.subprocess.PIPE
    racers = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", RACER, str(path), f"racer-{index}", str(last), stdin=pipe, stdout=pipe
        )
        for index in range(2)
    ]
    seen: list[Topology] = []

    async def watch() -> None:
        async with aclosing(FileTopologyStore(path).watch()) as later:
            async for topology in later:
                seen.append(topology)
                if topology.epoch == last:
                    return

    watching = asyncio.create_task(watch())
    for racer in racers:
        assert racer.stdout is not None
        assert await racer.stdout.readline() == b"ready\n"
    outputs = await asyncio.wait_for(asyncio.gather(*(racer.communicate(b"go\n") for racer in racers)), 60)
    await asyncio.wait_for(watching, 10)
    won = [{int(epoch) for epoch in output.split()} for output, _ in outputs]
    assert sorted([*won[0], *won[1]]) == list(range(2, last + 1)), "an epoch was won twice, or by nobody"
    epochs = [topology.epoch for topology in seen]
    assert epochs == sorted(set(epochs))
    for topology in seen:
        if topology.epoch > 1:
            winner = topology.shards[0].address
            assert topology.epoch in won[int(winner.removeprefix("racer-"))]


CRASHER = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from topk_grpc.topology.file import FileTopologyStore

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

store = FileTopologyStore(Path(sys.argv[1]))
present = store._read()
if sys.argv[2] == "rename":
    Path.replace = die
elif sys.argv[2] == "fsync":
    os.fsync = die
else:
    beside = FileTopologyStore._beside
    FileTopologyStore._beside = lambda self, suffix: die() if suffix == ".new" else beside(self, suffix)
store._compare_and_set(replace(present, epoch=present.epoch + 1))
"""


@pytest.mark.parametrize("step", ["write", "fsync", "rename"])
async def test_a_crash_before_the_rename_leaves_the_old_one(store: FileTopologyStore, path: Path, step: str) -> None:
    await store.compare_and_set(FIRST)
    crashed = subprocess.run([sys.executable, "-c", CRASHER, str(path), step], check=False, capture_output=True)
    assert crashed.returncode == -signal.SIGKILL, crashed.stderr
    assert await store.read() == FIRST
    await store.compare_and_set(at(2))  # the dead one's lock and leftovers are in nobody's way
    assert await store.read() == at(2)


# --- Watching ---------------------------------------------------------------------------------------------------------


async def test_watch_waits_for_the_first_and_sees_the_newest(store: FileTopologyStore) -> None:
    async with aclosing(store.watch()) as later:
        first = asyncio.ensure_future(anext(later))
        await store.compare_and_set(at(1))
        assert (await asyncio.wait_for(first, 10)).epoch == 1
        for epoch in range(2, 6):
            await store.compare_and_set(at(epoch, f"127.0.0.1:{epoch}"))
        found = await asyncio.wait_for(anext(later), 10)
        assert found == at(5, "127.0.0.1:5")


async def test_watch_sees_changes_that_no_time_stamp_shows(
    store: FileTopologyStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FileTopologyStore, "_identity", lambda self: (1,) if path.exists() else None)
    await store.compare_and_set(at(1))
    async with aclosing(store.watch()) as later:
        assert (await asyncio.wait_for(anext(later), 10)).epoch == 1
        await store.compare_and_set(at(2))
        assert (await asyncio.wait_for(anext(later), 10)).epoch == 2


async def test_watch_survives_removal_and_never_goes_back(store: FileTopologyStore, path: Path) -> None:
    for epoch in (1, 2):
        await store.compare_and_set(at(epoch))
    async with aclosing(store.watch()) as later:
        assert (await asyncio.wait_for(anext(later), 10)).epoch == 2
        path.unlink()
        for epoch in (1, 2, 3):
            await store.compare_and_set(at(epoch))
        assert (await asyncio.wait_for(anext(later), 10)).epoch == 3


async def test_watch_raises_on_damage(store: FileTopologyStore, path: Path) -> None:
    await store.compare_and_set(FIRST)
    async with aclosing(store.watch()) as later:
        await asyncio.wait_for(anext(later), 10)
        os.truncate(path, 10)
        with pytest.raises(CorruptError):
            await asyncio.wait_for(anext(later), 10)


async def test_close_ends_watches(store: FileTopologyStore) -> None:
    await store.compare_and_set(FIRST)
    async with aclosing(store.watch()) as later:
        await asyncio.wait_for(anext(later), 10)
        ended = asyncio.ensure_future(anext(later, None))
        await store.close()
        assert await asyncio.wait_for(ended, 10) is None


# --- Names ------------------------------------------------------------------------------------------------------------


async def test_open_store_reads_file_urls(tmp_path: Path) -> None:
    for url in (f"file:{tmp_path}/t.json", f"file://{tmp_path}/t.json"):
        store = open_store(url)
        try:
            with pytest.raises(TopologyError, match=f"{tmp_path}/t.json"):
                await store.read()
        finally:
            await store.close()


@pytest.mark.parametrize(
    "url", ["", "file:", "/tmp/t.json", "etcd://127.0.0.1:2379/topk", "file://host/t.json", "nope:x"]
)
def test_open_store_names_what_it_takes(url: str) -> None:
    with pytest.raises(TopologyError, match="file:PATH"):
        open_store(url)
