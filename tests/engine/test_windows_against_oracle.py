"""Every window against the naive tally: plays late, ahead and taken back, over the borders of tiers, after recovery.

Time passes and the same windows are asked for again: those that are kept up to date as plays arrive have to say what
those say that are counted anew.
"""

from __future__ import annotations

import random
from typing import Final

import pytest
from hypothesis import currently_in_test_context, event, given, settings
from hypothesis import strategies as st

from tests.engine.engine_shard import NOW, EngineShard, check_ranked
from tests.oracle import ModelPart, ShardModel, bounds_of, combined, is_within
from tests.window_traffic import (
    CHARTS,
    MINUTE,
    SECOND,
    SONGS,
    STEPS,
    TIERS,
    WINDOWS,
    Ask,
    AskAround,
    Delete,
    Move,
    Pass,
    Recover,
    Send,
    Snapshot,
    Stand,
    Step,
    TakeBack,
    range_around,
    steps_of,
)
from topk_grpc.engine import boards, cells, query
from topk_grpc.engine import windows as engine_windows
from topk_grpc.engine.admission import Limits
from topk_grpc.engine.query import Scope
from topk_grpc.errors import OutOfRangeError
from topk_grpc.model import (
    Bounds,
    ClusterSettings,
    GlobalWindow,
    Play,
    RangeWindow,
    SessionWindow,
    SlidingWindow,
    Window,
)

SLOTS: Final = 4


def note(what: str) -> None:
    """For hypothesis' statistics."""
    if currently_in_test_context():
        event(what)


class Traffic:
    """Runs steps on the engine and on the model, and compares what they say."""

    def __init__(self, tiers: str, windows: list[Window], heap_size: int) -> None:
        self.shard = EngineShard(ClusterSettings(SLOTS, "ring", SECOND), heap_size, range(SLOTS), tiers)
        self.model = ShardModel(SLOTS, frozenset(range(SLOTS)), SECOND, steps=steps_of(tiers))
        self.model.first_fine_ms = lambda newest_ms: self.shard.state.tiers.borders(newest_ms)[0]
        self.windows = windows
        self.now = NOW
        self.sequence = 0
        self.looked_aside = 0

    def run(self, step: Step) -> None:
        match step:
            case Send(plays):
                self.send(*(Play(song_id, self.now - age, count, charts) for song_id, age, count, charts in plays))
            case TakeBack(which, count, whole_charts, later_ms):
                counted = self.model.tally.plays
                if counted:
                    play = counted[which % len(counted)]
                    charts = play.charts if whole_charts else CHARTS
                    self.send(Play(play.song_id, play.played_at_ms + later_ms, -count, charts))
            case Delete(song_id):
                self.shard.delete_song(song_id)
                self.model.tally.delete_song(song_id)
            case Pass(milliseconds):
                self.now += milliseconds
            case Snapshot(use_blocks):
                self.shard.take_snapshot(use_blocks=use_blocks)
            case Recover(heap_size):
                self.shard.recover(heap_size)
            case Stand(which):
                chosen = [self.windows[number % len(self.windows)] for number in which]
                self.shard.let_stand(tuple(one for one in chosen if not isinstance(one, GlobalWindow | RangeWindow)))
            case Move():
                for window in self.shard.state.standing:
                    self.move(window)
            case Ask(live, before_ms, which, chart):
                at_ms = (
                    self.now if live else self.model.tally.newest_ms() if before_ms is None else self.now - before_ms
                )
                for number in which:
                    self.ask(self.windows[number % len(self.windows)], at_ms, chart, live=live)

            case AskAround():
                if self.model.tally.plays:
                    self.ask(range_around(self.model.tally.plays, step), self.now, step.chart, live=False)

    def send(self, *plays: Play) -> None:
        self.sequence += 1
        part = ModelPart("p", self.sequence, self.now, tuple(combined(enumerate(plays), SECOND)))
        [said] = self.shard.submit(part, limits=Limits(now_ms=self.now))
        expected = self.model.submit(part, self.now, said.rejects)
        assert said == expected
        for reason in expected.rejects.values():
            note(reason)

    def move(self, window: Window) -> None:
        bounds = engine_windows.bounds_of(window, self.now, SECOND)
        assert bounds is not None
        self.shard.state.move_standing(window, bounds, lambda: self.look_aside(window, bounds))

    def look_aside(self, window: Window, bounds: Bounds) -> None:
        """While a window moves, others are answered by what stands, and it itself by what lies in the cells."""
        self.looked_aside += 1
        tally = self.model.tally
        for chart in ("", "US"):
            self.compare(Scope(chart), tally.ranked(chart), {})
        self.compare(Scope("", bounds, 0, window), tally.ranked("", bounds), {})

    def ask(self, window: Window, at_ms: int, chart: str, *, live: bool) -> None:
        """An answer equals the tally's; a refusal is right, and so are the bounds that it names."""
        tally, tiers = self.model.tally, self.model.tiers
        truth = tally.truth(window, at_ms, chart)
        assert engine_windows.bounds_of(window, at_ms, SECOND) == truth.bounds
        if live and window in self.shard.state.standing:
            self.move(window)
        gap_ms = window.gap_ms if isinstance(window, SessionWindow) else 0
        scope = Scope(chart, truth.bounds, gap_ms, window if live else None)
        try:
            query.top_k(self.shard.state, scope, 1)
        except OutOfRangeError as refusal:
            note(f"{type(window).__name__} refused")
            assert not tally.has_to_answer(window, truth, tiers), (window, at_ms)
            if truth.bounds is not None and tiers.keep_all:
                near = Bounds(refusal.start_ms, refusal.end_ms)
                assert is_within(truth.bounds, near)
                assert is_within(near, tiers.around(truth.bounds, tally.newest_ms()))
                self.compare(Scope(chart, near), tally.ranked(chart, near), {})
            return
        note(f"{type(window).__name__} answered")
        self.compare(scope, truth.ranked, truth.sessions)

    def compare(self, scope: Scope, ranked: list[tuple[str, int]], sessions: dict[str, Bounds]) -> None:
        check_ranked(self.shard.state, scope, ranked, sessions, [*SONGS, "unheard of"], {1, 3, 10_000})


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(STEPS, min_size=3, max_size=25),
    tiers=st.sampled_from(TIERS),
    windows=st.lists(WINDOWS, min_size=1, max_size=8, unique=True),
    heap_size=st.sampled_from([1, 3, 50]),
    chunk_cells=st.sampled_from([3, 1 << 10]),
    step_cells=st.sampled_from([1, 2, 1 << 10]),
)
def test_windows_say_what_the_tally_says(
    steps: list[Step], tiers: str, windows: list[Window], heap_size: int, chunk_cells: int, step_cells: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "CHUNK_CELLS", chunk_cells)
        patch.setattr(boards, "_STEP_CELLS", step_cells)
        traffic = Traffic(tiers, windows, heap_size)
        for step in steps:
            traffic.run(step)
        for step in (Move(), Recover(heap_size), Snapshot(True), Recover(heap_size)):
            for chart in ("", "US"):
                traffic.run(Ask(True, None, tuple(range(len(windows))), chart))
            traffic.run(step)
        traffic.run(Ask(True, None, tuple(range(len(windows))), ""))


@pytest.mark.parametrize("seed", range(4))
def test_queries_between_the_steps_of_a_window_that_moves(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(seed)
    monkeypatch.setattr(boards, "_STEP_CELLS", 2)
    windows: list[Window] = [SlidingWindow(10 * MINUTE, MINUTE), SlidingWindow(5 * MINUTE, SECOND)]
    traffic = Traffic(TIERS[0], windows, 3)
    traffic.run(Stand((0, 1)))
    for _ in range(6):
        plays = [
            Play(chance.choice(SONGS), traffic.now - chance.randrange(3 * MINUTE), 1, chance.choice(((), ("US",))))
            for _ in range(30)
        ]
        traffic.send(*plays)
        traffic.run(Snapshot(chance.random() < 0.5))
        traffic.now += chance.choice((MINUTE, 4 * MINUTE))
        before = traffic.looked_aside
        traffic.run(Move())
        assert traffic.looked_aside > before
        traffic.run(Ask(True, None, (0, 1), ""))


@pytest.mark.parametrize("seed", range(8))
def test_sessions_close_together_at_every_instant(seed: int) -> None:
    """Within seconds of each other, so that many plays are exactly the gap apart, and many sessions merge."""
    chance = random.Random(seed)
    windows: list[Window] = [SessionWindow(gap * SECOND) for gap in (1, 2, 5)]
    traffic = Traffic(TIERS[0], windows, 3)
    traffic.now = NOW + 30 * SECOND
    if seed % 2:
        traffic.run(Stand((0, 1, 2)))
    plays = [
        Play(song_id, NOW + second * SECOND, 1, chance.choice(((), ("US",))))
        for song_id in SONGS
        for second in chance.sample(range(20), chance.randrange(1, 12))
    ]
    chance.shuffle(plays)
    taken_back = [Play(play.song_id, play.played_at_ms, -1, play.charts) for play in plays[::6]]
    for batch in (plays[:20], plays[20:], taken_back):
        traffic.send(*batch)
        for second in range(-1, 27):
            traffic.now = NOW + second * SECOND
            for window in windows:
                traffic.ask(window, traffic.now, chance.choice(("", "US")), live=bool(seed % 2))
        traffic.now = NOW + 30 * SECOND


@pytest.mark.parametrize("tiers", TIERS)
@pytest.mark.parametrize("with_old", [False, True])
def test_every_cut_around_every_border_of_tiers(tiers: str, with_old: bool) -> None:
    traffic = Traffic(tiers, [GlobalWindow()], 3)
    model = traffic.model
    ages = [(age + 600 * SECOND) // SECOND for _, age in model.tiers.steps if age is not None]
    around = [second for age in ages for second in range(age - 65, age + 66)]
    traffic.send(*(Play("a", NOW - second * SECOND + 999) for second in around), Play("b", NOW))
    if with_old:
        traffic.send(Play("a", NOW - 10_000 * SECOND))
    traffic.run(Snapshot(True))
    for second in around:
        cut = NOW - second * SECOND
        ranges = RangeWindow(cut, NOW + SECOND), RangeWindow(NOW - 4000 * SECOND, cut)
        for window in ranges:
            traffic.ask(window, NOW, "", live=False)


@pytest.mark.parametrize("seed", range(12))
def test_a_standing_session_goes_on_for_longer_than_its_buckets_are_kept(seed: int) -> None:
    """Two songs are played all the time; what comes late for its bucket joins no session, and changes no answer."""
    chance = random.Random(seed)
    window = SessionWindow(chance.choice((60, 150, 300)) * SECOND)
    traffic = Traffic(chance.choice(TIERS[1:3]), [window], 3)
    traffic.run(Stand((0,)))
    pause_ms = window.gap_ms * 6 // 10
    answered = 0
    for step in range(40 * MINUTE // pause_ms):
        traffic.move(window)
        traffic.send(*(Play(song_id, traffic.now - chance.randrange(3000)) for song_id in ("a", "b")))
        if step > 5 and chance.random() < 0.1:
            first_fine_ms = traffic.model.first_fine_ms(traffic.model.tally.newest_ms())
            traffic.send(Play(chance.choice("abz"), first_fine_ms - chance.randrange(6_000, 400_000)))
        traffic.run(Snapshot(chance.random() < 0.5))
        if chance.random() < 0.1:
            traffic.run(Recover(3))
        truth = traffic.model.tally.truth(window, traffic.now)
        traffic.move(window)
        traffic.compare(Scope("", truth.bounds, window.gap_ms, window), truth.ranked, truth.sessions)
        first = min((span.start_ms for span in truth.sessions.values()), default=traffic.now)
        answered += first < traffic.model.first_fine_ms(traffic.model.tally.newest_ms())
        traffic.now += pause_ms if chance.random() < 0.99 else window.gap_ms * 2
    assert answered, "no session was older than its buckets"


@given(WINDOWS, st.integers(-3_000_000, 3_000_000), st.sampled_from([1, 500, 1000]))
def test_bounds_are_what_walking_the_grid_finds(window: Window, at_ms: int, resolution_ms: int) -> None:
    assert engine_windows.bounds_of(window, at_ms, resolution_ms) == bounds_of(window, at_ms, resolution_ms)
