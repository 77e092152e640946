"""The bytes of a log segment: each structure drawn right above the code that writes and reads it. No I/O.

A segment is a header and then groups, end to end; a group is a record of type 0, its header, and the records of one
group commit. All integers are unsigned and little-endian. Behind the last group come zeros, up to the size that was
reserved when the segment was made.

A *position* counts bytes since the log began, over all segments: position = first_position + offset in the file.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from topk_grpc.errors import VersionError
from topk_grpc.storage.checksums import crc32c
from topk_grpc.storage.files import Bytes

VERSION: Final = 1
_MAGIC: Final = b"topk-log"
_U32_MAX: Final = (1 << 32) - 1

Record = tuple[int, Sequence[Bytes]]
"""A record to append: its type, 1 to 255, and the pieces of its payload."""


class DamagedError(Exception):
    """Bytes that do not read as what should stand there. The caller knows the file, and what it means."""

    def __init__(self, reason: str, offset: int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.offset = offset


# --- Segment header ---------------------------------------------------------------------------------------------------
#
#   0         8         12               20         28      36       40
#   +---------+---------+----------------+----------+-------+--------+
#   | magic   | version | first_position | reserved | salt  | crc32c |
#   +---------+---------+----------------+----------+-------+--------+
#
#   reserved  the size of the file when it was made: it never has less while it is the last one, so that a file which
#             somebody cut is told from one whose last group was torn
#   salt      eight random bytes that stand in each group header of the file and, since no client knows them, nowhere
#             else: seen behind a damaged group they prove that it had been durable (`later_group_begins`)
#   crc32c    of the 36 bytes before it
#
# Magic, version and crc32c keep these places in all versions to come: so damage is told from a newer version.

_SEGMENT: Final = struct.Struct("<8sIQQ8sI")
SEGMENT_HEADER_BYTES: Final = _SEGMENT.size


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """What a segment says of itself."""

    first_position: int
    reserved: int
    salt: bytes


def new_salt() -> bytes:
    """Eight random bytes, none of them zero: so they never begin in the zeros before them."""
    return bytes(1 + byte % 255 for byte in secrets.token_bytes(8))


def encode_segment_header(header: SegmentHeader) -> bytes:
    """The first 40 bytes of a segment."""
    data = _SEGMENT.pack(_MAGIC, VERSION, header.first_position, header.reserved, header.salt, 0)[:-4]
    return data + crc32c(data).to_bytes(4, "little")


def decode_segment_header(data: memoryview) -> SegmentHeader:
    """Reads the first 40 bytes of a segment.

    Raises:
        DamagedError: they are damaged, or never were a segment's.
        VersionError: a newer release wrote it; without the file's name.
    """
    if len(data) < SEGMENT_HEADER_BYTES:
        raise DamagedError(f"the file ends after {len(data)} bytes, inside its header", len(data))
    magic, version, first_position, reserved, salt, checksum = _SEGMENT.unpack_from(data)
    if magic != _MAGIC or checksum != crc32c(data[: SEGMENT_HEADER_BYTES - 4]):
        raise DamagedError("the segment's header is damaged", 0)
    if version > VERSION:
        raise VersionError(f"log format {version}, while this release reads up to {VERSION}")
    return SegmentHeader(first_position, reserved, salt)


# --- Record -----------------------------------------------------------------------------------------------------------
#
#   0        4        8      9
#   +--------+--------+------+---------+
#   | length | crc32c | type | payload |
#   +--------+--------+------+---------+
#
#   length    of the payload
#   crc32c    of type and payload
#   type      0: a group header; 1 to 255: what the owner of the log means by it

_RECORD: Final = struct.Struct("<IIB")
_CHECKED_FROM: Final = 8
_TYPE_CHECKSUMS: Final = tuple(crc32c(bytes([record_type])) for record_type in range(256))
_GROUP_HEADER_TYPE: Final = 0


def _encode_record(record_type: int, pieces: Sequence[Bytes]) -> tuple[bytes, int]:
    """What comes before the payload, and the size of both."""
    checksum, length = _TYPE_CHECKSUMS[record_type], 0
    for piece in pieces:
        checksum = crc32c(piece, checksum)
        length += piece.nbytes if isinstance(piece, memoryview) else len(piece)
    if length > _U32_MAX:
        raise ValueError(f"a payload of {length} bytes: a record holds at most {_U32_MAX}")
    return _RECORD.pack(length, checksum, record_type), _RECORD.size + length


def _decode_record(data: memoryview, offset: int, end: int) -> tuple[int, int, int]:
    """Type of the record at `offset`, and where its payload starts and ends, which is at or before `end`."""
    start = offset + _RECORD.size
    if start > end:
        raise DamagedError("the bytes end inside a record", offset)
    length, checksum, record_type = _RECORD.unpack_from(data, offset)
    if start + length > end:
        raise DamagedError(f"a record of {length} bytes does not fit where it stands", offset)
    if crc32c(data[offset + _CHECKED_FROM : start + length]) != checksum:
        raise DamagedError("a record's checksum is wrong", offset)
    return record_type, start, start + length


# --- Group ------------------------------------------------------------------------------------------------------------
#
#   0             9                 17     25     29      33
#   +-------------+-----------------+------+------+-------+--------
#   | record head | durable position| salt | size | count | records ...
#   +-------------+-----------------+------+------+-------+--------
#
#   durable   the position that was durable before this group: its own, for each group is written only after the one
#             before it has been synced. So a group that is there proves that all before it had been whole
#   salt      that of the segment
#   size      of the records that follow, in bytes
#   count     of the records that follow; 0 in a seal, which a closing or recovering process appends for the sake of
#             the proof above

_GROUP: Final = struct.Struct("<Q8sII")
RECORD_HEADER_BYTES: Final = _RECORD.size
GROUP_HEADER_BYTES: Final = _RECORD.size + _GROUP.size
_SALT_AT: Final = _RECORD.size + 8


@dataclass(frozen=True, slots=True)
class Group:
    """A whole group: its records as (type, start, end of the payload), and where it ends, as offsets in the file."""

    records: list[tuple[int, int, int]]
    end: int


def encode_group(records: Sequence[Record], position: int, salt: bytes) -> tuple[list[Bytes], int]:
    """The pieces of a group that will stand at `position`, payloads uncopied, and their size together.

    Raises:
        ValueError: a type out of range, or more bytes than a group can hold.
    """
    body: list[Bytes] = []
    size = 0
    for record_type, pieces in records:
        if not 1 <= record_type <= 255:
            raise ValueError(f"record type {record_type}: it has to lie in 1 to 255")
        head, record_bytes = _encode_record(record_type, pieces)
        body.append(head)
        body.extend(pieces)
        size += record_bytes
    if size > _U32_MAX:
        raise ValueError(f"a group of {size} bytes: it holds at most {_U32_MAX}")
    content = _GROUP.pack(position, salt, size, len(records))
    head, header_bytes = _encode_record(_GROUP_HEADER_TYPE, [content])
    return [head + content, *body], header_bytes + size


def decode_group(data: memoryview, offset: int, end: int, header: SegmentHeader) -> Group:
    """Reads the group at `offset` of a segment and checks every byte of it; it must end at or before `end`.

    Raises:
        DamagedError: it is not whole.
    """
    record_type, start, records_start = _decode_record(data, offset, end)
    if record_type != _GROUP_HEADER_TYPE or records_start - start != _GROUP.size:
        raise DamagedError("no group begins where one should", offset)
    position, salt, size, count = _GROUP.unpack_from(data, start)
    if salt != header.salt or position != header.first_position + offset:
        raise DamagedError(f"the group belongs to position {position} of another place", offset)
    group_end = records_start + size
    if group_end > end:
        raise DamagedError(f"a group of {size} bytes does not fit where it stands", offset)
    records = []
    at = records_start
    while at < group_end:
        record = _decode_record(data, at, group_end)
        if record[0] == _GROUP_HEADER_TYPE:
            raise DamagedError("a group begins inside another", at)
        records.append(record)
        at = record[2]
    if len(records) != count:
        raise DamagedError(f"a group of {count} records holds {len(records)}", offset)
    return Group(records, group_end)


def whole_records(data: memoryview, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The records of a damaged group that are whole, as (type, start, end of the payload); it ends at or before `end`.

    A damaged record whose length is right is passed over; behind a wrong length nothing can be told apart.
    """
    while offset + _RECORD.size <= end:
        length = _RECORD.unpack_from(data, offset)[0]
        try:
            record_type, start, stop = _decode_record(data, offset, end)
        except DamagedError:
            if not length or offset + _RECORD.size + length > end:
                return
            offset += _RECORD.size + length
            continue
        if record_type != _GROUP_HEADER_TYPE:
            yield record_type, start, stop
        offset = stop


def later_group_begins(data: memoryview, offset: int, header: SegmentHeader) -> int | None:
    """Where, behind the damaged group at `offset`, another one was begun; None if nowhere.

    One is enough to tell damage from a torn tail: it was written only after the damaged one had been synced.
    """
    found = _find(data, header.salt, offset + _SALT_AT + len(header.salt))
    return None if found is None else found - _SALT_AT


def written_bytes(data: memoryview) -> int:
    """How far `data` reaches up to its last byte that is not zero, as the reserved ones are; 0 if all are."""
    written = 0
    for at, part in _slices(data, 0):
        if part != _ZEROS[: len(part)]:
            written = at + len(part.rstrip(b"\0"))
    return written


def _find(data: memoryview, wanted: bytes, start: int) -> int | None:
    """Like bytes.find."""
    for at, part in _slices(data, start, len(wanted) - 1):
        found = part.find(wanted)
        if found >= 0:
            return at + found
    return None


_ZEROS: Final = bytes(1 << 20)


def _slices(data: memoryview, start: int, overlap: int = 0) -> Iterator[tuple[int, bytes]]:
    """Copies of it, one after the other, so that a mapped segment is not copied at once."""
    for at in range(start, len(data), len(_ZEROS)):
        yield at, bytes(data[at : at + len(_ZEROS) + overlap])
