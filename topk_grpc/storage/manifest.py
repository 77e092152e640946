"""The manifest of a snapshot: what it consists of, with the size and checksum of every file, and where the log goes on.

One line of JSON, drawn in docs/formats/snapshot.md. Its own checksum covers all of it, the format version included.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from topk_grpc.errors import VersionError
from topk_grpc.storage.array_files import DamagedFileError, Seal
from topk_grpc.storage.checksums import decode_self_checked, encode_self_checked

VERSION: Final = 1
NAME: Final = "manifest.json"
ARRAYS_NAME: Final = "arrays.npz"
COLUMN: Final = re.compile(r"[a-z][a-z0-9_]*")
"""The name of a column."""

BlockSeals = Mapping[int, Mapping[str, Seal]]
"""The columns of each block, by block id and column name."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a snapshot consists of.

    Attributes:
        number: of the snapshot; later ones have higher numbers.
        position: of the log: the snapshot holds all before it and nothing from it on.
        meta: what the owner said of it.
        arrays: the seal of arrays.npz.
        blocks: the seals of the blocks' files, in the blocks' order.
    """

    number: int
    position: int
    meta: Mapping[str, Any]
    arrays: Seal
    blocks: BlockSeals

    def block_names(self) -> set[str]:
        """The names of all its files in the blocks' directory."""
        return {block_name(block_id, column) for block_id, columns in self.blocks.items() for column in columns}


def block_name(block_id: int, column: str) -> str:
    """The file of one column of a block."""
    return f"{block_id:010}.{column}.npy"


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of manifest.json.

    Raises:
        TypeError: meta holds what JSON cannot.
    """
    return encode_self_checked(
        {
            "format": VERSION,
            "number": manifest.number,
            "position": manifest.position,
            "arrays": _encode_seal(manifest.arrays),
            "blocks": [
                {"block_id": block_id, "columns": {name: _encode_seal(seal) for name, seal in columns.items()}}
                for block_id, columns in manifest.blocks.items()
            ],
            "meta": dict(manifest.meta),
        }
    )


def decode_manifest(data: bytes, path: Path) -> Manifest:
    """Reads manifest.json.

    Raises:
        DamagedFileError: a byte of it is not as it was written, or it is no manifest.
        VersionError: a newer release wrote it.
    """
    content = decode_self_checked(data)
    if content is None:
        raise DamagedFileError(path, "has another checksum than when it was written")
    try:
        version = _natural(content["format"])
        if version > VERSION:
            raise VersionError(
                f"{path} has snapshot format {version}, while this release reads up to {VERSION}: start the release"
                " that wrote it, or a newer one"
            )
        return Manifest(
            number=_natural(content["number"]),
            position=_natural(content["position"]),
            meta=dict(content["meta"].items()),
            arrays=_decode_seal(content["arrays"]),
            blocks={
                _natural(block["block_id"]): {
                    _column(name): _decode_seal(seal) for name, seal in block["columns"].items()
                }
                for block in content["blocks"]
            },
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DamagedFileError(
            path, f"is as it was written, but no manifest ({type(error).__name__}: {error})"
        ) from error


def _encode_seal(seal: Seal) -> dict[str, Any]:
    return {"bytes": seal.size, "crc32c": f"{seal.checksum:08x}"}


def _decode_seal(content: Mapping[str, Any]) -> Seal:
    return Seal(_natural(content["bytes"]), int(content["crc32c"], 16))


def _natural(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise ValueError(f"{str(value)[:40]!r} is no number of anything")
    return value


def _column(name: str) -> str:
    """The name of a column, which becomes part of a file's."""
    if not COLUMN.fullmatch(name):
        raise ValueError(f"{name[:40]!r} is no name of a column")
    return name
