"""The engine against the naive shard of tests/oracle.py: any traffic, then every question, also after recovery."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from tests.engine.engine_shard import DAY, NOW, EngineShard, append_request, check_answers, outcome_of
from tests.oracle import ModelPart, ShardModel, combined, slot_of, tumbling
from topk_grpc.engine import cells
from topk_grpc.engine.admission import Limits
from topk_grpc.engine.windows import bounds_of
from topk_grpc.model import ClusterSettings, Play, TumblingWindow

SLOTS = 8
TTL = 40_000
SONGS = (
    "a", "b", "ab", "a\0", "m", "z" * 128, "é", "e\u0301", "ÿ", "日本", "\uffee", "\U0001d11e", "\0", "~",
)  # fmt: skip
CHARTS = ("US", "DE", "rock", "é", "c" * 64)

TIMES = st.one_of(
    st.integers(NOW - 5_000, NOW + 5_000),
    st.integers(NOW - 5_000, NOW + 5_000),
    st.integers(-5_000, -1),
    st.sampled_from([-(1 << 60), -(1 << 59), 1, 946_684_799, 4_102_444_801, NOW - 400 * DAY]),
    st.integers(NOW + 295_000, NOW + 310_000),
)
HUGE_COUNTS = [1 << 30, 1 << 53, (1 << 55) - 8, 1 << 55]
COUNTS = st.one_of(*[st.integers(1, 4)] * 12, st.sampled_from(HUGE_COUNTS))
PLAYS = st.builds(
    Play,
    st.sampled_from(SONGS),
    TIMES,
    COUNTS,
    st.lists(st.sampled_from(CHARTS), unique=True, max_size=3).map(tuple),
)


@dataclass(frozen=True)
class Send:
    producer: int
    step: int  # of the sequence: 0 a resend of the newest, negative an older one
    permanent: bool
    plays: tuple[Play, ...]
    slots: frozenset[int]  # the part holds only the plays of these


@dataclass(frozen=True)
class Group:
    requests: tuple[tuple[Send, ...], ...]


@dataclass(frozen=True)
class Pass:
    milliseconds: int


@dataclass(frozen=True)
class Expire:
    pass


@dataclass(frozen=True)
class Snapshot:
    use_blocks: bool


@dataclass(frozen=True)
class Recover:
    heap_size: int


SENDS = st.builds(
    Send,
    st.integers(0, 2),
    st.sampled_from([1, 1, 1, 0, 0, -1, -63, -64, -65, 2, 64, 65, 200]),
    st.booleans(),
    st.lists(PLAYS, min_size=1, max_size=6).map(tuple),
    st.one_of(st.just(frozenset(range(SLOTS))), st.frozensets(st.integers(0, SLOTS - 1), min_size=1)),
)
GROUPS = st.builds(
    Group, st.lists(st.lists(SENDS, min_size=1, max_size=3).map(tuple), min_size=1, max_size=2).map(tuple)
)
STEPS = st.one_of(
    GROUPS,
    GROUPS,
    GROUPS,
    st.builds(Pass, st.integers(0, TTL * 2)),
    st.just(Expire()),
    st.builds(Snapshot, st.booleans()),
    st.builds(Recover, st.sampled_from([1, 3, 50])),
)


class Traffic:
    """Runs steps on the engine and on the model, and compares what they say."""

    def __init__(self, resolution_ms: int, heap_size: int, owned: frozenset[int], charts_max: int) -> None:
        self.shard = EngineShard(ClusterSettings(SLOTS, "ring", resolution_ms), heap_size, owned)
        self.model = ShardModel(SLOTS, owned, resolution_ms, ttl_ms=TTL, charts_max=charts_max)
        self.now = NOW
        self.batches: dict[tuple[int, int], tuple[int, tuple[tuple[int, Play], ...]]] = {}
        self.sequences = {0: 100, 1: 100, 2: 100}

    @property
    def limits(self) -> Limits:
        return Limits(now_ms=self.now, producer_ttl_ms=TTL, charts_max=self.model.charts_max)

    def part(self, send: Send) -> ModelPart:
        """A batch is the same whenever it is sent: same plays, same first_sent_ms."""
        sequence = max(1, self.sequences[send.producer] + send.step)
        self.sequences[send.producer] = max(self.sequences[send.producer], sequence)
        plays = tuple(combined(enumerate(send.plays), self.model.resolution_ms))
        first = (0 if send.permanent else self.now, plays)
        first_sent_ms, plays = self.batches.setdefault((send.producer, sequence), first)
        inside = tuple(one for one in plays if slot_of(one[1].song_id, SLOTS) in send.slots)
        return ModelPart(f"producer-{send.producer}", sequence, first_sent_ms, inside)

    def run(self, step: Group | Pass | Expire | Snapshot | Recover) -> None:
        match step:
            case Group(requests):
                parts = [[part for part in map(self.part, sends) if part.plays] for sends in requests]
                responses = self.shard.commit([append_request(request) for request in parts], self.limits)
                for request, response in zip(parts, responses, strict=True):
                    for part, outcome in zip(request, response.outcomes, strict=True):
                        expected = self.model.submit(part, self.now)
                        for word in ("duplicate", "expired", *expected.rejects.values()):
                            if word not in vars(expected) or vars(expected)[word]:
                                event(word)
                        assert outcome_of(outcome) == expected, part
            case Pass(milliseconds):
                self.now += milliseconds
            case Expire():
                assert self.shard.expire(self.now - TTL) == self.model.expire(self.now - TTL)
            case Snapshot(use_blocks):
                self.shard.take_snapshot(use_blocks=use_blocks)
            case Recover(heap_size):
                self.shard.recover(heap_size)

    def check(self) -> None:
        resolution = self.model.resolution_ms
        panes = {
            bounds_of(TumblingWindow(size * resolution, offset * resolution), at, resolution)
            for size, offset, at in ((1, 0, NOW), (3, 1, NOW - 3_000), (1000, 7, -1), (400, 0, NOW + 299_999))
        }
        check_answers(self.shard.state, self.model.tally, [pane for pane in panes if pane], extra_ks=(3,))


@settings(max_examples=100, deadline=None)
@given(
    steps=st.lists(STEPS, min_size=1, max_size=14),
    resolution_ms=st.sampled_from([1000, 1, 60_000]),
    heap_size=st.sampled_from([1, 3, 50]),
    owned=st.one_of(st.just(frozenset(range(SLOTS))), st.frozensets(st.integers(0, SLOTS - 1), min_size=3)),
    charts_max=st.sampled_from([10_000, 3]),
    chunk_cells=st.sampled_from([3, 1 << 10]),
    forget=st.booleans(),
)
def test_any_traffic_is_decided_counted_and_recovered_as_the_naive_shard_does(
    steps: list[Group | Pass | Expire | Snapshot | Recover],
    resolution_ms: int,
    heap_size: int,
    owned: frozenset[int],
    charts_max: int,
    chunk_cells: int,
    forget: bool,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "CHUNK_CELLS", chunk_cells)
        traffic = Traffic(resolution_ms, heap_size, owned, charts_max)
        for step in steps:
            traffic.run(step)
        check_answers(traffic.shard.state, traffic.model.tally, [])
        traffic.run(Recover(heap_size))
        traffic.check()
        if forget:
            traffic.run(Pass(TTL + 1))
            traffic.run(Expire())
            traffic.run(Recover(heap_size))
        # Every batch once more: what had come whole is a duplicate, with the rejects of then, or its producer expired.
        for (producer, sequence), (_, plays) in traffic.batches.items():
            resend = Send(
                producer,
                sequence - traffic.sequences[producer],
                False,
                tuple(play for _, play in plays),
                frozenset(range(SLOTS)),
            )
            traffic.run(Group(((resend,),)))
        check_answers(traffic.shard.state, traffic.model.tally, [])


@given(size=st.integers(1, 10**10), offset=st.integers(-(10**10), 10**10), at=st.integers(-(1 << 60), 1 << 60))
def test_tumbling_bounds_are_the_pane_that_holds_the_instant(size: int, offset: int, at: int) -> None:
    assert bounds_of(TumblingWindow(size, offset), at, 1) == tumbling(size, offset, at)
