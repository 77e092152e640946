"""The k best of songs whose plays are spread over the shards, exactly: the three-phase uniform threshold (TPUT).

Pei Cao, Zhe Wang: Efficient Top-K Query Calculation in Distributed Networks, PODC 2004. Here m shards have each a part
of every song's count, and the order is the cluster's: by count, then by name.

1. Each shard tells its k best. Added up song by song these are least counts. The k-th of them, tau, is one that the
   k-th best song of the cluster reaches at least.
2. Each shard tells all songs with at least ceil(tau / m) plays there. A song that no shard tells of has less than that
   on each, so less than tau altogether: it is out. For each of the others a least count is known, and a largest one:
   what a shard has not told is below its threshold. Who cannot reach the k-th of the least counts is out.
3. Each shard tells the counts of those that are left.

Where this departs from the paper: plays go on arriving, so the shards tell of another state in each phase, and a song
that was out may be in again. Nothing is concluded from two states, therefore. In phase 2 the shards also tell the
counts of the k best so far, without which the k-th could only be put lower than tau. What they tell in phase 3 is all
of phase 2 once more, with the counts of the songs that are left, from one state of each shard (`QueryAtLeast`). `merge`
decides by that alone whether the k best are certain: it knows of each shard some counts, and a bound on all others. If
they are not, since a song that nobody had asked for has come up meanwhile, the same is asked with that song added. So
an answer is exact for one position of each shard's log, all of them after the query began, whatever was counted
meanwhile, and were it taken back. The thresholds are a matter of cost only.

Every round adds a song or lowers the threshold; after `ROUNDS_MAX`, or where too many songs would have to be named, all
that the shards have is asked for, which is certain at once. The gateway bounds that (`--threshold-entries-max`).
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

ROUNDS_MAX: Final = 8
"""Rounds after the shards' own k best; then everything is asked for."""

NAMED_BYTES_MAX: Final = 2 << 20
"""The most bytes of song ids in one question: they have to fit a message."""

Place = tuple[str, int]
"""A song with its count."""


@dataclass(frozen=True, slots=True)
class Told:
    """What one shard has told, from one state.

    Attributes:
        counts: of songs, 0 where it has none.
        bound: no other song has more plays there.
    """

    counts: Mapping[str, int]
    bound: int


@dataclass(frozen=True, slots=True)
class Merged:
    """What all shards' words come to.

    Attributes:
        places: the k best by what is known, best first.
        reach: songs of which not everything is known and that may be among the k best.
        unseen: whether a song that no shard has told of may be among them.
    """

    places: Sequence[Place]
    reach: Sequence[str]
    unseen: bool

    @property
    def certain(self) -> bool:
        """Whether the places are the k best of the shards' states, with their whole counts."""
        return not (self.reach or self.unseen)


@dataclass(frozen=True, slots=True)
class Question:
    """What every shard is asked.

    Attributes:
        count_min: tell of all songs with so many plays.
        named: and of these, however many they have; ascending.
    """

    count_min: int
    named: tuple[str, ...] = ()


def told_best(song_ids: Sequence[str], counts: Sequence[int], k: int, *, alone: bool) -> Told:
    """What a shard has told with its k best; a shard that is alone has no better ones."""
    full = len(song_ids) == k and not alone
    return Told(dict(zip(song_ids, counts, strict=True)), counts[-1] if full else 0)


def merge(told: Sequence[Told], k: int) -> Merged:
    """The k best by what the shards have told.

    Args:
        told: of each shard.
        k: above 0.
    """
    bounds = sum(one.bound for one in told)
    least: dict[str, int] = {}
    missing: dict[str, int] = {}  # how many plays more than the least it may have
    for one in told:
        for song_id, count in one.counts.items():
            least[song_id] = least.get(song_id, 0) + count
            missing[song_id] = missing.get(song_id, bounds) - one.bound
    best = heapq.nsmallest(k, ((-count, song_id) for song_id, count in least.items() if count))
    # A song is out if, with all it may have, it still stands behind the k-th.
    last = best[-1] if len(best) == k else (0, "")
    reach = [song_id for song_id, more in missing.items() if more and (-least[song_id] - more, song_id) <= last]
    unseen = bounds > 0 and bounds >= -last[0]
    return Merged([(song_id, -count) for count, song_id in best], reach, unseen)


class Search:
    """One query, without its messages: ask every shard `question`, and `take` what they tell, until that gives places.

    Args:
        k: above 0.

    Attributes:
        question: to be asked next; None: the k best of each shard.
    """

    def __init__(self, k: int) -> None:
        self._k = k
        self._rounds = 0
        self.question: Question | None = None

    def take(self, told: Sequence[Told]) -> Sequence[Place] | None:
        """The k best, best first, if they are certain; None: there is another question.

        Args:
            told: by each shard that was asked, from one state of it.
        """
        merged = merge(told, self._k)
        if merged.certain:
            return merged.places
        self._rounds += 1
        self.question = self._next(merged, len(told))
        return None

    def _next(self, merged: Merged, shards: int) -> Question:
        if self.question is None or merged.unseen:
            tau = merged.places[-1][1] if len(merged.places) == self._k else 0
            count_min, named = max(1, -(-tau // shards)), {song_id for song_id, _ in merged.places}
        else:
            count_min, named = self.question.count_min, {*self.question.named, *merged.reach}
        if self._rounds > ROUNDS_MAX or sum(len(song_id.encode()) for song_id in named) > NAMED_BYTES_MAX:
            return Question(1)
        return Question(count_min, tuple(sorted(named)))
