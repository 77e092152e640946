"""What a snapshot must hold before any of it is used: the kernels do not look whether an index lies within its array.

A checksum tells that a file is as it was written. It does not tell that what was written makes sense: a defect of the
release that wrote it, or somebody who has the disk, can put any number anywhere. So whatever is used as an index, an
offset or a size is held against what it points into, here, once, with a few passes over the arrays. What is merely
wrong (another count, another name) cannot be told from what is right; `topk audit` compares it with the log.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from topk_grpc.engine.windows import bounds_of
from topk_grpc.errors import InvalidArgumentError
from topk_grpc.model import COUNT_MAX, TIME_MS_MAX, GlobalWindow, RangeWindow, Window

Arrays = Mapping[str, NDArray[Any]]

SUM_MAX: Final = 1 << 61
"""What a chart holds at the most. It may be more than a shard's largest total: corrections that do not name the chart
make room for plays that do."""

_STRINGS_AT_ONCE: Final = 1 << 16
_CELLS_AT_ONCE: Final = 1 << 20
_NUMBER_MAX: Final = (1 << 32) - 1
_SEQUENCE_MAX: Final = (1 << 64) - 1


def require(holds: object, what: str) -> None:
    """Refuses what does not hold.

    Raises:
        InvalidArgumentError: it does not.
    """
    if not holds:
        raise InvalidArgumentError(what)


def integer(value: object, least: int, most: int, what: str) -> int:
    """An integer within bounds, both inclusive.

    Raises:
        InvalidArgumentError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InvalidArgumentError(f"{what} is {str(value)[:40]!r}, no integer from {least} to {most}")
    return value


def columns_of(arrays: Arrays, dtypes: Mapping[str, str], what: str) -> list[NDArray[Any]]:
    """The named columns, each of its dtype, all of one length.

    Raises:
        InvalidArgumentError: they are not.
    """
    found = [arrays.get(name) for name in dtypes]
    for name, column, dtype in zip(dtypes, found, dtypes.values(), strict=True):
        if column is None or column.ndim != 1 or column.dtype != np.dtype(dtype) or not column.flags.c_contiguous:
            raise InvalidArgumentError(f"{what}: the column {name} is missing, or not of type {dtype}")
    columns = [column for column in found if column is not None]
    require(len({len(column) for column in columns}) == 1, f"{what}: its columns differ in length")
    return columns


def within(column: NDArray[Any], least: int, most: int) -> bool:
    """Whether all numbers of a column lie within bounds, both inclusive."""
    return not len(column) or bool(column.min() >= least and column.max() <= most)


def check_strings(arrays: Arrays, what: str) -> int:
    """A string table's arena and offsets: records end to end, numbered in order, of well-formed UTF-8.

    Returns:
        How many strings there are.
    """
    (arena,) = columns_of(arrays, {"arena": "u1"}, what)
    (starts,) = columns_of(arrays, {"starts": "i8"}, what)
    count = len(starts)
    end = 0
    for first in range(0, count, _STRINGS_AT_ONCE):
        some = starts[first : first + _STRINGS_AT_ONCE]
        require(within(some, 6, len(arena)), f"{what}: an offset lies outside")
        heads = [arena[some - 6 + place].astype(np.int64) for place in range(6)]
        numbers = heads[0] | heads[1] << 8 | heads[2] << 16 | heads[3] << 24
        ends = some + (heads[4] | heads[5] << 8)
        chained = some[0] == end + 6 and bool((some[1:] == ends[:-1] + 6).all()) and ends[-1] <= len(arena)
        require(chained, f"{what}: the records do not lie end to end")
        require((numbers == np.arange(first, first + len(some))).all(), f"{what}: the records are out of order")
        texts = arena[end : ends[-1]].copy()
        for place in range(6):
            texts[some - 6 + place - end] = 0  # so that no character reaches from one record into the next
        try:
            texts.tobytes().decode()
        except UnicodeDecodeError as error:
            raise InvalidArgumentError(f"{what}: a name is no UTF-8") from error
        end = int(ends[-1])
    require(end == len(arena), f"{what}: there are bytes behind the last record")
    return count


def check_charts(arrays: Arrays) -> int:
    """The names of the charts, of which the first is the global one's and empty. Returns how many there are."""
    charts = check_strings(arrays, "charts")
    require(charts and not arrays["arena"][4:6].any(), "charts: the first is not the global one")
    return charts


def check_pairs(arrays: Arrays, charts: int, songs: int) -> int:
    """The (chart, song) pairs: of known charts, the global one aside, and known songs. Returns how many."""
    of_charts, of_songs = columns_of(arrays, {"charts": "i4", "songs": "i4"}, "pairs")
    require(within(of_charts, 1, charts - 1) and within(of_songs, 0, songs - 1), "pairs: of an unknown chart or song")
    return len(of_charts)


def check_marks(arrays: Arrays) -> None:
    """The producers' marks."""
    keys, *_ = columns_of(arrays, {"keys": "u8", "highest": "u8", "bitmaps": "u8"}, "marks")
    require(within(keys, 1, _SEQUENCE_MAX), "marks: a key is 0")


def check_board(arrays: Arrays, what: str, entry_charts: NDArray[np.int32], entries: int, charts: int) -> None:
    """A board's counts and its charts' totals, which follow from them.

    Args:
        arrays: from `Board.to_arrays`.
        what: the board's name.
        entry_charts: the chart of each entry; empty: all in chart 0.
        entries: how many it has to have.
        charts: how many there are at most.
    """
    (counts,) = columns_of(arrays, {"counts": "i8"}, what)
    require(len(counts) == entries, f"{what}: {len(counts)} counts for {entries} entries")
    totals = arrays.get("totals")
    if totals is None or totals.ndim != 2 or totals.shape[1] != 2 or totals.dtype != np.dtype("i8"):
        raise InvalidArgumentError(f"{what}: its totals are missing, or not two columns of integers")
    require(1 <= len(totals) <= 2 * charts + 1, f"{what}: totals of {len(totals)} charts, of {charts}")
    most = SUM_MAX if len(entry_charts) else COUNT_MAX
    require(within(counts, 0, most), f"{what}: a count lies out of range")
    if not len(entry_charts):
        plays, present = [int(counts.sum())], [int(np.count_nonzero(counts))]
    else:
        known = len(totals)
        require(within(entry_charts, 0, known - 1), f"{what}: an entry of a chart without totals")
        sums = np.zeros(known, np.int64)
        np.add.at(sums, entry_charts, counts)
        plays, present = sums.tolist(), np.bincount(entry_charts[counts != 0], minlength=known).tolist()
    rest = [0] * (len(totals) - len(plays))
    told = totals.tolist()
    require(told == [list(pair) for pair in zip(plays + rest, present + rest, strict=True)],
            f"{what}: the totals are not those of the counts")  # fmt: skip


def check_block(columns: Arrays, what: str, entries: int) -> None:
    """A block of cells: of known entries, in the order of their buckets, at least one."""
    buckets, of_entries, _ = columns_of(columns, {"buckets": "i8", "entries": "i4", "counts": "i8"}, what)
    require(len(buckets), f"{what}: it is empty")
    check_cells(buckets, of_entries, what, entries)


def check_cells(buckets: NDArray[Any], of_entries: NDArray[Any], what: str, entries: int) -> None:
    """Cells, at least one: of known entries, in the order of their buckets."""
    # A bucket that was rolled up begins before its plays.
    require(int(buckets[0]) >= -2 * TIME_MS_MAX and int(buckets[-1]) <= TIME_MS_MAX, f"{what}: a time out of range")
    for first in range(0, len(buckets), _CELLS_AT_ONCE):
        some = buckets[first : first + _CELLS_AT_ONCE + 1]
        require((some[1:] >= some[:-1]).all(), f"{what}: its cells are out of order")
        require(within(of_entries[first : first + _CELLS_AT_ONCE], 0, entries - 1), f"{what}: of an unknown entry")


def check_sessions(told: Mapping[str, Any], columns: NDArray[Any] | None, entries: int) -> None:
    """What standing sessions were: see `SessionSpan.to_snapshot`."""
    if columns is None or columns.ndim != 2 or columns.shape[0] != 4 or columns.dtype != np.dtype("i8"):
        raise InvalidArgumentError("sessions: the columns are missing, or not four of integers")
    if told["end"] is not None:
        integer(told["end"], -TIME_MS_MAX, TIME_MS_MAX, "sessions: end")
    for name in ("low", "settled"):
        integer(told[name], -4 * TIME_MS_MAX, TIME_MS_MAX, f"sessions: {name}")
    require(not columns[:, entries:].any(), "sessions: of an unknown entry")
    require(within(columns.reshape(-1), -4 * TIME_MS_MAX, TIME_MS_MAX), "sessions: a number out of range")
    known = min(entries, columns.shape[1])
    for entry in told["uncertain"]:
        integer(entry, 0, known - 1, "sessions: an uncertain entry")


def check_producers(told: Mapping[str, Any]) -> None:
    """What is known of producers: see `Producers.to_snapshot`."""
    following = integer(told["next_number"], 1, _NUMBER_MAX + 1, "producers: next_number")
    for name, number, last_seen_ms, permanent, rejects in told["known"]:
        bytes.fromhex(name)
        integer(number, 1, following - 1, "a producer's number")
        integer(last_seen_ms, -_SEQUENCE_MAX, _SEQUENCE_MAX, "a producer's last_seen_ms")
        require(isinstance(permanent, bool), "a producer's permanence is neither true nor false")
        for sequence, packed in rejects:
            integer(sequence, 0, _SEQUENCE_MAX, "a rejected batch's sequence")
            for one in packed:
                integer(one, 0, (_NUMBER_MAX << 8) | 255, "a reject")


def check_standing(windows: Iterable[Window], resolution_ms: int) -> None:
    """Windows that may stand.

    Raises:
        InvalidArgumentError: one may not.
    """
    for window in windows:
        require(not isinstance(window, GlobalWindow | RangeWindow), f"{window} cannot stand")
        bounds_of(window, 0, resolution_ms)


def borders_by_block(told: Mapping[str, Sequence[object]]) -> dict[int, list[int]]:
    """Where the tiers' borders stood when each block was merged."""
    return {
        int(number): [integer(border, -(1 << 63), TIME_MS_MAX, f"block {number}: a border") for border in borders]
        for number, borders in told.items()
    }


def check_times(meta: Mapping[str, Any], tiers: int) -> None:
    """The times of plays, and where the tiers' borders stood."""
    integer(meta["newest_event_ms"], -TIME_MS_MAX, TIME_MS_MAX, "newest_event_ms")
    if meta["oldest_event_ms"] is not None:
        integer(meta["oldest_event_ms"], -TIME_MS_MAX, TIME_MS_MAX, "oldest_event_ms")
    require(len(meta["tier_floors"]) == tiers, "tier_floors: not one for each tier")
    for floor in meta["tier_floors"]:
        integer(floor, -(1 << 63), TIME_MS_MAX, "tier_floors")
