"""Is an answer true? Each check returns what is wrong with it, a sentence each; nothing is wrong with most.

While plays are on their way the truth is a range (ledger.py), and an answer is wrong when no state within the range
gives it: a count outside it, a list out of order, a song missing that surely belongs there, a total that does not fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from tests.faults.ledger import IDS, NAMES, Counts, Range, comes_before
from tests.oracle import slot_of
from topk_grpc.changes import Change, ChangeKind, WatchUpdate
from topk_grpc.model import Answer, Certificate, Entry, SongsAnswer


class Owners:
    """Which songs are whose."""

    def __init__(self, owners: Sequence[int], shards: Sequence[str]) -> None:
        self._of = np.array([owners[slot_of(name, len(owners))] for name in NAMES])
        self._shards = list(shards)

    def without(self, missing: Sequence[str]) -> NDArray[np.bool_]:
        """For each song whether its shard is not among these."""
        return ~np.isin(self._of, [self._shards.index(shard) for shard in missing])


def of_some(truth: Range, songs: NDArray[np.bool_] | None) -> Range:
    """What remains of a range when only some songs are answered for; None: nobody knows which."""
    if songs is None:
        return Range(np.zeros_like(truth.low), truth.high)
    return Range(np.where(songs, truth.low, 0), np.where(songs, truth.high, 0))


def order_of(entries: Sequence[Entry], first_rank: int = 1) -> Iterator[str]:
    """Count descending, then song_id ascending by its bytes; each song once; ranks without gaps."""
    if [entry.rank for entry in entries] != list(range(first_rank, first_rank + len(entries))):
        yield f"the ranks are {[entry.rank for entry in entries][:20]}"
    places = [(-entry.count, entry.song_id.encode()) for entry in entries]
    if places != sorted(set(places)) or len({entry.song_id for entry in entries}) != len(entries):
        yield f"the entries are out of order, or not distinct: {[(e.song_id, e.count) for e in entries][:20]}"
    if unknown := [entry.song_id for entry in entries if entry.song_id not in IDS or entry.count <= 0]:
        yield f"these were never played, or have no plays: {unknown[:5]}"


def certificate(said: Certificate, truth: Range) -> Iterator[str]:
    """Totals within what they can be."""
    low, high = int(truth.low.sum()), int(truth.high.sum())
    if not low <= said.total_plays <= high:
        yield f"total_plays is {said.total_plays}, and has to lie in {low} to {high}"
    surely, possibly = int((truth.low > 0).sum()), int((truth.high > 0).sum())
    if said.distinct_songs is None or not surely <= said.distinct_songs <= possibly:
        yield f"distinct_songs is {said.distinct_songs}, and has to lie in {surely} to {possibly}"


def top_k(answer: Answer, k: int, truth: Range) -> Iterator[str]:
    """The k best of a window."""
    yield from order_of(answer.entries)
    yield from certificate(answer.certificate, truth)
    listed = np.zeros(len(NAMES), bool)
    for entry in answer.entries:
        if (song := IDS.get(entry.song_id)) is None:
            return
        listed[song] = True
        if not truth.low[song] <= entry.count <= truth.high[song]:
            yield f"{entry.song_id} has {entry.count}, and must have {truth.low[song]} to {truth.high[song]}"
    if len(answer.entries) != min(k, answer.certificate.distinct_songs or 0):
        yield f"{len(answer.entries)} entries of {answer.certificate.distinct_songs} songs for k {k}"
    if sum(entry.count for entry in answer.entries) + answer.certificate.other_plays != answer.certificate.total_plays:
        yield "the entries and other_plays do not add up to total_plays"
    if len(answer.entries) < k:
        absent = (truth.low > 0) & ~listed
    else:
        last = answer.entries[-1]
        absent = comes_before(truth.low, last.count, IDS[last.song_id]) & ~listed
    if absent.any():
        song = int(np.flatnonzero(absent)[0])
        yield f"{NAMES[song]} is missing, with at least {truth.low[song]} plays"


def songs(answer: SongsAnswer, asked: Sequence[str], truth: Range) -> Iterator[str]:
    """Count and rank of each song asked for."""
    if [song.song_id for song in answer.songs] != list(asked):
        yield f"asked for {list(asked)}, told of {[song.song_id for song in answer.songs]}"
        return
    yield from certificate(answer.certificate, truth)
    for song in answer.songs:
        number = IDS[song.song_id]
        if not truth.low[number] <= song.count <= truth.high[number]:
            yield f"{song.song_id} has {song.count}, and must have {truth.low[number]} to {truth.high[number]}"
        if (song.rank is None) != (song.count == 0):
            yield f"{song.song_id} has {song.count} plays and the rank {song.rank}"
        if song.rank is None:
            continue
        others = np.arange(len(NAMES)) != number
        least = 1 + int((comes_before(truth.low, song.count, number) & others).sum())
        most = 1 + int((comes_before(truth.high, song.count, number) & others).sum())
        if not least <= song.rank <= most:
            yield f"{song.song_id} has rank {song.rank}, and must have {least} to {most}"
        yield from order_of([*song.above], song.rank - len(song.above))
        yield from order_of([*song.below], song.rank + 1)


def watched(update: WatchUpdate, before: Sequence[Entry], sent: Counts) -> Iterator[str]:
    """A list that came by a watch. How old it is nobody knows, so it is bounded by what had been sent alone."""
    answer = update.answer
    yield from order_of(answer.entries)
    if _rebuilt(before, update.changes) != {entry.song_id: (entry.rank, entry.count) for entry in answer.entries}:
        yield "the changes do not make of the last list the present one"
    if answer.certificate.total_plays > int(sent.sum()):
        yield f"total_plays is {answer.certificate.total_plays}: more than was sent"
    for entry in answer.entries:
        if entry.count > sent[IDS[entry.song_id]]:
            yield f"{entry.song_id} has {entry.count}: more than was sent"


def _rebuilt(before: Sequence[Entry], changes: Sequence[Change]) -> dict[str, tuple[int, int]]:
    """A watched list after changes, the plain way: rank and count of each song."""
    places = {entry.song_id: (entry.rank, entry.count) for entry in before}
    for change in changes:
        if change.kind is ChangeKind.LEFT:
            del places[change.entry.song_id]
        else:
            places[change.entry.song_id] = change.entry.rank, change.entry.count
    return places
