"""Times as files have them: Arrow's way for whole columns against the way for single cells."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topk_grpc.cli.timestamps import TIME_UNITS, read_cell, read_times
from topk_grpc.errors import InputError
from topk_grpc.model import to_epoch_ms

NOW_MS = 1_800_000_000_000
PLAYED = 1_402_943_314_000  # 2014-06-16 18:28:34 UTC


def times_of(cells: list[Any], unit: str = "auto", kind: Any = None) -> tuple[list[int], dict[int, str]]:
    times, bad = read_times(pa.array(cells, kind), unit, NOW_MS)
    return times.tolist(), bad


@pytest.mark.parametrize(
    "cell",
    [
        "2014-06-16 18:28:34",
        "2014-06-16T18:28:34",
        "2014-06-16T18:28:34Z",
        "2014-06-16T18:28:34+00:00",
        "2014-06-16T11:28:34-07:00",
        "2014-06-16 11:28:34-0700",
        "2014-06-16T18:28:34.000",
        "2014-06-16T18:28:34.000999Z",
        "  2014-06-16 18:28:34 ",
        "20140616T182834",
        "1402943314",
        "1402943314.0",
        "1.402943314e9",
        "1402943314000",
        "1402943314000.9",
        "1402943314000999",
        "1402943314000999999",
    ],
)
@pytest.mark.parametrize("kind", [pa.string(), pa.large_binary(), pa.dictionary(pa.int32(), pa.string())])
def test_reads_every_way_to_write_a_time(cell: str, kind: Any) -> None:
    assert times_of([cell], kind=kind) == ([PLAYED], {})
    assert times_of([cell, "2014-06-16", "1402943314"], kind=kind) == ([PLAYED, PLAYED - 66_514_000, PLAYED], {})


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("", "missing"),
        ("   ", "missing"),
        (None, "missing"),
        ("yesterday", "ISO 8601"),
        ("16/06/2014 18:28", "ISO 8601"),
        ("2014-06-31", "ISO 8601"),
        ("2014-06-16 25:00:00", "ISO 8601"),
        ("0x10", "ISO 8601"),
        ("1e99", "future"),
        ("9" * 30, "too large"),
        ("nan", "ISO 8601"),
        ("-", "ISO 8601"),
        ("20140616", "1970"),
        ("0", "1970"),
        ("-1", "1969"),
        ("-99999999999", "no play"),
        ("1970-01-01T00:00:00Z", "1970"),
        ("2060-01-01", "future"),
        ("99999999999", "future"),
    ],
)
def test_refuses_what_is_no_time(cell: str | None, said: str) -> None:
    times, bad = times_of(["1402943314", cell, "1402943314"], kind=pa.string())
    assert list(bad) == [1]
    assert said in bad[1] or "too large" in bad[1]
    assert (times[0], times[2]) == (PLAYED, PLAYED)


def test_seconds_given_as_milliseconds_are_refused() -> None:
    for cells, kind in ((["1402943314"], pa.string()), ([1402943314], pa.int64()), ([1402943314.5], pa.float64())):
        _, bad = times_of(cells, "ms", kind)
        assert "1970-01-17" in bad[0]
        assert "--time-unit" in bad[0]
        assert times_of(cells, "s", kind)[1] == {}


def test_milliseconds_given_as_seconds_are_refused() -> None:
    assert "future" in times_of(["1402943314000"], "s")[1][0]
    assert "future" in times_of([1402943314000], "s")[1][0]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([PLAYED // 1000], pa.int32()),
        pa.array([PLAYED // 1000], pa.uint64()),
        pa.array([PLAYED], pa.int64()),
        pa.array([PLAYED * 1000 + 999], pa.int64()),
        pa.array([PLAYED * 1_000_000], pa.int64()),
        pa.array([PLAYED / 1000], pa.float64()),
        pa.array([Decimal(PLAYED) / 1000], pa.decimal128(20, 3)),
        pa.array([PLAYED // 1000], pa.timestamp("s")),
        pa.array([PLAYED], pa.timestamp("ms", tz="America/New_York")),
        pa.array([PLAYED * 1000 + 999], pa.timestamp("us", tz="UTC")),
        pa.array([PLAYED * 1_000_000 + 999_999], pa.timestamp("ns")),
    ],
)
def test_reads_typed_columns(column: Any) -> None:
    times, bad = read_times(column, "auto", NOW_MS)
    assert (times.tolist(), bad) == ([PLAYED], {})
    times, bad = read_times(pa.concat_arrays([column, pa.nulls(1, column.type)]), "auto", NOW_MS)
    assert (times.tolist()[0], list(bad)) == (PLAYED, [1])


def test_reads_dates_as_midnight() -> None:
    midnight = PLAYED - 66_514_000
    assert times_of([datetime(2014, 6, 16).date()], kind=pa.date32()) == ([midnight], {})
    assert times_of([datetime(2014, 6, 16).date()], kind=pa.date64()) == ([midnight], {})


def test_other_types_are_no_times() -> None:
    for column in (pa.array([True]), pa.array([[1]]), pa.array([{"a": 1}])):
        with pytest.raises(InputError, match="time column is of type"):
            read_times(column, "auto", NOW_MS)
    assert list(times_of([None], kind=pa.null())[1]) == [0]
    for weird in (float("nan"), float("inf"), 1e300):
        assert list(times_of([weird], kind=pa.float64())[1]) == [0]


WRITTEN = st.builds(
    lambda moment, form: moment.strftime(form),
    st.datetimes(datetime(1975, 1, 1), datetime(2026, 1, 1), timezones=st.just(UTC)),
    st.sampled_from(
        ["%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S.%f", "%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%dT%H:%M:%S-07:00", "%Y-%m-%d"]
    ),
)
NUMBERS = st.integers(0, 1 << 64).map(str) | st.decimals(0, 10**18, places=3).map(str)
OTHER = st.sampled_from(["", " ", "0x12", "+5", "1_000", "-3", "x", "2014-06-16T24:00:00", "2014-06-16T18"]) | st.text(
    max_size=6
)


@settings(max_examples=400, deadline=None)
@given(
    st.one_of(
        st.lists(WRITTEN, min_size=1, max_size=4),
        st.lists(NUMBERS, min_size=1),
        st.lists(WRITTEN | NUMBERS | OTHER, min_size=1),
    ),
    st.sampled_from(TIME_UNITS),
)
def test_columns_read_as_their_cells(cells: list[str], unit: str) -> None:
    times, bad = times_of(cells, unit, pa.string())
    for place, cell in enumerate(cells):
        try:
            expected = read_cell(cell, unit)
        except ValueError:
            assert place in bad
            continue
        plausible = abs(expected) >= 365 * 86_400_000 and -62_135_596_800_000 <= expected <= NOW_MS + 366 * 86_400_000
        assert (place not in bad) == plausible
        if plausible:
            assert times[place] == expected


@settings(max_examples=200, deadline=None)
@given(st.datetimes(datetime(1975, 1, 1), datetime(2026, 1, 1)), st.integers(-14 * 60, 14 * 60))
def test_offsets_are_honoured(moment: datetime, minutes: int) -> None:
    aware = moment.replace(tzinfo=timezone(timedelta(minutes=minutes)))
    assert times_of([aware.isoformat()]) == ([to_epoch_ms(aware)], {})


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-(1 << 63), (1 << 63) - 1), min_size=1), st.sampled_from(TIME_UNITS))
def test_integers_read_as_their_texts(values: list[int], unit: str) -> None:
    typed, typed_bad = times_of(values, unit, pa.int64())
    texts, text_bad = times_of([str(value) for value in values], unit, pa.string())
    assert typed_bad.keys() == text_bad.keys()
    assert [t for i, t in enumerate(typed) if i not in typed_bad] == [
        t for i, t in enumerate(texts) if i not in text_bad
    ]
