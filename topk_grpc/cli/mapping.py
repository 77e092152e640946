"""Which columns of a file make a play, and the check of each row against what a cluster takes.
 A row is bad when the cluster would refuse it whatever its settings, or when nobody can tell what it means: a missing
or malformed time, a time in 1970 (seconds read as milliseconds) or more than a year ahead, an empty song, a song of
more than 128 bytes, a chart of more than 64, what is no UTF-8, a count that is 0 or no whole number. Everything else is
the cluster's to judge. Names are taken as they are: no trimming, no case, no normalising.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from topk_grpc.cli.sources import require_pyarrow
from topk_grpc.cli.tabular import Problem, RowBatch
from topk_grpc.cli.timestamps import TIME_UNITS, read_times
from topk_grpc.errors import InputError
from topk_grpc.model import COUNT_MAX

if TYPE_CHECKING:
    import pyarrow

JOINT: Final = b" - "
"""What stands between the columns of a song."""

SONG_BYTES_MAX: Final = 128
CHART_BYTES_MAX: Final = 64


@dataclass(frozen=True, slots=True)
class Mapping:
    """Which columns make a play.

    Attributes:
        song: the columns of the song_id, joined with ` - `.
        time: the column of its time.
        chart: the column of the chart that it counts in besides the global one; an empty cell is none.
        count: the column of how many plays a row stands for.
        time_unit: of times that are numbers: auto (by their size), s, ms, us or ns.
    """

    song: tuple[str, ...]
    time: str
    chart: str | None = None
    count: str | None = None
    time_unit: str = "auto"

    def __post_init__(self) -> None:
        if not self.song:
            raise InputError("--song names no column")
        if self.time_unit not in TIME_UNITS:
            raise InputError(f"--time-unit is {self.time_unit!r}: it has to be one of {', '.join(TIME_UNITS)}")

    @property
    def names(self) -> tuple[str, ...]:
        """All columns, each once."""
        optional = [name for name in (self.chart, self.count) if name is not None]
        return tuple(dict.fromkeys([*self.song, self.time, *optional]))

    def producer_id(self, content_digest: str) -> str:
        """The producer that stands for a content read by this mapping: the same plays for all times."""
        said = [content_digest, list(self.song), self.time, self.chart, self.count, self.time_unit]
        digest = hashlib.blake2b(json.dumps(said).encode(), digest_size=16).hexdigest()
        return f"ingest-{digest}"


@dataclass(frozen=True, slots=True)
class PlayColumns:
    """Plays as `TopKClient.record_columns` takes them.

    Attributes:
        places: each play's place among the rows of its batch; None where no row was left out.
    """

    song_data: npt.NDArray[np.uint8]
    song_offsets: npt.NDArray[np.int64]
    played_at_ms: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64] | None
    chart_data: npt.NDArray[np.uint8] | None
    chart_offsets: npt.NDArray[np.int64] | None
    places: npt.NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(self.played_at_ms)

    @property
    def plays(self) -> int:
        """The sum of the counts."""
        return len(self) if self.counts is None else int(self.counts.sum())

    def place(self, index: int) -> int:
        """The place among the batch's rows of the play at an index."""
        return index if self.places is None else int(self.places[index])


def to_plays(batch: RowBatch, mapping: Mapping, now_ms: int) -> tuple[PlayColumns, list[Problem]]:
    """Makes plays of rows.

    Returns:
        The plays of the good rows, and the problems of the bad ones, one a row, in order.

    Raises:
        InputError: a column's type cannot be what it is mapped to.
    """
    pa = require_pyarrow()
    problems: dict[int, Problem] = dict(batch.broken)

    def note(found: dict[int, str], name: str) -> None:
        for place, message in found.items():
            if place not in problems:
                value = _show(batch.columns[name][place])
                problems[place] = Problem(batch.row_number(place), name, value, message)

    parts = [_text_column(batch.columns[name], name) for name in mapping.song]
    song = (
        parts[0]
        if len(parts) == 1
        else pa.compute.binary_join_element_wise(*parts, pa.scalar(JOINT, pa.large_binary()))
    )
    times, bad_times = read_times(batch.columns[mapping.time], mapping.time_unit, now_ms)
    note(bad_times, mapping.time)
    note(_bad_songs(song, parts), mapping.song[0])
    chart = None
    if mapping.chart is not None:
        chart = _text_column(batch.columns[mapping.chart], mapping.chart)
        note(_bad_texts(chart, CHART_BYTES_MAX, "chart"), mapping.chart)
    counts = None
    if mapping.count is not None:
        counts, bad_counts = _read_counts(batch.columns[mapping.count])
        note(bad_counts, mapping.count)

    places = None
    if problems:
        keep = np.ones(batch.rows, bool)
        keep[list(problems)] = False
        places = np.flatnonzero(keep)
        mask = pa.array(keep)
        song, times = song.filter(mask), times[places]
        chart = None if chart is None else chart.filter(mask)
        counts = None if counts is None else counts[places]
    chart_data, chart_offsets = (None, None) if chart is None else _buffers(chart)
    plays = PlayColumns(*_buffers(song), times, counts, chart_data, chart_offsets, places)
    return plays, [problems[place] for place in sorted(problems)]


def _show(cell: Any) -> str:
    value = cell.as_py()
    if value is None:
        return ""
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


# --- Texts ------------------------------------------------------------------------------------------------------------


def _text_column(column: pyarrow.Array, name: str) -> pyarrow.Array:
    """A column as large_binary without nulls."""
    pa = require_pyarrow()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_integer(kind):
        column = column.cast(pa.large_string())
    elif pa.types.is_null(kind):
        column = pa.array([b""] * len(column), pa.large_binary())
    elif not any(word in str(kind) for word in ("string", "binary")) or pa.types.is_nested(kind):
        raise InputError(f"column {name!r} is of type {kind}: a song or a chart is a text or a whole number")
    return column.cast(pa.large_binary()).fill_null(b"")


def _bad_songs(song: pyarrow.Array, parts: Sequence[pyarrow.Array]) -> dict[int, str]:
    bad = _bad_texts(song, SONG_BYTES_MAX, "song")
    pa = require_pyarrow()
    empty = np.ones(len(song), bool)
    for part in parts:
        empty &= np.asarray(pa.compute.binary_length(part).to_numpy(zero_copy_only=False)) == 0
    return bad | dict.fromkeys(np.flatnonzero(empty).tolist(), "the song is empty")


def _bad_texts(texts: pyarrow.Array, bytes_max: int, what: str) -> dict[int, str]:
    pa = require_pyarrow()
    lengths = np.asarray(pa.compute.binary_length(texts).to_numpy(zero_copy_only=False))
    bad = {
        place: f"the {what} is {lengths[place]} bytes of UTF-8: {bytes_max} is the most"
        for place in np.flatnonzero(lengths > bytes_max).tolist()
    }
    try:
        texts.cast(pa.large_string())
    except pa.ArrowInvalid:
        for place, value in enumerate(texts.to_pylist()):
            try:
                value.decode("utf-8")
            except UnicodeDecodeError:
                bad[place] = f"the {what} is not UTF-8: convert the file, as with `iconv -f latin1 -t utf-8`"
    return bad


def _buffers(texts: pyarrow.Array) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Data and offsets of a large_binary array; copies nothing."""
    _, offsets, data = texts.buffers()
    rows = len(texts)
    if offsets is None or not rows:
        return np.zeros(0, np.uint8), np.zeros(rows + 1, np.int64)
    starts = np.frombuffer(offsets, np.int64, rows + 1, texts.offset * 8)
    return np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8), starts


# --- Counts -----------------------------------------------------------------------------------------------------------


def _read_counts(column: pyarrow.Array) -> tuple[npt.NDArray[np.int64], dict[int, str]]:
    pa = require_pyarrow()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    counts = _counts_at_once(column)
    if counts is not None and bool(np.all((counts != 0) & (counts >= -COUNT_MAX) & (counts <= COUNT_MAX))):
        return counts, {}
    bad: dict[int, str] = {}
    out = np.ones(len(column), np.int64)
    for place, cell in enumerate(column.to_pylist()):
        try:
            out[place] = _read_count(cell)
        except ValueError as error:
            bad[place] = str(error)
    return out, bad


def _counts_at_once(column: pyarrow.Array) -> npt.NDArray[np.int64] | None:
    pa = require_pyarrow()
    if column.null_count:
        return None
    try:
        if "binary" in str(column.type):
            column = column.cast(pa.large_string())
        if (
            "string" in str(column.type)
            and pa.compute.any(pa.compute.match_substring(column, "x", ignore_case=True)).as_py()
        ):
            return None  # Arrow reads 0x10 as a number too, which we do not
        return np.asarray(column.cast(pa.int64()).to_numpy(zero_copy_only=False), np.int64)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None


def _read_count(cell: Any) -> int:
    text = cell.decode("utf-8", "backslashreplace") if isinstance(cell, bytes) else "" if cell is None else str(cell)
    text = text.strip()
    if not text:
        raise ValueError("the count is missing")
    whole, point, rest = text.partition(".")
    digits = whole[1:] if whole.startswith(("+", "-")) else whole
    if not (digits.isascii() and digits.isdigit()) or (point and rest.strip("0")):
        raise ValueError("the count is no whole number")
    count = int(digits) if len(digits) < 20 else COUNT_MAX + 1
    if not 1 <= count <= COUNT_MAX:
        raise ValueError(f"the count has to lie in 1 to {COUNT_MAX:,}, or below 0 as far to take plays back")
    return -count if whole.startswith("-") else count
