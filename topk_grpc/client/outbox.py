"""A producer's unacknowledged batches: what may be sent, what must be sent again, what an acknowledgement means.

Theory of operation. Sequences rise by one, so the outbox is a dict in sequence order plus one cursor:

    acknowledged …  | lowest … unacknowledged … | next_sequence
                        ^ cursor of the present stream

- A batch may be added while `next_sequence < lowest + span`. With span <= 63 no batch 64 or more above the lowest
  unacknowledged one ever exists, so none can be sent: a shard's marks reach back 64, and what is older counts as a
  duplicate there. This holds on resends too, and for acknowledgements that come out of order, since the bound is taken
  from the lowest unacknowledged sequence and not from how many there are.
- A new stream puts the cursor back to the lowest: everything unacknowledged is sent again, in order, before anything
  new.
- A batch counts as sent from the moment it is handed out: a write that fails may still have arrived. It remembers on
  how many streams that happened. An acknowledgement that says `duplicate` is expected once there were two; after one it
  means that somebody else used the same producer id and sequence.

Nothing here does I/O or awaits; delivery.py drives it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from topk_grpc.errors import SettingError, WrongServerError

SPAN_MAX: Final = 63
"""The most sequences that may be under way: one less than the 64 below the highest that a shard's marks remember."""


@dataclass(slots=True)
class OutgoingBatch:
    """A batch on its way.

    Attributes:
        sequence: its number within the producer.
        payload: the bytes of its StreamPlaysRequest, the same on each send.
        plays: how many plays it holds.
        sends: on how many streams it was sent.
    """

    sequence: int
    payload: bytes
    plays: int
    sends: int = 0


class Outbox:
    """The unacknowledged batches of one producer, in order."""

    def __init__(self, first_sequence: int, span: int) -> None:
        """Makes an empty outbox.

        Args:
            first_sequence: the number of the first batch, from 1.
            span: how far `next_sequence` may be above the lowest unacknowledged one, 1 to 63.

        Raises:
            SettingError: either is out of range.
        """
        if not 1 <= span <= SPAN_MAX:
            raise SettingError(
                f"batches_in_flight is {span}: it has to lie in 1 to {SPAN_MAX}, as far as a shard's marks reach"
            )
        if not 1 <= first_sequence < 1 << 63:
            raise SettingError(f"first_sequence is {first_sequence}: sequences count from 1")
        self._span = span
        self._batches: dict[int, OutgoingBatch] = {}
        self._cursor = first_sequence
        self.next_sequence = first_sequence

    def __len__(self) -> int:
        """How many batches are unacknowledged."""
        return len(self._batches)

    @property
    def lowest_unacknowledged(self) -> int:
        """The lowest unacknowledged sequence; `next_sequence` where there is none."""
        return next(iter(self._batches), self.next_sequence)

    @property
    def has_room(self) -> bool:
        """Whether one more batch may be added."""
        return self.next_sequence < self.lowest_unacknowledged + self._span

    def add(self, payload: bytes, plays: int) -> int:
        """Takes the batch that carries `next_sequence`; there must be room.

        Returns:
            Its sequence.
        """
        if not self.has_room:
            raise AssertionError("a batch was added to a full outbox")
        sequence = self.next_sequence
        self._batches[sequence] = OutgoingBatch(sequence, payload, plays)
        self.next_sequence += 1
        return sequence

    def begin_stream(self) -> None:
        """A new stream: everything unacknowledged goes first, in order."""
        self._cursor = self.lowest_unacknowledged

    def next_to_send(self) -> OutgoingBatch | None:
        """Hands out the next batch for the present stream, None where all were; counts the send."""
        while self._cursor < self.next_sequence:
            batch = self._batches.get(self._cursor)
            self._cursor += 1
            if batch is not None:
                batch.sends += 1
                return batch
        return None

    def acknowledge(self, sequence: int) -> OutgoingBatch | None:
        """Takes the acknowledgement of a batch that was sent on the present stream.

        Returns:
            The batch, which is now forgotten; None where it had been acknowledged before.

        Raises:
            WrongServerError: the batch was not sent on this stream: forgetting it might lose it.
        """
        if sequence >= self._cursor:
            raise WrongServerError(
                f"batch {sequence} was acknowledged before it was sent on this stream: a proxy mixes up streams"
            )
        return self._batches.pop(sequence, None)
