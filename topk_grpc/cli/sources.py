"""Files to ingest as streams of bytes: opened, recognised, decompressed, measured and hashed.
 What a file is decides its content, not its name: gzip and zstd are known by their first bytes, Parquet too; NDJSON
by its name or an opening brace, and all else is CSV.
"""

from __future__ import annotations

import hashlib
import io
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from topk_grpc.errors import InputError

if TYPE_CHECKING:
    import pyarrow

STDIN: Final = "-"
"""What stands for standard input among the files."""

FORMATS: Final = ("csv", "ndjson", "parquet")
"""What can be read."""

PEEK_BYTES: Final = 1 << 20
"""How much of a content can be seen before it is read."""

_GZIP: Final = b"\x1f\x8b"
_ZSTD: Final = b"\x28\xb5\x2f\xfd"
_PARQUET: Final = b"PAR1"
_SUFFIXES: Final = {
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "csv",
    ".ndjson": "ndjson",
    ".jsonl": "ndjson",
    ".json": "ndjson",
    ".parquet": "parquet",
    ".pq": "parquet",
}


def require_pyarrow() -> Any:
    """Imports pyarrow.

    Raises:
        InputError: it is not installed.
    """
    try:
        import pyarrow as pa
    except ImportError as error:
        raise InputError(
            "ingest reads files with pyarrow, which is not installed: pip install 'topk-grpc[ingest]'"
        ) from error
    return pa


class _Counting(io.RawIOBase):
    """Passes a stream on, counts its bytes and, if asked, hashes them."""

    def __init__(self, source: Any, name: str, *, hashed: bool = False) -> None:
        super().__init__()
        self._source = source
        self._name = name
        self.count = 0
        self.digest = hashlib.blake2b(digest_size=16) if hashed else None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        try:
            data = self._source.read(len(view))
        except (OSError, EOFError) as error:  # of the codec, or the disk
            raise InputError(f"{self._name} cannot be read on after {self.count:,} bytes: {error}") from error
        view[: len(data)] = data
        self.count += len(data)
        if self.digest is not None:
            self.digest.update(data)
        return len(data)


class Source:
    """An open file.

    Attributes:
        name: for messages.
        stream: its content, decompressed. Peekable (1 MiB, or all of it); seekable where the format is Parquet.
        format: csv, ndjson or parquet.
        tabbed: its name says that tabs part the cells.
        size: bytes of the file as it lies there; None where nobody knows.
    """

    def __init__(self, name: str, file_format: str, *, hashed: bool) -> None:
        """Use `open_source`."""
        pa = require_pyarrow()
        self._path = None if name == STDIN else Path(name)
        self.name = "standard input" if self._path is None else name
        try:
            self._file: BinaryIO = sys.stdin.buffer if self._path is None else self._path.open("rb", buffering=0)
            self._identity = None if self._path is None else _identity(self._path)
        except OSError as error:
            raise InputError(f"{name} cannot be opened: {error.strerror}") from error
        self.size = None if self._identity is None else self._identity[0]
        self._hashed = hashed
        try:
            self._open(file_format, pa)
        except BaseException:
            self._file.close()
            raise

    def _open(self, file_format: str, pa: Any) -> None:
        self._raw = _Counting(self._file, self.name)
        content = _decompressed(self._raw, pa)
        self._lies_there = self._path is not None and isinstance(content, io.BufferedReader)
        self._content = _Counting(content, self.name, hashed=self._hashed)
        self.stream: BinaryIO = io.BufferedReader(self._content, PEEK_BYTES)
        suffix = _suffix(self._path)
        self.tabbed = suffix == ".tsv"
        self.format = _format_of(self.peek(), suffix, file_format, self.name)
        if self.format == "parquet":
            self._make_seekable()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def peek(self) -> bytes:
        """The first MiB of the content, or all where it is shorter; before anything was read."""
        return self.stream.peek(PEEK_BYTES) if isinstance(self.stream, io.BufferedReader) else b""

    @property
    def bytes_read(self) -> int:
        """How many bytes of `size` were read."""
        return self._raw.count

    def digest(self) -> str:
        """The hash of the whole content; reads what is left of it.

        Raises:
            InputError: it cannot be read.
        """
        while self.stream.read(PEEK_BYTES):
            pass
        if self._content.digest is None:
            raise AssertionError("opened without hashed=True")
        return self._content.digest.hexdigest()

    def check_unchanged(self) -> None:
        """Compares the file's size and time of change with those at its opening.

        Raises:
            InputError: somebody writes to it.
        """
        if self._path is not None and self._identity != _identity(self._path):
            raise InputError(
                f"{self.name} changed while it was read: ingest it when it is complete (a file that has grown is "
                "another file, whose plays all count)"
            )

    def close(self) -> None:
        """Closes the file."""
        self.stream.close()
        if self._path is not None:
            self._file.close()

    def _make_seekable(self) -> None:
        """Parquet is read from its end: a stream goes to a temporary file; a file is gone through for its hash."""
        if self._lies_there:
            while self._hashed and self.stream.read(PEEK_BYTES):
                pass
            self.stream.close()
            self._file.seek(0)
            self.stream = self._file
            return
        copy = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the source
        while block := self.stream.read(PEEK_BYTES):
            copy.write(block)
        copy.seek(0)
        self.stream.close()
        self.stream = copy


def open_source(name: str, file_format: str = "auto", *, hashed: bool = False) -> Source:
    """Opens a file, or standard input.

    Args:
        name: the path, or `-`.
        file_format: csv, ndjson, parquet, or auto.
        hashed: `digest` will be asked for.

    Raises:
        InputError: there is no such file, or it cannot be read.
    """
    if file_format not in {"auto", *FORMATS}:
        raise InputError(f"--format is {file_format!r}: it has to be auto, {', '.join(FORMATS)}")
    return Source(name, file_format, hashed=hashed)


def _identity(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def _decompressed(raw: _Counting, pa: pyarrow) -> Any:
    buffered = io.BufferedReader(raw, PEEK_BYTES)
    head = buffered.peek(4)[:4]
    codec = "gzip" if head.startswith(_GZIP) else "zstd" if head == _ZSTD else None
    if codec is None:
        return buffered
    return pa.CompressedInputStream(pa.PythonFile(buffered, mode="r"), codec)


def _suffix(path: Path | None) -> str:
    suffixes = [] if path is None else [each.lower() for each in path.suffixes]
    while suffixes and suffixes[-1] in {".gz", ".zst", ".zstd"}:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _format_of(head: bytes, suffix: str, file_format: str, title: str) -> str:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if file_format == "auto":
        if head.startswith(_PARQUET):
            file_format = "parquet"
        else:
            file_format = _SUFFIXES.get(suffix) or ("ndjson" if text.startswith(b"{") else "csv")
    if file_format == "parquet" and not head.startswith(_PARQUET):
        raise InputError(
            f"{title} is no Parquet file: it does not begin with PAR1. Say --format csv or --format ndjson"
        )
    if file_format == "ndjson" and text.startswith(b"["):
        raise InputError(f"{title} is one JSON array: NDJSON has one object a line. `jq -c '.[]'` makes it so")
    return file_format
