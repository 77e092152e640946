"""The naive truth: a list of plays and a few lines for each question. Slow, and short enough to be seen to be right.

`Tally` answers queries. `ShardModel` decides about parts of batches as a shard has to, play by play, with plain sets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import xxhash

from topk_grpc.model import Bounds, Play

COUNT_MAX = 1 << 55

Ranked = list[tuple[str, int]]


def slot_of(song_id: str, slots: int) -> int:
    return xxhash.xxh64(song_id.encode()).intdigest() % slots


def tumbling(size_ms: int, offset_ms: int, at_ms: int) -> Bounds:
    """The pane that holds the instant, found by walking the grid."""
    start = offset_ms + (at_ms - offset_ms) // size_ms * size_ms
    assert start <= at_ms < start + size_ms
    assert (start - offset_ms) % size_ms == 0
    return Bounds(start, start + size_ms)


@dataclass
class Tally:
    """All plays that count."""

    plays: list[Play] = field(default_factory=list)

    def counts(self, chart: str = "", bounds: Bounds | None = None) -> dict[str, int]:
        counts: dict[str, int] = {}
        for play in self.plays:
            inside = bounds is None or bounds.start_ms <= play.played_at_ms < bounds.end_ms
            if inside and (not chart or chart in play.charts):
                counts[play.song_id] = counts.get(play.song_id, 0) + play.count
        return counts

    def ranked(self, chart: str = "", bounds: Bounds | None = None) -> Ranked:
        """By count, then by the bytes of the song's id."""
        return sorted(self.counts(chart, bounds).items(), key=lambda place: (-place[1], place[0].encode()))

    def charts(self) -> dict[str, tuple[int, int]]:
        """Plays and songs of each chart."""
        names = {chart for play in self.plays for chart in play.charts}
        return {name: (sum(self.counts(name).values()), len(self.counts(name))) for name in names}

    def newest_ms(self) -> int:
        return max((play.played_at_ms for play in self.plays), default=0)


def combined(plays: Iterable[tuple[int, Play]], resolution_ms: int) -> list[tuple[int, Play]]:
    """What a gateway makes of indexed plays: equal ones become one, with the first's index and the newest time."""
    groups: dict[tuple[str, int, tuple[str, ...]], int] = {}
    done: list[tuple[int, Play]] = []
    for index, play in plays:
        key = (play.song_id, play.played_at_ms // resolution_ms, play.charts)
        at = groups.get(key)
        if at is None or done[at][1].count + play.count > COUNT_MAX:
            groups[key] = len(done)
            done.append((index, play))
        else:
            first, sum_so_far = done[at]
            newest = max(sum_so_far.played_at_ms, play.played_at_ms)
            done[at] = (first, Play(play.song_id, newest, sum_so_far.count + play.count, play.charts))
    return done


# --- Admission --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelPart:
    """A part of a batch as a shard gets it."""

    producer_id: str
    sequence: int
    first_sent_ms: int
    plays: tuple[tuple[int, Play], ...]


@dataclass
class ModelOutcome:
    duplicate: bool = False
    not_owner_slots: set[int] = field(default_factory=set)
    rejects: dict[int, str] = field(default_factory=dict)
    expired: bool = False


@dataclass
class ModelProducer:
    seen: dict[int, set[int]] = field(default_factory=dict)  # the sequences that each slot has seen
    rejects: dict[int, dict[int, str]] = field(default_factory=dict)
    last_seen_ms: int = 0
    permanent: bool = False


@dataclass
class ShardModel:
    """What a shard has to decide. Times are milliseconds."""

    slots: int
    owned: frozenset[int]
    resolution_ms: int
    future_ms: int = 300_000
    ttl_ms: int = 30 * 86_400_000
    charts_max: int = 10_000
    tally: Tally = field(default_factory=Tally)
    producers: dict[str, ModelProducer] = field(default_factory=dict)

    def submit(self, part: ModelPart, now_ms: int) -> ModelOutcome:
        outcome = ModelOutcome()
        producer = self.producers.get(part.producer_id)
        if producer is None and 0 < part.first_sent_ms < now_ms - self.ttl_ms:
            outcome.expired = True
            return outcome
        producer = producer or ModelProducer()
        touched = {slot_of(play.song_id, self.slots) for _, play in part.plays}
        outcome.not_owner_slots = touched - self.owned
        fresh = {slot for slot in touched & self.owned if not self._is_duplicate(producer, slot, part.sequence)}
        outcome.duplicate = bool(touched & self.owned - fresh)
        if outcome.duplicate:
            outcome.rejects.update(producer.rejects.get(part.sequence, {}))
        if not fresh:
            return outcome
        self.producers[part.producer_id] = producer
        for slot in fresh:
            producer.seen.setdefault(slot, set()).add(part.sequence)
        producer.last_seen_ms = max(producer.last_seen_ms, now_ms, part.first_sent_ms)
        producer.permanent |= not part.first_sent_ms
        rejects = self._count([one for one in part.plays if slot_of(one[1].song_id, self.slots) in fresh], now_ms)
        if rejects:
            producer.rejects.setdefault(part.sequence, {}).update(rejects)
            for old in [known for known in producer.rejects if known + 64 < part.sequence]:
                del producer.rejects[old]  # no producer may send it any more
            outcome.rejects.update(rejects)
        return outcome

    @staticmethod
    def _is_duplicate(producer: ModelProducer, slot: int, sequence: int) -> bool:
        seen = producer.seen.get(slot, set())
        return sequence in seen or sequence < max(seen, default=0) - 64

    def _count(self, plays: Sequence[tuple[int, Play]], now_ms: int) -> dict[int, str]:
        rejects: dict[int, str] = {}
        total = sum(play.count for play in self.tally.plays)
        left: list[tuple[int, Play]] = []
        for index, play in plays:
            bucket_start = play.played_at_ms // self.resolution_ms * self.resolution_ms
            if bucket_start > now_ms + self.future_ms:
                rejects[index] = "IN_FUTURE"
            elif total + play.count > COUNT_MAX:
                rejects[index] = "TOTAL_OVERFLOW"
            else:
                total += play.count
                left.append((index, play))
        for index, play in left:
            names = set(self.tally.charts()) | set(play.charts)
            if len(names) > max(self.charts_max, len(self.tally.charts())):
                rejects[index] = "CHART_LIMIT"
            else:
                self.tally.plays.append(play)
        return rejects

    def expire(self, before_ms: int) -> int:
        idle = [name for name, one in self.producers.items() if not one.permanent and one.last_seen_ms < before_ms]
        for name in idle:
            del self.producers[name]
        return len(idle)


def split_by_slot(plays: Iterable[tuple[int, Play]], slots: int) -> Iterator[tuple[int, list[tuple[int, Play]]]]:
    """The plays of each slot."""
    found: dict[int, list[tuple[int, Play]]] = {}
    for index, play in plays:
        found.setdefault(slot_of(play.song_id, slots), []).append((index, play))
    yield from found.items()
