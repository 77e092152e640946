"""A shard without disk or network: the engine with a list for a log. Shared by the tests of this folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tests.oracle import ModelOutcome, ModelPart, Ranked, ShardModel, Tally
from topk_grpc.engine import query
from topk_grpc.engine.admission import Admission, Limits, admit, read_request
from topk_grpc.engine.apply import apply, replay
from topk_grpc.engine.cells import choose_merges, ordered_cells
from topk_grpc.engine.deletion import Deleted, delete, plays_of
from topk_grpc.engine.query import Scope
from topk_grpc.engine.state import ShardState
from topk_grpc.engine.tiers import parse_tiers
from topk_grpc.model import Bounds, ClusterSettings, Window
from topk_grpc.pb.topk.v1 import shard_service_pb2 as pb

NOW = 1_700_000_000_000
DAY = 86_400_000

REASONS = {
    pb.REJECT_REASON_IN_FUTURE: "IN_FUTURE",
    pb.REJECT_REASON_CHART_LIMIT: "CHART_LIMIT",
    pb.REJECT_REASON_MEMORY_LIMIT: "MEMORY_LIMIT",
    pb.REJECT_REASON_TOTAL_OVERFLOW: "TOTAL_OVERFLOW",
    pb.REJECT_REASON_NEGATIVE_BUCKET: "NEGATIVE_BUCKET",
}


def append_request(parts: Iterable[ModelPart], request_id: int = 1) -> bytes:
    """An AppendRequest by protobuf's own writer."""
    request = pb.AppendRequest(request_id=request_id, epoch=3)
    for part in parts:
        batch = request.batches.add(
            producer_id=part.producer_id, sequence=part.sequence, first_sent_ms=part.first_sent_ms
        )
        for index, play in part.plays:
            added = batch.plays.add(
                song_id=play.song_id, played_at_ms=play.played_at_ms, charts=play.charts, index=index
            )
            if play.count != 1 or index % 2:  # a count of 1 may be written or left out
                added.count = play.count
    return request.SerializeToString()


def outcome_of(message: pb.BatchOutcome) -> ModelOutcome:
    reasons = [REASONS[reason] for reason in message.rejected_reasons]
    assert len(set(message.rejected_indexes)) == len(message.rejected_indexes)
    return ModelOutcome(
        message.duplicate,
        set(message.not_owner_slots),
        dict(zip(message.rejected_indexes, reasons, strict=True)),
        message.refusal == pb.REFUSAL_PRODUCER_EXPIRED,
    )


class EngineShard:
    def __init__(self, settings: ClusterSettings, heap_size: int, owned: Iterable[int], tiers: str = "") -> None:
        self.settings, self.heap_size, self.owned = settings, heap_size, sorted(owned)
        self.tiers = parse_tiers(tiers, settings.resolution_ms) if tiers else None
        self.state = self._new_state()
        # An int: producers idle before that time are forgotten. A tuple: these windows stand. A text: the song is gone.
        self.log: list[Any] = []
        self._snapshot: tuple[int, str, dict[str, Any], dict[str, dict[int, Any]]] | None = None

    def commit(self, requests: Sequence[bytes], limits: Limits) -> list[pb.AppendResponse]:
        """A group: all are admitted, then logged, then applied; what takes plays back finds all before it applied."""
        admissions: list[Admission] = []
        applied = 0

        def take_through() -> None:
            nonlocal applied
            self.log += [b"".join(admission.payload) for admission in admissions[applied:] if admission.payload]
            for admission in admissions[applied:]:
                apply(self.state, admission)
            applied = len(admissions)

        for request in requests:
            read = read_request(request)
            if read.corrects:
                take_through()
            admissions.append(admit(self.state, read, limits))
        take_through()
        return [pb.AppendResponse.FromString(admission.response()) for admission in admissions]

    def submit(self, *parts: ModelPart, limits: Limits | None = None) -> list[ModelOutcome]:
        (response,) = self.commit([append_request(parts, 7)], limits or Limits(now_ms=NOW))
        assert response.request_id == 7
        return [outcome_of(outcome) for outcome in response.outcomes]

    def expire(self, before_ms: int) -> int:
        idle = self.state.producers.idle_since(before_ms)
        if idle:
            self.log.append(before_ms)
            self.state.producers.forget_idle(before_ms)
        return idle

    def _new_state(self) -> ShardState:
        state = ShardState(self.settings, self.heap_size, self.tiers)
        state.own(self.owned)
        return state

    def let_stand(self, windows: tuple[Window, ...]) -> None:
        """These windows are kept up to date from here on, and no others."""
        self.log.append(windows)
        self._let_stand(windows)

    def _let_stand(self, windows: tuple[Window, ...]) -> None:
        self.state.configure(self.state.tiers.tiers, windows)

    def delete_song(self, song_id: str) -> Deleted:
        had = plays_of(self.state, song_id)
        self.log.append(song_id)
        delete(self.state, song_id)
        return had

    def take_snapshot(self, *, use_blocks: bool) -> None:
        """As a shard does, blocks included; `use_blocks`: the live state goes on with them, as it does afterwards."""
        meta, arrays = self.state.to_snapshot()
        blocks: dict[str, dict[int, Any]] = {}
        roll_up = self.state.roll_up
        for name, board in self.state.boards.items():
            cells = board.cells
            kept = dict(cells.blocks)
            for index, merged in enumerate(choose_merges(cells.take_chunks(), kept, cells.done, roll_up)):
                number = 2 * len(self.log) + 2 + index
                whole = merged.cells(roll_up)
                for old in merged.blocks:
                    del kept[old]
                block = None
                if len(whole):
                    # Read-only and little more than bytes, as storage gives them back.
                    columns = {
                        column: np.frombuffer(array.tobytes(), array.dtype) for column, array in whole.columns().items()
                    }
                    kept[number] = block = ordered_cells(columns)
                    meta["blocks_rolled_up"][name][str(number)] = roll_up.borders
                if use_blocks:
                    cells.replace(merged, number, block, roll_up.borders)
            blocks[name] = {number: dict(one.columns()) for number, one in kept.items()}
        copies = {
            name: np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape) for name, array in arrays.items()
        }
        self._snapshot = (len(self.log), json.dumps(meta), copies, blocks)

    def recover(self, heap_size: int | None = None) -> None:
        """Begins again from the last snapshot, if there is one, and the log behind it."""
        self.heap_size = heap_size or self.heap_size
        position = 0
        if self._snapshot is None:
            self.state = self._new_state()
        else:
            position, meta, arrays, blocks = self._snapshot
            self.state = ShardState.from_snapshot(self.settings, self.heap_size, json.loads(meta), arrays, blocks)
        for record in self.log[position:]:
            self.replay(record)

    def replay(self, record: Any) -> None:
        if isinstance(record, int):
            self.state.producers.forget_idle(record)
        elif isinstance(record, str):
            delete(self.state, record)
        elif isinstance(record, tuple):
            self._let_stand(record)
        else:
            replay(self.state, memoryview(record))


def check_answers(state: ShardState, tally: Tally, panes: Iterable[Bounds], extra_ks: Iterable[int] = ()) -> None:
    """Holds everything that can be asked against the tally."""
    charts = tally.charts()
    found = {name: (totals.plays, totals.songs) for name, totals in query.charts(state)}
    assert found == charts
    assert state.newest_event_ms == tally.newest_ms()
    for chart in ["", *charts, "never heard of"]:
        for bounds in [None, *panes]:
            check_scope(state, tally, Scope(chart, bounds), extra_ks)


def check_scope(state: ShardState, tally: Tally, scope: Scope, extra_ks: Iterable[int] = ()) -> None:
    ranked = tally.ranked(scope.chart, scope.bounds)
    asked = [*sorted({play.song_id for play in tally.plays}), "unheard of", ""]
    check_ranked(state, scope, ranked, {}, asked, {1, len(ranked), 10_000, *extra_ks} - {0})


def check_ranked(
    state: ShardState,
    scope: Scope,
    ranked: Ranked,
    sessions: Mapping[str, Bounds],
    asked: Sequence[str],
    ks: Iterable[int],
) -> None:
    """Everything that can be asked about a scope: `ranked` are all its songs, `sessions` how far theirs reach."""

    def check(said: query.Ranked, expected: Ranked) -> None:
        assert list(zip(said.song_ids, said.counts, strict=True)) == expected
        if scope.gap_ms:
            assert said.sessions is not None
            spans = zip(said.song_ids, said.sessions, said.counts, strict=True)
            assert all(span == sessions[song_id] for song_id, span, count in spans if count)

    totals = (sum(count for _, count in ranked), len(ranked))
    for k in ks:
        best, said = query.top_k(state, scope, k)
        check(best, ranked[:k])
        assert (said.plays, said.songs) == totals
    said = query.totals(state, scope)
    assert (said.plays, said.songs) == totals

    counts = dict(ranked)
    answered, said = query.counts_of(state, scope, asked)
    check(answered, [(song_id, counts.get(song_id, 0)) for song_id in asked])
    assert (said.plays, said.songs) == totals

    # Places of this shard's songs, those also where they were with more or fewer plays, and of other shards' songs
    # between, before and behind them.
    moved = [(song_id, count + by) for song_id, count in ranked[:2] for by in (-1, 2) if count + by > 0]
    places = [*ranked[:3], *ranked[-1:], *moved, ("", 1), ("zz\U0010ffff", 1), ("m", 3), ("é", 1 << 55)]
    for neighbours in (0, 2, 100):
        standings, said = query.standings(state, scope, places, neighbours)
        assert (said.plays, said.songs) == totals
        for place, standing in zip(places, standings, strict=True):
            key = (-place[1], place[0].encode())
            others = [one for one in ranked if one[0] != place[0]]
            above = [one for one in others if (-one[1], one[0].encode()) < key]
            below = [one for one in others if (-one[1], one[0].encode()) > key]
            assert standing.above_count == len(above)
            if neighbours:
                check(standing.above, above[-neighbours:])
                check(standing.below, below[:neighbours])
            else:
                assert not standing.above.song_ids + standing.below.song_ids


def check_outcomes(model: ShardModel, parts: Sequence[ModelPart], said: Sequence[ModelOutcome], now_ms: int) -> None:
    for part, outcome in zip(parts, said, strict=True):
        assert outcome == model.submit(part, now_ms), part
