"""What one shard answers about a chart and a window.

For all time and for standing windows the k best come from a heap, which costs O(k). Every other answer begins with
candidates: entries with their counts, from the board's rows, from the cells within the window, or from sessions. That
sweeps over all entries, and `scans` says so, so that its owner can queue it.

Where each song lives on one shard, the k best of all shards' k best are the cluster's. Where songs are spread over them
(ring/partitioners.py), `at_least` tells what is needed to find these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from topk_grpc.engine.rankings import Names, Ranking
from topk_grpc.engine.session_spans import SessionSpan
from topk_grpc.engine.sessions import RolledUpError, Sessions, open_sessions
from topk_grpc.engine.state import CHARTS, GLOBAL, ShardState
from topk_grpc.errors import ResourceExhaustedError
from topk_grpc.kernels.heap import compare_with, select
from topk_grpc.model import Bounds, Window

_NONE = np.empty(0, np.int32), np.empty(0, np.int64)
_NO_SESSIONS = Sessions(*_NONE, np.empty(0, np.int64), np.empty(0, np.int64))


@dataclass(frozen=True, slots=True)
class Scope:
    """The plays that a query counts.

    Attributes:
        chart: its name; empty: the global one.
        bounds: None: all time. For sessions the span that an open one's last play lies in.
        gap_ms: above 0: count each entry's open session.
        standing: the window that the bounds are of, where it is worth being kept up to date.
    """

    chart: str = ""
    bounds: Bounds | None = None
    gap_ms: int = 0
    standing: Window | None = field(default=None, compare=False)

    @property
    def board(self) -> str:
        """The board that holds the chart."""
        return CHARTS if self.chart else GLOBAL


@dataclass(frozen=True, slots=True)
class Totals:
    """Plays and songs of a scope on this shard."""

    plays: int
    songs: int


@dataclass(frozen=True, slots=True)
class Ranked:
    """Songs and their counts, best first; where sessions are counted, how far they reach."""

    song_ids: list[str]
    counts: list[int]
    sessions: list[Bounds] | None = None


@dataclass(frozen=True, slots=True)
class PlaceStanding:
    """What stands around a place: how many entries before it, the nearest before and after it, best first."""

    above_count: int
    above: Ranked
    below: Ranked


def _chart_number(state: ShardState, chart: str) -> int | None:
    """The chart's number on its board; None if this shard has never heard of it."""
    if not chart:
        return 0
    number = int(state.charts.find_texts([chart])[0])
    return number if number >= 0 else None


@dataclass(frozen=True, slots=True)
class _Candidates:
    """Entries of a scope, ascending, with their counts, some of which may be 0; and their sessions."""

    entries: NDArray[np.int32]
    counts: NDArray[np.int64]
    sessions: Sessions | None = None

    @property
    def totals(self) -> Totals:
        return Totals(int(self.counts.sum()), int(np.count_nonzero(self.counts)))


def _ranking(state: ShardState, scope: Scope) -> Ranking | None:
    """The ranking that is kept up to date for a scope; None: cells have to be summed."""
    if scope.bounds is None:
        return state.boards[scope.board].all_time
    span = _standing_sessions(state, scope) if scope.gap_ms else state.standing.span(scope.board, scope.bounds)
    return span.ranking if span is not None else None


def _standing_sessions(state: ShardState, scope: Scope) -> SessionSpan | None:
    """The sessions that are kept up to date for a scope, if they are certain."""
    if not scope.gap_ms or scope.bounds is None:
        return None
    span = state.standing.sessions(scope.board, scope.gap_ms, scope.bounds.end_ms)
    return span if span is not None and span.is_certain(_eligible(state, scope)) else None


def _eligible(state: ShardState, scope: Scope) -> NDArray[np.bool_] | None:
    """Which entries of the board are of the chart; None: all."""
    return state.pairs.charts == _chart_number(state, scope.chart) if scope.board == CHARTS else None


def scans(state: ShardState, scope: Scope, k: int) -> bool:
    """Whether `top_k` has to look at more than a heap."""
    ranking = _ranking(state, scope)
    if ranking is None:
        return True
    number = _chart_number(state, scope.chart)
    return number is not None and state.boards[scope.board].best(ranking, number, k, fill=False) is None


def _check(state: ShardState, bounds: Bounds) -> None:
    state.tiers.check(bounds, state.newest_event_ms, state.oldest_event_ms)


def _candidates(state: ShardState, scope: Scope) -> _Candidates:
    """All entries of a scope.

    Raises:
        OutOfRangeError: the buckets kept for its time are too coarse.
    """
    number = _chart_number(state, scope.chart)
    board = state.boards[scope.board]
    ranking = _ranking(state, scope)
    if scope.gap_ms and scope.bounds is not None:
        return _session_candidates(state, scope, scope.bounds, number, ranking)
    if ranking is None and scope.bounds is not None:
        _check(state, scope.bounds)
    if number is None:
        return _Candidates(*_NONE)
    if ranking is not None:
        entries, counts = np.arange(len(board), dtype=np.int32), board.counts(ranking)
    elif scope.bounds is not None:
        resolution = state.settings.resolution_ms
        entries, counts = board.cells.sums(
            scope.bounds.start_ms // resolution, scope.bounds.end_ms // resolution, len(board)
        )
    if scope.board == CHARTS:
        inside = state.pairs.charts[entries] == number
        entries, counts = entries[inside], counts[inside]
    return _Candidates(entries, counts)


def _session_candidates(
    state: ShardState, scope: Scope, bounds: Bounds, number: int | None, ranking: Ranking | None
) -> _Candidates:
    """The entries with an open session."""
    if number is None:
        return _Candidates(*_NONE, _NO_SESSIONS)
    resolution, board = state.settings.resolution_ms, state.boards[scope.board]
    eligible = _eligible(state, scope)
    span = _standing_sessions(state, scope)
    if span is not None and ranking is not None:
        listed = board.counts(ranking) > 0
        entries = np.flatnonzero(listed if eligible is None else listed & eligible).astype(np.int32)
        known = span.sessions(entries)
        return _Candidates(known.entries, known.counts, known)
    try:
        found = open_sessions(
            board.cells,
            len(board),
            eligible,
            scope.gap_ms // resolution,
            bounds.end_ms // resolution,
            state.past,
        )
    except RolledUpError:
        raise state.tiers.refusal(
            bounds,
            state.newest_event_ms,
            state.oldest_event_ms,
            "may hold sessions that began before the finest buckets kept",
        ) from None
    return _Candidates(found.entries, found.counts, found)


def _spans(state: ShardState, candidates: _Candidates, entries: NDArray[np.int32]) -> list[Bounds] | None:
    """How far the sessions of some of the candidates reach; None where no sessions are counted."""
    if candidates.sessions is None:
        return None
    at = np.searchsorted(candidates.entries, entries)
    known = candidates.sessions
    return _bounds_of(state, Sessions(entries, known.counts[at], known.starts[at], known.lasts[at]))


def _bounds_of(state: ShardState, sessions: Sessions) -> list[Bounds]:
    resolution = state.settings.resolution_ms
    return [
        Bounds(start * resolution, last * resolution + resolution)
        for start, last in zip(sessions.starts.tolist(), sessions.lasts.tolist(), strict=True)
    ]


def _ranked(
    state: ShardState,
    scope: Scope,
    entries: NDArray[np.int32],
    counts: NDArray[np.int64],
    sessions: list[Bounds] | None = None,
) -> Ranked:
    songs = state.songs_of(scope.board)
    numbers = songs[entries] if len(songs) else entries
    return Ranked(state.songs.texts(numbers), counts.tolist(), sessions)


def top_k(state: ShardState, scope: Scope, k: int) -> tuple[Ranked, Totals]:
    """The shard's k best of a scope.

    Raises:
        OutOfRangeError: the buckets kept for its time are too coarse.
    """
    ranking, number = _ranking(state, scope), _chart_number(state, scope.chart)
    board = state.boards[scope.board]
    if ranking is not None and number is not None:
        best = board.best(ranking, number, k, fill=True)
        if best is not None:
            span = _standing_sessions(state, scope)
            found = None if span is None else _bounds_of(state, span.sessions(best[0]))
            return _ranked(state, scope, *best, found), Totals(*ranking.totals(number))
    candidates = _candidates(state, scope)
    names = Names(state.songs_of(scope.board), state.songs)
    entries, counts = names.select(candidates.entries, candidates.counts, k)
    return _ranked(state, scope, entries, counts, _spans(state, candidates, entries)), candidates.totals


def totals(state: ShardState, scope: Scope) -> Totals:
    """Plays and songs of a scope."""
    ranking = _ranking(state, scope)
    if ranking is None:
        return _candidates(state, scope).totals
    number = _chart_number(state, scope.chart)
    return Totals(*ranking.totals(number)) if number is not None else Totals(0, 0)


def _entries_of(state: ShardState, scope: Scope, song_ids: Sequence[str]) -> NDArray[np.int32]:
    """The songs' entries on the scope's board; -1 where this shard has none."""
    songs = state.songs.find_texts(list(song_ids))
    if scope.board != CHARTS:
        return songs
    number = _chart_number(state, scope.chart)
    wanted = np.full(len(songs), -1, np.int32)
    known = songs >= 0
    if number is not None:
        wanted[known] = state.pairs.find(np.full(int(known.sum()), number, np.int32), songs[known])
    return wanted


def counts_of(state: ShardState, scope: Scope, song_ids: Sequence[str]) -> tuple[Ranked, Totals]:
    """The counts of songs in a scope, in the order asked; 0 where there is none.

    Raises:
        OutOfRangeError: the buckets kept for its time are too coarse.
    """
    wanted = _entries_of(state, scope, song_ids)
    ranking, board = _ranking(state, scope), state.boards[scope.board]
    if ranking is not None and not scope.gap_ms:
        found = [board.count(entry, ranking) if 0 <= entry < len(board) else 0 for entry in wanted.tolist()]
        return Ranked(list(song_ids), found), totals(state, scope)
    candidates = _candidates(state, scope)
    size = len(candidates.entries)
    at = np.minimum(np.searchsorted(candidates.entries, wanted), max(size - 1, 0))
    there = candidates.entries[at] == wanted if size else np.zeros(len(wanted), np.bool_)
    counts = np.where(there, candidates.counts[at], 0).tolist() if size else [0] * len(wanted)
    sessions = None
    if candidates.sessions is not None:
        sessions = [Bounds(0, 0)] * len(wanted)
        for place, span in zip(
            np.flatnonzero(there).tolist(), _spans(state, candidates, wanted[there]) or (), strict=True
        ):
            sessions[place] = span
    return Ranked(list(song_ids), counts, sessions), candidates.totals


def at_least(
    state: ShardState, scope: Scope, count_min: int, song_ids: Sequence[str], entries_max: int
) -> tuple[list[int], Ranked, Totals]:
    """The counts of songs, and all entries beside them with at least so many plays, in no order.

    Args:
        state: the shard's.
        scope: what is counted; no sessions.
        count_min: above 0.
        song_ids: each once.
        entries_max: the most entries that are told.

    Raises:
        OutOfRangeError: the buckets kept for its time are too coarse.
        ResourceExhaustedError: there are more entries.
    """
    candidates = _candidates(state, scope)
    entries, counts = candidates.entries, candidates.counts
    wanted = _entries_of(state, scope, song_ids)
    chosen = counts >= count_min
    asked = np.zeros(len(wanted), np.int64)
    if len(entries):
        at = np.minimum(np.searchsorted(entries, wanted), len(entries) - 1)
        there = entries[at] == wanted
        asked[there] = counts[at[there]]
        chosen[at[there]] = False
    many = int(np.count_nonzero(chosen))
    if many > entries_max:
        raise ResourceExhaustedError(
            f"{many:,} songs of a shard have {count_min:,} plays or more, and may be among the best: more than a query"
            f" may look at ({entries_max:,}, --threshold-entries-max). Ask for a smaller k or another window, or use a"
            " cluster made with --partitioner ring"
        )
    return asked.tolist(), _ranked(state, scope, entries[chosen], counts[chosen]), candidates.totals


def standings(
    state: ShardState, scope: Scope, places: Sequence[tuple[str, int]], neighbours: int
) -> tuple[list[PlaceStanding], Totals]:
    """What stands around places (song_id, count) in the order of this shard's entries.

    Args:
        state: the shard's.
        scope: what is counted.
        places: song ids with their counts, each at least 1; the songs may be other shards'. A song that has another
            count by now does not stand above or below the place that it had itself.
        neighbours: how many entries before and after each to return.
    """
    candidates = _candidates(state, scope)
    found = candidates.totals
    if places and not neighbours:  # then nobody asks what stands behind the last place
        near = candidates.counts >= min(count for _, count in places)
        candidates = _Candidates(candidates.entries[near], candidates.counts[near])
    return [_standing(state, scope, candidates, place, neighbours=neighbours) for place in places], found


def _standing(
    state: ShardState, scope: Scope, candidates: _Candidates, place: tuple[str, int], *, neighbours: int
) -> PlaceStanding:
    """What stands around one place. Only entries of the same count are compared by name."""
    song_id, count = place
    name = song_id.encode()
    entries, counts = candidates.entries, candidates.counts
    higher, lower = counts > count, (counts < count) & (counts > 0)
    own = int(_entries_of(state, scope, [song_id])[0])
    at = int(np.searchsorted(entries, own))
    if own >= 0 and at < len(entries) and entries[at] == own:
        higher[at] = lower[at] = False
    ties = np.flatnonzero(counts == count)
    sides = np.empty(len(ties), np.int8)
    songs, strings = state.songs_of(scope.board), state.songs
    compare_with(
        songs, strings.starts, strings.arena, entries[ties], counts[ties], name, len(name), count, sides, len(ties)
    )
    above_count = int(np.count_nonzero(higher)) + int(np.count_nonzero(sides > 0))
    if not neighbours:
        return PlaceStanding(above_count, Ranked([], []), Ranked([], []))

    def nearest(tied: NDArray[np.intp], others: NDArray[np.bool_], *, backwards: bool) -> Ranked:
        rows = tied
        missing = neighbours - len(tied)
        if missing > 0:  # the ties are not enough: those with the nearest counts, and whatever ties with them
            rows = np.flatnonzero(others)
            if len(rows) > missing:
                distances = np.abs(counts[rows] - count)
                rows = rows[distances <= np.partition(distances, missing - 1)[missing - 1]]
            rows = np.concatenate((rows, tied))
        chosen, plays = select(
            songs, strings.starts, strings.arena, entries[rows], counts[rows], neighbours, backwards=backwards
        )
        step = -1 if backwards else 1
        chosen, plays = chosen[::step], plays[::step]
        return _ranked(state, scope, chosen, plays, _spans(state, candidates, chosen))

    above = nearest(ties[sides > 0], higher, backwards=True)
    below = nearest(ties[sides < 0], lower, backwards=False)
    return PlaceStanding(above_count, above, below)


def charts(state: ShardState) -> list[tuple[str, Totals]]:
    """All charts but the global one, with what they hold over all time, in the order of their first play."""
    board = state.boards[CHARTS]
    held = ((state.charts.text(number), Totals(*board.totals(number))) for number in range(1, len(state.charts)))
    return [(name, total) for name, total in held if total.plays]
