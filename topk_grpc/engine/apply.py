"""Counting what was admitted, live and from the log.

The live path applies the parts that `admission` has decided, after their record is on disk. Replay reads the same bytes
back, follows the record's verdicts, and ends in the same state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from topk_grpc.engine.admission import Admission, Part, read_request
from topk_grpc.engine.state import CHARTS, GLOBAL, ShardState
from topk_grpc.errors import InvalidArgumentError
from topk_grpc.kernels.counters import expand_charts
from topk_grpc.kernels.hash import hash_strings
from topk_grpc.kernels.marks import touch_slots
from topk_grpc.kernels.wire import message_spans
from topk_grpc.pb.topk.v1 import shard_service_pb2 as pb

LATE_MS: Final = 300_000
"""How far a play may be behind the newest one before it is called late: windows are final after that by default."""


def apply(state: ShardState, admission: Admission, between: Callable[[], None] | None = None) -> None:
    """Counts the plays of an admitted request.

    Args:
        state: the shard's.
        admission: of the request.
        between: called after each part; the state is whole then.
    """
    for part in admission.parts:
        if part.changes:
            state.late_plays += _late_plays(state, part)
            apply_part(state, admission.request, part)
            state.pending_plays -= part.plays
            if between is not None:
                between()


def _late_plays(state: ShardState, part: Part) -> int:
    columns, before_ms = part.columns, state.newest_event_ms - LATE_MS
    if state.oldest_event_ms is None or not columns.count or int(columns.times_ms.min()) >= before_ms:
        return 0
    late = (columns.times_ms < before_ms) & (columns.counts > 0)
    if part.chosen is not None:
        late &= part.chosen == 1
    return int(columns.counts[late].sum())


def apply_part(state: ShardState, request: bytes | memoryview, part: Part) -> None:
    """Counts the chosen plays of one part; corrections behind all others."""
    if not part.corrects:
        _count(state, request, part, part.chosen)
        return
    chosen = np.ones(part.columns.count, np.uint8) if part.chosen is None else part.chosen
    for turn in (part.columns.counts > 0, part.columns.counts < 0):
        _count(state, request, part, chosen * turn.astype(np.uint8))


def _count(state: ShardState, request: bytes | memoryview, part: Part, chosen: NDArray[np.uint8] | None) -> None:
    columns = part.columns
    starts, sizes, hashes = columns.song_starts, columns.song_sizes, part.hashes
    times, counts = columns.times_ms, columns.counts
    if chosen is not None:
        rows = np.flatnonzero(chosen)
        starts, sizes, hashes, times, counts = starts[rows], sizes[rows], hashes[rows], times[rows], counts[rows]
    if not len(starts):
        return
    songs = state.songs.add(request, starts, sizes, hashes)
    buckets = times // state.settings.resolution_ms
    state.note_times(int(times.min()), int(times.max()))
    board = state.boards[GLOBAL]
    board.add(
        songs, np.zeros(len(songs), np.int32), buckets, counts, state.songs_of(GLOBAL), state.songs, len(state.songs)
    )
    if columns.charts_used:
        chosen = np.ones(columns.count, np.uint8) if chosen is None else chosen
        _count_in_charts(state, part, chosen, songs, buckets, counts)


def _count_in_charts(  # noqa: PLR0917
    state: ShardState,
    part: Part,
    chosen: NDArray[np.uint8],
    songs: NDArray[np.int32],
    buckets: NDArray[np.int64],
    counts: NDArray[np.int64],
) -> None:
    columns = part.columns
    used = columns.charts_used
    pair_charts, pair_songs = np.empty(used, np.int32), np.empty(used, np.int32)
    pair_buckets, pair_counts = np.empty(used, np.int64), np.empty(used, np.int64)
    pairs = expand_charts(
        chosen, columns.chart_bounds, part.chart_numbers, songs, buckets, counts,
        pair_charts, pair_songs, pair_buckets, pair_counts, columns.count,
    )  # fmt: skip
    if not pairs:
        return
    entries = state.pairs.add(pair_charts[:pairs], pair_songs[:pairs])
    state.boards[CHARTS].add(
        entries,
        pair_charts[:pairs],
        pair_buckets[:pairs],
        pair_counts[:pairs],
        state.songs_of(CHARTS),
        state.songs,
        len(state.pairs),
        state.pairs.charts,
    )


def replay(state: ShardState, payload: memoryview) -> int:
    """Does again what an AppendRecord of the log did.

    Returns:
        When it was admitted, milliseconds since the epoch.

    Raises:
        InvalidArgumentError: the record holds no AppendRecord; its checksum was right, so a defect wrote it.
    """
    spans, _ = message_spans(payload, 0, len(payload), 1)
    if len(spans) != 1:
        raise InvalidArgumentError("a log record of type append does not hold one request")
    start, end = spans[0].tolist()
    request = payload[start:end]
    rest = pb.AppendRecord.FromString(bytes(payload[end:]))
    parts = read_request(request).parts
    verdicts = {verdict.batch: verdict for verdict in rest.verdicts}
    for index, part in enumerate(parts):
        verdict = verdicts.get(index)
        if verdict is not None and verdict.refusal:
            continue
        _follow(state, request, part, verdict, rest.admitted_ms)
        apply_part(state, request, part)
    return rest.admitted_ms


def _follow(state: ShardState, request: memoryview, part: Part, verdict: pb.Verdict | None, admitted_ms: int) -> None:
    """Sets the marks of a part, and chooses its plays, as the verdict says."""
    columns = part.columns
    slots = np.empty(columns.count, np.int32)
    touched = np.zeros(state.settings.slots, np.uint8)
    touch_slots(part.slot_keys(request, state.settings), columns.count, slots, touched)
    if verdict is not None:
        touched[list(verdict.skipped_slots)] = 0
        part.chosen = touched[slots]
        if verdict.rejected_indexes:
            part.chosen[np.isin(columns.indexes, np.array(verdict.rejected_indexes, np.uint32))] = 0
    if touched.any():
        producer = state.producers.get_or_add(part.producer_id(request))
        state.producers.marks.decide(touched, np.ones_like(touched), producer.number, columns.sequence)
        state.producers.seen(producer, max(admitted_ms, columns.first_sent_ms), permanent=not columns.first_sent_ms)
        if verdict is not None:
            reasons = (int(reason) for reason in verdict.rejected_reasons)
            rejects = list(zip(verdict.rejected_indexes, reasons, strict=True))
            state.producers.remember_rejects(producer, columns.sequence, rejects)
    if columns.charts_used:
        used = columns.charts_used
        starts, sizes = columns.chart_starts[:used], columns.chart_sizes[:used]
        numbers = np.full(used, -1, np.int32)
        chosen = np.ones(columns.count, bool) if part.chosen is None else part.chosen == 1
        wanted = np.repeat(chosen, np.diff(columns.chart_bounds))
        if part.corrects:  # those of corrections are known by then: so charts are numbered as they were at admission
            plays = np.repeat(columns.counts > 0, np.diff(columns.chart_bounds))
            named = [wanted & plays, wanted & ~plays]
        else:
            named = [wanted]
        for some in named:
            numbers[some] = state.charts.add(
                request,
                starts[some],
                sizes[some],
                hash_strings(request, starts[some], sizes[some]),  # type: ignore[arg-type]
            )
        part.chart_numbers = numbers
