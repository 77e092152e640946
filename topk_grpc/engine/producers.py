"""What a shard remembers of producers: their marks, their rejects, and when they were last heard of.

Rejects are kept as long as a resend of their batch can be told from a new one, so that the acknowledgement of a resend
repeats those of the first.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topk_grpc.kernels.marks import MarkTable

MARK_REACH = 64
"""A producer's sequences this far below the highest can still be told apart."""


@dataclass(slots=True)
class Producer:
    """One producer.

    Attributes:
        number: stands for it in the marks, from 1.
        last_seen_ms: the shard's clock when its last batch was admitted.
        permanent: a batch of it had no first_sent_ms: never to be forgotten.
        rejects: by sequence: each play that was rejected here, `index << 8 | reason`. A clock that is wrong, or a unit,
            rejects whole batches: eight bytes a play, then, not two objects.
    """

    number: int
    last_seen_ms: int = 0
    permanent: bool = False
    rejects: dict[int, array[int]] = field(default_factory=dict)

    def rejects_of(self, sequence: int) -> Iterator[tuple[int, int]]:
        """Index and reason of each rejected play of a batch."""
        return ((packed >> 8, packed & 255) for packed in self.rejects.get(sequence, ()))


class Producers:
    """All producers of a shard. One writer."""

    def __init__(self) -> None:
        self.marks = MarkTable()
        self._known: dict[bytes, Producer] = {}
        self._next_number = 1

    def __len__(self) -> int:
        return len(self._known)

    @property
    def memory_bytes(self) -> int:
        """Bytes in use; an estimate for the names."""
        return self.marks.memory_bytes + 250 * len(self._known)

    def get(self, producer_id: bytes) -> Producer | None:
        """The producer of that id, if it is known."""
        return self._known.get(producer_id)

    def get_or_add(self, producer_id: bytes) -> Producer:
        """The producer of that id."""
        producer = self._known.get(producer_id)
        if producer is None:
            producer = self._known[producer_id] = Producer(self._next_number)
            self._next_number += 1
        return producer

    def discard(self, producer_id: bytes) -> None:
        """Takes back the addition of the newest producer, which has no marks yet."""
        self._next_number = self._known.pop(producer_id).number

    def seen(self, producer: Producer, now_ms: int, *, permanent: bool) -> None:
        """Notes that a batch of the producer was admitted."""
        producer.last_seen_ms = max(producer.last_seen_ms, now_ms)
        producer.permanent = producer.permanent or permanent

    def remember_rejects(self, producer: Producer, sequence: int, rejects: list[tuple[int, int]]) -> None:
        """Keeps the rejects of a batch, and drops those of batches that are too old to be resent."""
        if rejects:
            packed = (index << 8 | reason for index, reason in rejects)
            producer.rejects.setdefault(sequence, array("Q")).extend(packed)
            for old in [known for known in producer.rejects if known + MARK_REACH < sequence]:
                del producer.rejects[old]

    def idle_since(self, before_ms: int) -> int:
        """How many would be forgotten by `forget_idle`."""
        return sum(1 for one in self._known.values() if not one.permanent and one.last_seen_ms < before_ms)

    def forget_idle(self, before_ms: int) -> None:
        """Forgets the producers last seen before that time, permanent ones excepted."""
        idle = [name for name, one in self._known.items() if not one.permanent and one.last_seen_ms < before_ms]
        if idle:
            self.marks.forget(np.array([self._known.pop(name).number for name in idle], np.uint64))

    # --- Slots that come and go ---------------------------------------------------------------------------------------

    def with_marks(self, numbers: NDArray[np.uint64]) -> list[tuple[bytes, Producer]]:
        """The producers of these numbers, in their order, with their ids."""
        by_number = {one.number: (name, one) for name, one in self._known.items()}
        return [by_number[number] for number in numbers.tolist()]

    def join(
        self, producer_id: bytes, last_seen_ms: int, rejects: Mapping[int, Iterable[int]], *, permanent: bool
    ) -> Producer:
        """Takes in what another shard knows of a producer; what is known here stays.

        Args:
            producer_id: the client's.
            last_seen_ms, permanent, rejects: as in `Producer`.
        """
        producer = self.get_or_add(producer_id)
        self.seen(producer, last_seen_ms, permanent=permanent)
        for sequence, packed in rejects.items():
            known = producer.rejects.setdefault(sequence, array("Q"))
            known.extend(sorted(set(packed) - set(known)))
        return producer

    def forget_slots(self, wanted: NDArray[np.bool_]) -> None:
        """Forgets the marks of some slots, and the producers that have no others; wanted is bool[slots]."""
        numbers = set(self.marks.forget_slots(wanted).tolist())
        if numbers:
            self._known = {name: one for name, one in self._known.items() if one.number not in numbers}

    # --- Snapshots ----------------------------------------------------------------------------------------------------

    def to_snapshot(self) -> tuple[dict[str, Any], dict[str, NDArray[np.generic]]]:
        """What a snapshot keeps, copied: what JSON holds, and arrays."""
        meta = {
            "next_number": self._next_number,
            "known": [
                [
                    name.hex(),
                    one.number,
                    one.last_seen_ms,
                    one.permanent,
                    [[s, r.tolist()] for s, r in one.rejects.items()],
                ]
                for name, one in self._known.items()
            ],
        }
        return meta, self.marks.to_arrays()

    @classmethod
    def from_snapshot(cls, meta: dict[str, Any], arrays: dict[str, NDArray[np.generic]]) -> Producers:
        """The producers that `to_snapshot` described."""
        producers = cls()
        producers.marks = MarkTable.from_arrays(arrays)
        producers._next_number = meta["next_number"]
        for name, number, last_seen_ms, permanent, rejects in meta["known"]:
            kept = {sequence: array("Q", one) for sequence, one in rejects}
            producers._known[bytes.fromhex(name)] = Producer(number, last_seen_ms, permanent, kept)
        return producers
