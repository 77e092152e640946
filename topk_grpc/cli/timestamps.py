"""Columns of times, as they come in real files, to epoch milliseconds.
 There are two ways through: Arrow's, for a whole column that is of one kind, and `read_cell`, for one text at a time,
when the column is mixed or has a cell that cannot be read. Tests hold them against each other.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from topk_grpc.cli.sources import require_pyarrow
from topk_grpc.errors import InputError
from topk_grpc.model import format_time, to_epoch_ms

if TYPE_CHECKING:
    import pyarrow

TIME_UNITS: Final = ("auto", "s", "ms", "us", "ns")
"""What numbers can count."""

YEAR_MS: Final = 366 * 86_400_000
_1971_MS: Final = 365 * 86_400_000
_YEAR_1_MS: Final = -62_135_596_800_000
_PER_SECOND: Final = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
# The least sizes that are taken for ms, us and ns: 1e11 s is the year 5138, 1e11 ms 1973, and so on.
_AUTO: Final = ((10**17, "ns"), (10**14, "us"), (10**11, "ms"), (0, "s"))
_NUMBER: Final = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,2})?")
_INT64_MAX: Final = (1 << 63) - 1
_MISSING: Final = "the time is missing"

Times = tuple[npt.NDArray[np.int64], dict[int, str]]
"""Epoch milliseconds, 0 where there is none; and for those places what is wrong."""


def read_times(column: pyarrow.Array, unit: str, now_ms: int) -> Times:
    """Reads a column.

    Args:
        column: texts, timestamps, dates or numbers.
        unit: of numbers, one of TIME_UNITS.
        now_ms: the clock; what lies more than a year ahead of it is refused, as no cluster takes it.

    Raises:
        InputError: the column's type holds no times.
    """
    pa = require_pyarrow()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        times, bad = _from_timestamps(column)
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        times, bad = _from_numbers(column, unit)
    elif _is_text(kind):
        times, bad = _from_texts(column, unit)
    elif pa.types.is_null(kind):
        times, bad = np.zeros(len(column), np.int64), dict.fromkeys(range(len(column)), _MISSING)
    else:
        raise InputError(f"the time column is of type {kind}: times are texts, timestamps, dates or numbers")
    outside = (times < _YEAR_1_MS) | (times > now_ms + YEAR_MS) | (np.abs(np.maximum(times, _YEAR_1_MS)) < _1971_MS)
    for place in np.flatnonzero(outside).tolist():
        bad.setdefault(place, _implausible(int(times[place]), unit))
    return times, bad


def read_cell(text: str, unit: str) -> int:
    """Reads one time.

    Returns:
        Epoch milliseconds, rounded down.

    Raises:
        ValueError: it is none; the message says what to do.
    """
    text = text.strip()
    if not text:
        raise ValueError(_MISSING)
    if _NUMBER.fullmatch(text):
        try:
            return _number_to_ms(Fraction(Decimal(text)), unit)
        except (InvalidOperation, OverflowError) as error:
            raise ValueError("the number is no time") from error
    try:
        return to_epoch_ms(datetime.fromisoformat(text))
    except (ValueError, OverflowError):
        raise ValueError(
            "not a time: ISO 8601 is read, as in 2014-06-16 18:28:34 or 2014-06-16T18:28:34-07:00, and numbers"
        ) from None


def _implausible(time_ms: int, unit: str) -> str:
    when = format_time(time_ms)
    if time_ms >= _1971_MS:
        return f"that is {when}, in the future: if it is a number, say its unit with --time-unit"
    if unit == "auto" or time_ms < 0:
        return f"that is {when}, which no play is: if it is a number, say its unit with --time-unit"
    return (
        f"read as {unit} that is {when}: most likely a coarser unit, say it with --time-unit (seconds are s), or auto"
    )


def _number_to_ms(value: Fraction | int, unit: str) -> int:
    if unit == "auto":
        size = abs(Fraction(value))
        unit = next(name for least, name in _AUTO if size >= least)
    time_ms = int(value * 1000 // _PER_SECOND[unit])
    if not -_INT64_MAX <= time_ms <= _INT64_MAX:
        raise ValueError("the number is too large for a time")
    return time_ms


def _is_text(kind: Any) -> bool:
    types = require_pyarrow().types
    checks = ("is_string", "is_large_string", "is_binary", "is_large_binary", "is_string_view", "is_binary_view")
    return any(getattr(types, name)(kind) for name in checks if hasattr(types, name))


# --- Whole columns ----------------------------------------------------------------------------------------------------


def _values(column: pyarrow.Array) -> npt.NDArray[np.int64]:
    """int64 values with 0 for null."""
    pa = require_pyarrow()
    filled = column.cast(pa.int64()).fill_null(0)
    return np.asarray(filled.to_numpy(zero_copy_only=False), np.int64)


def _nulls(column: pyarrow.Array) -> dict[int, str]:
    if not column.null_count:
        return {}
    return dict.fromkeys(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False)).tolist(), _MISSING)


def _from_timestamps(column: pyarrow.Array) -> Times:
    pa = require_pyarrow()
    if pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("s") if pa.types.is_date32(column.type) else pa.timestamp("ms"))
    values = _values(column)
    return _scale(values, column.type.unit), _nulls(column)


def _from_numbers(column: pyarrow.Array, unit: str) -> Times:
    pa = require_pyarrow()
    if pa.types.is_integer(column.type) and not pa.types.is_uint64(column.type):
        return _scale(_values(column), unit), _nulls(column)
    bad: dict[int, str] = {}
    times = np.zeros(len(column), np.int64)
    for place, value in enumerate(column.to_pylist()):
        try:
            if value is None:
                raise ValueError(_MISSING)
            # A double has 53 bits, today's seconds take 31: the nearest microsecond is what was meant.
            exact = Fraction(round(value * 1_000_000), 1_000_000) if isinstance(value, float) else Fraction(value)
            times[place] = _number_to_ms(exact, unit)
        except (ValueError, OverflowError) as error:
            bad[place] = (
                str(error) if isinstance(error, ValueError) and str(error) == _MISSING else "the number is no time"
            )
    return times, bad


def _scale(values: npt.NDArray[np.int64], unit: str) -> npt.NDArray[np.int64]:
    """Milliseconds, rounded down; what does not fit 64 bits becomes the largest, which is refused as the future."""
    if unit == "auto":
        out = np.zeros_like(values)
        size = np.abs(np.maximum(values, -_INT64_MAX))
        below = _INT64_MAX
        for least, name in _AUTO:
            chosen = (size >= least) & (size < below) if below != _INT64_MAX else size >= least
            out[chosen] = _scale(values[chosen], name)
            below = least
        return out
    if unit == "s":
        fits = np.abs(np.maximum(values, -_INT64_MAX)) <= _INT64_MAX // 1000
        return np.where(fits, np.where(fits, values, 0) * 1000, _INT64_MAX)
    return values // (_PER_SECOND[unit] // 1000)


def _from_texts(column: pyarrow.Array, unit: str) -> Times:
    pa = require_pyarrow()
    whole = _at_once(column, unit)
    if whole is not None:
        return whole, {}
    bad: dict[int, str] = {}
    times = np.zeros(len(column), np.int64)
    for place, cell in enumerate(column.cast(pa.large_binary()).to_pylist()):
        try:
            times[place] = read_cell((cell or b"").decode("utf-8"), unit)
        except UnicodeDecodeError:
            bad[place] = "not UTF-8"
        except ValueError as error:
            bad[place] = str(error)
    return times, bad


def _at_once(column: pyarrow.Array, unit: str) -> npt.NDArray[np.int64] | None:
    """All cells by Arrow, if all are of one kind that it reads."""
    pa = require_pyarrow()
    if column.null_count or not len(column):
        return None
    try:
        texts = column.cast(pa.large_string())
    except pa.ArrowInvalid:
        return None
    first = texts[0].as_py()
    if first.isdecimal():
        # Arrow reads 0x10 as a number too, which we do not.
        if pa.compute.any(pa.compute.match_substring(texts, "x", ignore_case=True)).as_py():
            return None
        numbers = _cast(texts, pa.int64())
        return None if numbers is None else _scale(_values(numbers), unit)
    for kind in (pa.timestamp("us"), pa.timestamp("us", tz="UTC")):
        moments = _cast(texts, kind)
        if moments is not None:
            return _scale(_values(moments), "us")
    return None


def _cast(texts: pyarrow.Array, kind: Any) -> pyarrow.Array | None:
    try:
        return texts.cast(kind)
    except require_pyarrow().ArrowInvalid:
        return None


def utc_now_ms() -> int:
    """The clock."""
    return to_epoch_ms(datetime.now(UTC))
