"""Shards without disk or network between which slots move, and one model of all of them together."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from hypothesis import currently_in_test_context, event

from tests.engine.engine_shard import NOW, EngineShard, check_ranked
from tests.oracle import ModelPart, Ranked, ShardModel, bounds_of, combined, is_within, slot_of
from tests.window_traffic import (
    CHARTS,
    SECOND,
    SONGS,
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
from topk_grpc.engine import query, transfer
from topk_grpc.engine.admission import Limits
from topk_grpc.engine.indexing import unindexed, use_indexes
from topk_grpc.engine.query import Scope
from topk_grpc.engine.transfer import SlotTotals
from topk_grpc.errors import OutOfRangeError
from topk_grpc.model import Bounds, ClusterSettings, GlobalWindow, Play, RangeWindow, SessionWindow, Window

SLOTS: Final = 8
SHARDS: Final = 3


@dataclass(frozen=True)
class Begin:
    """Some slots are frozen on one shard and exported; those of them that it does not own stay where they are."""

    source: int
    target: int
    slots: tuple[int, ...]


@dataclass(frozen=True)
class Finish:
    """What was exported is imported and dropped, or, if it was aborted, owned again."""

    commits: bool = True


@dataclass(frozen=True)
class Resend:
    which: int


@dataclass(frozen=True)
class OnOne:
    """A step that one shard takes alone."""

    shard: int
    step: Stand | Snapshot | Recover | Move


ClusterStep = Step | Begin | Finish | Resend | OnOne


@dataclass(frozen=True)
class Imported:
    image: bytes


@dataclass(frozen=True)
class Frozen:
    slots: tuple[int, ...]


@dataclass(frozen=True)
class Owned:
    slots: tuple[int, ...]


@dataclass(frozen=True)
class Dropped:
    slots: tuple[int, ...]


def note(what: str) -> None:
    """For hypothesis' statistics."""
    if currently_in_test_context():
        event(what)


def _always(answer: int, _: int) -> int:
    return answer


class MovingShard(EngineShard):
    """A shard whose log also knows what is moved."""

    def do(self, record: Imported | Frozen | Owned | Dropped) -> None:
        self.log.append(record)
        self.replay(record)

    def replay(self, record: Any) -> None:
        match record:
            case Imported(image):
                transfer.import_slots(self.state, transfer.read_image(image))
            case Frozen(slots):
                self.state.owned[list(slots)] = 0
            case Owned(slots):
                self.state.own(slots)
            case Dropped(slots):
                transfer.drop_slots(self.state, slots)
            case _:
                super().replay(record)


def nothing_of(slots: Sequence[int]) -> SlotTotals:
    zeros = (0,) * len(slots)
    return SlotTotals(tuple(slots), zeros, zeros, zeros, zeros)


class MovingCluster:
    """Runs steps on the shards and on the model, and compares what they say. The last shard owns nothing at first."""

    def __init__(self, tiers: str, windows: list[Window], heap_size: int) -> None:
        cluster = ClusterSettings(SLOTS, "ring", SECOND)
        owned = (range(SLOTS // 2), range(SLOTS // 2, SLOTS), range(0))
        self.shards = [MovingShard(cluster, heap_size, slots, tiers) for slots in owned]
        self.owners = {slot: shard for shard, slots in zip(self.shards, owned, strict=True) for slot in slots}
        self.model = ShardModel(SLOTS, frozenset(range(SLOTS)), SECOND, steps=steps_of(tiers))
        self.windows = windows
        self.now = NOW
        self.sequence = 0
        self.sent: list[ModelPart] = []
        self.move: tuple[MovingShard, MovingShard, tuple[int, ...], bytes] | None = None

    # --- Steps --------------------------------------------------------------------------------------------------------

    def run(self, step: ClusterStep) -> None:
        match step:
            case Begin(source, target, slots):
                self.begin(self.shards[source], self.shards[target], slots)
            case Finish(commits):
                self.finish(commits=commits)
            case Resend(which):
                self.finish()
                if self.sent:
                    self.submit(self.sent[which % len(self.sent)], again=True)
            case OnOne(which, one):
                self.on_one(self.shards[which], one)
            case Send(plays):
                self.send(*(Play(song_id, self.now - age, count, charts) for song_id, age, count, charts in plays))
            case TakeBack(which, count, whole_charts, later_ms):
                counted = self.model.tally.plays
                if counted:
                    play = counted[which % len(counted)]
                    charts = play.charts if whole_charts else CHARTS
                    self.send(Play(play.song_id, play.played_at_ms + later_ms, -count, charts))
            case Delete(song_id):
                self.finish()
                self.owner_of(song_id).delete_song(song_id)
                self.model.tally.delete_song(song_id)
            case Pass(milliseconds):
                self.now += milliseconds
            case Snapshot() | Recover() | Stand() | Move():
                for shard in self.shards:
                    self.on_one(shard, step)
            case Ask(live, before_ms, which, chart):
                at_ms = (
                    self.now if live else self.model.tally.newest_ms() if before_ms is None else self.now - before_ms
                )
                for number in which:
                    self.ask(self.windows[number % len(self.windows)], at_ms, chart, live=live)
            case AskAround():
                if self.model.tally.plays:
                    self.ask(range_around(self.model.tally.plays, step), self.now, step.chart, live=False)

    def on_one(self, shard: MovingShard, step: Stand | Snapshot | Recover | Move) -> None:
        match step:
            case Snapshot(use_blocks):
                shard.take_snapshot(use_blocks=use_blocks)
            case Recover(heap_size):
                before = transfer.slot_totals(shard.state, range(SLOTS))
                owned = shard.state.owned.tolist()
                shard.recover(heap_size)
                assert transfer.slot_totals(shard.state, range(SLOTS)) == before
                assert shard.state.owned.tolist() == owned
            case Stand(which):
                chosen = [self.windows[number % len(self.windows)] for number in which]
                shard.let_stand(tuple(one for one in chosen if not isinstance(one, GlobalWindow | RangeWindow)))
            case Move():
                for window in shard.state.standing:
                    bounds = bounds_of(window, self.now, SECOND)
                    assert bounds is not None
                    shard.state.move_standing(window, bounds)

    def begin(self, source: MovingShard, target: MovingShard, slots: Iterable[int]) -> None:
        self.finish()
        held = tuple(sorted(slot for slot in slots if self.owners[slot] is source))
        if source is target or not held:
            return
        before = transfer.slot_totals(source.state, held)
        source.do(Frozen(held))
        image = transfer.export_slots(source.state, held)
        if held[0] % 2 and (todo := unindexed(source.state)):
            use_indexes(source.state, [(one, one.index()) for one in todo])
            assert transfer.export_slots(source.state, held) == image
            note("indexed")
        assert transfer.slot_totals(source.state, held) == before
        read = transfer.read_image(image)
        assert transfer.image_totals(read) == before
        transfer.can_import(target.state, read, 10_000, 0)
        self.move = source, target, held, image

    def finish(self, *, commits: bool = True) -> None:
        if self.move is None:
            return
        source, target, slots, image = self.move
        self.move = None
        if not commits:
            note("aborted")
            source.do(Owned(slots))
            return
        note("moved plays" if any(transfer.slot_totals(source.state, slots).plays) else "moved nothing")
        others = tuple(slot for slot in range(SLOTS) if slot not in slots)
        left, right = (transfer.slot_totals(shard.state, others) for shard in (source, target))
        target.do(Imported(image))
        target.do(Owned(slots))
        source.do(Dropped(slots))
        self.owners |= dict.fromkeys(slots, target)
        assert transfer.slot_totals(target.state, slots) == transfer.image_totals(transfer.read_image(image))
        assert transfer.slot_totals(source.state, slots) == nothing_of(slots)
        assert transfer.slot_totals(source.state, others) == left
        assert transfer.slot_totals(target.state, others) == right

    # --- Plays --------------------------------------------------------------------------------------------------------

    def owner_of(self, song_id: str) -> MovingShard:
        return self.owners[slot_of(song_id, SLOTS)]

    def send(self, *plays: Play) -> None:
        frozen = self.move[2] if self.move else ()
        chosen = [play for play in plays if slot_of(play.song_id, SLOTS) not in frozen]
        if not chosen:
            return
        self.sequence += 1
        part = ModelPart("p", self.sequence, self.now, tuple(combined(enumerate(chosen), SECOND)))
        self.sent.append(part)
        self.submit(part)

    def submit(self, part: ModelPart, *, again: bool = False) -> None:
        """Each shard gets its part of a batch; what all of them say is what the model says."""
        said_at_all: dict[int, str] = {}
        expected_at_all: dict[int, str] = {}
        for shard in self.shards:
            own = tuple(one for one in part.plays if self.owner_of(one[1].song_id) is shard)
            if not own:
                continue
            of_shard = dataclasses.replace(part, plays=own)
            [said] = shard.submit(of_shard, limits=Limits(now_ms=self.now))
            fine_ms = shard.state.tiers.borders(shard.state.newest_event_ms)[0]
            self.model.first_fine_ms = functools.partial(_always, fine_ms)
            expected = self.model.submit(of_shard, self.now, said.rejects)
            assert (said.duplicate, said.not_owner_slots, said.expired) == (again, set(), False)
            assert expected.duplicate == again
            said_at_all |= said.rejects
            expected_at_all |= expected.rejects
        assert said_at_all == expected_at_all
        if again:
            note("resent" if not said_at_all else "resent with rejects")

    # --- Questions ----------------------------------------------------------------------------------------------------

    def ask(self, window: Window, at_ms: int, chart: str, *, live: bool) -> None:
        """Each shard's answer is the tally's of its slots; a refusal is right, and the bounds that come of it work."""
        self.finish()
        tally, tiers = self.model.tally, self.model.tiers
        truth = tally.truth(window, at_ms, chart)
        for shard in self.shards:
            if live and window in shard.state.standing and truth.bounds is not None:
                shard.state.move_standing(window, truth.bounds)
        gap_ms = window.gap_ms if isinstance(window, SessionWindow) else 0
        scope = Scope(chart, truth.bounds, gap_ms, window if live else None)
        near = self.refusal(scope)
        if near is None:
            note(f"{type(window).__name__} answered")
            self.compare(scope, truth.ranked, truth.sessions)
            return
        note(f"{type(window).__name__} refused")
        assert not tally.has_to_answer(window, truth, tiers), (window, at_ms)
        if truth.bounds is not None and tiers.keep_all:
            while (wider := self.refusal(Scope(chart, near))) is not None:
                assert wider != near
                near = wider
            assert is_within(truth.bounds, near)
            assert is_within(near, tiers.around(truth.bounds, tally.newest_ms()))
            self.compare(Scope(chart, near), tally.ranked(chart, near), {})

    def refusal(self, scope: Scope) -> Bounds | None:
        """The least span around the bounds that shards name which refuse a scope; None: none does."""
        found: Bounds | None = None
        for shard in self.shards:
            try:
                query.top_k(shard.state, scope, 1)
            except OutOfRangeError as refusal:
                start, end = refusal.start_ms, refusal.end_ms
                found = Bounds(min(start, found.start_ms), max(end, found.end_ms)) if found else Bounds(start, end)
        return found

    def compare(self, scope: Scope, ranked: Ranked, sessions: dict[str, Bounds]) -> None:
        for shard in self.shards:
            own = [one for one in ranked if self.owner_of(one[0]) is shard]
            check_ranked(shard.state, scope, own, sessions, [*SONGS, "unheard of"], {1, 3, 10_000})
