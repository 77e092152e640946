"""Power is lost before every single file operation of a shard's life, and again before each of its recovery.

Whatever the disk may then hold: every answered request counts, what was under way counts wholly or not at all, and once
it was sent again everything counts exactly once. Disks that hold the same bytes are tried once.

docs/durability.md names each operation, by the labels of `label_of`, and what a start makes of a crash before it.
"""

from __future__ import annotations

import errno
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.shard.cores import PATH, take_snapshot
from tests.shard.crash_life import (
    STEPS,
    Life,
    Start,
    holds,
    live_with_the_oracle,
    new_life,
    resend,
    start,
)
from tests.storage.simulated_disk import Fault, SimulatedDisk
from topk_grpc.engine import cells
from topk_grpc.errors import CorruptError, StorageError
from topk_grpc.kernels import compiled

DOCUMENT = Path(__file__).parents[2] / "docs/durability.md"
STRIDE = 1 if compiled() else 25
"""Uncompiled kernels are hundreds of times slower: there some of the crashes have to do."""

pytestmark = pytest.mark.timeout(600)


def label_of(operation: str, path: Path) -> str:
    """An operation as docs/durability.md calls it: what is done, to which kind of file."""
    if not path.is_relative_to(PATH):
        return f"{operation} DIR/.."
    name = re.sub(r"\d{6,}", "N", str(path.relative_to(PATH)))
    return f"{operation} {'DIR' if name == '.' else re.sub(r'N[.][a-z]+[.]npy', 'N.npy', name)}"


@dataclass
class Crash:
    """A disk as it may be found, and what was known when power was lost."""

    disk: SimulatedDisk
    done: int
    under_way: int
    step: int
    start: Start
    where: str


def crashes_of(life: Life) -> list[Crash]:
    """Lives on; before each operation all disks are taken that could be found, had power been lost there."""
    found: list[Crash] = []
    seen = set()

    def look(operation: str, path: Path) -> None:
        for what, survivor in life.disk.survivors():
            key = (survivor.digest(), life.done, life.under_way)
            if key not in seen:
                seen.add(key)
                where = f"before {operation} {path} in step {life.step} ({STEPS[life.step]}); what survived: {what}"
                found.append(Crash(survivor, life.done, life.under_way, life.step, life.start, where))

    life.disk.fault = look
    life.live()
    return found


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
    """So that a start need not touch megabytes: there are hundreds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "CHUNK_CELLS", 1 << 10)
        yield


@pytest.fixture(scope="module")
def truth() -> Life:
    return live_with_the_oracle()


@pytest.fixture(scope="module")
def crashes() -> list[Crash]:
    return crashes_of(new_life())


def check(disk: SimulatedDisk, crash: Crash, truth: Life, *, go_on: bool = False) -> None:
    """Everything answered is there; what was not is sent again; then everything is there, each once."""
    core = start(disk, crash.start)
    allowed = truth.held[crash.done : crash.done + crash.under_way + 1]
    assert any(holds(core, held, all_time_only=True) for held in allowed), crash.where
    resend(core, truth.outcomes, crash.done, crash.under_way, crash.step)
    last = truth.held[crash.done + crash.under_way]
    assert holds(core, last), crash.where
    if go_on:
        take_snapshot(core)
        core.close()
        core = start(disk, crash.start)
        assert holds(core, last), crash.where
    core.close()


def test_every_answered_request_counts_once_wherever_power_is_lost(
    truth: Life, crashes: list[Crash], capsys: pytest.CaptureFixture[str]
) -> None:
    operations = len(truth.disk.operations)
    for number, crash in enumerate(crashes[::STRIDE]):
        check(crash.disk.copy(), crash, truth, go_on=number % 3 == 0)
    with capsys.disabled():
        print(f"\ncrash points: {operations} file operations, {len(crashes)} different disks found after them")
    assert operations >= 290
    assert len(crashes) >= 800


def test_every_answered_request_counts_once_when_power_is_lost_again_in_recovery(
    truth: Life, crashes: list[Crash], capsys: pytest.CaptureFixture[str]
) -> None:
    operations: Counter[str] = Counter()
    seen = set()
    tried = 0
    for crash in crashes[:: 15 * STRIDE]:
        disk = crash.disk.copy()
        again: list[Crash] = []

        def look(operation: str, path: Path, crash: Crash = crash, disk: SimulatedDisk = disk) -> None:
            operations[operation] += 1
            for what, survivor in disk.survivors():
                key = (survivor.digest(), crash.done, crash.under_way)
                if key not in seen:
                    seen.add(key)
                    where = f"{crash.where}; then before {operation} {path} of recovery; what survived: {what}"
                    again.append(Crash(survivor, crash.done, crash.under_way, crash.step, crash.start, where))  # noqa: B023

        disk.fault = look
        core = start(disk, crash.start)
        disk.fault = None
        core.close()
        for second in again:
            check(second.disk, second, truth)
        tried += len(again)
    with capsys.disabled():
        print(f"\ncrash points in recovery: {operations.total()} file operations, {tried} different disks")
    if STRIDE == 1:
        assert operations.total() >= 400
        assert tried >= 300


def failing_at(index: int) -> Fault:
    """The operation of that index fails with EIO, and every one after it: nobody may go on as if nothing were."""
    left = index

    def fault(_operation: str, path: Path) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.EIO, "injected", str(path))

    return fault


def test_a_failed_operation_is_survived_though_the_page_cache_lies(truth: Life) -> None:
    """A sync that fails drops what it should have written, and later syncs succeed without it; a write that fails has
    written its first half. The process ends; the next one starts on the same page cache; then power is lost.
    """
    failures = 0
    labels = [label_of(operation.split()[0], Path(operation.split()[1])) for operation in truth.disk.operations]
    chosen = sorted({*map(labels.index, labels), *range(0, len(labels), 4)})[::STRIDE]  # each kind, and more
    for index in chosen:
        life = new_life()
        disk = life.disk
        disk.fault = failing_at(index)
        disk.short_writes = disk.forgets_on_failed_sync = True
        where = f"{truth.disk.operations[index]} failed"
        try:
            life.live()
        except StorageError:
            failures += 1
        disk.fault = None
        disk.end_of_process()
        crash = Crash(disk, life.done, life.under_way, life.step, life.start, where)
        if life.step == len(STEPS) - 1 and not life.under_way:  # it only failed to close
            crash.where += " at the end"
        check(disk, crash, truth)
        disk.end_of_process()
        seen = set()
        for what, survivor in disk.survivors():
            if (key := survivor.digest()) not in seen:
                seen.add(key)
                core = start(survivor, life.start)
                assert holds(core, truth.held[life.done + life.under_way]), (where, what)
                core.close()
    assert failures >= 0.9 * len(chosen)


def test_what_cannot_be_read_stops_the_start_or_is_made_up_for_and_changes_nothing(truth: Life) -> None:
    """EIO at each read of a start: the older snapshot stands in for the newer; nothing stands in for the log."""
    helped = stopped = 0
    for index in range(1000):
        disk = truth.disk.copy()
        before = disk.digest()
        reads = 0

        def fault(_operation: str, path: Path, index: int = index) -> None:
            nonlocal reads
            reads += 1
            if reads == index + 1:
                raise OSError(errno.EIO, "Input/output error", str(path))

        disk.read_fault = fault
        try:
            core = start(disk, Start())
        except StorageError as error:
            assert not isinstance(error, CorruptError)
            assert re.search("cannot be|could not be", str(error))
            assert disk.digest() == before
            stopped += 1
            disk.read_fault = None
            disk.end_of_process()
            core = start(disk, Start())
        else:
            helped += reads > index
        disk.read_fault = None
        assert holds(core, truth.held[-1]), index
        core.close()
        if reads <= index:
            break
    assert helped > 10
    assert stopped > 3


def test_the_document_names_every_operation_and_no_other(truth: Life) -> None:
    done = {label_of(operation.split()[0], Path(operation.split()[1])) for operation in truth.disk.operations}
    rows = re.findall(r"^\|[^|]*\| `([a-z_]+ \S+)` \|", DOCUMENT.read_text(), re.MULTILINE)
    named = {row for row in rows if not row.split()[1].startswith(("TARGET", "topology"))}
    assert named == done
