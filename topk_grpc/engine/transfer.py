"""Moving slots: all that a shard knows of some slots is taken out, put into another shard's state, and dropped here.

Theory of operation. An *image* (slots_image.py) holds, of some slots: the songs with plays, their (chart, song) entries
with the plays of all time, all their cells in the grain that they are kept in, their standing sessions, the marks of
the slots and what is known of the producers that set them. With it goes what gives the cells their meaning: the time
of the shard's newest and oldest play, its tiers with their floors, its standing windows.

Importing makes the target what it would be if it had counted these plays itself, and nothing that it answers may be
finer than what either side still knows:

- *Tiers.* The target takes over the later newest event time, and floors where the source's borders stood. So cells
  that were rolled up lie before a border, and no window is cut through them. What the last tier had dropped counts for
  all time only.
- *Standing windows.* The union of both sides' stands. A window of the target that the source's cells can be cut for
  counts the new entries' cells right away; any other is folded, and counted anew where it can be cut again.
- *Standing sessions* cannot be found again from cells once these are rolled up, so they travel. Both sides are brought
  to the later position first, each by what it knew before: the target's entries by its own cells, the image's by those
  of the image and the source's borders. Then the columns are joined. Where a side does not stand (a gap that stood on
  one side only, say) it begins there, as sessions always begin; if its cells do not tell enough, they fold on the
  target.
- *Names.* Songs, charts and pairs get the target's numbers; a song from an earlier ownership is known and has no plays.
- *Producers.* Marks are exact per slot, so those of the image are new to the target. The producer may be known: it was
  seen at the later of both times, and the rejects of both are kept, so that a resend's answer repeats them.

Dropping takes all plays of the slots' entries back (deletion.py), forgets their marks, and the producers that have no
others. The songs stay interned. Times, tiers and standing windows stay as they are.

All of it is a function of the state and the image, with no clock: a shard logs the image and replays the import. Where
a partitioner gives slots to batches (`round_robin`), counts belong to none: only producers and marks are moved and
dropped.

Rejected: handing over what a snapshot holds, by slot. Its columns are in the order of the source's numbers, so they
would have to be renumbered by the target with the source's tables at hand; and cells would come in blocks of either
grain.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from topk_grpc.engine.boards import Board
from topk_grpc.engine.cells import Cells, CellStore, merge, no_cells
from topk_grpc.engine.deletion import entries_of, remove
from topk_grpc.engine.rankings import Ranking
from topk_grpc.engine.session_spans import SessionSpan
from topk_grpc.engine.slot_totals import SlotTotals, chosen_slots, chosen_songs, image_totals, slot_totals
from topk_grpc.engine.slots_image import (
    ImageBoard,
    ImageMarks,
    ImageProducer,
    ImageSessions,
    SlotsImage,
    read_image,
    write_image,
)
from topk_grpc.engine.state import CHARTS, GLOBAL, ShardState, check_settings
from topk_grpc.engine.tiers import RollUp
from topk_grpc.errors import InvalidArgumentError, ResourceExhaustedError
from topk_grpc.model import COUNT_MAX, Bounds, SessionWindow, Window

__all__ = [
    "SlotTotals",
    "SlotsImage",
    "can_import",
    "drop_slots",
    "export_slots",
    "image_totals",
    "import_slots",
    "read_image",
    "slot_totals",
]


# --- Export -----------------------------------------------------------------------------------------------------------


def export_slots(state: ShardState, slots: Sequence[int]) -> bytes:
    """The image of some slots.

    Args:
        state: of the source; it is not changed. Everything admitted has been applied.
        slots: at least one.
    """
    wanted = chosen_slots(state, slots)
    entries = entries_of(state, chosen_songs(state, wanted))
    charted = entries[CHARTS]
    of_songs, of_charts = state.pairs.songs[charted], state.pairs.charts[charted]
    songs, song_places = _renumbered(len(state.songs), entries[GLOBAL], of_songs)
    charts, chart_places = _renumbered(len(state.charts), of_charts)
    in_global = np.zeros(len(entries[GLOBAL]), np.int32)
    boards = {
        GLOBAL: _export_board(state, GLOBAL, slots, entries[GLOBAL], in_global, song_places[entries[GLOBAL]]),
        CHARTS: _export_board(
            state, CHARTS, slots, charted, chart_places[of_charts] + np.int32(1), song_places[of_songs]
        ),
    }
    producers, marks = _export_marks(state, wanted)
    song_ids, starts, sizes = _export_songs(state, songs)
    return write_image(
        SlotsImage(
            tuple(sorted(set(slots))),
            state.settings,
            state.newest_event_ms,
            state.oldest_event_ms,
            state.tiers,
            song_ids,
            starts,
            sizes,
            np.empty(0, np.uint64),
            state.charts.texts(charts),
            boards,
            producers,
            marks,
        )
    )


def _renumbered(count: int, *used: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The numbers below `count` that are used, ascending, and for each number its place among them."""
    flags = np.zeros(count, np.bool_)
    for numbers in used:
        flags[numbers] = True
    return np.flatnonzero(flags).astype(np.int32), np.cumsum(flags, dtype=np.int32) - np.int32(1)


def _export_songs(
    state: ShardState, songs: NDArray[np.int32]
) -> tuple[bytes, NDArray[np.int64], NDArray[np.int32]]:  # fmt: skip
    """The song ids one behind the other, where each begins, and its bytes."""
    table = state.songs
    begins = table.starts[songs]
    sizes = table.arena[begins - 2].astype(np.int32) | table.arena[begins - 1].astype(np.int32) << 8
    stops = np.cumsum(sizes, dtype=np.int64)
    starts = stops - sizes
    total = int(stops[-1]) if len(stops) else 0
    places = np.arange(total) + np.repeat(begins - starts, sizes)
    return table.arena[places].tobytes(), starts, sizes


def _export_board(  # noqa: PLR0917
    state: ShardState,
    name: str,
    slots: Sequence[int],
    entries: NDArray[np.int32],
    charts: NDArray[np.int32],
    songs: NDArray[np.int32],
) -> ImageBoard:
    board = state.boards[name]
    counts = board.counts_of(entries)
    sessions: dict[Window, ImageSessions] = {}
    for window in state.standing:
        span = board.sessions.get(window)
        if span is not None and span.end is not None:
            held, columns, uncertain = span.of_entries(entries)
            sessions[window] = ImageSessions(
                span.end, span.settled, held.astype(np.int32), columns, uncertain.astype(np.int32)
            )
    return ImageBoard(charts, songs, counts, _export_cells(board, slots, entries, state.roll_up), sessions)


def _export_cells(board: Board, slots: Sequence[int], entries: NDArray[np.int32], roll_up: RollUp) -> Cells:
    """The entries' cells as a snapshot taken now would keep them, each entry under its place."""
    numbers = np.full(len(board), -1, np.int32)
    numbers[entries] = np.arange(len(entries), dtype=np.int32)
    parts = list(board.cells.of_entries(numbers, slots)) if len(entries) else []
    return merge(parts, roll_up) if parts else no_cells()


def _export_marks(state: ShardState, wanted: NDArray[np.bool_]) -> tuple[list[ImageProducer], ImageMarks]:
    marks = state.producers.marks.of_slots(wanted)
    numbers, which = np.unique(marks["producers"], return_inverse=True)
    producers = [
        ImageProducer(name, one.last_seen_ms, one.permanent, one.rejects)
        for name, one in state.producers.with_marks(numbers)
    ]
    return producers, ImageMarks(
        which.astype(np.int32), marks["slots"].astype(np.int32), marks["highest"], marks["bitmaps"]
    )


# --- Import -----------------------------------------------------------------------------------------------------------


def can_import(state: ShardState, image: SlotsImage, charts_max: int, memory_bytes_max: int) -> None:
    """Refuses an image that this shard cannot take in. Asked once, before it is logged; replay does not ask again.

    Args:
        state: of the target.
        image: from `read_image`.
        charts_max: the most charts of a shard.
        memory_bytes_max: the budget; 0 is none.

    Raises:
        ForeignDirectoryError: it comes from a cluster with other slots, partitioner or resolution.
        InvalidArgumentError: this shard has plays or marks of these slots already.
        ResourceExhaustedError: charts, memory or the largest total would not suffice.
    """
    check_settings(image.settings, state.settings)
    own = slot_totals(state, image.slots)
    held = [slot for slot, entries, marks in zip(own.slots, own.entries, own.marks, strict=True) if entries or marks]
    if held:
        raise InvalidArgumentError(
            f"this shard has plays or marks of slots {held[:10]} already: it would count them twice; they have to be"
            " dropped first"
        )
    fresh = int(np.count_nonzero(state.charts.find_texts(list(image.charts)) < 0)) if image.charts else 0
    if fresh and len(state.charts) - 1 + fresh > charts_max:
        raise ResourceExhaustedError(
            f"the slots bring {fresh} charts that this shard does not know, it has {len(state.charts) - 1} of at most"
            f" {charts_max}: raise --charts-max, or move the slots to another shard"
        )
    total = state.boards[GLOBAL].totals(0)[0] + state.pending_plays
    if total + image.plays > COUNT_MAX:
        raise ResourceExhaustedError(
            f"the slots bring {image.plays} plays to {total}: a shard counts at most {COUNT_MAX}; move them elsewhere"
        )
    needed = state.memory_bytes + image.memory_bytes
    if memory_bytes_max and needed > memory_bytes_max:
        raise ResourceExhaustedError(
            f"with these slots the shard would need about {needed >> 20} MiB of a budget of {memory_bytes_max >> 20}:"
            " raise --memory-bytes-max, or move fewer slots or to another shard"
        )


def import_slots(state: ShardState, image: SlotsImage) -> None:
    """Takes an image in; whether the slots are owned is another matter.

    Args:
        state: of the target, which has no plays and no marks of these slots.
        image: from `read_image`.
    """
    _import_producers(state, image)
    windows = list(dict.fromkeys([*state.standing, *image.tiers.standing]))
    if windows != list(state.standing):
        state.configure(state.tiers.tiers, windows)
    joined = {name: _join_positions(state, name, board, image) for name, board in image.boards.items()}
    if any(len(board) for board in image.boards.values()):
        state.tiers = state.tiers.joined(image.tiers, image.newest_event_ms)
        _fold_uncut(state, image)
    if image.oldest_event_ms is not None:
        state.note_times(image.oldest_event_ms, image.newest_event_ms)
    songs = state.songs.add(image.song_ids, image.song_starts, image.song_sizes, image.song_hashes)
    charts = np.append(np.zeros(1, np.int32), state.charts.add_texts(list(image.charts)) if image.charts else [])
    for name, told in image.boards.items():  # the global board has a row for each song, with plays or without
        of_charts = charts[told.charts].astype(np.int32)
        entries = songs[told.songs]
        if name == CHARTS:
            entries = state.pairs.add(of_charts, entries)
        own = entries[told.cells.entries]
        cells = Cells(told.cells.buckets, own, told.cells.counts, told.cells.first, told.cells.last, ordered=True)
        board = state.boards[name]
        board.take_in(
            entries, of_charts, told.counts, cells, state.songs_of(name), state.songs,
            len(state.songs) if name == GLOBAL else len(state.pairs),
            state.pairs.charts if name == CHARTS else state.songs_of(GLOBAL),
        )  # fmt: skip
        for window, arrived in joined[name].items():
            board.join_sessions(
                board.sessions[window], arrived.settled,
                entries[arrived.entries], arrived.columns, entries[arrived.uncertain],
            )  # fmt: skip


def _import_producers(state: ShardState, image: SlotsImage) -> None:
    numbers = np.zeros(len(image.producers), np.uint64)
    for place, one in enumerate(image.producers):
        known = state.producers.join(one.producer_id, one.last_seen_ms, one.rejects, permanent=one.permanent)
        numbers[place] = known.number
    marks = image.marks
    state.producers.marks.enter(
        numbers[marks.producers], marks.slots.astype(np.uint64), marks.highest, marks.bitmaps
    )  # fmt: skip


def _fold_uncut(state: ShardState, image: SlotsImage) -> None:
    """Folds the standing windows for which the image's cells are too coarse."""
    resolution = state.settings.resolution_ms
    for window in state.standing:
        for board in state.boards.values():
            span = board.spans.get(window)
            if span is None or span.start == span.end:
                continue
            bounds = Bounds(span.start * resolution, span.end * resolution)
            if image.tiers.exact_span(bounds, image.newest_event_ms, image.oldest_event_ms) != bounds:
                board.move_span(span, 0, 0)


def _join_positions(
    state: ShardState, name: str, told: ImageBoard, image: SlotsImage
) -> dict[Window, ImageSessions]:  # fmt: skip
    """Brings the target's sessions and the image's to one position, each by what it knows.

    Returns:
        The image's sessions there. The target's of windows that are not among them stand nowhere.
    """
    board = state.boards[name]
    joined: dict[Window, ImageSessions] = {}
    if not len(told):
        return joined
    state.look_back()
    for window in [one for one in state.standing if isinstance(one, SessionWindow)]:
        span, kept = board.sessions[window], told.sessions.get(window)
        ends = [end for end in (span.end, None if kept is None else kept.end) if end is not None]
        if not ends:
            continue
        board.move_sessions(span, max(ends))
        arrived = _advanced(told, kept, span.gap, max(ends), image)
        if span.end is None or arrived is None:
            board.fold_sessions(span)
        else:
            joined[window] = arrived
    return joined


def _advanced(
    told: ImageBoard, kept: ImageSessions | None, gap: int, end: int, image: SlotsImage
) -> ImageSessions | None:
    """The image's sessions at a later position, or begun there; None where they cannot be known."""
    past, known = image.past, len(told)
    span = SessionSpan(Ranking(0, 1), gap, lambda entries: told.counts[entries])
    store = CellStore()
    if len(told.cells):
        store.restore_blocks({0: told.cells}, {})
    if kept is not None and kept.end >= past.finest:
        columns = np.zeros((4, known), np.int64)
        columns[:, kept.entries] = kept.columns
        meta = {
            "end": kept.end, "low": kept.end - 1 - gap, "settled": kept.settled, "uncertain": kept.uncertain.tolist()
        }  # fmt: skip
        span.restore(meta, columns, _count_nowhere)
    span.move(store, end, known, past, _count_nowhere)
    if span.end is None:
        return None
    held, columns, uncertain = span.of_entries(np.arange(known, dtype=np.int32))
    return ImageSessions(end, span.settled, held.astype(np.int32), columns, uncertain.astype(np.int32))


def _count_nowhere(entries: NDArray[np.int32], counts: NDArray[np.int64]) -> None:
    """These sessions have no ranking."""


# --- Dropping ---------------------------------------------------------------------------------------------------------


def drop_slots(state: ShardState, slots: Sequence[int]) -> None:
    """Forgets some slots: their plays, their marks, and producers that have no marks elsewhere.

    Args:
        state: of the source. Everything admitted has been applied.
        slots: at least one.
    """
    wanted = chosen_slots(state, slots)
    remove(state, entries_of(state, chosen_songs(state, wanted)), slots)
    state.producers.forget_slots(wanted)
