"""What partitioners come to: how even shards are, what moves when one joins or leaves. Computed; nothing is sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from topk_grpc.cli.load import Zipf, song_columns, song_name
from topk_grpc.kernels.hash import hash_strings
from topk_grpc.ring import partitioner_of, plan_owners

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of generated plays."""

    producer_id: bytes
    sequence: int
    songs: Int64s


class Traffic:
    """Generated plays: songs by Zipf's law, in batches of a few producers. The same arguments give the same.

    Args:
        plays, batch_plays: altogether, and in each batch.
        songs, zipf, seed: of the songs that are drawn.
        producers: who send the batches in turn.
    """

    def __init__(  # noqa: PLR0917
        self, plays: int, batch_plays: int, songs: int, zipf: float, producers: int, seed: int
    ) -> None:
        self._drawn = Zipf(songs, zipf, seed).draw(plays)
        self._batch_plays = batch_plays
        self._producers = producers

    def batches(self) -> Iterator[Batch]:
        """All batches, in the order of their sending."""
        for number, start in enumerate(range(0, len(self._drawn), self._batch_plays)):
            producer = f"bench-{number % self._producers}".encode()
            songs = self._drawn[start : start + self._batch_plays]
            yield Batch(producer, number // self._producers + 1, songs)

    @cached_property
    def ranked(self) -> list[tuple[str, int]]:
        """The generator's own tally: all songs with their plays, best first."""
        numbers, counts = np.unique(self._drawn, return_counts=True)
        order = np.lexsort((numbers, -counts))  # names are of one length, so their order is that of the numbers
        names = map(song_name, numbers[order].tolist())
        return list(zip(names, counts[order].tolist(), strict=True))

    def plays_by_slot(self, partitioner: str, slots: int) -> Int64s:
        """How many plays each slot gets."""
        keys_of = partitioner_of(partitioner).slot_keys
        found = np.zeros(slots, np.int64)
        for batch in self.batches():
            data, offsets = song_columns(batch.songs)
            hashes = hash_strings(data, offsets[:-1].copy(), np.diff(offsets).astype(np.int32))
            keys = keys_of(hashes, batch.producer_id, batch.sequence, slots)
            found += np.bincount((keys % np.uint64(slots)).astype(np.int64), minlength=slots)
        return found


@dataclass(frozen=True, slots=True)
class Moved:
    """What moves when the shards change, as shares of all.

    Attributes:
        slots: that get another owner.
        plays: that go along; None: they cannot, and the change is refused.
    """

    slots: float
    plays: float | None


@dataclass(frozen=True, slots=True)
class Placement:
    """What a partitioner comes to.

    Attributes:
        slots_load, plays_load: of the fullest shard, over the mean.
        joins, leaves: what moves from n shards to n + 1, and to n - 1.
    """

    slots_load: float
    plays_load: float
    joins: Moved
    leaves: Moved


def names_of(shards: int) -> list[str]:
    """Shard ids, in the order in which shards join."""
    return [f"shard-{index}" for index in range(shards)]


def _plan(partitioner: str, shards: int, slots: int, current: Sequence[str] | None = None) -> list[str]:
    names = names_of(shards)
    return [names[owner] for owner in plan_owners(partitioner, names, slots, current)]


def place(partitioner: str, traffic: Traffic, shards: int, slots: int) -> Placement:
    """Places traffic on shards, and lets one join and one leave.

    Args:
        partitioner: its name.
        traffic: to be placed.
        shards: at first, at least 2.
        slots: of the cluster.
    """
    plays = traffic.plays_by_slot(partitioner, slots)
    owners = _plan(partitioner, shards, slots)
    whole = partitioner_of(partitioner).whole_songs

    def moved(after: Sequence[str], stay: float | None) -> Moved:
        changed = np.array([one != other for one, other in zip(owners, after, strict=True)])
        return Moved(float(changed.mean()), float(plays[changed].sum() / plays.sum()) if whole else stay)

    def load(weights: Int64s) -> float:
        by_shard = [weights[[owner == name for owner in owners]].sum() for name in names_of(shards)]
        return float(max(by_shard) / np.mean(by_shard))

    return Placement(
        load(np.ones(slots, np.int64)),
        load(plays),
        moved(_plan(partitioner, shards + 1, slots, owners), 0.0),
        moved(_plan(partitioner, shards - 1, slots, owners), None),
    )


GROWTH_SLOTS: Final = 1024


def grow(partitioner: str, shards_max: int, slots: int = GROWTH_SLOTS) -> list[list[str]]:
    """The owners of all slots with 1, 2, … shards, as they join one after another."""
    history = [_plan(partitioner, 1, slots)]
    for shards in range(2, shards_max + 1):
        history.append(_plan(partitioner, shards, slots, history[-1]))
    return history


def moved_share(before: Sequence[str], after: Sequence[str]) -> float:
    """The share of slots that have another owner."""
    return sum(one != other for one, other in zip(before, after, strict=True)) / len(before)
