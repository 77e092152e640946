"""CSV, NDJSON and Parquet as batches of rows, each of the same size, with the columns asked for.
 Theory of operation. Cells stay as they are: CSV and NDJSON give texts (large_binary, whatever is in them, also what
is no UTF-8), Parquet gives its own types; what they mean is mapping.py's to say. So one broken cell spoils its row
and not the file, and row n of a file is always in batch n div 8192, which makes an ingest resumable.

What breaks a row itself is a problem too: a CSV row with another number of cells, a line that is no JSON. Arrow's CSV
reader stops at the first such row or, asked to, leaves it out; it then has no place among the rows. NDJSON is read by
Python's own parser line by line: Arrow's gives up a whole block for one bad line.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from topk_grpc.cli.sources import PEEK_BYTES, Source, require_pyarrow
from topk_grpc.errors import InputError

if TYPE_CHECKING:
    import pyarrow

BATCH_ROWS: Final = 8192
"""Rows of each batch but the last: it fixes which rows make one batch of plays, for all times."""

_BLOCK_BYTES: Final = 4 << 20
_LINE_BYTES_MAX: Final = 4 << 20
_RAGGED: Final = re.compile(r"(?:Row #(\d+): )?Expected (\d+) columns, got (\d+): ?(.*)", re.DOTALL)
_SHOWN_CHARS: Final = 80


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that cannot be taken.

    Attributes:
        row: from 1, without the header.
        column: the cell's column; empty where the row as a whole is meant.
        value: the cell, as far as it can be shown.
        message: what is wrong and what to do.
    """

    row: int
    column: str
    value: str
    message: str

    def __str__(self) -> str:
        where = f"row {self.row:,}" + (f", column {self.column!r}" if self.column else "")
        return f"{where}: {shorten(self.value)!r}: {self.message}" if self.value else f"{where}: {self.message}"


@dataclass(slots=True)
class RowBatch:
    """Consecutive rows.

    Attributes:
        index: its place in the file, from 0.
        rows: how many there are.
        columns: Arrow arrays by name, of that length each.
        broken: problems of rows as a whole, by place in the batch; their cells are null.
        row_number: gives the number of the row at a place of this batch, from 1, as people count.
    """

    index: int
    rows: int
    columns: dict[str, pyarrow.Array]
    row_number: Callable[[int], int]
    broken: dict[int, Problem] = field(default_factory=dict)


def shorten(value: str) -> str:
    """A cell for a message."""
    return value if len(value) <= _SHOWN_CHARS else value[: _SHOWN_CHARS - 1] + "…"


def read(
    source: Source, names: Sequence[str], delimiter: str = "", on_ragged: Callable[[Problem], None] | None = None
) -> Iterator[RowBatch]:
    """Reads the columns named.

    Args:
        source: opened, nothing read.
        names: of the columns, distinct.
        delimiter: between the cells of a CSV; empty: a comma, or a tab where the name says so.
        on_ragged: is told of CSV rows with another number of cells than the header, which are left out. None: the first
            one ends the reading.

    Raises:
        InputError: a column is missing, or the file cannot be read on.
    """
    match source.format:
        case "csv":
            return _Csv(source, names, delimiter, on_ragged).batches()
        case "ndjson":
            return _read_ndjson(source, names)
        case _:
            return _read_parquet(source, names)


def _missing(source: Source, missing: str, present: Sequence[str], hint: str = "") -> InputError:
    close = difflib.get_close_matches(missing, present, n=1)
    suggestion = f" Did you mean {close[0]!r}?" if close else ""
    listed = ", ".join(present[:50]) + (" …" if len(present) > 50 else "")
    return InputError(f"{source.name} has no column {missing!r}: it has {listed or 'none'}.{suggestion}{hint}")


# --- Batches of one size ----------------------------------------------------------------------------------------------


def _rechunk(blocks: Iterator[pyarrow.RecordBatch]) -> Iterator[pyarrow.RecordBatch]:
    """Cuts blocks of any size into batches of BATCH_ROWS; the last may be smaller."""
    pa = require_pyarrow()
    waiting: list[pyarrow.RecordBatch] = []
    rows = 0
    for block in blocks:
        offset = 0
        while rows + block.num_rows - offset >= BATCH_ROWS:
            piece = block.slice(offset, BATCH_ROWS - rows)
            offset += piece.num_rows
            yield pa.concat_batches([*waiting, piece]) if waiting else piece
            waiting, rows = [], 0
        if offset < block.num_rows:
            waiting.append(block.slice(offset))
            rows += block.num_rows - offset
    if rows:
        yield pa.concat_batches(waiting)


# --- CSV --------------------------------------------------------------------------------------------------------------


class _Csv:
    """One CSV file on its way through."""

    def __init__(
        self, source: Source, names: Sequence[str], delimiter: str, on_ragged: Callable[[Problem], None] | None
    ) -> None:
        self._source = source
        self._on_ragged = on_ragged
        self._delimiter = _delimiter(delimiter, source)
        self._ragged: list[int] = []
        self._header_alone = False
        header, self._header_rows = self._read_header()
        self._width = len(header)
        self._places = {name: self._place(name, header) for name in names}

    def batches(self) -> Iterator[RowBatch]:
        pa = require_pyarrow()
        if self._header_alone:
            return
        try:
            for index, block in enumerate(_rechunk(iter(self._open()))):
                columns = {name: block.column(f"c{place}") for name, place in self._places.items()}
                yield RowBatch(index, block.num_rows, columns, self._row_numbers(index))
        except pa.ArrowInvalid as error:
            raise self._explain(str(error)) from error

    def _read_header(self) -> tuple[list[str], int]:
        """The names of the columns, and how many rows they and blank lines before them take."""
        head = self._source.peek()
        text = head.removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="replace")
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter)
        try:
            number, header = next((number, row) for number, row in enumerate(rows, start=1) if any(row))
        except StopIteration:
            raise InputError(f"{self._source.name} is empty: the first line of a CSV names its columns") from None
        except csv.Error as error:
            raise InputError(f"{self._source.name} is no CSV: its header cannot be read: {error}") from error
        # Arrow takes a header without a line end and without rows for a row that is too long.
        self._header_alone = (
            len(head) < PEEK_BYTES and not text.endswith(("\n", "\r")) and rows.line_num >= len(text.splitlines())
        )
        return [name.strip() for name in header], number

    def _place(self, name: str, header: list[str]) -> int:
        if name not in header:
            alone = len(header) == 1 and any(each in header[0] for each in ";\t|,")
            hint = " If something else than a comma parts the cells, say --delimiter" if alone else ""
            raise _missing(self._source, name, header, hint)
        if header.count(name) > 1:
            raise InputError(f"{self._source.name} has {header.count(name)} columns {name!r}: rename all but one")
        return header.index(name)

    def _open(self) -> Any:
        from pyarrow import csv as arrow_csv

        pa = require_pyarrow()
        used = [f"c{place}" for place in dict.fromkeys(self._places.values())]
        return arrow_csv.open_csv(
            pa.PythonFile(self._source.stream, mode="r"),
            # One thread: the row numbers of its errors are exact, and the cluster needs the other cores.
            read_options=arrow_csv.ReadOptions(
                use_threads=False,
                block_size=_BLOCK_BYTES,
                column_names=[f"c{place}" for place in range(self._width)],
                skip_rows_after_names=self._header_rows,
            ),
            parse_options=arrow_csv.ParseOptions(
                delimiter=self._delimiter,
                newlines_in_values=True,
                invalid_row_handler=None if self._on_ragged is None else self._leave_out,
            ),
            convert_options=arrow_csv.ConvertOptions(
                column_types=dict.fromkeys(used, pa.large_binary()), include_columns=used, check_utf8=False
            ),
        )

    def _leave_out(self, row: Any) -> str:
        number = (row.number or 0) - self._header_rows
        self._ragged.append(number)
        if self._on_ragged is not None:
            self._on_ragged(self._ragged_problem(number, row.actual_columns, row.text))
        return "skip"

    def _ragged_problem(self, number: int, cells: int, text: str) -> Problem:
        return Problem(
            number,
            "",
            text,
            f"the row has {cells} cells, the header {self._width}: "
            f"quote cells that hold a {self._delimiter!r}, and close every quote",
        )

    def _row_numbers(self, index: int) -> Callable[[int], int]:
        def row_number(place: int) -> int:
            number = index * BATCH_ROWS + place + 1
            for left_out in self._ragged:
                if left_out > number:
                    break
                number += 1
            return number

        return row_number

    def _explain(self, message: str) -> InputError:
        ragged = _RAGGED.search(message)
        if ragged is not None:
            if self._on_ragged is not None:
                return InputError(
                    f"{self._source.name} has a row that cannot be left out, as it is no UTF-8 either: {message}"
                )
            number = int(ragged[1] or 0) - self._header_rows
            problem = self._ragged_problem(number, int(ragged[3]), ragged[4])
            return InputError(f"{self._source.name}, {problem}; or leave such rows out with --skip-bad")
        if "straddling" in message or "block" in message:
            return InputError(
                f"{self._source.name} has a row of more than {_BLOCK_BYTES >> 20} MiB: "
                "most likely a quote that is opened and never closed"
            )
        return InputError(f"{self._source.name} cannot be read as CSV: {message}")


def _delimiter(given: str, source: Source) -> str:
    text = {"\\t": "\t", "tab": "\t", "": "\t" if source.tabbed else ","}.get(given, given)
    if len(text) != 1 or not text.isascii() or text in '"\r\n':
        raise InputError(f"--delimiter is {given!r}: it has to be one ASCII character, as in ';' or '\\t'")
    return text


# --- NDJSON -----------------------------------------------------------------------------------------------------------


def _read_ndjson(source: Source, names: Sequence[str]) -> Iterator[RowBatch]:
    numbers: list[int] = []
    cells: dict[str, list[str | None]] = {name: [] for name in names}
    broken: dict[int, Problem] = {}
    seen: dict[str, None] = {}
    unseen = set(names)
    index = 0

    def batch() -> RowBatch:
        if unseen and index == 0 and seen:
            raise _missing(source, next(name for name in names if name in unseen), list(seen))
        columns = {name: _texts(values) for name, values in cells.items()}
        return RowBatch(index, len(numbers), columns, numbers.__getitem__, broken)

    for number, line in _lines(source):
        numbers.append(number)
        row = _parse(line)
        if row is None:
            broken[len(numbers) - 1] = Problem(
                number,
                "",
                line.decode(errors="replace").strip(),
                "the line is no JSON object: NDJSON has one object a line",
            )
            row = {}
        if index == 0 and len(seen) < 1000:
            seen |= dict.fromkeys(row)
            unseen -= row.keys()
        for name in names:
            value = row.get(name)
            if value is not None and not isinstance(value, str):
                kind = {bool: "true or false", list: "a list", dict: "an object"}.get(type(value), type(value).__name__)
                broken[len(numbers) - 1] = Problem(
                    number, name, json.dumps(value), f"the value is {kind}: a text or a number is needed"
                )
                value = None
            cells[name].append(value)
        if len(numbers) == BATCH_ROWS:
            yield batch()
            index += 1
            numbers, broken, cells = [], {}, {name: [] for name in names}
    if numbers:
        yield batch()


def _lines(source: Source) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers."""
    number = 0
    while line := source.stream.readline(_LINE_BYTES_MAX):
        number += 1
        if len(line) == _LINE_BYTES_MAX and not line.endswith(b"\n"):
            raise InputError(
                f"{source.name}, line {number:,} is longer than {_LINE_BYTES_MAX >> 20} MiB: "
                "NDJSON has one object a line"
            )
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.isspace() and line:
            yield number, line


def _parse(line: bytes) -> dict[str, Any] | None:
    """The object, its numbers as the texts that they are there; None if it is none."""
    try:
        # What is no UTF-8 is kept: its cell is refused later, the others are fine.
        row = json.loads(line.decode("utf-8", "surrogateescape"), parse_int=str, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _texts(values: list[str | None]) -> pyarrow.Array:
    pa = require_pyarrow()
    try:
        return pa.array(values, pa.large_string()).cast(pa.large_binary())
    except UnicodeEncodeError:
        return pa.array([None if value is None else _bytes(value) for value in values], pa.large_binary())


def _bytes(value: str) -> bytes:
    try:
        return value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return value.encode("utf-8", "surrogatepass")  # half a pair, written as \\ud800: no UTF-8 either


# --- Parquet ----------------------------------------------------------------------------------------------------------


def _read_parquet(source: Source, names: Sequence[str]) -> Iterator[RowBatch]:
    from pyarrow import parquet

    pa = require_pyarrow()
    try:
        file = parquet.ParquetFile(source.stream)
        present = file.schema_arrow.names
        for name in names:
            if name not in present:
                raise _missing(source, name, present)
            if present.count(name) > 1:
                raise InputError(f"{source.name} has {present.count(name)} columns {name!r}: rename all but one")
        blocks = file.iter_batches(batch_size=BATCH_ROWS, columns=list(names), use_threads=False)
        for index, block in enumerate(_rechunk(blocks)):
            first = index * BATCH_ROWS + 1
            yield RowBatch(index, block.num_rows, {name: block.column(name) for name in names}, first.__add__)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{source.name} cannot be read as Parquet: {error}") from error
