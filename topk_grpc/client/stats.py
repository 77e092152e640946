"""What a client has done so far."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class ClientStats:
    """Counts since the client was made.

    Attributes:
        plays_sent: plays in batches that were handed to the stream, resends not counted again.
        plays_accepted: plays that the cluster acknowledged as counted, by this send or an earlier one.
        plays_rejected: plays that the cluster refused, one by one.
        batches_acknowledged: batches that are durable.
        batches_duplicate: those among them of which an earlier send had been counted.
        batches_resent: sends of a batch beyond its first.
        reconnects: streams opened beyond the first.
    """

    plays_sent: int = 0
    plays_accepted: int = 0
    plays_rejected: int = 0
    batches_acknowledged: int = 0
    batches_duplicate: int = 0
    batches_resent: int = 0
    reconnects: int = 0
