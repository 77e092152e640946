"""CRC-32C (Castagnoli) of any bytes, without copying them, and small JSON files that carry their own.

google_crc32c takes bytes and numpy arrays but no memoryview, and holds the interpreter's lock while it runs (about
10 GB/s): so views are lent to it as arrays, and long ones piece by piece, for the sake of the other threads.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

import google_crc32c
import numpy as np

_SLICE_BYTES: Final = 1 << 16
_SELF_CHECKED: Final = re.compile(rb'\{"crc32c": "([0-9a-f]{8})", ')


def crc32c(data: bytes | memoryview, checksum: int = 0) -> int:
    """The CRC-32C of `data`, which continues what `checksum` was taken of."""
    if len(data) < _SLICE_BYTES:
        return int(google_crc32c.extend(checksum, data if type(data) is bytes else np.frombuffer(data, np.uint8)))
    array = np.frombuffer(data, np.uint8)
    for start in range(0, len(array), _SLICE_BYTES):
        checksum = google_crc32c.extend(checksum, array[start : start + _SLICE_BYTES])
    return checksum


def encode_self_checked(content: dict[str, Any]) -> bytes:
    """One line of JSON whose first key, `crc32c`, covers every byte behind it (from the next key's quote on)."""
    body = json.dumps(content).encode()[1:] + b"\n"
    return b'{"crc32c": "%08x", ' % crc32c(body) + body


def decode_self_checked(data: bytes) -> dict[str, Any] | None:
    """The content that `encode_self_checked` was given, or None if a byte of it is not as it was, or it is no JSON."""
    start = _SELF_CHECKED.match(data)
    if start is None or int(start[1], 16) != crc32c(data[start.end() :]):
        return None
    try:
        content: dict[str, Any] = json.loads(data)
    except (ValueError, RecursionError):  # a right checksum of something else
        return None
    del content["crc32c"]
    return content
