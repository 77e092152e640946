"""The files of a log: how they are named, and how one comes into being.

A segment is named by its first position, in 20 digits, so that names sort as positions do. It gets this name only when
its header is durable: a file of that name whose header does not read is damaged, and never half made.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from topk_grpc.errors import DiskFullError, WriteFailedError
from topk_grpc.storage.files import Bytes, Files, WritableFile, is_no_space
from topk_grpc.storage.log_format import SegmentHeader, encode_segment_header

TEMPORARY: Final = ".tmp"
"""How the names end of what is not finished; it is removed when met."""

_NAME: Final = re.compile(r"([0-9]{20})\.log")


def segment_path(directory: Path, first_position: int) -> Path:
    """The file of the segment that begins there."""
    return directory / f"{first_position:020}.log"


def list_segments(files: Files, directory: Path) -> list[int]:
    """The first positions of all segments, ascending."""
    return [int(match[1]) for name in files.names(directory) if (match := _NAME.fullmatch(name))]


def make_segment(
    files: Files,
    directory: Path,
    first_position: int,
    *,
    reserve: range,
    salt: bytes,
    groups: Sequence[Bytes] = (),
) -> tuple[WritableFile, SegmentHeader]:
    """Makes a segment that holds these groups, in the place of one of that name. Returns it open, and durable.

    Args:
        files: the file system.
        directory: where the segments are.
        first_position: where it begins.
        reserve: the least and the most bytes to reserve, as range(least, most + 1). The last bytes of a disk are taken
            in halves of the most: a handful of small segments, not one for each group.
        salt: see `log_format`.
        groups: what follows the header.

    Raises:
        DiskFullError: not even the least is there; nothing has changed.
        OSError: nothing has changed.
        WriteFailedError: it is unknown whether the segment is there.
    """
    least, reserved = reserve.start, reserve.stop - 1
    while True:
        header = SegmentHeader(first_position, reserved, salt)
        try:
            return _write_segment(files, directory, header, groups), header
        except OSError as error:
            if not is_no_space(error):
                raise
            if reserved == least:
                raise DiskFullError(
                    f"{directory}: no room for a log segment of {least} bytes ({error.strerror}). Nothing was written."
                    " Free disk space, then try again"
                ) from error
            reserved = max(reserved // 2, least)


def _write_segment(files: Files, directory: Path, header: SegmentHeader, groups: Sequence[Bytes]) -> WritableFile:
    """The steps of docs/formats/log.md, "A new segment"."""
    path = segment_path(directory, header.first_position)
    temporary = path.with_suffix(TEMPORARY)
    file = files.create(temporary)  # step 1
    try:
        file.reserve(header.reserved)  # step 2
        file.write(0, [encode_segment_header(header), *groups])  # step 3
        file.sync()  # step 4
        files.rename(temporary, path)  # step 5
    except OSError:
        with contextlib.suppress(OSError):
            file.close()
        with contextlib.suppress(OSError):
            files.remove(temporary)
        raise
    try:
        files.sync_directory(directory)  # step 6
    except OSError as error:
        file.close()
        raise WriteFailedError(
            f"{path}: the directory could not be made durable ({error.strerror}). End this process; when the disk is"
            " healthy again, start it: recovery finds what is there"
        ) from error
    return file
