"""Targets: the log, segments and groups with any bytes in them, and replay over a chain of segments.

The oracle is a second reader of the format, written from docs/formats/log.md word by word: which records there are, how
far the torn tail reaches, or that the log is damaged. Its checksums are right where the first byte of an input says so:
then the harness computes them, wherever a header or a record can be made out.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Final

from tests.fuzz.harness import Choices, Target, change
from topk_grpc.errors import CorruptError, VersionError
from topk_grpc.storage.checksums import crc32c
from topk_grpc.storage.log_format import SegmentHeader, encode_group, encode_segment_header
from topk_grpc.storage.replay import Replay
from topk_grpc.storage.segments import segment_path

DIRECTORY: Final = Path("/log")
SALT: Final = b"SaltSalt"
HEADER_BYTES, RECORD_BYTES, GROUP_BYTES = 40, 9, 33


class MemoryFiles:
    """The part of `storage.files.Files` that reading needs."""

    def __init__(self, content: dict[Path, bytes]) -> None:
        self.content = content

    def map(self, path: Path, *, changing: bool = False) -> memoryview:
        return memoryview(self.content[path])


# --- Inputs -----------------------------------------------------------------------------------------------------------


def segment(first: int, groups: list[list[bytes]], room: int = 0) -> bytes:
    """A segment with these groups, and room for more."""
    body = b""
    for records in groups:
        pieces, _ = encode_group([(7, [record]) for record in records], first + HEADER_BYTES + len(body), SALT)
        body += b"".join(pieces)
    reserved = HEADER_BYTES + len(body) + room
    return encode_segment_header(SegmentHeader(first, reserved, SALT)) + body + bytes(room)


def right_checksums(data: bytes) -> bytes:
    """Computes the checksum of the header, and of each record from there on."""
    fixed = bytearray(data)
    if len(fixed) < HEADER_BYTES:
        return data
    fixed[36:40] = crc32c(bytes(fixed[:36])).to_bytes(4, "little")
    at = HEADER_BYTES
    while at + RECORD_BYTES <= len(fixed):
        (length,) = struct.unpack_from("<I", fixed, at)
        end = at + RECORD_BYTES + length
        if end > len(fixed) or not any(fixed[at : at + RECORD_BYTES]):
            break
        fixed[at + 4 : at + 8] = crc32c(bytes(fixed[at + 8 : end])).to_bytes(4, "little")
        at = end
    return bytes(fixed)


_SEGMENTS: Final = (
    segment(0, [[b"a", b"bc"], [b"", b"d" * 9]]),
    segment(0, [[b"first"], []], room=20),
    segment(0, [[b"one"], [b"two", b"three"], [], [b"four"]], room=60),
)


def build(choices: Choices) -> dict[int, bytes]:
    """One to three segments with some of their bytes changed."""
    how = choices.below(256)
    content: dict[int, bytes] = {}
    first = 0
    for _ in range(1 + how % 3):
        kind = choices.below(4)
        if kind == 3:
            data = choices.take(choices.below(120))
        else:
            valid = _SEGMENTS[kind]
            data = segment(first, [[b"%d" % first, b"x" * kind], [], [b"y"]][: 1 + kind], room=how >> 4)
            data = change(choices, data if first else valid)
        content[first] = right_checksums(data) if how & 8 else data
        first += max(1, len(content[first])) + (choices.below(3) if not choices.below(16) else 0)
    return content


# --- The oracle -------------------------------------------------------------------------------------------------------


class DamagedError(Exception):
    pass


def _record(data: bytes, at: int, end: int) -> tuple[int, int, int]:
    if at + RECORD_BYTES > end:
        raise DamagedError
    length, checksum, kind = struct.unpack_from("<IIB", data, at)
    stop = at + RECORD_BYTES + length
    if stop > end or crc32c(data[at + 8 : stop]) != checksum:
        raise DamagedError
    return kind, at + RECORD_BYTES, stop


def _group(data: bytes, at: int, end: int, first: int, salt: bytes) -> tuple[list[tuple[int, bytes, int]], int]:
    kind, start, stop = _record(data, at, end)
    if kind or stop - start != 24:
        raise DamagedError
    position, its_salt, size, count = struct.unpack_from("<Q8sII", data, start)
    if its_salt != salt or position != first + at or stop + size > end:
        raise DamagedError
    records = []
    group_end = stop + size
    while stop < group_end:
        kind, start, stop = _record(data, stop, group_end)
        if not kind:
            raise DamagedError
        records.append((kind, data[start:stop], first + stop))
    if len(records) != count:
        raise DamagedError
    return records, group_end


def expected(content: dict[int, bytes], start: int) -> tuple[list[tuple[int, bytes, int]], int, int]:
    """All records from the segment on that holds `start`; the end of the log; bytes that are cut.

    Raises:
        DamagedError: the log is.
    """
    firsts = sorted(content)
    begin = max((first for first in firsts if first <= start), default=None)
    if begin is None:
        raise DamagedError
    records: list[tuple[int, bytes, int]] = []
    chain = [first for first in firsts if first >= begin]
    for first, following in zip(chain, [*chain[1:], None], strict=True):
        data = content[first]
        if len(data) < HEADER_BYTES:
            raise DamagedError
        magic, version, position, reserved, salt, checksum = struct.unpack_from("<8sIQQ8sI", data)
        if magic != b"topk-log" or checksum != crc32c(data[:36]) or version > 1 or position != first:
            raise DamagedError
        end = len(data) if following is None else following - first
        if len(data) < (reserved if following is None else end) or any(data[end:]):
            raise DamagedError
        at = max(start - first, HEADER_BYTES)
        if following is None and at > len(data):
            raise DamagedError
        while at < end:
            try:
                found, at = _group(data, at, end, first, salt)
            except DamagedError:
                if following is not None or (any(data[at:]) and salt in data[at + 17 + 8 :]):
                    raise
                break
            records += found
    return records, chain[-1] + at, len(content[chain[-1]][at:].rstrip(b"\0"))


# --- Targets ----------------------------------------------------------------------------------------------------------


def _replay(content: dict[int, bytes], start: int) -> None:
    try:
        wanted = expected(content, start)
    except DamagedError:
        wanted = None
    files = MemoryFiles({segment_path(DIRECTORY, first): data for first, data in content.items()})
    replay = Replay(files, DIRECTORY, sorted(content), start)  # type: ignore[arg-type]
    try:
        records = [(kind, bytes(payload), end) for kind, payload, end in replay.records()]
    except (CorruptError, VersionError) as error:
        assert wanted is None, error
        assert "/log/" in str(error)
        return
    assert replay.tail is not None
    assert (records, replay.tail.end, replay.tail.cut_bytes) == wanted


def replay(data: bytes) -> None:
    """A chain of segments, from a position that a snapshot may name."""
    choices = Choices(data)
    start = 0 if choices.below(4) else choices.below(400)
    _replay(build(choices), start)


def segment_bytes(data: bytes) -> None:
    """One segment, from its first byte to its last."""
    content = right_checksums(data[1:]) if data[:1] and data[0] & 1 else data[1:]
    _replay({0: content}, 0)


def _segment_seeds() -> list[bytes]:
    return [flag + data for flag in (b"\0", b"\1") for data in _SEGMENTS]


def _replay_seeds() -> list[bytes]:
    return [bytes([1, how, kind]) + bytes(30) for how in (0, 1, 2, 8, 9, 10, 250) for kind in (0, 1, 2)]


TARGETS = (
    Target("segment", segment_bytes, _segment_seeds, 350, 200),
    Target("replay", replay, _replay_seeds, 25, 200),
)
