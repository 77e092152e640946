"""The partitioners: what of a play is hashed to a slot, which shard owns a slot, and what follows for merging answers.

A cluster has one of them from its beginning. Marks, log and migrations see slots only, and ask here for nothing but the
slot of a play. What is merged depends on one question: are all plays of a song in one slot?

- They are, where the song is hashed. A shard then knows a song's whole count, so the k best of all shards' k best are
  the cluster's, and a slot moves with its songs.
- They are not, where batches go round. Each shard has a part of every song's count, and the k best have to be found by
  thresholds (gateway/threshold.py). Counts stay where they were counted when a slot moves; its marks go along.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from topk_grpc.errors import SettingError, UnsupportedError
from topk_grpc.kernels.hash import xxh64
from topk_grpc.ring.bounded_load import plan_bounded_load

Hashes = NDArray[np.uint64]
SlotKeys = Callable[[Hashes, bytes, int, int], Hashes]
Plan = Callable[[Sequence[str], int, Sequence[str | None] | None], list[str]]


@dataclass(frozen=True, slots=True)
class Partitioner:
    """One way to place plays.

    Attributes:
        name: as the topology has it.
        whole_songs: whether all plays of a song are in one slot, and so on one shard.
        slot_keys: of the plays of a batch, from the hashes of their songs, its producer_id and sequence, and how many
            slots there are: uint64[n], whose remainder by the slots is each play's slot.
        plan: the owner of each slot, from shard ids, the number of slots and the present owners.
    """

    name: str
    whole_songs: bool
    slot_keys: SlotKeys
    plan: Plan

    def require_whole_songs(self, what: str) -> None:
        """Refuses what is exact only where a shard knows a song's whole count.

        Args:
            what: is asked for; the subject of the message.

        Raises:
            UnsupportedError: a song's plays are spread over the shards.
        """
        if not self.whole_songs:
            raise UnsupportedError(
                f"{what} is not possible with the partitioner {self.name!r}, which spreads a song's plays over the"
                " shards: for that load the plays into a cluster made with --partitioner ring; this one answers top-Ks"
                " of global, tumbling, sliding and range windows"
            )


def _keys_by_song(hashes: Hashes, producer_id: bytes, sequence: int, slots: int) -> Hashes:
    """A song's slot is its XXH64 modulo the slots."""
    del producer_id, sequence, slots
    return hashes


def _keys_by_batch(hashes: Hashes, producer_id: bytes, sequence: int, slots: int) -> Hashes:
    """The batches of a producer go round the slots, one after the other; where they begin is the producer's XXH64."""
    return np.full(len(hashes), (int(xxh64(producer_id)) + sequence) % slots, np.uint64)


def _plan_modulo(shard_ids: Sequence[str], slots: int, current: Sequence[str | None] | None) -> list[str]:
    """Slot modulo shards: what everybody writes first, for comparison. A shard that joins moves almost every slot."""
    del current
    names = sorted(shard_ids)
    return [names[slot % len(names)] for slot in range(slots)]


PARTITIONERS: Final[Mapping[str, Partitioner]] = MappingProxyType({
    one.name: one
    for one in (
        Partitioner("ring", True, _keys_by_song, plan_bounded_load),
        Partitioner("modulo", True, _keys_by_song, _plan_modulo),
        Partitioner("round_robin", False, _keys_by_batch, plan_bounded_load),
    )
})  # fmt: skip
"""All of them by name. `ring` is for production; the others are what it is compared with."""


def partitioner_of(name: str) -> Partitioner:
    """The partitioner of that name.

    Raises:
        SettingError: there is none.
    """
    found = PARTITIONERS.get(name)
    if found is None:
        raise SettingError(f"the partitioner is {name!r}: it has to be one of {', '.join(PARTITIONERS)}")
    return found
