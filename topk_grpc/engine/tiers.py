"""Tiers: how fine the plays of each age are kept, and which windows can be cut exactly.

Theory of operation. A tier is a width of time buckets and an age: `1s:1h,1m:1d,1h:90d,1d:*` keeps seconds for an hour,
minutes for a day, and so on. Ages are measured against the newest event time, never the clock, plus some slack: history
loaded years later is cut as it was live. Borders follow from that: plays before border i are kept in the buckets of
tier i + 1 or coarser. A border is a multiple of the next tier's width, so that no bucket lies across it, and it only
ever moves forward: what has been rolled up is not to be had back. So where a play counts and what is refused follow
from the newest event time alone, not from when storage gets round to merging the cells.

A window can be cut at an instant that is a multiple of the width kept there, or where nothing older was ever recorded.
Otherwise it is refused, with the smallest span around it that can be cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd
from typing import Final

import numpy as np
from numpy.typing import NDArray

from topk_grpc.errors import OutOfRangeError, SettingError, WindowError
from topk_grpc.model import (
    Bounds,
    GlobalWindow,
    RangeWindow,
    SessionWindow,
    SlidingWindow,
    TumblingWindow,
    Window,
    format_duration,
    format_time,
    parse_duration,
)

SLACK_MS: Final = 600_000
"""Buckets are kept this much longer than their tier's age."""

_NEVER: Final = -(1 << 63)


@dataclass(frozen=True, slots=True)
class Tier:
    """Buckets of one width, and how long they are kept; `age_ms` None: for good."""

    width_ms: int
    age_ms: int | None

    def __str__(self) -> str:
        return f"{format_duration(self.width_ms)}:{'*' if self.age_ms is None else format_duration(self.age_ms)}"


def parse_tiers(text: str, resolution_ms: int) -> tuple[Tier, ...]:
    """Reads `1s:1h,1m:1d,1h:90d,1d:*`.

    Args:
        text: WIDTH:AGE, finest first; the last age may be `*`, for good.
        resolution_ms: the cluster's, which the first width has to be.

    Raises:
        SettingError: it is no such list.
    """
    tiers: list[Tier] = []
    for part in text.split(","):
        width, colon, age = part.strip().partition(":")
        if not colon:
            raise SettingError(f"--tiers: {part!r} is no tier: write WIDTH:AGE, as in 1s:1h")
        try:
            tiers.append(Tier(parse_duration(width), None if age.strip() == "*" else parse_duration(age)))
        except WindowError as error:
            raise SettingError(f"--tiers: {part!r} is no tier: {error}") from error
    if tiers[0].width_ms != resolution_ms:
        raise SettingError(
            f"--tiers begins with {format_duration(tiers[0].width_ms)}, but the cluster's resolution is"
            f" {format_duration(resolution_ms)}: the first width has to be that"
        )
    for finer, coarser in pairwise(tiers):
        if coarser.width_ms <= finer.width_ms or coarser.width_ms % finer.width_ms:
            raise SettingError(f"--tiers: {coarser} follows {finer}: each width has to be a multiple of the one before")
        if finer.age_ms is None or (coarser.age_ms is not None and coarser.age_ms <= finer.age_ms):
            raise SettingError(f"--tiers: {coarser} follows {finer}: each age has to be greater than the one before")
    return tuple(tiers)


def everything_at(resolution_ms: int) -> tuple[Tier, ...]:
    """Tiers that keep everything at the resolution, for good."""
    return (Tier(resolution_ms, None),)


def _need_of(window: Window, resolution_ms: int) -> tuple[int, int] | None:
    """The grain that a standing window cuts at, and how far back, in milliseconds."""
    match window:
        case TumblingWindow(size_ms, offset_ms):
            return gcd(size_ms, offset_ms), size_ms
        case SlidingWindow(size_ms, slide_ms):
            return slide_ms or resolution_ms, size_ms + slide_ms
        case SessionWindow(gap_ms):
            return resolution_ms, gap_ms + resolution_ms
        case GlobalWindow() | RangeWindow():
            return None


class Tiers:
    """The tiers in force on a shard, and the borders that follow. One writer.

    Args:
        tiers: as `parse_tiers` gives them.
        standing: windows that need their grain for as long as they reach, whatever the tiers say.
        floors: for each tier where its border stood when the settings changed.
    """

    def __init__(
        self, tiers: Sequence[Tier], standing: Iterable[Window] = (), floors: Sequence[int] | None = None
    ) -> None:
        self.tiers = tuple(tiers)
        self.standing = tuple(standing)
        self.floors = tuple(floors) if floors is not None else (_NEVER,) * len(self.tiers)
        self._ages = self._reaches()

    def __str__(self) -> str:
        return ",".join(map(str, self.tiers))

    def _reaches(self) -> list[int | None]:
        ages = [tier.age_ms for tier in self.tiers]
        for window in self.standing:
            need = _need_of(window, self.tiers[0].width_ms)
            if need is None:
                continue
            grain, reach = need
            fitting = max(index for index, tier in enumerate(self.tiers) if grain % tier.width_ms == 0)
            for index in range(fitting, len(ages)):  # a coarser tier is never kept shorter than a finer one
                age = ages[index]
                ages[index] = None if age is None else max(age, reach)
        return ages

    def borders(self, newest_ms: int) -> list[int]:
        """For each tier: plays before this instant are kept coarser, or behind the last tier not at all."""
        borders = []
        for index, (age, floor) in enumerate(zip(self._ages, self.floors, strict=True)):
            if age is None:
                borders.append(floor)
                continue
            width = self.tiers[min(index + 1, len(self.tiers) - 1)].width_ms
            borders.append(max(floor, (newest_ms - age - SLACK_MS) // width * width))
        return borders

    def changed(self, tiers: Sequence[Tier], standing: Iterable[Window], newest_ms: int) -> Tiers:
        """The tiers after a change of settings: what has been rolled up by now stays so."""
        return Tiers(tiers, standing, self._held(tiers, newest_ms))

    def joined(self, others: Tiers, newest_ms: int) -> Tiers:
        """These tiers, where plays come in that were kept in others until a newest event time."""
        floors = map(max, self.floors, others._held(self.tiers, newest_ms))
        return Tiers(self.tiers, self.standing, tuple(floors))

    def _held(self, tiers: Sequence[Tier], newest_ms: int) -> list[int]:
        """For each of some tiers: plays before this instant are kept coarser by now than it would."""
        now = self.borders(newest_ms)
        floors = []
        for index, tier in enumerate(tiers):
            held = min(border for border, old in zip(now, self.tiers, strict=True) if tier.width_ms % old.width_ms == 0)
            width = tiers[min(index + 1, len(tiers) - 1)].width_ms
            floors.append(held if held == _NEVER else -(-held // width) * width)
        return floors

    # --- Cutting ------------------------------------------------------------------------------------------------------

    def _width_at(self, time_ms: int, borders: Sequence[int]) -> int | None:
        """The width kept at an instant; None where nothing is kept any more."""
        for tier, border in zip(self.tiers, borders, strict=True):
            if time_ms >= border:
                return tier.width_ms
        return None

    def bucket_span(self, time_ms: int, newest_ms: int) -> Bounds | None:
        """The bucket that a play at an instant is kept in; None where nothing is kept any more."""
        width = self._width_at(time_ms, self.borders(newest_ms))
        if width is None:
            return None
        start = time_ms // width * width
        return Bounds(start, start + width)

    def check(self, bounds: Bounds, newest_ms: int, oldest_ms: int | None) -> None:
        """Refuses bounds that cannot be cut.

        Args:
            bounds: multiples of the resolution.
            newest_ms, oldest_ms: times of the newest and the oldest play; oldest None: there is none.

        Raises:
            OutOfRangeError: with the smallest span around them that can be cut.
        """
        exact = self.exact_span(bounds, newest_ms, oldest_ms)
        if exact != bounds:
            raise self._refusal(bounds, exact, "cannot be cut exactly")

    def refusal(self, bounds: Bounds, newest_ms: int, oldest_ms: int | None, why: str) -> OutOfRangeError:
        """The error for a window that cannot be answered, with the nearest bounds that can."""
        return self._refusal(bounds, self.exact_span(bounds, newest_ms, oldest_ms), why)

    def _refusal(self, bounds: Bounds, exact: Bounds, why: str) -> OutOfRangeError:
        return OutOfRangeError(
            f"{format_time(bounds.start_ms)}..{format_time(bounds.end_ms)} {why}: plays of that age are kept in coarser"
            f" time buckets (tiers {self}). The nearest exact bounds are"
            f" range:{format_time(exact.start_ms)}..{format_time(exact.end_ms)}",
            exact.start_ms,
            exact.end_ms,
        )

    def exact_span(self, bounds: Bounds, newest_ms: int, oldest_ms: int | None) -> Bounds:
        """The smallest span around the bounds that can be cut; without what is not kept any more."""
        borders = self.borders(newest_ms)
        if oldest_ms is None:
            return bounds
        last = self.tiers[-1].width_ms
        kept = self._width_at(oldest_ms, borders)
        # A cut here or before has nothing on its other side.
        first = oldest_ms // (kept or last) * (kept or last)
        start, end = bounds.start_ms, bounds.end_ms
        if start > first:
            width = self._width_at(start, borders)
            start = borders[-1] if width is None else start // width * width
        elif kept is None and end > first:
            start = borders[-1]
        if end > first:
            width = self._width_at(end, borders)
            end = max(start, borders[-1]) + last if width is None else -(-end // width) * width
        return Bounds(start, max(end, start + self.tiers[0].width_ms))

    def roll_up(self, newest_ms: int) -> RollUp:
        """What a merge of cells does now to those before the borders."""
        resolution = self.tiers[0].width_ms
        borders = tuple(border // resolution for border in self.borders(newest_ms))
        return RollUp(tuple(tier.width_ms // resolution for tier in self.tiers), borders)


@dataclass(frozen=True, slots=True)
class RollUp:
    """Widths and borders of the tiers, in buckets at the resolution: into what cells are merged.

    Attributes:
        widths: of each tier.
        borders: for each tier: cells before it are kept in the next one, or behind the last not at all.
    """

    widths: tuple[int, ...]
    borders: tuple[int, ...]

    def of(self, buckets: NDArray[np.int64]) -> NDArray[np.int64]:
        """The first bucket of the tier's bucket that each is kept in, int64[n]."""
        for width, border in zip(self.widths[1:], self.borders, strict=False):
            buckets = np.where(buckets < border, buckets // width * width, buckets)
        return buckets

    @property
    def first_kept(self) -> int:
        """What lies before is not kept any more."""
        return self.borders[-1]

    def is_due(self, last: int, done: Sequence[int]) -> bool:
        """Whether cells up to the bucket `last`, merged when the borders were `done`, lie wholly before a later one."""
        before = done if len(done) == len(self.borders) else (_NEVER,) * len(self.borders)
        return any(last < border and then <= last for border, then in zip(self.borders, before, strict=True))
