"""What one shard answers about a chart and a span of time.

Every answer begins with candidates: entries with their counts, of which those of the chart asked for are kept. For all
time and k within the heap these are the heap's, which costs O(k); everything else sums cells or sweeps over all
entries, and says so by `scans`, so that its owner can queue it.

Each song lives on one shard, so the k best of all shards' k best are the cluster's k best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from topk_grpc.engine.state import CHARTS, GLOBAL, ShardState
from topk_grpc.kernels.heap import compare_with, select
from topk_grpc.model import Bounds, Window

_NONE = np.empty(0, np.int32), np.empty(0, np.int64)


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


def scans(state: ShardState, scope: Scope, k: int) -> bool:
    """Whether `top_k` has to look at more than a heap."""
    number = _chart_number(state, scope.chart)
    return scope.bounds is not None or (number is not None and state.boards[scope.board].best(number, k) is None)


def _candidates(state: ShardState, scope: Scope) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """All entries of a scope with their counts; some may be 0."""
    number = _chart_number(state, scope.chart)
    if number is None:
        return _NONE
    board = state.boards[scope.board]
    if scope.bounds is None:
        entries, counts = np.arange(len(board), dtype=np.int32), board.counts()
    else:
        resolution = state.settings.resolution_ms
        entries, counts = board.cells.sums(
            scope.bounds.start_ms // resolution, scope.bounds.end_ms // resolution, len(board)
        )
    if scope.board == CHARTS:
        inside = state.pairs.charts[entries] == number
        entries, counts = entries[inside], counts[inside]
    return entries, counts


def _ranked(state: ShardState, scope: Scope, entries: NDArray[np.int32], counts: NDArray[np.int64]) -> Ranked:
    songs = state.songs_of(scope.board)
    numbers = songs[entries] if len(songs) else entries
    return Ranked(state.songs.texts(numbers), counts.tolist())


def _select(
    state: ShardState, scope: Scope, entries: NDArray[np.int32], counts: NDArray[np.int64], k: int
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    return select(
        state.songs_of(scope.board),
        state.songs.starts,
        state.songs.arena,
        np.ascontiguousarray(entries),
        np.ascontiguousarray(counts),
        k,
    )


def top_k(state: ShardState, scope: Scope, k: int) -> tuple[Ranked, Totals]:
    """The shard's k best of a scope."""
    number = _chart_number(state, scope.chart)
    if number is None:
        return Ranked([], []), Totals(0, 0)
    board = state.boards[scope.board]
    best = board.best(number, k) if scope.bounds is None else None
    if best is not None:
        return _ranked(state, scope, *_select(state, scope, *best, k)), Totals(*board.totals(number))
    entries, counts = _candidates(state, scope)
    totals = Totals(int(counts.sum()), int(np.count_nonzero(counts)))
    return _ranked(state, scope, *_select(state, scope, entries, counts, k)), totals


def totals(state: ShardState, scope: Scope) -> Totals:
    """Plays and songs of a scope."""
    if scope.bounds is None:
        number = _chart_number(state, scope.chart)
        return Totals(*state.boards[scope.board].totals(number)) if number is not None else Totals(0, 0)
    _, counts = _candidates(state, scope)
    return Totals(int(counts.sum()), int(np.count_nonzero(counts)))


def counts_of(state: ShardState, scope: Scope, song_ids: Sequence[str]) -> tuple[Ranked, Totals]:
    """The counts of songs in a scope, in the order asked; 0 where there is none."""
    counts, total = _counts_of(state, scope, song_ids)
    return Ranked(list(song_ids), counts), total


def _counts_of(state: ShardState, scope: Scope, song_ids: Sequence[str]) -> tuple[list[int], Totals]:
    songs = state.songs.find_texts(list(song_ids))
    number = _chart_number(state, scope.chart)
    if number is None:
        return [0] * len(songs), Totals(0, 0)
    if scope.board == CHARTS:
        wanted = np.full(len(songs), -1, np.int32)
        known = songs >= 0
        wanted[known] = state.pairs.find(np.full(int(known.sum()), number, np.int32), songs[known])
    else:
        wanted = songs
    if scope.bounds is None:
        board = state.boards[scope.board]
        return [board.count(entry) if entry >= 0 else 0 for entry in wanted.tolist()], Totals(*board.totals(number))
    entries, counts = _candidates(state, scope)  # entries ascend
    at = np.searchsorted(entries, wanted)
    found = [
        int(counts[place]) if entry >= 0 and place < len(entries) and entries[place] == entry else 0
        for place, entry in zip(at.tolist(), wanted.tolist(), strict=True)
    ]
    return found, Totals(int(counts.sum()), int(np.count_nonzero(counts)))


def standings(
    state: ShardState, scope: Scope, places: Sequence[tuple[str, int]], neighbours: int
) -> tuple[list[PlaceStanding], Totals]:
    """What stands around places (song_id, count) in the order of this shard's entries.

    Args:
        state: the shard's.
        scope: what is counted.
        places: song ids with their counts, each at least 1; the songs may be other shards'.
        neighbours: how many entries before and after each to return.
    """
    entries, counts = _candidates(state, scope)
    result = [_standing(state, scope, entries, counts, place, neighbours=neighbours) for place in places]
    return result, Totals(int(counts.sum()), int(np.count_nonzero(counts)))


def _standing(
    state: ShardState,
    scope: Scope,
    entries: NDArray[np.int32],
    counts: NDArray[np.int64],
    place: tuple[str, int],
    *,
    neighbours: int,
) -> PlaceStanding:
    """What stands around one place. Only entries of the same count are compared by name."""
    song_id, count = place
    name = song_id.encode()
    higher = counts > count
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
        chosen = select(
            songs, strings.starts, strings.arena, entries[rows], counts[rows], neighbours, backwards=backwards
        )
        step = -1 if backwards else 1
        return _ranked(state, scope, chosen[0][::step], chosen[1][::step])

    above = nearest(ties[sides > 0], higher, backwards=True)
    below = nearest(ties[sides < 0], (counts < count) & (counts > 0), backwards=False)
    return PlaceStanding(above_count, above, below)


def charts(state: ShardState) -> list[tuple[str, Totals]]:
    """All charts but the global one, with what they hold over all time, in the order of their first play."""
    board = state.boards[CHARTS]
    held = ((state.charts.text(number), Totals(*board.totals(number))) for number in range(1, len(state.charts)))
    return [(name, total) for name, total in held if total.plays]
