"""What a producer is told when it is made, checked before anything is recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from topk_grpc.errors import SettingError
from topk_grpc.model import Rejected

BATCH_PLAYS_MAX = 65_536
"""The most plays of a batch that a cluster takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordOptions:
    """How plays are recorded; `TopKClient` explains each."""

    producer_id: str
    first_sequence: int
    first_sent_ms: int | None
    batch_plays: int
    linger_ms: float
    batches_in_flight: int
    expect_duplicates: bool
    on_rejected: Callable[[Rejected], None] | None
    deadline_seconds: float
    clock: Callable[[], float]
    random: Callable[[], float]

    def __post_init__(self) -> None:
        """Refuses what cannot work, before anything is recorded.

        Raises:
            SettingError: an option is out of range.
        """
        try:
            producer_bytes = len(self.producer_id.encode())
        except UnicodeEncodeError as error:
            raise SettingError(f"producer_id {self.producer_id!r} cannot be written as UTF-8") from error
        _check("producer_id's length in bytes", producer_bytes, 1, 128)
        _check("first_sequence", self.first_sequence, 1, 1 << 62)
        if self.first_sent_ms is not None:
            _check("first_sent_ms", self.first_sent_ms, 0, 1 << 62)
        _check("batch_plays", self.batch_plays, 1, BATCH_PLAYS_MAX)
        _check("linger_ms", self.linger_ms, 0, 3_600_000)
        _check("batches_in_flight", self.batches_in_flight, 1, 63)
        _check("deadline_seconds", self.deadline_seconds, 0.001, 86_400)

    def now_ms(self) -> int:
        """The clock, in milliseconds since the epoch."""
        return int(self.clock() * 1000)


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise SettingError(f"{name} is {value}: it has to lie in {low} to {high}")
