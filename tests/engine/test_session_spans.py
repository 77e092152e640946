"""Standing sessions against a list of plays: disorder, restarts, and tiers that roll up what sessions began with."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from topk_grpc.engine import cells, query
from topk_grpc.engine.cells import choose_merges, ordered_cells
from topk_grpc.engine.query import Scope
from topk_grpc.engine.state import CHARTS, GLOBAL, ShardState
from topk_grpc.engine.tiers import SLACK_MS, parse_tiers
from topk_grpc.errors import OutOfRangeError
from topk_grpc.model import Bounds, ClusterSettings, SessionWindow

SONGS = 4
GAP = 5
NOW = 1_700_000_000
# The slack is 600 s, so a second tier of 100 s begins 610 s back.
TIERS = parse_tiers("1s:10s,100s:*", 1000)


@dataclass
class Naive:
    """Plays that joined sessions when they came: (song, bucket) -> plays."""

    joined: Counter[tuple[int, int]] = field(default_factory=Counter)
    everything: Counter[tuple[int, int]] = field(default_factory=Counter)

    def sessions(self, at: int) -> dict[int, tuple[int, int, int]]:
        """First bucket, last bucket and plays of each song's session that is open in a bucket."""
        found = {}
        for song in range(SONGS):
            buckets = sorted(bucket for (of, bucket), plays in self.joined.items() if of == song and plays)
            buckets = [bucket for bucket in buckets if bucket <= at]
            if not buckets or at - buckets[-1] > GAP:
                continue
            session = [buckets.pop()]
            while buckets and session[-1] - buckets[-1] <= GAP:
                session.append(buckets.pop())
            found[song] = (session[-1], session[0], sum(self.joined[song, bucket] for bucket in session))
        return found


class Standing:
    """A state with standing sessions, fed with plays of songs by number."""

    def __init__(self) -> None:
        self.state = ShardState(ClusterSettings(), 2)
        self.songs = self.state.songs.add_texts([f"song {number}" for number in range(SONGS)])
        self.chart = int(self.state.charts.add_texts(["x"])[0])
        self.state.configure(TIERS, [SessionWindow(GAP * 1000)])
        self.naive = Naive()
        self.now = NOW

    def move(self, seconds: int) -> None:
        self.now += seconds
        end = (self.now + 1) * 1000
        for window in self.state.standing:
            self.state.move_standing(window, Bounds(end - 1000 - GAP * 1000, end))

    def play(self, plays: list[tuple[int, int, int]]) -> None:
        """Counts (song, bucket, plays), all of them positive or all negative."""
        songs = self.songs[[song for song, _, _ in plays]]
        buckets = np.array([bucket for _, bucket, _ in plays], np.int64)
        counts = np.array([count for _, _, count in plays], np.int64)
        self.state.note_times(int(buckets.min()) * 1000, int(buckets.max()) * 1000)
        finest = self.state.past.finest
        zeros = np.zeros(len(songs), np.int32)
        state = self.state
        state.boards[GLOBAL].add(
            songs, zeros, buckets, counts, state.songs_of(GLOBAL), state.songs, len(state.songs)
        )  # fmt: skip
        charts = np.full(len(songs), self.chart, np.int32)
        pairs = state.pairs.add(charts, songs)
        state.boards[CHARTS].add(
            pairs, charts, buckets, counts, state.songs_of(CHARTS), state.songs, len(state.pairs), state.pairs.charts
        )
        for song, bucket, count in plays:
            self.naive.everything[song, bucket] += count
            if bucket >= finest:
                self.naive.joined[song, bucket] += count
            else:
                event("a play that is too late to join")

    def restart(self, *, merged: bool) -> None:
        """Snapshot and recovery; what the state keeps in blocks is rolled up."""
        if not len(self.state.boards[GLOBAL]):
            return  # the songs are interned before they are played, which a shard never does
        meta, arrays = self.state.to_snapshot()
        blocks: dict[str, dict[int, object]] = {}
        for name, board in self.state.boards.items():
            kept = dict(board.cells.blocks)
            for index, one in enumerate(
                choose_merges(board.cells.take_chunks(), kept, board.cells.done, self.state.roll_up)
            ):
                whole = one.cells(self.state.roll_up)
                for old in one.blocks:
                    del kept[old]
                number = 10 * max(kept, default=0) + 10 + index
                if len(whole):
                    kept[number] = ordered_cells(whole.columns())
                    meta["blocks_rolled_up"][name][str(number)] = self.state.roll_up.borders
                if merged:
                    board.cells.replace(one, number, kept.get(number), self.state.roll_up.borders)
            blocks[name] = {number: dict(one.columns()) for number, one in kept.items()}
        if not merged:
            self.state = ShardState.from_snapshot(ClusterSettings(), 2, json.loads(json.dumps(meta)), arrays, blocks)  # type: ignore[arg-type]

    def check(self) -> None:
        end = (self.now + 1) * 1000
        for chart in ("", "x"):
            scope = Scope(chart, Bounds(end - 1000 - GAP * 1000, end), GAP * 1000)
            expected = self.naive.sessions(self.now)
            try:
                ranked, totals = query.top_k(self.state, scope, SONGS)
            except OutOfRangeError:
                event("refused")
                # Only where a session may reach back to what is rolled up.
                finest = self.state.past.finest
                assert any(start - GAP < finest + 100 for start, _, _ in expected.values()) or self.taken_back
                continue
            event("answered, from before the border" if self._reaches_back(expected) else "answered")
            order = sorted(expected, key=lambda song: (-expected[song][2], song))
            assert ranked.song_ids == [f"song {song}" for song in order]
            assert ranked.counts == [expected[song][2] for song in order]
            assert ranked.sessions == [
                Bounds(expected[song][0] * 1000, expected[song][1] * 1000 + 1000) for song in order
            ]
            assert (totals.plays, totals.songs) == (sum(one[2] for one in expected.values()), len(expected))
            for song in range(SONGS):
                found, _ = query.counts_of(self.state, scope, [f"song {song}"])
                assert found.counts == [expected.get(song, (0, 0, 0))[2]]

    taken_back = False

    def _reaches_back(self, expected: dict[int, tuple[int, int, int]]) -> bool:
        return any(start < self.state.past.finest for start, _, _ in expected.values())


PLAYS = st.lists(
    st.tuples(st.integers(0, SONGS - 1), st.integers(0, 14) | st.just(0) | st.just(700), st.integers(1, 3)), max_size=6
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("play"), PLAYS),
        st.tuples(st.just("play"), PLAYS),
        st.tuples(st.just("ahead"), PLAYS),
        st.tuples(st.just("move"), st.integers(0, 8)),
        st.tuples(st.just("move"), st.sampled_from([1, 2, 5, 200, 640])),
        st.tuples(st.just("go on"), st.sampled_from([50, 700, 1000])),
        st.tuples(st.just("take back"), st.integers(0, 50)),
        st.tuples(st.just("restart"), st.booleans()),
    ),
    min_size=2,
    max_size=20,
)


@settings(max_examples=300, deadline=None)
@given(steps=STEPS, chunk_cells=st.sampled_from([3, 1 << 10]))
def test_standing_sessions_are_those_of_the_plays(steps: list[tuple[str, object]], chunk_cells: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "CHUNK_CELLS", chunk_cells)
        standing = Standing()
        standing.move(0)
        for kind, value in steps:
            match kind, value:
                case "play", list(plays) if plays:
                    standing.play([(song, standing.now - back, count) for song, back, count in plays])
                case "ahead", list(plays) if plays:
                    standing.play([(song, standing.now + back % 100, count) for song, back, count in plays])
                case "move", int(seconds):
                    standing.move(seconds)
                case "go on", int(seconds):  # a song that is played on and on
                    for _ in range(0, seconds, GAP):
                        standing.play([(0, standing.now, 1)])
                        standing.move(GAP)
                case "take back", int(which):
                    held = sorted(place for place, plays in standing.naive.everything.items() if plays)
                    if held:
                        song, bucket = held[which % len(held)]
                        standing.play([(song, bucket, -1)])
                        standing.taken_back = True
                case "restart", bool(merged):
                    standing.restart(merged=merged)
                    standing.move(0)
            standing.check()


def test_a_session_goes_on_for_longer_than_its_buckets_are_kept() -> None:
    standing = Standing()
    standing.move(0)
    for _ in range(300):
        standing.play([(0, standing.now, 2)])
        standing.move(GAP)
    standing.restart(merged=True)
    standing.restart(merged=False)
    standing.move(0)
    assert standing.state.past.finest > NOW + SLACK_MS // 1000
    end = (standing.now + 1) * 1000
    ranked, _ = query.top_k(standing.state, Scope("", Bounds(end - 1000 - GAP * 1000, end), GAP * 1000), 3)
    assert (ranked.song_ids, ranked.counts) == (["song 0"], [600])
    assert ranked.sessions is not None
    assert ranked.sessions[0].start_ms == NOW * 1000
