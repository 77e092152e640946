"""A shard's life with everything in it that writes to disk, and what has to be held after each of its requests.

Two charts, plays late and ahead, corrections, refused plays, a deleted song, standing windows that come and go, tiers
that roll blocks up and change, snapshots with groups between their steps, producers that expire, clean and unclean
ends.
The oracle lives it once; whoever is crashed in it is held against what the oracle held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from tests.engine.engine_shard import NOW
from tests.oracle import ModelOutcome, ModelPart, Ranked, ShardModel
from tests.shard.cores import CLUSTER, IDENTITY, PATH, abandon, commit, new_disk, settings_of
from tests.storage.simulated_disk import SimulatedDisk
from tests.window_traffic import steps_of
from topk_grpc.engine import query
from topk_grpc.engine.query import Scope
from topk_grpc.engine.windows import bounds_of
from topk_grpc.model import Bounds, Play, SessionWindow, SlidingWindow, TumblingWindow
from topk_grpc.shard.core import PendingSnapshot, ShardCore

TIERS: Final = "1s:10s,5s:60s,20s:*"
OTHER_TIERS: Final = "1s:20s,5s:100s,20s:*"
SEGMENT_BYTES: Final = 3000
"""Far below what the setting allows, so that a few groups fill a segment."""

SONGS: Final = ("a", "b", "c", "d", "é", "gone")
CHARTS: Final = ("", "x", "y")
MINUTE: Final = 60_000
WINDOWS: Final = (TumblingWindow(MINUTE), SessionWindow(20_000), SlidingWindow(10_000))


@dataclass(frozen=True)
class Start:
    """A start, with what is configured."""

    tiers: str = TIERS
    windows: str = "tumbling:1m,session:20s"


@dataclass(frozen=True)
class Group:
    """Parts, each a request of its own, taken through together."""

    after_ms: int
    parts: tuple[ModelPart, ...]


@dataclass(frozen=True)
class Delete:
    song_id: str


@dataclass(frozen=True)
class Do:
    """What changes no counts: `begin`, `write`, `end` and `clear` of a snapshot, or one of the names below."""

    what: str


Step = Start | Group | Delete | Do


def plays(*plays: tuple[str, int, int, str]) -> tuple[Play, ...]:
    """Song, seconds after NOW, count, and the letters of its charts."""
    return tuple(Play(song_id, NOW + 1000 * second, count, tuple(charts)) for song_id, second, count, charts in plays)


def part(sequence: int, *given: tuple[str, int, int, str], producer: str = "p", filler: int = 0) -> ModelPart:
    first_sent_ms = NOW if producer == "idle" else 0
    many = plays(*given, *(("filler" * 20, -900 + number, 1, "") for number in range(filler)))
    return ModelPart(producer, sequence, first_sent_ms, tuple(enumerate(many)))


SNAPSHOT: Final = (Do("begin"), Do("write"), Do("end"), Do("clear"))
LATER: Final = 15 * MINUTE

STEPS: Final[tuple[Step, ...]] = (
    Start(),
    Group(0, (part(1, ("a", 0, 5, "x"), ("b", -1, 3, "xy"), ("gone", -2, 4, "y")),)),
    Group(0, (part(2, ("a", 1, 2, "y"), ("c", -800, 7, "x"), filler=9), part(1, ("d", 2, 1, ""), producer="idle"))),
    Group(
        0,
        (
            part(3, ("a", 0, -3, "x"), ("b", -1, -9, "x")),  # the second is refused
            part(4, ("c", -799, -2, "x"), ("b", -1, -1, "y"), ("far", 9000, 1, "")),  # so is the last
            part(5, ("é", 3, 6, "y"), filler=4),
        ),
    ),
    Do("begin"),
    Group(0, (part(6, ("a", 4, 1, "x"), ("c", 4, 2, "")),)),
    Do("write"),
    Group(0, (part(7, ("a", 4, -1, "x"), ("b", 5, 2, "y"), filler=9),)),
    Do("end"),
    Do("clear"),
    Delete("gone"),
    Do("follow"),
    Group(0, (part(8, ("gone", 6, 2, "x"), ("d", 6, 1, "xy")),)),
    *SNAPSHOT,
    Do("expire"),
    Group(0, (part(9, ("b", 7, 1, "x"), filler=15),)),
    Do("abandon"),
    Start(OTHER_TIERS, "tumbling:1m,session:20s,sliding:10s"),
    Group(0, (part(10, ("a", 8, 1, ""), filler=15), part(11, ("b", 8, 1, "x"), filler=3))),
    Group(LATER, (part(12, ("a", LATER // 1000, 1, "x"), ("c", LATER // 1000 - 1, 3, "y"), filler=2),)),
    *SNAPSHOT,  # rolls blocks up
    Group(LATER, (part(13, ("a", 0, -1, "x"), ("é", LATER // 1000 - 3, 2, "y")),)),  # from a bucket that was rolled up
    Delete("c"),
    Do("close"),
    Start(TIERS, "tumbling:1m,session:20s"),
    Do("move"),
    Group(LATER, (part(14, ("c", LATER // 1000, 2, "x"), ("b", 7, -1, "x"), filler=20),)),
    *SNAPSHOT,
    Group(LATER, (part(15, ("d", LATER // 1000 + 1, 2, "xy")), part(16, ("d", LATER // 1000 + 1, -1, "x")))),
    Do("close"),
)


@dataclass
class Held:
    """What has to be held after some of the requests: every chart, all of it, in order, in each scope."""

    now_ms: int
    answers: dict[Scope, Ranked]


@dataclass
class Life:
    """One life on a disk. Whoever interrupts it reads how far it had come.

    Attributes:
        done: requests and deletions that were answered.
        under_way: those that were asked for and not answered.
        start: the last start begun.
        step: the number of the step.
        outcomes: of each request answered.
    """

    disk: SimulatedDisk
    model: ShardModel | None = None
    done: int = 0
    under_way: int = 0
    step: int = 0
    start: Start = field(default_factory=Start)
    core: ShardCore | None = None
    outcomes: list[ModelOutcome | None] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    _pending: PendingSnapshot | None = None
    _written: object = None
    _now_ms: int = NOW

    def live(self) -> None:
        for self.step, step in enumerate(STEPS):
            self._live(step)

    def _live(self, step: Step) -> None:
        match step:
            case Start():
                self.start = step
                self.core = start(self.disk, step)
                if not self.held and self.model:
                    self._hold()
            case Group(after_ms, parts):
                assert self.core is not None
                self._now_ms = NOW + after_ms
                self.under_way = len(parts)
                outcomes = commit(self.core, *parts, now_ms=self._now_ms)
                for one, outcome in zip(parts, outcomes, strict=True):
                    assert isinstance(outcome, ModelOutcome), outcome
                    self.outcomes.append(outcome)
                    if self.model is not None:
                        assert outcome == self.model.submit(one, self._now_ms, outcome.rejects), one
                        self._hold()
                self.done, self.under_way = self.done + len(parts), 0
            case Delete(song_id):
                assert self.core is not None
                self.under_way = 1
                self.core.delete_song(song_id)
                self.outcomes.append(None)
                if self.model is not None:
                    self.model.tally.delete_song(song_id)
                    self._hold()
                self.done, self.under_way = self.done + 1, 0
            case Do(what):
                self._do(what)

    def _do(self, what: str) -> None:
        core = self.core
        assert core is not None
        match what:
            case "begin":
                self._pending = core.begin_snapshot()
            case "write":
                assert self._pending is not None
                self._written = core.write_snapshot(self._pending)
            case "end":
                core.end_snapshot(self._pending, self._written)  # type: ignore[arg-type]
            case "clear":
                core.clear_snapshot(self._pending, self._written)  # type: ignore[arg-type]
            case "follow":
                window = SlidingWindow(10_000)
                bounds = bounds_of(window, self._now_ms, CLUSTER.resolution_ms)
                assert bounds is not None
                core.follow(window, bounds, self._now_ms)
                assert window in core.state.standing
            case "move":  # and lets the window go that is not configured any more
                core.move_standing(NOW + 10 * LATER)
                assert SlidingWindow(10_000) not in core.state.standing
            case "expire":
                assert core.expire_producers(NOW + 40 * 86_400_000) == 1
            case "abandon":
                abandon(core)
            case "close":
                core.close()

    def _hold(self) -> None:
        assert self.model is not None
        tally = self.model.tally
        answers = {Scope(chart): tally.ranked(chart) for chart in CHARTS}
        for scope in scopes(self._now_ms):
            sessions = isinstance(scope.standing, SessionWindow)
            truth = tally.truth(scope.standing, self._now_ms, scope.chart) if scope.standing and sessions else None
            answers[scope] = tally.ranked(scope.chart, scope.bounds) if truth is None else truth.ranked
        self.held.append(Held(self._now_ms, answers))


def scopes(now_ms: int) -> Iterator[Scope]:
    """Windows that are summed from cells, and those that stand."""
    every = Bounds(NOW // 20_000 * 20_000 - 1_000_000, NOW // 20_000 * 20_000 + 10_000_000)
    for chart in CHARTS:
        yield Scope(chart, every)
        for window in WINDOWS:
            bounds = bounds_of(window, now_ms, CLUSTER.resolution_ms)
            yield Scope(chart, bounds, window.gap_ms if isinstance(window, SessionWindow) else 0, window)


def start(disk: SimulatedDisk, how: Start) -> ShardCore:
    """A core as a shard's process starts it."""
    settings = settings_of(PATH, tiers=how.tiers, standing_windows=how.windows)
    object.__setattr__(settings, "segment_bytes", SEGMENT_BYTES)
    core = ShardCore(settings, CLUSTER, disk)
    core.recover()
    core.own(IDENTITY, list(range(CLUSTER.slots)))
    core.configure(NOW)
    return core


def requests() -> list[tuple[int, ModelPart | str]]:
    """When each request of the life is sent, and what it is: a part, or a song to delete."""
    found: list[tuple[int, ModelPart | str]] = []
    now_ms = NOW
    for step in STEPS:
        if isinstance(step, Group):
            now_ms = NOW + step.after_ms
            found += [(now_ms, one) for one in step.parts]
        elif isinstance(step, Delete):
            found.append((now_ms, step.song_id))
    return found


REQUESTS: Final = requests()
EXPIRED_FROM: Final = next(index for index, step in enumerate(STEPS) if step == Do("expire"))


def new_life(model: ShardModel | None = None) -> Life:
    """One that begins without a data directory."""
    return Life(new_disk(), model)


def live_with_the_oracle() -> Life:
    """The life from beginning to end, each answer as the oracle gives it."""
    model = ShardModel(CLUSTER.slots, frozenset(range(CLUSTER.slots)), CLUSTER.resolution_ms, steps=steps_of(TIERS))
    life = new_life(model)
    life.live()
    assert life.done == len(REQUESTS) == len(life.held) - 1
    return life


def holds(core: ShardCore, held: Held, *, all_time_only: bool = False) -> bool:
    """Whether the shard answers as the oracle did."""
    for scope, expected in held.answers.items():
        if all_time_only and scope.bounds is not None:
            continue
        ranked, totals = query.top_k(core.state, scope, 10_000)
        if list(zip(ranked.song_ids, ranked.counts, strict=True)) != expected:
            return False
        if (totals.plays, totals.songs) != (sum(count for _, count in expected), len(expected)):
            return False
    return True


def resend(core: ShardCore, life: Sequence[ModelOutcome | None], done: int, under_way: int, step: int) -> None:
    """What producers do after a crash: send again whatever they have no answer to; and some that they have one to."""
    for index, (now_ms, request) in enumerate(REQUESTS[: done + under_way]):
        if isinstance(request, str):
            if index >= done:
                core.delete_song(request)
            continue
        if request.producer_id == "idle" and step >= EXPIRED_FROM:
            continue
        (outcome,) = commit(core, request, now_ms=now_ms)
        assert isinstance(outcome, ModelOutcome), outcome
        said = life[index]
        assert said is not None
        assert outcome.rejects == said.rejects, request
        assert outcome.duplicate or index >= done, request
