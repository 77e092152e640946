"""The file store with real files, real processes, real kills."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from tests.topology.topologies import FIRST, at
from topk_grpc.errors import (
    CorruptError,
    StorageError,
    TopologyError,
    UnavailableError,
)
from topk_grpc.topology import file, open_store
from topk_grpc.topology.file import FileTopologyStore


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "topology.json"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[FileTopologyStore]:
    it = FileTopologyStore(path)
    yield it
    await it.close()


# --- Reading and replacing --------------------------------------------------------------------------------------------


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


# --- Leading ----------------------------------------------------------------------------------------------------------


async def test_a_leader_whose_lock_was_removed_hears_of_it(store: FileTopologyStore, path: Path) -> None:
    async with store.lead("office") as leadership:
        path.with_name("topology.json.office.lock").unlink()
        await asyncio.wait_for(leadership.lost.wait(), 10)
        async with asyncio.timeout(10), FileTopologyStore(path).lead("office") as another:
            assert not another.lost.is_set()


async def test_what_a_lock_cannot_be_made_for_is_named(tmp_path: Path) -> None:
    missing = FileTopologyStore(tmp_path / "nowhere" / "topology.json")
    with pytest.raises(StorageError, match="nowhere"):
        async with missing.lead("office"):
            pass
    with pytest.raises(StorageError, match="nowhere"):
        async with missing.announce("shard-0", "127.0.0.1:1"):
            pass


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
    "url", ["", "file:", "/tmp/t.json", "etcd:/127.0.0.1:2379/topk", "file://host/t.json", "nope:x"]
)
def test_open_store_names_what_it_takes(url: str) -> None:
    with pytest.raises(TopologyError, match="file:PATH"):
        open_store(url)
