"""Arrays in files: `.npy` for one that stays mapped, `.npz` for many that are loaded; both as numpy writes them.

Every file has a `Seal`, its size and CRC-32C, which the snapshot's manifest keeps: it is taken from the bytes on their
way to the disk, and checked against all bytes of the file before any is used.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from topk_grpc.storage.checksums import crc32c
from topk_grpc.storage.files import Bytes, Files, WritableFile, is_unreadable

Array = npt.NDArray[Any]
_BUFFER_BYTES: Final = 64 << 10
_PIECE_BYTES: Final = 1 << 20


class DamagedFileError(Exception):
    """A file of a snapshot is missing, or not as it was written."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} {reason}")
        self.path = path


@dataclass(frozen=True, slots=True)
class Seal:
    """What all bytes of a file come to."""

    size: int
    checksum: int


class _Sink(io.RawIOBase):
    """Writes to the end of a file, and seals it."""

    def __init__(self, file: WritableFile) -> None:
        super().__init__()
        self._file = file
        self.seal = Seal(0, 0)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._file.write(self.seal.size, [view])
        self.seal = Seal(self.seal.size + len(view), crc32c(view, self.seal.checksum))
        return len(view)


class _Source(io.RawIOBase):
    """Reads from memory, without copying all of it as BytesIO does."""

    def __init__(self, data: memoryview) -> None:
        super().__init__()
        self._data = data
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        part = self._data[self._at : self._at + len(target)]
        target[: len(part)] = part
        self._at += len(part)
        return len(part)


def seal_of(data: Bytes) -> Seal:
    """What bytes come to."""
    return Seal(len(data), crc32c(data))


def write_bytes(files: Files, path: Path, data: Bytes, *, private: bool = False) -> Seal:
    """Writes a file, maybe one that nobody else may read; durable but for its name."""
    return _write(files, path, lambda sink: sink.write(data), private=private)


def write_column(files: Files, path: Path, array: Array) -> Seal:
    """Writes one array as `.npy`; durable but for its name."""
    return _write(files, path, lambda sink: _write_npy(sink, array))


def write_arrays(files: Files, path: Path, arrays: Mapping[str, Array]) -> Seal:
    """Writes arrays as an uncompressed `.npz`; durable but for its name."""

    def fill(sink: IO[bytes]) -> None:
        with zipfile.ZipFile(sink, "w") as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    _write_npy(member, array)

    return _write(files, path, fill)


def _write_npy(sink: IO[bytes], array: Array) -> None:
    """Writes an array as numpy does, which would copy it in large pieces while it holds the interpreter's lock.

    Who writes a snapshot has the processor last: plays and queries would wait for the lock until its turn comes again.
    """
    np.lib.format.write_array_header_1_0(sink, np.lib.format.header_data_from_array_1_0(array))
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    for start in range(0, len(data), _PIECE_BYTES):
        sink.write(data[start : start + _PIECE_BYTES])


def _write(files: Files, path: Path, fill: Callable[[Any], object], *, private: bool = False) -> Seal:
    file = files.create(path, private=private)
    try:
        sink = _Sink(file)
        # numpy writes headers and directories in small pieces; what is larger than the buffer passes by it.
        with io.BufferedWriter(sink, _BUFFER_BYTES) as buffered:
            fill(buffered)
        file.sync()
        return sink.seal
    finally:
        file.close()


def read_sealed(files: Files, path: Path, seal: Seal) -> memoryview:
    """Maps a file whose every byte is as it was written.

    Raises:
        DamagedFileError: it is not.
    """
    try:
        data = files.map(path)
    except FileNotFoundError:
        raise DamagedFileError(path, "is missing") from None
    except OSError as error:
        if not is_unreadable(error):
            raise
        raise DamagedFileError(path, f"cannot be read ({error.strerror})") from error
    if len(data) != seal.size:
        raise DamagedFileError(path, f"has {len(data)} bytes instead of {seal.size}")
    if crc32c(data) != seal.checksum:
        raise DamagedFileError(path, f"has another checksum than its {seal.size} bytes had when they were written")
    return data


def read_column(data: memoryview, path: Path) -> Array:
    """The array of a `.npy` file, as a read-only view of these bytes.

    Raises:
        DamagedFileError: they are none.
    """
    try:
        return _view(data)
    except Exception as error:  # numpy promises nothing about what it raises
        raise DamagedFileError(path, f"holds no array ({type(error).__name__}: {error})") from error


def _view(data: memoryview) -> Array:
    source = _Source(data)
    version = np.lib.format.read_magic(source)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, fortran_order, dtype = read_header(source)
    flat: Array = np.frombuffer(data, dtype, offset=source.tell())
    if min(shape, default=0) < 0 or dtype.subdtype is not None:
        # reshape would take -1 for "as many as there are"; an array within each element changes the shape, too.
        raise ValueError(f"its shape is {shape} of {dtype}")
    return flat.reshape(shape, order="F" if fortran_order else "C")


def read_arrays(data: memoryview, path: Path) -> dict[str, Array]:
    """The arrays of an `.npz` file, copied into memory of their own: never more than the file has bytes.

    Raises:
        DamagedFileError: it is no such file, or compressed, as none of ours is.
    """
    try:
        with zipfile.ZipFile(io.BufferedReader(_Source(data))) as archive:
            members = archive.infolist()
        return {member.filename.removesuffix(".npy"): _view(_stored(data, member)).copy() for member in members}
    except Exception as error:  # as above
        raise DamagedFileError(path, f"holds no arrays ({type(error).__name__}: {error})") from error


_LOCAL_HEADER: Final = struct.Struct("<26xHH")
"""Of a file in a zip archive: how long its name and its extra field are; both, then the content, follow."""


def _stored(data: memoryview, member: zipfile.ZipInfo) -> memoryview:
    """The content of a file in a zip archive; its CRC-32 is left alone, since the archive has a seal."""
    name_size, extra_size = _LOCAL_HEADER.unpack_from(data, member.header_offset)
    start = member.header_offset + _LOCAL_HEADER.size + name_size + extra_size
    if member.compress_type != zipfile.ZIP_STORED or start + member.file_size > len(data):
        raise ValueError(f"{member.filename} is compressed, or cut off")
    return data[start : start + member.file_size]
