"""Damage to each byte of a log: a `CorruptError`, or a cut of the last group, and never a record that was not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.storage.simulated_disk import SimulatedDisk
from tests.storage.workload import GROUP_RECORDS, PATH, Owner, write_log
from topk_grpc.errors import CorruptError, VersionError
from topk_grpc.storage.checksums import crc32c
from topk_grpc.storage.log_format import (
    SEGMENT_HEADER_BYTES,
    DamagedError,
    SegmentHeader,
    decode_group,
    encode_group,
    encode_segment_header,
)
from topk_grpc.storage.segments import list_segments

GROUPS = 6


def damaged(disk: SimulatedDisk, path: Path, content: bytes) -> SimulatedDisk:
    copy = disk.copy()
    copy.write_durably(path, content)
    return copy


def outcome(disk: SimulatedDisk) -> tuple[str, int]:
    """What a start makes of it: corrupt, or so many groups; and that nothing was changed or invented."""
    before = {path: bytes(disk.map(path)) for path in disk.files(PATH)}
    try:
        owner = Owner(disk)
    except CorruptError as error:
        assert {path: bytes(disk.map(path)) for path in disk.files(PATH)} == before
        assert error.path in str(error)
        assert "Nothing was changed. Restore this data directory from its last backup" in str(error)
        return "corrupt", -1
    assert owner.numbers() == list(range(len(owner.numbers())))
    assert len(owner.numbers()) % GROUP_RECORDS == 0
    return "recovered", len(owner.numbers()) // GROUP_RECORDS


def flips(disk: SimulatedDisk, path: Path) -> list[tuple[int, tuple[str, int]]]:
    content = bytes(disk.map(path))
    results = []
    for at in range(len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[at] ^= 1 << bit
            results.append((at, outcome(damaged(disk, path, bytes(changed)))))
    return results


def test_a_flipped_bit_in_an_earlier_segment_is_corruption() -> None:
    disk = write_log(GROUPS, close=False)
    first, *_ = disk.files(PATH / "log")
    assert len(disk.map(first)) < list_segments(disk, PATH / "log")[1] + 1
    assert {result for _, result in flips(disk, first)} == {("corrupt", -1)}


def test_a_flipped_bit_in_the_last_segment_cuts_the_last_group_at_most() -> None:
    disk = write_log(groups=2, segment_bytes=600, close=False)
    (path,) = disk.files(PATH / "log")
    content = bytes(disk.map(path))
    end = len(content.rstrip(b"\0"))
    last_group = content.rindex(content[28:36], 0, end) - 17
    for at, result in flips(disk, path):
        if at < last_group:
            assert result == ("corrupt", -1), at
        elif at < end:
            assert result == ("recovered", 1), at
        else:
            assert result == ("recovered", 2), at


def test_a_flipped_bit_in_a_log_that_was_closed_is_corruption() -> None:
    disk = write_log(groups=2, segment_bytes=600, close=True)
    (path,) = disk.files(PATH / "log")
    content = bytes(disk.map(path))
    seal = content.rindex(content[28:36]) - 17
    for at, result in flips(disk, path):
        assert result == (("corrupt", -1) if at < seal else ("recovered", 2)), at


def test_a_flipped_bit_in_a_log_that_was_recovered_is_corruption() -> None:
    """Also where the process was killed again before it appended anything."""
    disk = write_log(groups=2, segment_bytes=600, close=False)
    Owner(disk, segment_bytes=600)
    disk = disk.copy()
    (path,) = disk.files(PATH / "log")
    content = bytes(disk.map(path))
    seal = content.rindex(content[28:36]) - 17
    for at, result in flips(disk, path):
        assert result == (("corrupt", -1) if at < seal else ("recovered", 2)), at


def test_a_group_with_another_number_of_records_than_it_says_is_damaged() -> None:
    header = SegmentHeader(0, 400, b"saltsalt")
    pieces, _ = encode_group([(1, [b"payload"])], SEGMENT_HEADER_BYTES, header.salt)
    data = bytearray(encode_segment_header(header) + b"".join(pieces))
    at = SEGMENT_HEADER_BYTES
    data[at + 29] = 2
    data[at + 4 : at + 8] = crc32c(bytes(data[at + 8 : at + 33])).to_bytes(4, "little")
    with pytest.raises(DamagedError, match="a group of 2 records holds 1"):
        decode_group(memoryview(data), at, len(data), header)


def test_the_last_group_torn_at_any_byte_is_cut_and_noted() -> None:
    disk = write_log(groups=3, segment_bytes=900, close=False)
    (path,) = disk.files(PATH / "log")
    content = bytes(disk.map(path))
    start = content.rindex(content[28:36]) - 17
    end = len(content.rstrip(b"\0"))
    for at in range(start, end):
        for torn in (
            content[:at] + bytes(len(content) - at),  # the front reached the disk
            content[:start] + bytes(at - start + 1) + content[at + 1 :],  # the back did
        ):
            copy = damaged(disk, path, torn)
            owner = Owner(copy)
            assert len(owner.numbers()) == 2 * GROUP_RECORDS
            if torn[start:].strip(b"\0"):
                assert "cut a group that was being written" in owner.recovery.notes[0]
            owner.append()
            owner.close()
            assert Owner(copy).numbers() == list(range(3 * GROUP_RECORDS))


def test_a_segment_cut_by_somebody_is_corruption_at_any_length() -> None:
    disk = write_log(GROUPS)
    for path in disk.files(PATH / "log"):
        content = bytes(disk.map(path))
        for size in range(len(content)):
            assert outcome(damaged(disk, path, content[:size])) == ("corrupt", -1), (path, size)


def test_missing_segments_are_corruption() -> None:
    disk = write_log(20)
    files = disk.files(PATH / "log")
    assert len(files) > 4
    for path in files[:-1]:
        copy = disk.copy()
        copy.remove_durably(path)
        assert outcome(copy) == ("corrupt", -1), path


def test_swapped_segments_are_corruption() -> None:
    disk = write_log(20)
    first, second, *_ = disk.files(PATH / "log")
    copy = damaged(disk, first, bytes(disk.map(second)))
    with pytest.raises(CorruptError, match=f"the file belongs at position {list_segments(disk, PATH / 'log')[1]}"):
        Owner(copy)


def test_bytes_behind_an_earlier_segment_are_corruption() -> None:
    disk = write_log(20)
    first = disk.files(PATH / "log")[0]
    assert outcome(damaged(disk, first, bytes(disk.map(first)) + bytes(100))) == ("recovered", 20)
    assert outcome(damaged(disk, first, bytes(disk.map(first)) + bytes(100) + b"x")) == ("corrupt", -1)


def test_group_of_another_file_is_never_replayed() -> None:
    """As blocks of a deleted segment may show up again in a new one, on a file system that lost its way."""
    disk, other = write_log(3, segment_bytes=900, close=False), write_log(3, segment_bytes=900, close=False)
    (path,) = disk.files(PATH / "log")
    content, foreign = bytes(disk.map(path)), bytes(other.map(path))
    start = content.rindex(content[28:36]) - 17
    assert outcome(damaged(disk, path, content[:start] + foreign[start:])) == ("recovered", 2)


def test_corrupt_error_names_file_offset_and_what_to_do() -> None:
    disk = write_log(3, segment_bytes=900)
    (path,) = disk.files(PATH / "log")
    content = bytearray(disk.map(path))
    content[120] ^= 1
    with pytest.raises(CorruptError) as caught:
        Owner(damaged(disk, path, bytes(content)))
    assert caught.value.path == str(path)
    assert caught.value.offset is not None
    assert 73 <= caught.value.offset <= 120
    assert f"{path} is damaged at byte {caught.value.offset}: " in str(caught.value)
    assert "it had been durable, for a later group begins at byte" in str(caught.value)


def test_a_newer_segment_is_a_version_error_not_corruption() -> None:
    disk = write_log(3, segment_bytes=900)
    (path,) = disk.files(PATH / "log")
    content = bytes(disk.map(path))
    header = content[:8] + (2).to_bytes(4, "little") + content[12:36]
    newer = header + crc32c(header).to_bytes(4, "little") + content[40:]
    with pytest.raises(VersionError, match="log format 2, while this release reads up to 1: start the release that"):
        Owner(damaged(disk, path, newer))
