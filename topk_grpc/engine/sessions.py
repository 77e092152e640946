"""Open sessions, found by looking back from an instant.

Plays of an entry whose buckets lie at most the gap apart form a session. Only entries with plays in the last gap can
have one that is open, so these are found first; then their cells are gathered farther and farther back until each
session's beginning is certain: nothing lies in the gap before it. A bucket whose plays were all taken back is no part
of any session.

Sessions need the finest buckets. One that reaches back to where they are rolled up already has no known beginning.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from topk_grpc.engine.cells import Cells, CellStore
from topk_grpc.engine.tiers import RollUp
from topk_grpc.kernels.sorting import sum_by_key


class RolledUpError(Exception):
    """Some session reaches back to where the finest buckets are not kept any more."""


@dataclass(frozen=True, slots=True)
class Sessions:
    """One session each of some entries, by entry.

    Attributes:
        entries: ascending, int32[n].
        counts: plays in the session, int64[n].
        starts, lasts: its first and its last bucket, int64[n].
    """

    entries: NDArray[np.int32]
    counts: NDArray[np.int64]
    starts: NDArray[np.int64]
    lasts: NDArray[np.int64]

    def take(self, rows: NDArray[np.bool_]) -> Sessions:
        """Some of them."""
        return Sessions(self.entries[rows], self.counts[rows], self.starts[rows], self.lasts[rows])


@dataclass(frozen=True, slots=True)
class Past:
    """How far back the finest buckets are kept.

    Attributes:
        finest: the first bucket that is.
        lost: plays before this bucket are not kept at all; None: there have never been any.
        roll_up: where plays before the finest are kept.
    """

    finest: int
    lost: int | None
    roll_up: RollUp

    @classmethod
    def of(cls, roll_up: RollUp, oldest: int | None) -> Past:
        """How far back, where the oldest play lies in that bucket; None: there is none."""
        lost = oldest is not None and oldest < roll_up.first_kept
        return cls(roll_up.borders[0], roll_up.first_kept if lost else None, roll_up)

    def kept_under(self, buckets: NDArray[np.int64]) -> NDArray[np.int64]:
        """The least bucket that plays of these buckets may be kept under."""
        return np.minimum(self.roll_up.of(buckets), buckets)


def open_sessions(  # noqa: PLR0917
    store: CellStore, entries: int, eligible: NDArray[np.bool_] | None, gap: int, end: int, past: Past
) -> Sessions:
    """The sessions that are open in the bucket before `end`.

    Args:
        store: the cells.
        entries: how many entries the board has.
        eligible: the entries asked for, bool[entries]; None: all.
        gap: the largest distance of neighbouring plays' buckets.
        end: plays in this bucket and after it are not looked at.
        past: how far back the finest buckets are kept.

    Raises:
        RolledUpError: one of them may reach back to where they are not.
    """
    low = end - 1 - gap
    if reaches_back(store, low, end, past, eligible):
        raise RolledUpError
    wanted = played_within(store, entries, max(low, past.finest), end)
    if eligible is not None:
        wanted &= eligible
    sessions, certain = last_sessions(store, wanted, gap, end, past)
    is_open = sessions.lasts >= low
    if not certain[is_open].all():
        raise RolledUpError
    return sessions.take(is_open)


def played_within(store: CellStore, entries: int, start: int, end: int) -> NDArray[np.bool_]:
    """Which entries have cells in the buckets [start, end), bool[entries]."""
    played = np.zeros(entries, np.bool_)
    for cells in store.within(start, end):
        played[cells.entries] = True
    return played


def last_sessions(
    store: CellStore, wanted: NDArray[np.bool_], gap: int, end: int, past: Past
) -> tuple[Sessions, NDArray[np.bool_]]:
    """The last session before a bucket of each entry wanted that has one in the finest buckets.

    Args:
        store: the cells.
        wanted: bool[entries]; changed.
        gap, end, past: as in `open_sessions`.

    Returns:
        The sessions, and for each whether its beginning is certain: it may reach back behind the finest buckets.
    """
    found: list[tuple[Sessions, NDArray[np.bool_]]] = []
    reach, step, bottom = end, max(gap, 1), max(past.finest, store.first - gap)
    while wanted.any():
        reach, step = max(bottom, reach - 2 * step), 4 * step
        last = _last_sessions(store, wanted, gap, reach, end)
        certain = last.starts - gap >= reach
        if reach == bottom:
            if not certain.all():
                certain |= _surely_none_before(store, last, gap, past)
            found.append((last, certain))
            break
        found.append((last.take(certain), certain[certain]))
        # Of those that have no session so far the last one may lie farther back.
        wanted[last.entries[certain]] = False
    if not found:
        return Sessions(np.empty(0, np.int32), *(np.empty(0, np.int64) for _ in range(3))), np.empty(0, np.bool_)
    columns = zip(*((one.entries, one.counts, one.starts, one.lasts) for one, _ in found), strict=True)
    whole = Sessions(*(np.concatenate(column) for column in columns))
    order = np.argsort(whole.entries)
    sessions = Sessions(whole.entries[order], whole.counts[order], whole.starts[order], whole.lasts[order])
    return sessions, np.concatenate([certain for _, certain in found])[order]


def reaches_back(store: CellStore, start: int, end: int, past: Past, eligible: NDArray[np.bool_] | None = None) -> bool:
    """Whether there may be plays in [start, end) that are not kept in the finest buckets."""
    if start >= past.finest:
        return False
    if past.lost is not None and start < past.lost:
        return True
    first, stop = int(past.kept_under(np.array([start]))[0]), min(end, past.finest)
    return any(eligible is None or eligible[cells.entries].any() for cells in store.within(first, stop))


def _surely_none_before(store: CellStore, sessions: Sessions, gap: int, past: Past) -> NDArray[np.bool_]:
    """For each session whether no plays before the finest buckets can belong to it."""
    if not len(sessions.entries):
        return np.empty(0, np.bool_)
    lows = sessions.starts - gap
    certain = np.ones(len(lows), np.bool_) if past.lost is None else lows >= past.lost
    lows = past.kept_under(lows)
    for cells in store.within(int(lows.min()), past.finest):
        at = np.minimum(np.searchsorted(sessions.entries, cells.entries), len(lows) - 1)
        touched = (sessions.entries[at] == cells.entries) & (cells.buckets >= lows[at])
        certain[at[touched]] = False
    return certain


def _last_sessions(store: CellStore, wanted: NDArray[np.bool_], gap: int, reach: int, end: int) -> Sessions:
    """The last session of each entry wanted within the buckets [reach, end)."""
    pieces = []
    for cells in store.within(reach, end):
        rows = wanted[cells.entries]
        if rows.any():
            pieces.append(cells.take(rows, cells.first, cells.last))
    entries, buckets, counts = _by_entry(pieces, reach, end)
    if not len(entries):
        return Sessions(np.empty(0, np.int32), *(np.empty(0, np.int64) for _ in range(3)))
    other = entries[1:] != entries[:-1]
    heads = np.flatnonzero(np.concatenate(([True], other | (buckets[1:] - buckets[:-1] > gap))))
    tails = np.concatenate((heads[1:], [len(entries)])) - 1
    plays = np.add.reduceat(counts, heads)
    is_last = np.concatenate((entries[heads[1:]] != entries[heads[:-1]], [True]))
    return Sessions(entries[heads], plays, buckets[heads], buckets[tails]).take(is_last)


def _by_entry(
    pieces: list[Cells], first: int, end: int
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """The cells by entry, then bucket, equal ones added up, those that cancel out left out."""
    if not pieces:
        return np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.int64)
    entries = np.concatenate([piece.entries for piece in pieces])
    buckets = np.concatenate([piece.buckets for piece in pieces])
    counts = np.concatenate([piece.counts for piece in pieces])
    bucket_bits = (end - first).bit_length()
    bits = int(entries.max()).bit_length() + bucket_bits
    if bits > 63:  # a gap of many thousands of years
        order = np.lexsort((buckets, entries))
        entries, buckets, counts = entries[order], buckets[order], counts[order]
        fresh = (entries[1:] != entries[:-1]) | (buckets[1:] != buckets[:-1])
        heads = np.flatnonzero(np.concatenate(([True], fresh)))
        entries, buckets, counts = entries[heads], buckets[heads], np.add.reduceat(counts, heads)
    else:
        keys = (entries.astype(np.uint64) << np.uint64(bucket_bits)) | (buckets - first).astype(np.uint64)
        keys, counts = sum_by_key(keys, counts, bits, np.empty_like(keys), np.empty_like(counts))
        entries = (keys >> np.uint64(bucket_bits)).astype(np.int32)
        buckets = (keys & np.uint64((1 << bucket_bits) - 1)).astype(np.int64) + first
    kept = counts != 0
    return entries[kept], buckets[kept], counts[kept]
