"""A board: entries with their counts in each window kept, the best of each chart in order, and their cells by time.

There are two in a shard. On the global board an entry is a song, under the same number, and there is one chart, 0. On
the chart board an entry is a (chart, song) pair, numbered by a `PairTable`. Everything else is the same, so both are
this class.

An entry's row is int64[2 * windows]: for each window kept its count and its place in its chart's heap, the window of
all time first. So a play touches one cache line, whichever windows it counts in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from topk_grpc.engine.cells import Cells, CellStore
from topk_grpc.engine.copies import Copy
from topk_grpc.engine.rankings import Names, Ranking
from topk_grpc.engine.session_spans import SessionSpan
from topk_grpc.engine.sessions import Past
from topk_grpc.kernels.strings import StringTable

_IDENTITY: Final = np.empty(0, np.int32)
_ONE_CHART: Final = np.zeros(1 << 16, np.int32)
_NOWHERE: Final = -1 << 62
_STEP_CELLS: Final = 1 << 16  # counted in a millisecond or two


class Span:
    """A ranking of the plays in the buckets [start, end), kept up to date by the board."""

    def __init__(self, ranking: Ranking) -> None:
        self.ranking = ranking
        self.start = 0
        self.end = 0


class Board:
    """Counts, heaps and cells of one kind of entry. One writer.

    Args:
        heap_size: the best entries that each chart keeps in order.

    Attributes:
        all_time: the ranking of all plays.
        spans: the other rankings kept, by any key.
        sessions: the standing sessions, by any key.
        past: how far back the finest buckets are kept; set by the owner while sessions stand.
        cells: all plays by time.
        entry_charts: the chart of each entry; empty: all in chart 0.
        heap_rebuilds: heaps that were filled anew for a query.
    """

    def __init__(self, heap_size: int) -> None:
        self._heap_size = heap_size
        self._rows: NDArray[np.int64] = np.zeros((1 << 8, 2), np.int64)
        self._entries = 0
        self._free_columns: list[int] = []
        self.all_time = Ranking(0, heap_size)
        self.spans: dict[object, Span] = {}
        self.sessions: dict[object, SessionSpan] = {}
        self.past: Past | None = None
        self.cells = CellStore()
        self.names = Names(_IDENTITY, StringTable())
        self.entry_charts: NDArray[np.int32] = _IDENTITY
        self.heap_rebuilds = 0

    def __len__(self) -> int:
        return self._entries

    @property
    def rankings(self) -> list[Ranking]:
        """All rankings."""
        kept: list[Span | SessionSpan] = [*self.spans.values(), *self.sessions.values()]
        return [self.all_time, *(span.ranking for span in kept)]

    def memory_by_part(self) -> dict[str, int]:
        """Bytes of the arrays of each part; of the heaps only what is in use. From any thread."""
        return {
            "rows": self._rows.nbytes,
            "heaps": sum(ranking.memory_bytes for ranking in self.rankings),
            "sessions": sum(span.memory_bytes for span in list(self.sessions.values())),
            "cells": self.cells.memory_bytes,
        }

    def _reserve(self, entries: int, charts: int) -> None:
        if entries > len(self._rows):
            self._resize(max(entries, 2 * len(self._rows)), self._rows.shape[1])
        self._entries = max(self._entries, entries)
        for ranking in self.rankings:
            ranking.reserve(charts)

    def _resize(self, entries: int, columns: int) -> None:
        rows = np.zeros((entries, columns), np.int64)
        rows[: self._entries, : self._rows.shape[1]] = self._rows[: self._entries]
        self._rows = rows

    def add(  # noqa: PLR0917
        self,
        entries: NDArray[np.int32],
        charts: NDArray[np.int32],
        buckets: NDArray[np.int64],
        counts: NDArray[np.int64],
        songs: NDArray[np.int32],
        strings: StringTable,
        known: int,
        entry_charts: NDArray[np.int32] = _IDENTITY,
    ) -> None:
        """Counts plays, in all rankings that hold their buckets. Negative counts take plays back.

        Args:
            entries, charts, buckets, counts: of each play; the charts' and entries' numbers.
            songs: the song of each entry of the board; empty: the same number.
            strings: the song ids.
            known: how many entries there are now, new ones included.
            entry_charts: the chart of each entry of the board; empty: all in chart 0.
        """
        if not len(entries):
            return
        self.names, self.entry_charts = Names(songs, strings), entry_charts
        self._reserve(known, int(charts.max()) + 1)
        self.all_time.count(self._rows, self.names, charts, entries, counts)
        if self.spans:
            first, last = int(buckets.min()), int(buckets.max())
            for span in self.spans.values():
                if span.start <= first and last < span.end:
                    span.ranking.count(self._rows, self.names, charts, entries, counts)
                elif first < span.end and last >= span.start:
                    inside = (buckets >= span.start) & (buckets < span.end)
                    span.ranking.count(self._rows, self.names, charts[inside], entries[inside], counts[inside])
        self.cells.append(buckets, entries, counts)
        if self.sessions and self.past is not None:
            for taken in (counts > 0, counts < 0):
                if taken.any():
                    for session_span in self.sessions.values():
                        session_span.add(
                            self.cells, entries[taken], buckets[taken], counts[taken],
                            self._entries, self.past, self._counter(session_span.ranking),
                        )  # fmt: skip

    def _counter(self, ranking: Ranking) -> Callable[[NDArray[np.int32], NDArray[np.int64]], None]:
        def count(entries: NDArray[np.int32], counts: NDArray[np.int64]) -> None:
            ranking.count(self._rows, self.names, self.charts_of(entries), entries, counts)

        return count

    def charts_of(self, entries: NDArray[np.int32]) -> NDArray[np.int32]:
        """The charts of entries."""
        if len(self.entry_charts):
            return self.entry_charts[entries]
        return _ONE_CHART[: len(entries)] if len(entries) <= len(_ONE_CHART) else np.zeros(len(entries), np.int32)

    # --- Spans --------------------------------------------------------------------------------------------------------

    def _open_ranking(self) -> Ranking:
        if not self._free_columns:
            column = self._rows.shape[1]
            self._resize(len(self._rows), column + 2)
            self._free_columns.append(column)
        ranking = Ranking(self._free_columns.pop(), self._heap_size)
        ranking.reserve(self.all_time.charts)
        return ranking

    def _close_ranking(self, ranking: Ranking) -> None:
        """Forgets a ranking; its columns are used again."""
        ranking.clear(self._rows)
        self._free_columns.append(ranking.column)

    def open_span(self, key: object) -> Span:
        """Makes an empty ranking that `move_span` fills."""
        self.spans[key] = Span(self._open_ranking())
        return self.spans[key]

    def close_span(self, key: object) -> None:
        """Forgets a span or sessions."""
        span = self.spans.pop(key, None) or self.sessions.pop(key)
        self._close_ranking(span.ranking)

    def move_span(self, span: Span, start: int, end: int, between: Callable[[], None] | None = None) -> None:
        """Makes a span that of the buckets [start, end), by what leaves and what enters it.

        Where it would move by more than its own length all is counted anew.

        Args:
            span: of this board.
            start, end: buckets.
            between: called after each step: all but this span, which stands nowhere then, can be read.
        """
        ranking = span.ranking
        if end <= span.start or span.end <= start:
            if span.start != span.end:
                ranking.clear(self._rows)
            span.start = span.end = start
        changes = (
            (span.start, min(start, span.end), -1),
            (max(end, span.start), span.end, -1),
            (start, min(span.start, end), 1),
            (max(span.end, start), end, 1),
        )
        span.start = span.end = _NOWHERE
        for first, stop, sign in changes:
            for cells in self.cells.within(first, stop):
                for done in range(0, len(cells), _STEP_CELLS):
                    step = slice(done, done + _STEP_CELLS)
                    entries, counts = cells.entries[step], cells.counts[step]
                    ranking.count(self._rows, self.names, self.charts_of(entries), entries, counts, sign)
                    if between is not None:
                        between()
        span.start, span.end = start, end

    # --- Sessions -----------------------------------------------------------------------------------------------------

    def open_sessions(self, key: object, gap: int) -> SessionSpan:
        """Makes standing sessions that `move_sessions` begins.

        Args:
            key: any.
            gap: in buckets.
        """
        span = SessionSpan(self._open_ranking(), gap, lambda entries: self._rows[entries, 0])
        self.sessions[key] = span
        return span

    def move_sessions(self, span: SessionSpan, end: int) -> None:
        """Moves sessions on to a later bucket, or begins them, if what they need is kept as fine as they need it."""
        past = self.past
        if past is None:
            return
        if span.end is not None and span.end < past.finest:
            self.fold_sessions(span)
        span.move(self.cells, end, self._entries, past, self._counter(span.ranking))

    def fold_sessions(self, span: SessionSpan) -> None:
        """Lets sessions stand nowhere."""
        span.ranking.clear(self._rows)
        span.fold()

    def restore_sessions(self, span: SessionSpan, meta: Mapping[str, Any], columns: NDArray[np.int64]) -> None:
        """Begins with what `SessionSpan.to_snapshot` described."""
        span.restore(meta, columns, self._counter(span.ranking))

    # --- Slots that come and go ---------------------------------------------------------------------------------------

    def take_in(  # noqa: PLR0917
        self,
        entries: NDArray[np.int32],
        charts: NDArray[np.int32],
        counts: NDArray[np.int64],
        cells: Cells,
        songs: NDArray[np.int32],
        strings: StringTable,
        known: int,
        entry_charts: NDArray[np.int32] = _IDENTITY,
    ) -> None:
        """Takes entries in with all that they have, sessions aside.

        Args:
            entries, charts, counts: each entry, its chart and its plays of all time, which may be more than its cells'.
            cells: their plays by time.
            songs, strings, known, entry_charts: as in `add`.
        """
        self.names, self.entry_charts = Names(songs, strings), entry_charts
        self._reserve(known, int(charts.max(initial=0)) + 1)
        self.all_time.count(self._rows, self.names, charts, entries, counts)
        for span in self.spans.values():
            inside = cells.within(span.start, span.end)
            of_charts = self.charts_of(inside.entries)
            span.ranking.count(self._rows, self.names, of_charts, inside.entries, inside.counts)
        self.cells.append(cells.buckets, cells.entries, cells.counts)

    def join_sessions(
        self,
        span: SessionSpan,
        settled: int,
        entries: NDArray[np.int32],
        columns: NDArray[np.int64],
        uncertain: NDArray[np.int32],
    ) -> None:
        """Takes sessions in that stand at the same position: see `SessionSpan.join`."""
        span.join(settled, entries, columns, uncertain, self._entries, self._counter(span.ranking))

    def remove(self, entries: NDArray[np.int32], slots: Sequence[int] = ()) -> None:
        """Takes away all that some entries have; their cells cancel out when they are merged.

        Args:
            entries: each once, ascending.
            slots: that they belong to, where these are known.
        """
        for ranking in self.rankings:
            counts = self._rows[entries, ranking.column]
            held = entries[counts != 0]
            ranking.count(self._rows, self.names, self.charts_of(held), held, -counts[counts != 0])
        for session_span in self.sessions.values():
            session_span.forget(entries)
        numbers = np.full(self._entries, -1, np.int32)
        numbers[entries] = entries
        for cells in list(self.cells.of_entries(numbers, slots)):
            self.cells.append(cells.buckets, cells.entries, -cells.counts)

    # --- Reading ------------------------------------------------------------------------------------------------------

    def totals(self, chart: int) -> tuple[int, int]:
        """Plays and entries of a chart, all time."""
        return self.all_time.totals(chart)

    def best(
        self, ranking: Ranking, chart: int, k: int, *, fill: bool
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]] | None:
        """The k best of a chart in a ranking.

        Args:
            ranking: of this board.
            chart: its number.
            k: how many.
            fill: sweep over all entries where the heap does not say; else None is returned then.
        """
        best = ranking.best(self.names, chart, k)
        if best is None and fill:
            candidates = np.arange(self._entries, dtype=np.int32)
            if len(self.entry_charts):
                candidates = np.flatnonzero(self.entry_charts[: self._entries] == chart).astype(np.int32)
            if k > self._heap_size:
                return self.names.select(candidates, self._rows[candidates, ranking.column], k)
            ranking.fill(self._rows, self.names, chart, candidates)
            self.heap_rebuilds += 1
            best = ranking.best(self.names, chart, k)
        return best

    def count(self, entry: int, ranking: Ranking | None = None) -> int:
        """The count of one entry; all time, if no ranking is given."""
        return int(self._rows[entry, ranking.column if ranking else 0])

    def counts_of(self, entries: NDArray[np.int32]) -> NDArray[np.int64]:
        """The counts of some entries, all time; 0 for those that are not known yet."""
        counts = np.zeros(len(entries), np.int64)
        known = entries < self._entries
        counts[known] = self._rows[entries[known], 0]
        return counts

    def counts(self, ranking: Ranking | None = None) -> NDArray[np.int64]:
        """The count of each entry: a copy; all time, if no ranking is given."""
        return self._rows[: self._entries, ranking.column if ranking else 0].copy()

    # --- Snapshots ----------------------------------------------------------------------------------------------------

    def to_arrays(self, copy: Copy = np.copy) -> dict[str, NDArray[np.generic]]:
        """What a snapshot keeps, copied: counts and totals of all time. The rest is found again from them and cells."""
        return {"counts": copy(self._rows[: self._entries, 0]), "totals": self.all_time.copy_totals()}

    def restore(
        self,
        arrays: dict[str, NDArray[np.generic]],
        songs: NDArray[np.int32],
        charts: NDArray[np.int32],
        strings: StringTable,
    ) -> None:
        """Begins with what `to_arrays` described.

        Args:
            arrays: from `to_arrays`.
            songs: as in `add`.
            charts: the chart of each entry; empty: all in chart 0.
            strings: the song ids.
        """
        counts, totals = arrays["counts"], arrays["totals"]
        self.names, self.entry_charts = Names(songs, strings), charts
        self._reserve(len(counts), len(totals))
        self._rows[: len(counts), 0] = counts
        self.all_time.restore_totals(totals)  # type: ignore[arg-type]
        if not len(charts):
            self.all_time.fill(self._rows, self.names, 0, np.arange(len(counts), dtype=np.int32))
            return
        order = np.argsort(charts, kind="stable").astype(np.int32)
        stops = np.cumsum(np.bincount(charts, minlength=len(totals)))
        for chart, stop in enumerate(stops.tolist()):
            start = int(stops[chart - 1]) if chart else 0
            if stop > start:
                self.all_time.fill(self._rows, self.names, chart, order[start:stop])


def global_songs() -> NDArray[np.int32]:
    """The songs of the global board's entries: the same numbers."""
    return _IDENTITY
