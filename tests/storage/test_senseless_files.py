"""Files of a snapshot whose seals are right and that are no such files: damaged, and no memory beyond their bytes.

Found by fuzzing (tests/fuzz).
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from topk_grpc.errors import CorruptError
from topk_grpc.storage import DataDirectory
from topk_grpc.storage.array_files import DamagedFileError, Seal, read_arrays, read_column
from topk_grpc.storage.checksums import crc32c
from topk_grpc.storage.manifest import Manifest, decode_manifest, encode_manifest

PATH = Path("/data/file")


def npy(header: str, content: bytes = bytes(32), version: bytes = b"\x01\x00") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + content


def header(descr: object = "<i8", shape: object = (4,), order: object = False) -> str:
    return f"{{'descr': {descr!r}, 'fortran_order': {order!r}, 'shape': {shape!r}, }}"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        npy(header(shape=(-1,))),
        npy(header(shape=(-4,))),
        npy(header(shape=(1 << 62,))),
        npy(header(shape=(5,))),
        npy(header(shape="4")),
        npy(header(descr="|O")),
        npy(header(descr="2i4")),
        npy(header(descr="<i3")),
        npy("(" * 300),
        npy("{'descr': 1"),
        npy(header(), version=b"\x03\x00"),
        npy(header(), content=bytes(31)),
    ],
)
def test_column_that_is_none_is_damaged(data: bytes) -> None:
    with pytest.raises(DamagedFileError, match="/data/file holds no array"):
        read_column(memoryview(data), PATH)


def archive(compression: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as written:
        for name, content in members.items():
            written.writestr(f"{name}.npy", content)
    return out.getvalue()


def test_archive_is_read_as_numpy_reads_it() -> None:
    out = io.BytesIO()
    given: dict[str, Any] = {
        "a": np.arange(5),
        "b": np.asfortranarray(np.ones((2, 3))),
        "c": np.empty((0, 2), np.int32),
    }
    np.savez(out, **given)
    read = read_arrays(memoryview(out.getvalue()), PATH)
    assert read.keys() == given.keys()
    for name, array in given.items():
        assert read[name].dtype == array.dtype
        assert np.array_equal(read[name], array)
        assert read[name].flags.writeable


@pytest.mark.parametrize(
    "data",
    [
        b"",
        archive(zipfile.ZIP_DEFLATED, bomb=npy(header(shape=(1 << 24,)), bytes(1 << 27))),
        archive(huge=npy(header(shape=(1 << 50,)))),
        archive(a=npy(header()))[:-30],
        archive(a=b"no array"),
    ],
)
def test_archive_that_is_none_is_damaged(data: bytes) -> None:
    with pytest.raises(DamagedFileError, match="/data/file holds no arrays"):
        read_arrays(memoryview(data), PATH)


MANIFEST: dict[str, Any] = json.loads(
    encode_manifest(Manifest(3, 40, {"a": 1}, Seal(9, 7), {5: {"counts": Seal(1, 2)}}))
)


def sealed(content: Any) -> bytes:
    body = json.dumps(content).encode()[1:] + b"\n"
    return b'{"crc32c": "%08x", ' % crc32c(body) + body


@pytest.mark.parametrize(
    "changes",
    [
        {"number": None},
        {"position": -1},
        {"position": 1 << 63},
        {"position": True},
        {"format": "1"},
        {"meta": []},
        {"arrays": {}},
        {"arrays": {"bytes": 1, "crc32c": 5}},
        {"blocks": {}},
        {"blocks": [{"block_id": "5", "columns": {}}]},
        {"blocks": [{"block_id": 5, "columns": {"../../etc": {"bytes": 1, "crc32c": "0"}}}]},
    ],
    ids=str,
)
def test_manifest_that_is_none_is_damaged(changes: dict[str, Any]) -> None:
    content = {name: value for name, value in (MANIFEST | changes).items() if name != "crc32c"}
    if changes == {"blocks": {}}:
        content["blocks"] = 5
    with pytest.raises(DamagedFileError, match="/data/file is as it was written, but no manifest"):
        decode_manifest(sealed(content), PATH)


def test_manifest_that_is_no_json_is_damaged() -> None:
    for body in (b"\n", b'"a": ' + b"[" * 100_000, b'"a": \xff}', b'"a": 1' + b"0" * 5000 + b"}"):
        with pytest.raises(DamagedFileError):
            decode_manifest(b'{"crc32c": "%08x", ' % crc32c(body) + body, PATH)


@pytest.mark.parametrize("directory_id", [None, 5, "", "../../../etc", "g" * 32, "a" * 33])
def test_format_with_another_id_is_damaged(tmp_path: Path, directory_id: object) -> None:
    DataDirectory.open(tmp_path).close()
    (tmp_path / "FORMAT").write_bytes(sealed({"format": 1, "directory_id": directory_id}))
    with pytest.raises(CorruptError, match="FORMAT is damaged"):
        DataDirectory.open(tmp_path)
