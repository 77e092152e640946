"""Corrections: plays with a negative count, each taken back whole or not at all.

A correction names a song, a time and charts, as a play does. It is admitted if in its time bucket the song has at least
as many plays as it takes back, on the global board and in each chart named; so no bucket is ever negative, and with it
no window. The bucket is as wide as the tier that covers the time: what has been rolled up is taken back from there.

What a song has is what was applied, what the request at hand adds and the corrections before have left. Requests with
corrections are admitted when everything before them has been applied (`Request.corrects`), so of what was admitted and
not applied yet only the request's own parts have to be looked at.

Theory of operation. What the corrections of a part ask for comes down to few distinct *places*: (song, chart, bucket),
numbered together. The plays of all places are gathered in passes over columns; only then each correction is decided, in
their order. Songs are numbered among themselves, since one that is new has no number on the shard yet, and must not
get one by a correction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from topk_grpc.engine.spans import span_sums
from topk_grpc.engine.state import CHARTS, GLOBAL, ShardState
from topk_grpc.kernels.strings import StringTable

if TYPE_CHECKING:
    from topk_grpc.engine.admission import Part

Rows = NDArray[np.intp]


def refused(state: ShardState, request: bytes, earlier: Sequence[Part], part: Part) -> Rows:
    """The corrections that would make a bucket negative, as rows of the part.

    Args:
        state: everything before the request has been applied to it.
        request: what the columns point into.
        earlier: the parts of the request before, decided.
        part: with corrections; everything else of it is decided.
    """
    rows = np.flatnonzero(_chosen(part) & (part.columns.counts < 0))
    if not len(rows):
        return rows
    columns = part.columns
    songs = StringTable()
    numbers = songs.add(request, columns.song_starts[rows], columns.song_sizes[rows], part.hashes[rows])
    plays = [(one, np.flatnonzero(_chosen(one))) for one in earlier]
    plays.append((part, np.flatnonzero(_chosen(part) & (columns.counts > 0))))
    newest_ms = max(
        (int(one.columns.times_ms[chosen].max()) for one, chosen in plays if len(chosen)),
        default=state.newest_event_ms,
    )
    buckets = _Buckets.of(state, columns.times_ms[rows], max(newest_ms, state.newest_event_ms or newest_ms))
    places = _Places(len(state.charts), len(buckets.starts))
    owners, keys = places.of(part, rows, numbers, buckets)
    known, needs = np.unique(keys, return_inverse=True)
    first_rows = rows[np.unique(numbers, return_index=True)[1]]
    on_shard = state.songs.find(
        request, columns.song_starts[first_rows], columns.song_sizes[first_rows], part.hashes[first_rows]
    )
    held = _applied(state, places, known, on_shard, buckets)
    for one, chosen in plays:
        starts, sizes = one.columns.song_starts[chosen], one.columns.song_sizes[chosen]
        found = songs.find(request, starts, sizes, one.hashes[chosen])
        _add_plays(held, known, places, one, chosen[found >= 0], found[found >= 0], buckets)
    return rows[_decide(held.tolist(), needs, owners, columns.counts[rows])]


def _chosen(part: Part) -> NDArray[np.bool_]:
    return np.ones(part.columns.count, bool) if part.chosen is None else part.chosen == 1


@dataclass(frozen=True, slots=True)
class _Buckets:
    """The buckets of a part's corrections, ascending; numbered from 0. Starts and ends are bucket numbers."""

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    resolution_ms: int

    @classmethod
    def of(cls, state: ShardState, times_ms: NDArray[np.int64], newest_ms: int) -> _Buckets:
        resolution = state.settings.resolution_ms
        spans: set[tuple[int, int]] = set()
        for bucket in np.unique(times_ms // resolution).tolist():
            span = state.tiers.bucket_span(bucket * resolution, newest_ms)
            if span is not None:  # else plays of that time are not kept any more
                spans.add((span.start_ms // resolution, span.end_ms // resolution))
        columns = np.array(sorted(spans), np.int64).reshape(-1, 2)
        return cls(columns[:, 0].copy(), columns[:, 1].copy(), resolution)

    def numbers(self, times_ms: NDArray[np.int64]) -> NDArray[np.intp]:
        """The bucket of each time; -1: none of these."""
        if not len(self.starts):
            return np.full(len(times_ms), -1, np.intp)
        buckets = times_ms // self.resolution_ms
        numbers = np.searchsorted(self.starts, buckets, side="right") - 1
        return np.where((numbers >= 0) & (buckets < self.ends[numbers]), numbers, -1)


@dataclass(frozen=True, slots=True)
class _Places:
    """Numbers for (song, chart, bucket); -1 where chart or bucket is none. Chart 0 is the global one."""

    charts: int
    buckets: int

    def of(
        self, part: Part, rows: Rows, songs: NDArray[np.int32], buckets: _Buckets
    ) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
        """Where plays count: for each of their places which of `rows` it belongs to, from 0, and its number.

        Args:
            part: whose plays they are.
            rows: which.
            songs: of these rows.
            buckets: to be told apart.
        """
        owners = np.arange(len(rows))
        charts = np.zeros(len(rows), np.int64)
        if part.chart_numbers is not None:
            firsts, stops = (part.columns.chart_bounds[bound].astype(np.int64) for bound in (rows, rows + 1))
            many = stops - firsts
            named = np.repeat(owners, many)
            # The places of the names: counted up from each row's first.
            names = np.arange(len(named)) + np.repeat(firsts - (np.cumsum(many) - many), many)
            owners, charts = np.append(owners, named), np.append(charts, part.chart_numbers[names])
        of_bucket = buckets.numbers(part.columns.times_ms[rows])[owners]
        keys = (songs.astype(np.int64)[owners] * self.charts + charts) * self.buckets + of_bucket
        return owners, np.where((charts >= 0) & (of_bucket >= 0), keys, -1)

    def apart(self, keys: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Songs, charts and buckets of places."""
        rest, buckets = np.divmod(keys, max(1, self.buckets))
        songs, charts = np.divmod(rest, self.charts)
        return songs, charts, buckets


def _applied(
    state: ShardState, places: _Places, keys: NDArray[np.int64], on_shard: NDArray[np.int32], buckets: _Buckets
) -> NDArray[np.int64]:
    """The applied plays of each place; -1 for the place that is none, so that nothing can be taken from there.

    Args:
        state: the shard.
        places: what the keys mean.
        keys: of the places, each once.
        on_shard: for each song its number on the shard; -1: it is new.
        buckets: as in the keys.
    """
    held = np.where(keys < 0, -1, 0)
    songs, charts, of_bucket = places.apart(keys)
    entries = np.where(keys < 0, -1, on_shard[songs])
    named = np.flatnonzero((entries >= 0) & (charts > 0))
    pairs = state.pairs.find(charts[named].astype(np.int32), entries[named].astype(np.int32))
    of_board = {GLOBAL: np.flatnonzero((entries >= 0) & (charts == 0)), CHARTS: named[pairs >= 0]}
    entries[named] = pairs
    for board, which in of_board.items():
        starts, ends = buckets.starts[of_bucket[which]], buckets.ends[of_bucket[which]]
        held[which] = span_sums(state.boards[board].cells, entries[which].astype(np.int32), starts, ends)
    return held


def _add_plays(  # noqa: PLR0917
    held: NDArray[np.int64],
    known: NDArray[np.int64],
    places: _Places,
    part: Part,
    rows: Rows,
    songs: NDArray[np.int32],
    buckets: _Buckets,
) -> None:
    """Adds plays that were admitted, and are not applied yet, to the places that are known."""
    owners, keys = places.of(part, rows, songs, buckets)
    at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    wanted = (keys >= 0) & (known[at] == keys)
    np.add.at(held, at[wanted], part.columns.counts[rows][owners[wanted]])


def _decide(
    held: list[int], needs: NDArray[np.intp], owners: NDArray[np.intp], counts: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Which corrections are refused, one after the other: each leaves less to those behind it.

    Args:
        held: the plays of each place; changed.
        needs, owners: places, and the correction that takes from each.
        counts: of the corrections, negative.
    """
    order = np.argsort(owners, kind="stable")
    sorted_needs = needs[order].tolist()
    stops = np.searchsorted(owners[order], np.arange(len(counts)), side="right").tolist()
    out = np.zeros(len(counts), bool)
    start = 0
    for correction, (stop, count) in enumerate(zip(stops, counts.tolist(), strict=True)):
        own = sorted_needs[start:stop]
        start = stop
        if all(held[place] + count >= 0 for place in own):
            for place in own:
                held[place] += count
        else:
            out[correction] = True
    return out
