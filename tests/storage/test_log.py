from __future__ import annotations

import errno
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.storage.simulated_disk import fail_on
from tests.storage.workload import PATH, Owner, new_disk, write_log
from topk_grpc.errors import CorruptError, DiskFullError, ResourceExhaustedError, StorageError, WriteFailedError
from topk_grpc.storage import DataDirectory, Log, OsFiles, recover
from topk_grpc.storage.checksums import crc32c
from topk_grpc.storage.log_format import GROUP_HEADER_BYTES, SEGMENT_HEADER_BYTES, Record, encode_group
from topk_grpc.storage.segments import list_segments

Records = list[tuple[int, bytes, int]]


def open_log(directory: DataDirectory, segment_bytes: int = 4096) -> tuple[Records, Log]:
    recovery = recover(directory, segment_bytes)
    records = [(kind, bytes(payload), position) for kind, payload, position in recovery.records()]
    return records, recovery.open_log()


RECORD = st.tuples(st.integers(1, 255), st.lists(st.binary(max_size=40), max_size=4))


@settings(max_examples=60, deadline=None)
@given(lives=st.lists(st.lists(st.lists(RECORD, min_size=1, max_size=6), max_size=8), min_size=1, max_size=3))
def test_replay_gives_back_what_was_appended(lives: list[list[list[Record]]]) -> None:
    disk = new_disk()
    appended: list[tuple[int, bytes]] = []
    ends: list[int] = []
    for groups in lives:
        directory = DataDirectory.open(PATH, disk)
        records, log = open_log(directory, segment_bytes=300)
        assert [(kind, payload) for kind, payload, _ in records] == appended
        for group in groups:
            before = log.position
            ends.append(log.append_group(group))
            assert ends[-1] == log.position > before
            appended.extend((kind, b"".join(pieces)) for kind, pieces in group)
        log.close()
        directory.close()
    records, _ = open_log(DataDirectory.open(PATH, disk))
    assert [(kind, payload) for kind, payload, _ in records] == appended
    assert set(ends) <= {position for _, _, position in records}


def test_real_files_and_views_of_any_kind(tmp_path: Path) -> None:
    directory = DataDirectory.open(tmp_path / "data")
    _, log = open_log(directory, segment_bytes=1 << 20)
    many: list[Record] = []
    for i in range(2000):
        many.append((1, [b"x" * (i % 5), memoryview(bytearray(b"writable")), memoryview(b"frozen")[1:3]]))  # noqa: PERF401
    large = bytes(range(256)) * 16_384  # 4 MiB: larger than a segment, and than one CRC slice
    log.append_group(many)
    log.append_group([(255, [large, b"end"])])
    log.append_group([(2, [])])
    log.close()
    records, log = open_log(directory, segment_bytes=1 << 20)
    assert [(kind, payload) for kind, payload, _ in records] == [
        *((1, b"x" * (i % 5) + b"writable" + b"ro") for i in range(2000)),
        (255, large + b"end"),
        (2, b""),
    ]
    log.close()
    directory.close()


def test_payloads_are_views_of_the_map_and_outlive_the_rewrite(tmp_path: Path) -> None:
    directory = DataDirectory.open(tmp_path / "data")
    _, log = open_log(directory, segment_bytes=1 << 20)
    log.append_group([(1, [b"a" * 100_000]), (1, [b"b"])])
    log.close()
    recovery = recover(directory, 1 << 20)
    payloads = [payload for _, payload, _ in recovery.records()]
    assert all(payload.readonly for payload in payloads)
    assert payloads[0].obj is payloads[1].obj
    recovery.open_log().append_group([(1, [b"c"])])
    assert bytes(payloads[0]) == b"a" * 100_000


def test_a_group_is_one_write_and_one_fdatasync() -> None:
    disk = new_disk()
    owner = Owner(disk, segment_bytes=4096)
    disk.operations.clear()
    owner.append()
    assert [operation.split()[0] for operation in disk.operations] == ["write", "sync"]


def test_segments_roll_before_they_would_outgrow_their_reserved_size() -> None:
    disk = write_log(groups=20)
    files = disk.files(PATH / "log")
    assert len(files) > 3
    assert all(len(disk.map(file)) <= 400 for file in files)
    firsts = list_segments(disk, PATH / "log")
    assert [first + len(disk.map(file)) for first, file in zip(firsts, files, strict=True)][:-1] == firsts[1:]


def test_a_new_segment_is_durable_before_its_first_group() -> None:
    disk = new_disk()
    owner = Owner(disk)
    disk.operations.clear()
    while len(list_segments(disk, PATH / "log")) == 1:
        disk.operations.clear()
        owner.append()
    assert [operation.split()[0] for operation in disk.operations] == [
        *("create", "reserve", "write", "sync", "rename", "sync_directory"),
        *("truncate", "write", "sync"),
    ]


def test_delete_before_drops_whole_segments_only() -> None:
    disk = new_disk()
    owner = Owner(disk)
    for _ in range(20):
        owner.append()
    firsts = list_segments(disk, PATH / "log")
    assert owner.log.delete_before(firsts[2] - 1) == 1
    assert list_segments(disk, PATH / "log") == firsts[1:]
    assert owner.log.delete_before(firsts[2]) == 1
    assert owner.log.delete_before(owner.log.position) == len(firsts) - 3
    assert list_segments(disk, PATH / "log") == firsts[-1:]
    owner.append()


def test_a_failed_deletion_leaves_the_log_usable() -> None:
    disk = new_disk()
    owner = Owner(disk)
    for _ in range(10):
        owner.append()
    disk.fault = fail_on("remove", ".log", errno.EIO)
    with pytest.raises(StorageError, match="could not be deleted"):
        owner.log.delete_before(owner.log.position)
    assert owner.log.delete_before(owner.log.position) > 0
    owner.append()


@pytest.mark.parametrize("operation", ["write", "sync"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_failed_write_or_sync_ends_all_use(operation: str, code: int) -> None:
    disk = new_disk()
    owner = Owner(disk, segment_bytes=4096)
    owner.append()
    disk.fault = fail_on(operation, ".log", code)
    with pytest.raises(WriteFailedError, match=r"What is on disk is unknown: end this process"):
        owner.append()
    position = owner.log.position
    with pytest.raises(WriteFailedError, match="cannot be used any more"):
        owner.append()
    assert owner.log.position == position
    owner.close()
    again = Owner(disk.copy())
    assert again.numbers()[: owner.acknowledged] == list(range(owner.acknowledged))


def test_a_directory_that_does_not_sync_ends_all_use() -> None:
    disk = new_disk()
    owner = Owner(disk)
    disk.fault = fail_on("sync_directory", "log", errno.EIO)
    with pytest.raises(WriteFailedError, match="directory could not be made durable"):
        for _ in range(10):
            owner.append()
    with pytest.raises(WriteFailedError, match="cannot be used any more"):
        owner.append()


@pytest.mark.parametrize("operation", ["create", "reserve", "write", "sync", "rename"])
def test_a_full_disk_writes_nothing_and_leaves_the_log_usable(operation: str) -> None:
    disk = new_disk()
    owner = Owner(disk)
    disk.fault = fail_on(operation, ".log" if operation == "rename" else ".tmp", errno.ENOSPC, times=100)
    with pytest.raises(DiskFullError, match=r"Nothing was written\. Free disk space") as caught:
        for _ in range(10):
            owner.append()
    assert isinstance(caught.value, ResourceExhaustedError)
    position = owner.log.position
    with pytest.raises(DiskFullError):
        owner.append()
    assert owner.log.position == position
    assert not [path for path in disk.files(PATH) if path.suffix == ".tmp"]
    assert Owner(disk.copy()).numbers() == list(range(owner.acknowledged))
    disk.fault = None
    owner.append()
    owner.close()
    assert Owner(disk).numbers() == list(range(owner.acknowledged))


def test_what_was_reserved_can_be_appended_to_a_full_disk() -> None:
    disk = new_disk()
    owner = Owner(disk)
    position = owner.log.position
    owner.log.reserve(records=3, payload_bytes=1000)
    assert owner.log.position == position + SEGMENT_HEADER_BYTES  # a segment of its own
    disk.fault = fail_on("reserve", ".tmp", errno.ENOSPC, times=100)
    owner.log.append_group([(1, [bytes(500)]), (1, [bytes(400), bytes(50)]), (2, [bytes(50)])])
    with pytest.raises(DiskFullError):
        owner.log.reserve(records=1, payload_bytes=1000)
    owner.log.close()
    owner.directory.close()
    disk.fault = None
    records, _ = open_log(DataDirectory.open(PATH, disk))
    assert [(kind, len(payload)) for kind, payload, _ in records] == [(1, 500), (1, 450), (2, 50)]


def test_the_last_room_of_a_disk_is_taken_in_smaller_segments() -> None:
    disk = new_disk()
    owner = Owner(disk, segment_bytes=100_000)
    owner.log.append_group([(1, [bytes(99_800)])])
    disk.fault = fail_on("reserve", ".tmp", errno.ENOSPC, times=3)
    owner.append()
    last = disk.files(PATH / "log")[-1]
    assert len(disk.map(last)) == 12_500


def test_other_errors_of_a_new_segment_end_all_use() -> None:
    disk = new_disk()
    owner = Owner(disk)
    disk.fault = fail_on("create", ".tmp", errno.EMFILE)
    with pytest.raises(WriteFailedError, match="new log segment"):
        for _ in range(10):
            owner.append()


@pytest.mark.parametrize(
    ("operation", "code", "kind"), [("reserve", errno.ENOSPC, DiskFullError), ("sync", errno.EIO, StorageError)]
)
def test_recovery_that_cannot_write_changes_nothing(operation: str, code: int, kind: type[Exception]) -> None:
    disk = write_log(groups=5)
    before = {path: bytes(disk.map(path)) for path in disk.files(PATH)}
    disk.fault = fail_on(operation, ".tmp", code, times=100)
    with pytest.raises(kind):
        Owner(disk)
    assert {path: bytes(disk.map(path)) for path in disk.files(PATH)} == before


def test_recovery_writes_the_last_segment_anew() -> None:
    disk = write_log(groups=2)
    disk.operations.clear()
    Owner(disk)
    assert [operation.split()[0] for operation in disk.operations] == [
        *("sync_directory", "sync_directory"),  # of the data directory, whoever made it
        *("create", "reserve", "write", "sync", "rename", "sync_directory"),
    ]


def test_restarts_do_not_make_the_log_grow() -> None:
    disk = write_log(groups=2)
    positions = []
    for _ in range(3):
        owner = Owner(disk)
        positions.append(owner.log.position)
        owner.close()
    assert len(set(positions)) == 1


def test_open_log_waits_for_the_end_of_the_records() -> None:
    directory = DataDirectory.open(PATH, write_log(groups=2))
    recovery = recover(directory, 400)
    next(recovery.records())
    with pytest.raises(RuntimeError):
        recovery.open_log()


@pytest.mark.parametrize("records", [[], [(0, [b""])], [(256, [b""])]])
def test_what_no_group_can_hold_is_refused_and_harmless(records: list[tuple[int, list[bytes]]]) -> None:
    disk = new_disk()
    owner = Owner(disk)
    with pytest.raises(ValueError, match="record"):
        owner.log.append_group(records)
    owner.append()


def test_bytes_of_a_group_are_as_documented() -> None:
    pieces, size = encode_group([(7, [b"pay", b"load"])], position=0x0102, salt=b"saltsalt")
    data = b"".join(pieces)
    assert size == len(data) == GROUP_HEADER_BYTES + 9 + 7
    assert SEGMENT_HEADER_BYTES == 40
    assert GROUP_HEADER_BYTES == 33
    header = (0x0102).to_bytes(8, "little") + b"saltsalt" + (16).to_bytes(4, "little") + (1).to_bytes(4, "little")
    assert data == (
        (24).to_bytes(4, "little")
        + bitwise_crc32c(b"\x00" + header).to_bytes(4, "little")
        + (b"\x00" + header)
        + (7).to_bytes(4, "little")
        + bitwise_crc32c(b"\x07payload").to_bytes(4, "little")
        + b"\x07payload"
    )


def bitwise_crc32c(data: bytes) -> int:
    """RFC 3720, appendix B.4: the polynomial 0x1EDC6F41, reflected."""
    checksum = 0xFFFFFFFF
    for byte in data:
        checksum ^= byte
        for _ in range(8):
            checksum = checksum >> 1 ^ (0x82F63B78 if checksum & 1 else 0)
    return checksum ^ 0xFFFFFFFF


@given(st.lists(st.binary(max_size=30)))
def test_checksums_continue_over_pieces_of_any_kind(pieces: list[bytes]) -> None:
    checksum = 0
    for piece in pieces:
        checksum = crc32c(memoryview(bytearray(piece)), checksum)
    assert checksum == crc32c(b"".join(pieces)) == bitwise_crc32c(b"".join(pieces))
    assert crc32c(b"123456789") == 0xE3069283


def test_a_disk_without_fallocate_gets_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("os.posix_fallocate", refuse)
    file = OsFiles().create(tmp_path / "file")
    file.write(0, [b"abc"])
    file.reserve(3_000_000)
    file.close()
    assert (tmp_path / "file").read_bytes() == b"abc" + bytes(3_000_000 - 3)


def test_a_log_of_a_new_directory_is_empty() -> None:
    owner = Owner(new_disk())
    assert owner.directory.is_new
    assert owner.numbers() == []
    assert owner.recovery.notes == []


def test_a_log_without_segments_has_lost_them() -> None:
    disk = write_log(groups=1)
    for path in disk.files(PATH / "log"):
        disk.remove_durably(path)
    with pytest.raises(CorruptError, match="missing from position 0"):
        Owner(disk)
