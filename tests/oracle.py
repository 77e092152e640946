"""The naive truth: a list of plays and a few lines for each question. Slow, and short enough to be seen to be right.

`bounds_of` says what a window counts, by walking its grid. `Tally` answers queries, and `Tiers` says which of them a
cluster has to be able to answer. `ShardModel` decides about parts of batches as a shard has to, play by play, with
plain sets.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import xxhash

from topk_grpc.model import (
    Bounds,
    GlobalWindow,
    Play,
    RangeWindow,
    SessionWindow,
    SlidingWindow,
    TumblingWindow,
    Window,
)

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


def bounds_of(window: Window, at_ms: int, resolution_ms: int) -> Bounds | None:
    """What a window counts at an instant: its edge is walked to, bucket by bucket."""
    bucket = next(at for at in itertools.count(at_ms, -1) if at % resolution_ms == 0)

    def last_on_grid(step_ms: int, offset_ms: int = 0) -> int:
        return next(at for at in itertools.count(bucket, -resolution_ms) if (at - offset_ms) % step_ms == 0)

    match window:
        case GlobalWindow():
            return None
        case TumblingWindow(size, offset):
            start = last_on_grid(size, offset)
            return Bounds(start, start + size)
        case SlidingWindow(size, 0):
            return Bounds(bucket + resolution_ms - size, bucket + resolution_ms)
        case SlidingWindow(size, slide):
            end = last_on_grid(slide)
            return Bounds(end - size, end)
        case SessionWindow(gap):  # where the last play of an open session lies
            return Bounds(bucket - gap, bucket + resolution_ms)
        case RangeWindow(start, end):
            return Bounds(start, end)


def is_within(inner: Bounds, outer: Bounds) -> bool:
    return outer.start_ms <= inner.start_ms and inner.end_ms <= outer.end_ms


NOT_KEPT = 1 << 62
"""As a width: no instant cuts it."""


@dataclass(frozen=True)
class Tiers:
    """How finely time is kept: each width for its age behind the newest play; an age of None is for good."""

    steps: tuple[tuple[int, int | None], ...]
    slack_ms: int = 600_000

    @property
    def keep_all(self) -> bool:
        return self.steps[-1][1] is None

    def width_at(self, at_ms: int, newest_ms: int) -> int:
        """How wide the bucket is that a play of that time is kept in."""
        for (width, age), (coarser, _) in zip(self.steps, (*self.steps[1:], self.steps[-1]), strict=True):
            if age is None:
                return width
            border = newest_ms - age - self.slack_ms
            if at_ms >= border - border % coarser:  # rolled up whole coarser buckets at a time
                return width
        return NOT_KEPT

    def first_fine_ms(self, newest_ms: int) -> int:
        """Before it buckets are rolled up."""
        age = self.steps[0][1]
        if age is None:
            return -NOT_KEPT
        border = newest_ms - age - self.slack_ms
        return border - border % self.steps[min(1, len(self.steps) - 1)][0]

    def cuts_at(self, at_ms: int, newest_ms: int, oldest_ms: int = -NOT_KEPT) -> bool:
        """Whether plays before and after that time are told apart; there is nothing to tell before the oldest."""
        return at_ms <= oldest_ms or at_ms % self.width_at(at_ms, newest_ms) == 0

    def around(self, bounds: Bounds, newest_ms: int, oldest_ms: int = -NOT_KEPT) -> Bounds:
        """The least span around that one that is cut exactly."""
        finest = self.steps[0][0]
        starts, ends = itertools.count(bounds.start_ms, -finest), itertools.count(bounds.end_ms, finest)
        return Bounds(
            next(at for at in starts if self.cuts_at(at, newest_ms, oldest_ms)),
            next(at for at in ends if self.cuts_at(at, newest_ms, oldest_ms)),
        )


@dataclass(frozen=True)
class Truth:
    """The whole answer to a query: all entries, and for sessions how far each reaches."""

    bounds: Bounds | None
    ranked: Ranked
    sessions: dict[str, Bounds] = field(default_factory=dict)

    @functools.cached_property
    def total(self) -> int:
        return sum(count for _, count in self.ranked)


@dataclass
class Tally:
    """All plays that count, corrections among them; and those that did until their song was deleted."""

    plays: list[Play] = field(default_factory=list)
    resolution_ms: int = 1000
    deleted: list[Play] = field(default_factory=list)
    late: list[Play] = field(default_factory=list)
    """Those of them that came when time buckets of their age had been rolled up: they join no session."""

    def delete_song(self, song_id: str) -> None:
        self.deleted += [play for play in self.plays if play.song_id == song_id]
        self.plays = [play for play in self.plays if play.song_id != song_id]

    def _named(self, chart: str) -> Iterator[Play]:
        return (play for play in self.plays if not chart or chart in play.charts)

    def counts(self, chart: str = "", bounds: Bounds | None = None) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for play in self._named(chart):
            if bounds is None or bounds.start_ms <= play.played_at_ms < bounds.end_ms:
                counts[play.song_id] += play.count
        return {song_id: count for song_id, count in counts.items() if count}

    def ranked(self, chart: str = "", bounds: Bounds | None = None) -> Ranked:
        """By count, then by the bytes of the song's id."""
        return by_count(self.counts(chart, bounds))

    def truth(self, window: Window, at_ms: int, chart: str = "") -> Truth:
        """What a window holds at an instant."""
        bounds = bounds_of(window, at_ms, self.resolution_ms)
        if not isinstance(window, SessionWindow):
            return Truth(bounds, self.ranked(chart, bounds))
        sessions = self.sessions(window.gap_ms, at_ms, chart)
        ranked = by_count({song_id: count for song_id, (count, _) in sessions.items()})
        return Truth(bounds, ranked, {song_id: span for song_id, (_, span) in sessions.items()})

    def has_to_answer(self, window: Window, truth: Truth, tiers: Tiers) -> bool:
        """Whether everything that the window cuts is kept finely enough. A refusal is right only where it is not."""
        newest, oldest = self.newest_ms(), self.oldest_ms(tiers)
        if truth.bounds is None or truth.bounds.end_ms <= oldest:
            return True
        if isinstance(window, SessionWindow):
            # Sessions need each play's own bucket, back to where an earlier play would still join the first.
            first = min((span.start_ms for span in truth.sessions.values()), default=truth.bounds.end_ms)
            reach = max(oldest, min(first - window.gap_ms, truth.bounds.start_ms))
            return tiers.width_at(reach, newest) == self.resolution_ms
        return (
            tiers.cuts_at(truth.bounds.start_ms, newest, oldest)
            and tiers.cuts_at(truth.bounds.end_ms, newest, oldest)
            and tiers.width_at(max(truth.bounds.start_ms, oldest), newest) != NOT_KEPT
        )

    def sessions(self, gap_ms: int, at_ms: int, chart: str = "") -> dict[str, tuple[int, Bounds]]:
        """Each song's last session at an instant, where it is still open: its plays, and how far it reaches."""
        now = at_ms - at_ms % self.resolution_ms
        found = {}
        for song_id, sums in self._buckets(chart).items():
            session: list[int] = []
            for bucket in sorted((bucket for bucket in sums if bucket <= now and sums[bucket] > 0), reverse=True):
                if (session[-1] if session else now) - bucket > gap_ms:
                    break
                session.append(bucket)
            if session:
                count = sum(sums[bucket] for bucket in session)
                found[song_id] = count, Bounds(session[-1], session[0] + self.resolution_ms)
        return found

    def _buckets(self, chart: str) -> dict[str, Counter[int]]:
        """Each song's plays by the time bucket, but for those that came too late for it."""
        found: dict[str, Counter[int]] = {}
        late = Counter(self.late)
        for play in self._named(chart):
            if late[play] > 0:
                late[play] -= 1
                continue
            bucket = play.played_at_ms - play.played_at_ms % self.resolution_ms
            found.setdefault(play.song_id, Counter())[bucket] += play.count
        return found

    def kept(self, chart: str, song_id: str, at_ms: int, tiers: Tiers) -> int:
        """The plays of a song in the bucket that a play of that time is kept in: what a correction can take back."""
        width = tiers.width_at(at_ms, self.newest_ms())
        if width == NOT_KEPT:
            return 0
        start = at_ms - at_ms % width
        return self.counts(chart, Bounds(start, start + width)).get(song_id, 0)

    def charts(self) -> dict[str, tuple[int, int]]:
        """Plays and songs of each chart that has any."""
        names = {chart for play in self.plays for chart in play.charts}
        held = {name: self.counts(name) for name in names}
        return {name: (sum(counts.values()), len(counts)) for name, counts in held.items() if counts}

    def newest_ms(self) -> int:
        return max((play.played_at_ms for play in self.plays + self.deleted), default=0)

    def oldest_ms(self, tiers: Tiers) -> int:
        """Where the bucket of the oldest play begins; far ahead without any."""
        oldest = min((play.played_at_ms for play in self.plays + self.deleted), default=1 << 60)
        return oldest - oldest % tiers.width_at(oldest, self.newest_ms())


def by_count(counts: Mapping[str, int]) -> Ranked:
    """By count, then by the bytes of the song's id."""
    return sorted(counts.items(), key=lambda place: (-place[1], place[0].encode()))


def combined(plays: Iterable[tuple[int, Play]], resolution_ms: int) -> list[tuple[int, Play]]:
    """What a gateway makes of indexed plays: equal ones become one, with the first's index and the newest time.

    Corrections stay what they are.
    """
    groups: dict[tuple[str, int, tuple[str, ...]], int] = {}
    done: list[tuple[int, Play]] = []
    for index, play in plays:
        key = (play.song_id, play.played_at_ms // resolution_ms, play.charts)
        if play.count < 0:
            done.append((index, play))
            continue
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
    steps: tuple[tuple[int, int | None], ...] = ()
    tally: Tally = field(init=False)
    producers: dict[str, ModelProducer] = field(default_factory=dict)
    charts_named: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.tally = Tally(resolution_ms=self.resolution_ms)
        self.tiers = Tiers(self.steps or ((self.resolution_ms, None),))
        self.first_fine_ms = self.tiers.first_fine_ms  # standing windows can put it off

    def submit(self, part: ModelPart, now_ms: int, said: Mapping[int, str] | None = None) -> ModelOutcome:
        """Decides. `said`: what the shard rejected, where its standing windows keep finer buckets than the tiers do."""
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
        rejects = self._count([one for one in part.plays if slot_of(one[1].song_id, self.slots) in fresh], now_ms, said)
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

    def _count(self, plays: Sequence[tuple[int, Play]], now_ms: int, said: Mapping[int, str] | None) -> dict[int, str]:
        rejects: dict[int, str] = {}
        total = sum(play.count for play in self.tally.plays)
        left: list[tuple[int, Play]] = []
        for index, play in sorted(plays, key=lambda one: one[1].count < 0):  # corrections after all others
            bucket_start = play.played_at_ms // self.resolution_ms * self.resolution_ms
            if bucket_start > now_ms + self.future_ms:
                rejects[index] = "IN_FUTURE"
            elif play.count > 0 and total + play.count > COUNT_MAX:
                rejects[index] = "TOTAL_OVERFLOW"
            else:
                total += max(play.count, 0)
                left.append((index, play))
        for index, play in left:
            names = self.charts_named | set(play.charts)
            if play.count < 0:
                refused = self._makes_negative(play, self.tiers)
                if said is not None and refused != self._makes_negative(play, Tiers(((self.resolution_ms, None),))):
                    refused = index in said
                if refused:
                    rejects[index] = "NEGATIVE_BUCKET"
                    continue
            if len(names) > max(self.charts_max, len(self.charts_named)):
                rejects[index] = "CHART_LIMIT"
                continue
            self.charts_named = names
            self.tally.plays.append(play)
        first_fine_ms = self.first_fine_ms(self.tally.newest_ms())
        self.tally.late += [
            play
            for index, play in left
            if index not in rejects and play.count > 0 and play.played_at_ms < first_fine_ms
        ]
        return rejects

    def _makes_negative(self, play: Play, tiers: Tiers) -> bool:
        kept = (self.tally.kept(chart, play.song_id, play.played_at_ms, tiers) for chart in ("", *play.charts))
        return min(kept) + play.count < 0

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
