"""Checks columns of plays before a kernel walks over them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from topk_grpc.errors import InvalidArgumentError

Bytes = bytes | bytearray | memoryview | npt.NDArray[np.uint8]
Int64s = npt.NDArray[np.int64] | memoryview


@dataclass(frozen=True, slots=True)
class Columns:
    """One batch as Arrow-like columns: play i's song_id is song_data[song_offsets[i] : song_offsets[i + 1]]."""

    song_data: npt.NDArray[np.uint8]
    song_offsets: npt.NDArray[np.int64]
    played_at_ms: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64] | None
    chart_data: npt.NDArray[np.uint8] | None
    chart_offsets: npt.NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(self.played_at_ms)


def check_columns(  # noqa: PLR0917  # as they are given to record_columns
    song_data: Bytes,
    song_offsets: Int64s,
    played_at_ms: Int64s,
    counts: Int64s | None,
    chart_data: Bytes | None,
    chart_offsets: Int64s | None,
    plays_max: int,
) -> Columns:
    """Brings the columns into the form that the kernel reads; copies nothing that has it.

    Raises:
        InvalidArgumentError: there is no row or more than plays_max, lengths that do not fit, offsets that fall or
            leave their data.
    """
    times = _int64s(played_at_ms, "played_at_ms")
    if not 1 <= len(times) <= plays_max:
        raise InvalidArgumentError(f"{len(times)} rows: one call is one batch, of 1 to {plays_max} plays (batch_plays)")
    count_column = None if counts is None else _int64s(counts, "counts")
    if count_column is not None and len(count_column) != len(times):
        raise InvalidArgumentError(f"{len(count_column)} counts for {len(times)} rows")
    if (chart_data is None) != (chart_offsets is None):
        raise InvalidArgumentError("chart_data and chart_offsets are given together or not at all")
    songs = _texts(song_data, song_offsets, len(times), "song")
    if chart_data is None or chart_offsets is None:
        return Columns(*songs, times, count_column, None, None)
    return Columns(*songs, times, count_column, *_texts(chart_data, chart_offsets, len(times), "chart"))


def _int64s(values: Int64s, name: str) -> npt.NDArray[np.int64]:
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InvalidArgumentError(
            f"{name} has {array.ndim} dimensions of {array.dtype}: it has to be one row of int64"
        )
    # Writeable, since the kernel's views are; what Arrow hands out is not.
    return np.require(array, dtype=np.int64, requirements=["C", "W"])


def _texts(data: Bytes, offsets: Int64s, rows: int, name: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    data_bytes = np.frombuffer(data, dtype=np.uint8)
    starts = _int64s(offsets, f"{name}_offsets")
    if len(starts) != rows + 1:
        raise InvalidArgumentError(f"{len(starts)} {name}_offsets for {rows} rows: there is one more than rows")
    if starts[0] < 0 or starts[-1] > len(data_bytes) or bool(np.any(starts[1:] < starts[:-1])):
        raise InvalidArgumentError(
            f"{name}_offsets have to rise within 0 to {len(data_bytes)}, the bytes of {name}_data"
        )
    return data_bytes, starts
