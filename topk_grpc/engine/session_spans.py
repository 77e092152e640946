"""Standing sessions: each entry's last session, carried forward as plays arrive.

Theory of operation. For a gap and a position `end` this holds, for every entry, the last session among the plays in
buckets before `end`, open or not: first bucket, last bucket, plays; and a bucket after which nothing was played until
it began. A play that comes in the order of time, or late and with nothing in the gap before it, begins a session or
prolongs it (kernels/sessions.py). A play that may join two sessions, and one that is taken back, are seen to from the
cells, for the entries concerned. A play in bucket `end` or after it waits in its cell until the position has
moved there. The ranking counts the plays of open sessions only: when the position moves, those that nobody has
prolonged fall silent, and they are found among the cells of the buckets that the gap no longer covers.

A session that goes on for longer than the finest buckets are kept is known nevertheless, as long as its gap has been
standing since. Where the cells would have to say what is not in them any more, an entry is marked as uncertain; while
its session is open the window is refused.

What is not known: sessions that ended before `settled`, when this began. Nothing that comes in time can touch them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from topk_grpc.engine.cells import CellStore
from topk_grpc.engine.copies import Copy
from topk_grpc.engine.rankings import Ranking
from topk_grpc.engine.sessions import Past, Sessions, last_sessions, played_within, reaches_back
from topk_grpc.engine.spans import span_sums
from topk_grpc.kernels.sessions import carry_forward

_COLUMNS: Final = 4  # starts, lasts, plays, priors: see kernels/sessions.py

Count = Callable[[NDArray[np.int32], NDArray[np.int64]], None]
"""Adds plays to entries in the span's ranking."""


class SessionSpan:
    """The sessions of one board under one gap. One writer.

    Args:
        ranking: of the plays in open sessions.
        gap: in buckets.
        all_time: tells the plays of all time of entries.

    Attributes:
        end: the position: plays in this bucket or after it wait; None: it stands nowhere.
    """

    def __init__(self, ranking: Ranking, gap: int, all_time: Callable[[NDArray[np.int32]], NDArray[np.int64]]) -> None:
        self.ranking = ranking
        self.gap = gap
        self._all_time = all_time
        self.end: int | None = None
        self._low = 0
        self._settled = 0
        self._columns: NDArray[np.int64] = np.zeros((_COLUMNS, 0), np.int64)
        self._uncertain: set[int] = set()

    @property
    def memory_bytes(self) -> int:
        """Bytes beside the ranking."""
        return self._columns.nbytes

    def _reserve(self, entries: int) -> None:
        known = self._columns.shape[1]
        if entries > known:
            columns = np.zeros((_COLUMNS, max(entries, 2 * known)), np.int64)
            columns[:, :known] = self._columns
            self._columns = columns

    # --- Plays --------------------------------------------------------------------------------------------------------

    def add(  # noqa: PLR0917
        self,
        store: CellStore,
        entries: NDArray[np.int32],
        buckets: NDArray[np.int64],
        counts: NDArray[np.int64],
        known: int,
        past: Past,
        count: Count,
    ) -> None:
        """Takes plays in whose cells the store holds already; or takes back, where their counts are negative.

        Args:
            store: of the board.
            entries, buckets, counts: of each play; the counts are all positive, or all negative.
            known: how many entries the board has.
            past: how far back the finest buckets are kept.
            count: into the ranking.
        """
        if self.end is None or not len(entries):
            return
        self._reserve(known)
        if counts[0] < 0:
            self._take_back(store, entries, buckets, counts, known, past, count)
            return
        rows = len(entries)
        changed, deltas = np.empty(rows, np.int32), np.empty(rows, np.int64)
        unclear, results = np.empty(rows, np.int32), np.empty(2, np.int64)
        starts, lasts, plays, priors = self._columns
        carry_forward(
            starts, lasts, plays, priors, entries, buckets, counts, past.finest, self._settled, self._low, self.end,
            self.gap, changed, deltas, unclear, results, rows,
        )  # fmt: skip
        changes, left = results.tolist()
        if changes:
            count(changed[:changes], deltas[:changes])
        if left:
            self._look_up(store, np.unique(unclear[:left]), known, past, count)

    def _take_back(  # noqa: PLR0917
        self,
        store: CellStore,
        entries: NDArray[np.int32],
        buckets: NDArray[np.int64],
        counts: NDArray[np.int64],
        known: int,
        past: Past,
        count: Count,
    ) -> None:
        """A bucket that keeps some plays stays in its session; where one is emptied the session may fall apart."""
        starts, lasts, plays = (column[entries] for column in self._columns[:3])
        inside = (plays > 0) & (starts <= buckets) & (buckets <= lasts) & (buckets < (self.end or 0))
        old = inside & (buckets < past.finest) & (self._all_time(entries) > 0)
        # Which plays of a coarser bucket are the session's nobody knows.
        self._uncertain |= set(entries[old].tolist())
        some = np.flatnonzero(inside & (buckets >= past.finest))
        if not len(some):
            return
        places, which = np.unique(np.stack((entries[some], buckets[some])), axis=1, return_inverse=True)
        left = span_sums(store, places[0].astype(np.int32), places[1], places[1] + 1)
        emptied = left[which.reshape(-1)] == 0
        unclear = np.unique(entries[some[emptied]])
        kept = some[~emptied & ~np.isin(entries[some], unclear)]
        if len(kept):
            np.add.at(self._columns[2], entries[kept], counts[kept])
            is_open = lasts[kept] >= self._low
            count(entries[kept[is_open]], counts[kept[is_open]])
        if len(unclear):
            self._look_up(store, unclear, known, past, count)

    def _look_up(self, store: CellStore, entries: NDArray[np.int32], known: int, past: Past, count: Count) -> None:
        """Finds the sessions of some entries, each once and ascending, from the cells."""
        wanted = np.zeros(known, np.bool_)
        wanted[entries] = True
        found, certain = last_sessions(store, wanted, self.gap, self.end or 0, past)
        starts, lasts, plays, priors = self._columns
        before = self._open_plays(entries)
        # One that began before the finest buckets, and has nothing in them any more, ended where nobody can see.
        old = (plays[entries] > 0) & (starts[entries] < past.finest) & (self._all_time(entries) > 0)
        lost = np.setdiff1d(entries[old], found.entries)
        plays[np.setdiff1d(entries, lost)] = 0
        starts[found.entries], lasts[found.entries], plays[found.entries] = found.starts, found.lasts, found.counts
        priors[found.entries] = found.starts - self.gap - 1
        self._uncertain -= set(entries.tolist())
        self._uncertain |= {*found.entries[~certain].tolist(), *lost.tolist()}
        deltas = self._open_plays(entries) - before
        if deltas.any():
            count(entries[deltas != 0], deltas[deltas != 0])

    def _open_plays(self, entries: NDArray[np.int32]) -> NDArray[np.int64]:
        _, lasts, plays, _ = self._columns
        return np.where(lasts[entries] >= self._low, plays[entries], 0)

    # --- Position -----------------------------------------------------------------------------------------------------

    def fold(self) -> None:
        """Stands nowhere; the ranking is emptied by its owner."""
        self.end = None
        self._columns = np.zeros((_COLUMNS, 0), np.int64)
        self._uncertain = set()

    def move(self, store: CellStore, end: int, known: int, past: Past, count: Count) -> None:
        """Moves the position on, to a later bucket; or begins there, with an empty ranking.

        It begins only where all that it needs is kept as fine as it needs it.
        """
        if self.end is None and reaches_back(store, end - 1 - self.gap, end, past):
            return
        self._reserve(known)
        if self.end is None:
            self._begin(store, end, known, past, count)
            return
        if end <= self.end:
            return
        # First the plays that have waited, while what was open still counts as such.
        waiting = list(store.within(self.end, end))
        self.end = end
        if waiting:
            entries = np.concatenate([piece.entries for piece in waiting])
            buckets = np.concatenate([piece.buckets for piece in waiting])
            counts = np.concatenate([piece.counts for piece in waiting])
            order = np.argsort(buckets, kind="stable")
            entries, buckets, counts = entries[order], buckets[order], counts[order]
            taken_back = counts < 0
            for rows in (~taken_back, taken_back):
                self.add(store, entries[rows], buckets[rows], counts[rows], known, past, count)
        # Then those that nobody has prolonged fall silent.
        low, self._low = self._low, end - 1 - self.gap
        _, lasts, plays, _ = (column[:known] for column in self._columns)
        silent = played_within(store, known, low, self._low) & (lasts >= low) & (lasts < self._low) & (plays > 0)
        entries = np.flatnonzero(silent).astype(np.int32)
        if len(entries):
            count(entries, -plays[entries])

    def _begin(self, store: CellStore, end: int, known: int, past: Past, count: Count) -> None:
        self.end, self._low = end, end - 1 - self.gap
        self._settled = max(end - 1 - 2 * self.gap, past.finest)
        played = played_within(store, known, self._settled, end)
        sessions, certain = last_sessions(store, played, self.gap, end, past)
        values_of = (sessions.starts, sessions.lasts, sessions.counts, sessions.starts - self.gap - 1)
        for column, values in zip(self._columns, values_of, strict=True):
            column[sessions.entries] = values
        self._uncertain = set(sessions.entries[~certain].tolist())
        is_open = sessions.lasts >= self._low
        count(sessions.entries[is_open], sessions.counts[is_open])

    # --- Slots that come and go ---------------------------------------------------------------------------------------

    def of_entries(self, entries: NDArray[np.int32]) -> tuple[NDArray[np.intp], NDArray[np.int64], NDArray[np.intp]]:
        """What is known of some entries, for another shard.

        Args:
            entries: ascending.

        Returns:
            Which of them have a session, as places among them; their columns; which are uncertain.
        """
        known = entries[entries < self._columns.shape[1]]
        held = np.flatnonzero(self._columns[2][known] > 0)
        uncertain = np.flatnonzero(np.isin(entries, np.fromiter(self._uncertain, np.int32)))
        return held, self._columns[:, known[held]], uncertain

    def join(  # noqa: PLR0917
        self,
        settled: int,
        entries: NDArray[np.int32],
        columns: NDArray[np.int64],
        uncertain: NDArray[np.int32],
        known: int,
        count: Count,
    ) -> None:
        """Takes in sessions that stand at the same position: of entries that have none.

        Args:
            settled: from when on they are known.
            entries, columns: as `of_entries` gives them.
            uncertain: entries.
            known: how many entries the board has.
            count: into the ranking.
        """
        self._reserve(known)
        self._settled = max(self._settled, settled)
        self._columns[:, entries] = columns
        self._uncertain |= set(uncertain.tolist())
        plays = self._open_plays(entries)
        count(entries[plays > 0], plays[plays > 0])

    def forget(self, entries: NDArray[np.int32]) -> None:
        """Knows nothing of these entries, which have no plays any more; the ranking is left to its owner."""
        self._columns[:, entries[entries < self._columns.shape[1]]] = 0
        self._uncertain -= set(entries.tolist())

    @property
    def settled(self) -> int:
        """Sessions that ended before this bucket are not known."""
        return self._settled

    # --- Reading ------------------------------------------------------------------------------------------------------

    def is_certain(self, eligible: NDArray[np.bool_] | None) -> bool:
        """Whether all open sessions (of the entries asked for) are known from their beginning."""
        if not self._uncertain:
            return True
        entries = np.fromiter(self._uncertain, np.int32)
        still = entries[self._open_plays(entries) > 0]
        return not (len(still) if eligible is None else eligible[still].any())

    def sessions(self, entries: NDArray[np.int32]) -> Sessions:
        """The sessions of entries, which are open."""
        starts, lasts, plays, _ = self._columns
        return Sessions(entries, plays[entries], starts[entries], lasts[entries])

    # --- Snapshots ----------------------------------------------------------------------------------------------------

    def to_snapshot(self, known: int, copy: Copy = np.copy) -> tuple[dict[str, Any], NDArray[np.int64]]:
        """What JSON holds, and the columns of so many entries, copied: not the room beside them, while writes wait."""
        meta = {
            "end": self.end, "low": self._low, "settled": self._settled, "uncertain": sorted(self._uncertain)
        }  # fmt: skip
        return meta, copy(self._columns[:, :known])

    def restore(self, meta: Mapping[str, Any], columns: NDArray[np.int64], count: Count) -> None:
        """Begins with what `to_snapshot` described; the ranking is empty."""
        self.end, self._low, self._settled = meta["end"], meta["low"], meta["settled"]
        self._uncertain = set(meta["uncertain"])
        self._columns = np.array(columns, np.int64)
        if self.end is not None:
            entries = np.flatnonzero((columns[2] > 0) & (columns[1] >= self._low)).astype(np.int32)
            count(entries, self._columns[2][entries])
