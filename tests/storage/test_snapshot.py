from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.storage.simulated_disk import SimulatedDisk
from tests.storage.workload import GROUP_RECORDS, PATH, Owner, new_disk
from topk_grpc.errors import CorruptError, DiskFullError, StorageError, VersionError
from topk_grpc.storage import Block, DataDirectory, OsFiles, Snapshot, recover
from topk_grpc.storage.checksums import decode_self_checked, encode_self_checked
from topk_grpc.storage.segments import list_segments

DTYPES = st.one_of(
    hnp.integer_dtypes(endianness="<"),
    hnp.floating_dtypes(endianness="<"),
    hnp.byte_string_dtypes(),
    hnp.boolean_dtypes(),
    st.just(np.dtype([("a", "<u4"), ("b", "<i8")])),
)
ARRAYS = hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5))
NAMES = st.sampled_from(["a", "b1", "song_ids", "counts"])


def equal(one: npt.NDArray[np.generic], other: npt.NDArray[np.generic]) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


@settings(max_examples=60, deadline=None)
@given(
    arrays=st.dictionaries(NAMES, ARRAYS),
    columns=st.dictionaries(NAMES, ARRAYS),
    meta=st.dictionaries(st.text(), st.integers()),
)
def test_what_was_written_is_read(
    arrays: dict[str, npt.NDArray[np.generic]], columns: dict[str, npt.NDArray[np.generic]], meta: dict[str, int]
) -> None:
    disk = new_disk()
    owner = Owner(disk)
    position = owner.log.position
    mapped = owner.recovery.snapshots.write(Snapshot(position, meta, arrays, (Block(3, columns),)))
    owner.close()
    snapshot = recover(DataDirectory.open(PATH, disk), 400).snapshot
    assert snapshot is not None
    assert snapshot.position == position
    assert snapshot.meta == meta
    assert snapshot.arrays.keys() == arrays.keys()
    assert all(equal(array, snapshot.arrays[name]) for name, array in arrays.items())
    for blocks in (mapped, snapshot.blocks):
        assert [block.block_id for block in blocks] == [3]
        assert blocks[0].columns.keys() == columns.keys()
        assert all(equal(column, blocks[0].columns[name]) for name, column in columns.items())
        assert not any(column.flags.writeable for column in blocks[0].columns.values())


def test_real_files_are_standard_numpy_files(tmp_path: Path) -> None:
    owner = Owner(OsFiles(), tmp_path / "data", 4096)
    big = np.arange(3_000_000, dtype=np.int64)
    owner.recovery.snapshots.write(
        Snapshot(owner.log.position, {}, {"big": big, "none": big[:0]}, (Block(0, {"c": big}),))
    )
    owner.close()
    with np.load(tmp_path / "data/snapshots/000001/arrays.npz", allow_pickle=False) as arrays:
        assert equal(arrays["big"], big)
        assert equal(arrays["none"], big[:0])
    assert equal(np.load(tmp_path / "data/blocks/0000000000.c.npy", allow_pickle=False), big)
    again = Owner.__new__(Owner)
    again.directory = DataDirectory.open(tmp_path / "data")
    snapshot = recover(again.directory, 4096).snapshot
    assert snapshot is not None
    column = snapshot.blocks[0].columns["c"]
    assert equal(column, big)
    assert not column.flags.owndata
    assert snapshot.arrays["big"].flags.writeable


def with_snapshots(count: int, *, tail: int = 1) -> SimulatedDisk:
    disk = new_disk()
    owner = Owner(disk)
    for _ in range(count):
        for _ in range(3):
            owner.append()
        owner.take_snapshot()
    for _ in range(tail):
        owner.append()
    owner.close()
    return disk.copy()


def test_the_last_two_snapshots_are_kept_with_their_blocks_and_their_log() -> None:
    disk = with_snapshots(5)
    assert disk.names(PATH / "snapshots") == ["000004", "000005"]
    assert disk.names(PATH / "blocks") == [f"000000000{n}.numbers.npy" for n in (2, 3, 4)]
    owner = Owner(disk)
    firsts = list_segments(disk, PATH / "log")
    assert firsts[0] <= owner.recovery.snapshots.kept_position() < firsts[1]
    assert firsts[0] > 0


def test_kept_position_is_zero_before_there_are_two_snapshots() -> None:
    owner = Owner(new_disk())
    owner.append()
    assert owner.recovery.snapshots.kept_position() == 0
    owner.take_snapshot()
    first = owner.log.position
    assert owner.recovery.snapshots.kept_position() == 0
    owner.append()
    owner.take_snapshot()
    assert owner.recovery.snapshots.kept_position() == first


def test_each_step_is_durable_before_the_next_relies_on_it() -> None:
    disk = new_disk()
    owner = Owner(disk)
    for _ in range(3):
        owner.append()
        owner.take_snapshot()
    owner.append()
    disk.operations.clear()
    owner.take_snapshot()
    blocks, snapshots = PATH / "blocks", PATH / "snapshots"
    expected = [
        *("create", "write", "sync", f"sync_directory {blocks}"),
        *("make_directory", "create", "write", "sync"),
        *("create", "write", "sync", f"sync_directory {snapshots / '000004.tmp'}"),
        *(f"rename {snapshots / '000004'}", f"sync_directory {snapshots}"),
        *(f"rename {snapshots / '000002.tmp'}", f"sync_directory {snapshots}"),
        *("remove", "remove", f"remove {snapshots / '000002.tmp'}", f"remove {blocks}/0000000000.numbers.npy"),
    ]
    done = [operation for operation in disk.operations if "/log/" not in operation]
    merged = [one for one, before in zip(done, ["", *done], strict=False) if one != before]  # writes in many pieces
    assert len(merged) == len(expected)
    assert all(one.startswith(start) for one, start in zip(merged, expected, strict=True)), merged


def test_blocks_are_written_once() -> None:
    disk = new_disk()
    owner = Owner(disk)
    owner.append()
    owner.take_snapshot()
    disk.operations.clear()
    owner.append()
    owner.take_snapshot()
    assert [operation for operation in disk.operations if "/blocks/0000000000" in operation] == []
    owner.close()
    owner = Owner(disk)
    disk.operations.clear()
    owner.append()
    owner.take_snapshot()
    assert [operation for operation in disk.operations if "/blocks/0000000001" in operation] == []


@pytest.mark.parametrize("name", ["manifest.json", "arrays.npz"])
def test_a_flipped_bit_anywhere_in_the_newest_snapshot_falls_back_to_the_one_before(name: str) -> None:
    disk = with_snapshots(3)
    path = PATH / "snapshots/000003" / name
    content = bytes(disk.map(path))
    for at in range(len(content)):
        copy = disk.copy()
        copy.write_durably(path, content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        owner = Owner(copy)
        assert owner.numbers() == list(range(10 * GROUP_RECORDS))
        assert len(owner.recovery.notes) == 1
        assert owner.recovery.notes[0].startswith(f"snapshot 000003 is damaged: {path}")


def test_a_damaged_or_missing_block_falls_back_too_and_is_made_again() -> None:
    disk = with_snapshots(3)
    path = PATH / "blocks/0000000002.numbers.npy"
    content = bytes(disk.map(path))
    for change in (None, content[:-1], content[:-1] + b"\xff", b""):
        copy = disk.copy()
        if change is None:
            copy.remove_durably(path)
        else:
            copy.write_durably(path, change)
        owner = Owner(copy)
        assert owner.numbers() == list(range(10 * GROUP_RECORDS))
        assert len(owner.recovery.notes) == 1
        owner.take_snapshot()
        owner.close()
        again = Owner(copy)
        assert again.numbers() == list(range(10 * GROUP_RECORDS))
        assert again.recovery.notes == []
        assert copy.names(PATH / "snapshots") == ["000002", "000004"]


def test_a_snapshot_damaged_in_whatever_file_leaves_the_other_usable() -> None:
    disk = with_snapshots(2, tail=0)
    for path in disk.files(PATH / "snapshots"):
        copy = disk.copy()
        copy.remove_durably(path)
        assert Owner(copy).numbers() == list(range(6 * GROUP_RECORDS)), path


def test_no_log_is_deleted_while_only_one_snapshot_is_whole() -> None:
    disk = with_snapshots(3)
    disk.write_durably(PATH / "snapshots/000002/manifest.json", b"{}")
    owner = Owner(disk)
    assert owner.recovery.snapshots.kept_position() == 0
    assert len(owner.recovery.notes) == 1
    firsts = list_segments(disk, PATH / "log")
    owner.log.delete_before(owner.recovery.snapshots.kept_position())
    assert list_segments(disk, PATH / "log") == firsts


def test_both_snapshots_damaged_is_corruption_where_the_log_was_deleted() -> None:
    disk = with_snapshots(3)
    for number in ("000002", "000003"):
        disk.write_durably(PATH / "snapshots" / number / "arrays.npz", b"")
    with pytest.raises(CorruptError, match="no snapshot is whole") as caught:
        Owner(disk)
    assert "snapshot 000002 is damaged" in str(caught.value)
    assert "snapshot 000003 is damaged" in str(caught.value)
    assert "Restore this data directory from its last backup" in str(caught.value)


def test_the_whole_log_stands_in_for_damaged_snapshots() -> None:
    disk = with_snapshots(1)
    disk.write_durably(PATH / "snapshots/000001/arrays.npz", b"")
    owner = Owner(disk)
    assert owner.numbers() == list(range(4 * GROUP_RECORDS))
    assert "snapshot 000001 is damaged" in owner.recovery.notes[0]


def test_all_snapshots_missing_is_corruption_where_the_log_was_deleted() -> None:
    disk = with_snapshots(3)
    disk.remove_durably(PATH / "snapshots/000002")
    disk.remove_durably(PATH / "snapshots/000003")
    with pytest.raises(CorruptError, match="the log is missing from position 0 on"):
        Owner(disk)


def test_a_log_without_its_end_is_corruption() -> None:
    disk = with_snapshots(3)
    for path in disk.files(PATH / "log"):
        disk.remove_durably(path)
    with pytest.raises(CorruptError, match="the log is missing from position"):
        Owner(disk)


def test_an_older_log_than_the_snapshot_is_corruption() -> None:
    disk, before = with_snapshots(3), with_snapshots(0)
    for path in disk.files(PATH / "log"):
        disk.remove_durably(path)
    for path in before.files(PATH / "log"):
        disk.write_durably(path, bytes(before.map(path)))
    with pytest.raises(CorruptError, match="the log ends before the snapshot's position"):
        Owner(disk)


def test_a_newer_snapshot_is_a_version_error_and_no_fallback() -> None:
    disk = with_snapshots(3)
    path = PATH / "snapshots/000003/manifest.json"
    content = decode_self_checked(bytes(disk.map(path)))
    assert content is not None
    disk.write_durably(path, encode_self_checked({**content, "format": 2}))
    with pytest.raises(VersionError, match="snapshot format 2, while this release reads up to 1"):
        Owner(disk)


@pytest.mark.parametrize(("code", "kind"), [(errno.ENOSPC, DiskFullError), (errno.EIO, StorageError)])
def test_a_snapshot_that_fails_at_any_operation_changes_nothing(code: int, kind: type[StorageError]) -> None:
    failures = 0
    for index in range(100):
        disk = new_disk()
        owner = Owner(disk)
        for _ in range(2):
            owner.append()
            owner.take_snapshot()
        owner.append()
        left = index

        def fault(operation: str, path: Path) -> None:
            nonlocal left
            left -= 1
            if left == -1:
                raise OSError(code, errno.errorcode[code], str(path))

        disk.fault = fault
        snapshots = disk.names(PATH / "snapshots")
        state = owner.numbers()
        try:
            owner.take_snapshot()
        except StorageError as error:
            failures += 1
            if "is durable, but old ones" not in str(error) and "old log segment" not in str(error):
                assert type(error) is kind
                assert disk.names(PATH / "snapshots") == snapshots
                assert len(disk.names(PATH / "blocks")) == 2
        disk.fault = None
        assert Owner(disk.copy()).numbers() == state
        owner.new = list(range(owner.acknowledged))[
            len(owner.old) + sum(len(b.columns["numbers"]) for b in owner.blocks) :
        ]
        owner.next_block_id += 100
        owner.append()
        owner.take_snapshot()
        owner.close()
        assert Owner(disk).numbers() == list(range(owner.acknowledged))
        if left >= 0:
            break
    assert failures > 15


@pytest.mark.parametrize(
    "snapshot",
    [
        Snapshot(0, {}, {"../a": np.zeros(1)}),
        Snapshot(0, {}, {"file": np.zeros(1)}),
        Snapshot(0, {}, {"a": np.array([None])}),
        Snapshot(0, {}, {}, (Block(1, {"A/B": np.zeros(1)}),)),
        Snapshot(0, {}, {}, (Block(1, {}), Block(1, {}))),
        Snapshot(0, {}, {}, (Block(-1, {}),)),
    ],
)
def test_what_could_not_be_read_again_is_refused(snapshot: Snapshot) -> None:
    disk = new_disk()
    owner = Owner(disk)
    disk.operations.clear()
    with pytest.raises(ValueError, match=r"array|block"):
        owner.recovery.snapshots.write(snapshot)
    assert disk.operations == []


def test_a_dropped_block_id_cannot_come_back_with_other_content() -> None:
    disk = new_disk()
    owner = Owner(disk)
    store = owner.recovery.snapshots
    store.write(Snapshot(owner.log.position, {}, {}, (Block(1, {"c": np.arange(3)}),)))
    store.write(Snapshot(owner.log.position, {}, {}, ()))
    with pytest.raises(ValueError, match="cannot be used again"):
        store.write(Snapshot(owner.log.position, {}, {}, (Block(1, {"c": np.arange(4)}),)))
