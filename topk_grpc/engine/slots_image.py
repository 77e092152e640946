"""The image of some slots: what one shard hands to another, and how it is read.

An image is a protobuf message (`SlotsImage` in shard_service.proto) of columns. It numbers songs, charts and entries
among themselves, so it means the same wherever it is read. It comes from another process, and is logged by the shard
that takes it in: so it is held against itself when it is read, whole, once. Whatever is used as an index, an offset or
a size lies within what it points into, each song belongs to one of the slots, and the cells of an entry never hold more
plays than it has. What is merely wrong, another count or another name, is found by comparing totals: slot_totals.py.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray

from topk_grpc.engine.cells import Cells
from topk_grpc.engine.sessions import Past
from topk_grpc.engine.soundness import SUM_MAX, check_cells, check_standing, check_times, integer, require, within
from topk_grpc.engine.state import CHARTS, GLOBAL
from topk_grpc.engine.tiers import Tiers, parse_tiers
from topk_grpc.errors import InvalidArgumentError, VersionError
from topk_grpc.kernels.counters import sum_cells
from topk_grpc.kernels.encode import varint
from topk_grpc.kernels.hash import hash_strings
from topk_grpc.model import TIME_MS_MAX, ClusterSettings, SessionWindow, Window, parse_window
from topk_grpc.pb.topk.v1 import shard_service_pb2 as pb
from topk_grpc.ring.partitioners import partitioner_of

IMAGE_VERSION: Final = 1

Pieces = list[bytes | memoryview]
"""Bytes, to be joined."""

_LENGTH_DELIMITED: Final = 2
_NAME_BYTES_MAX: Final = (1 << 16) - 1
_BUCKET_MIN: Final = -4 * TIME_MS_MAX


@dataclass(frozen=True, slots=True, eq=False)
class ImageSessions:
    """Standing sessions of some entries.

    Attributes:
        end, settled: as in `SessionSpan`.
        entries: that have one, ascending, int32[n].
        columns: int64[4, n], as in `SessionSpan`.
        uncertain: those of them that are not known for certain, int32.
    """

    end: int
    settled: int
    entries: NDArray[np.int32]
    columns: NDArray[np.int64]
    uncertain: NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class ImageBoard:
    """The entries of a board that have plays.

    Attributes:
        charts, songs: of each entry, int32[n], numbered as in the image; chart 0 is the global one.
        counts: their plays of all time, int64[n].
        cells: their plays by time, ordered, each entry under its number in the image; none of them 0.
        sessions: those that stand somewhere.
    """

    charts: NDArray[np.int32]
    songs: NDArray[np.int32]
    counts: NDArray[np.int64]
    cells: Cells
    sessions: Mapping[Window, ImageSessions]

    def __len__(self) -> int:
        return len(self.counts)


@dataclass(frozen=True, slots=True, eq=False)
class ImageProducer:
    """A producer with marks in the slots; the attributes are those of `producers.Producer`."""

    producer_id: bytes
    last_seen_ms: int
    permanent: bool
    rejects: Mapping[int, array[int]]


@dataclass(frozen=True, slots=True, eq=False)
class ImageMarks:
    """Marks, place by place: the producer's place in the image, the slot, and what kernels/marks.py keeps."""

    producers: NDArray[np.int32]
    slots: NDArray[np.int32]
    highest: NDArray[np.uint64]
    bitmaps: NDArray[np.uint64]


@dataclass(frozen=True, slots=True, eq=False)
class SlotsImage:
    """All that a shard knows of some slots.

    Attributes:
        slots: ascending.
        settings: of the cluster.
        newest_event_ms, oldest_event_ms, tiers: of the shard; its standing windows are `tiers.standing`.
        song_ids: one behind the other.
        song_starts, song_sizes, song_hashes: where each begins in `song_ids`, its bytes and its hash.
        charts: names; chart n of the image is the n-th of them, from 1.
        boards: by name.
        producers: that have marks in the slots.
        marks: of the slots.
    """

    slots: tuple[int, ...]
    settings: ClusterSettings
    newest_event_ms: int
    oldest_event_ms: int | None
    tiers: Tiers
    song_ids: bytes
    song_starts: NDArray[np.int64]
    song_sizes: NDArray[np.int32]
    song_hashes: NDArray[np.uint64]
    charts: Sequence[str]
    boards: Mapping[str, ImageBoard]
    producers: Sequence[ImageProducer]
    marks: ImageMarks

    @property
    def past(self) -> Past:
        """How far back the shard kept the finest buckets."""
        oldest = self.oldest_event_ms
        roll_up = self.tiers.roll_up(self.newest_event_ms)
        return Past.of(roll_up, None if oldest is None else oldest // self.settings.resolution_ms)

    @property
    def memory_bytes(self) -> int:
        """About what a shard's state grows by: names with their indexes, rows, cells, marks."""
        boards = self.boards.values()
        rows = sum(len(board) for board in boards) * (48 + 16 * len(self.tiers.standing))
        cells = sum(board.cells.memory_bytes for board in boards)
        return len(self.song_ids) + 40 * len(self.song_sizes) + rows + cells + 48 * len(self.marks.slots)

    @property
    def plays(self) -> int:
        """In the global chart."""
        return int(self.boards[GLOBAL].counts.sum())


# --- Writing ----------------------------------------------------------------------------------------------------------


def write_image(image: SlotsImage) -> bytes:
    """The image's bytes."""
    message = pb.SlotsImage(
        version=IMAGE_VERSION,
        slots=image.slots,
        cluster_slots=image.settings.slots,
        partitioner=image.settings.partitioner,
        resolution_ms=image.settings.resolution_ms,
        newest_event_ms=image.newest_event_ms,
        oldest_event_ms=image.oldest_event_ms,
        tiers=str(image.tiers),
        tier_floors=image.tiers.floors,
        standing_windows=[str(window) for window in image.tiers.standing],
        charts=image.charts,
        producers=[
            pb.ImageProducer(
                producer_id=one.producer_id,
                last_seen_ms=one.last_seen_ms,
                permanent=one.permanent,
                rejects=[
                    pb.ImageRejects(sequence=sequence, packed=_data_of(np.array(packed, np.uint64)).tobytes())
                    for sequence, packed in one.rejects.items()
                ],
            )
            for one in image.producers
        ],
    )
    marks = image.marks
    pieces: Pieces = [message.SerializeToString(deterministic=True)]
    pieces += _field(pb.SlotsImage, "song_ids", [image.song_ids])
    pieces += _column_field(pb.SlotsImage, "song_sizes", image.song_sizes)
    pieces += _field(pb.SlotsImage, "global_board", _write_board(image.boards[GLOBAL], in_charts=False))
    pieces += _field(pb.SlotsImage, "chart_board", _write_board(image.boards[CHARTS], in_charts=True))
    columns: dict[str, NDArray[Any]] = {
        "producers": marks.producers,
        "slots": marks.slots,
        "highest": marks.highest,
        "bitmaps": marks.bitmaps,
    }
    pieces += _field(pb.SlotsImage, "marks", _columns_fields(pb.ImageMarks, columns))
    return b"".join(pieces)


def _write_board(board: ImageBoard, *, in_charts: bool) -> Pieces:
    columns: dict[str, NDArray[Any]] = {"charts": board.charts} if in_charts else {}
    columns |= {"songs": board.songs, "counts": board.counts}
    cells = board.cells
    columns |= {"cell_buckets": cells.buckets, "cell_entries": cells.entries, "cell_counts": cells.counts}
    pieces = _columns_fields(pb.ImageBoard, columns)
    for window, told in board.sessions.items():
        pieces += _field(pb.ImageBoard, "sessions", _write_sessions(window, told))
    return pieces


def _write_sessions(window: Window, told: ImageSessions) -> Pieces:
    message = pb.ImageSessions(window=str(window), end=told.end, settled=told.settled)
    starts, lasts, plays, priors = told.columns
    columns: dict[str, NDArray[Any]] = {"entries": told.entries, "uncertain": told.uncertain}
    columns |= {"starts": starts, "lasts": lasts, "plays": plays, "priors": priors}
    return [message.SerializeToString(), *_columns_fields(pb.ImageSessions, columns)]


# Columns are written between the messages by hand: message objects would copy each of them three times.


def _field(message: type[Message], name: str, pieces: Pieces) -> Pieces:
    """A field of bytes or of a message, given in pieces."""
    number = message.DESCRIPTOR.fields_by_name[name].number
    size = sum(piece.nbytes if isinstance(piece, memoryview) else len(piece) for piece in pieces)
    return [varint(number << 3 | _LENGTH_DELIMITED) + varint(size), *pieces]


def _columns_fields(message: type[Message], columns: Mapping[str, NDArray[Any]]) -> Pieces:
    return [piece for name, column in columns.items() for piece in _column_field(message, name, column)]


def _column_field(message: type[Message], name: str, column: NDArray[Any]) -> Pieces:
    return _field(message, name, [_data_of(column)]) if len(column) else []


def _data_of(column: NDArray[Any]) -> memoryview:
    """A column's bytes, little-endian."""
    return np.ascontiguousarray(column.astype(column.dtype.newbyteorder("<"), copy=False)).view(np.uint8).data


# --- Reading ----------------------------------------------------------------------------------------------------------


def read_image(image: bytes | memoryview) -> SlotsImage:
    """Reads an image and holds it against itself.

    Raises:
        InvalidArgumentError: it is none, or contradicts itself.
        VersionError: another release wrote it.
    """
    try:
        message = pb.SlotsImage.FromString(bytes(image))
    except DecodeError as error:
        raise InvalidArgumentError("the image of slots is no SlotsImage message") from error
    if message.version != IMAGE_VERSION:
        raise VersionError(
            f"the image of slots has version {message.version}, this release reads {IMAGE_VERSION}: move slots between"
            " shards of one release"
        )
    settings = _read_settings(message)
    slots = tuple(message.slots)
    require(slots and list(slots) == sorted(set(slots)), "image: no slots, or not in ascending order")
    require(slots[-1] < settings.slots, "image: a slot that the cluster does not have")
    newest_ms, oldest_ms = message.newest_event_ms, None
    if message.HasField("oldest_event_ms"):
        oldest_ms = message.oldest_event_ms
    standing = [parse_window(text) for text in message.standing_windows]
    check_standing(standing, settings.resolution_ms)
    floors = list(message.tier_floors)
    tiers = parse_tiers(message.tiers, settings.resolution_ms)
    check_times(
        {"newest_event_ms": newest_ms, "oldest_event_ms": oldest_ms, "tier_floors": floors}, len(tiers)
    )  # fmt: skip
    starts, sizes, hashes = _read_songs(message, slots, settings)
    charts = list(message.charts)
    require(len(set(charts)) == len(charts) and "" not in charts, "image: a chart without a name, or two of one name")
    require(all(len(name.encode()) <= _NAME_BYTES_MAX for name in charts), "image: a chart's name is too long")
    newest_bucket = newest_ms // settings.resolution_ms
    boards = {
        GLOBAL: _read_board(message.global_board, GLOBAL, len(sizes), None, newest_bucket),
        CHARTS: _read_board(message.chart_board, CHARTS, len(sizes), len(charts), newest_bucket),
    }
    for board in boards.values():
        require(not len(board) or oldest_ms is not None, "image: plays, and no time of the oldest")
        require(all(window in standing for window in board.sessions), "image: sessions of a window that does not stand")
    producers = [_read_producer(one) for one in message.producers]
    require(len({one.producer_id for one in producers}) == len(producers), "image: a producer occurs twice")
    return SlotsImage(
        slots, settings, newest_ms, oldest_ms, Tiers(tiers, standing, floors), message.song_ids, starts, sizes, hashes,
        charts, boards, producers, _read_marks(message.marks, slots, len(producers)),
    )  # fmt: skip


def _read_settings(message: pb.SlotsImage) -> ClusterSettings:
    require(message.cluster_slots >= 1 and message.resolution_ms >= 1, "image: slots or resolution are 0")
    return ClusterSettings(message.cluster_slots, message.partitioner, message.resolution_ms)


def _column(data: bytes, dtype: str, what: str, rows: int | None = None) -> NDArray[Any]:
    """A column, read-only and without a copy."""
    kind = np.dtype(dtype)
    require(len(data) % kind.itemsize == 0, f"image: {what} is cut off")
    require(rows is None or len(data) == rows * kind.itemsize, f"image: {what} has not as many rows as the others")
    told = np.frombuffer(data, kind.newbyteorder("<"))
    # A dtype that names its byte order keeps it in `astype`, and the kernels' uncompiled form reads native ones only.
    return told.view(kind) if sys.byteorder == "little" else told.astype(kind)


def _read_songs(
    message: pb.SlotsImage, slots: tuple[int, ...], settings: ClusterSettings
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.uint64]]:
    sizes = _column(message.song_sizes, "i4", "song_sizes").copy()
    require(within(sizes, 1, _NAME_BYTES_MAX), "image: a song_id of no bytes, or of too many")
    stops = np.cumsum(sizes, dtype=np.int64)
    starts = stops - sizes
    require(
        (int(stops[-1]) if len(stops) else 0) == len(message.song_ids), "image: the song_ids do not fit their sizes"
    )
    try:
        message.song_ids.decode()
    except UnicodeDecodeError as error:
        raise InvalidArgumentError("image: a song_id is no UTF-8") from error
    first_bytes = np.frombuffer(message.song_ids, np.uint8)[starts]
    require(((first_bytes & 0xC0) != 0x80).all(), "image: a song_id begins within a character")
    hashes = hash_strings(message.song_ids or b"\0", starts, sizes)
    wanted = np.zeros(settings.slots, np.bool_)
    wanted[list(slots)] = True
    require(wanted[hashes % np.uint64(settings.slots)].all(), "image: a song of another slot")
    whole = partitioner_of(settings.partitioner).whole_songs
    require(whole or not len(sizes), "image: songs, where a slot is a batch's and counts stay where they are")
    order = np.argsort(hashes)
    twins = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    alike = {int(song) for at in twins.tolist() for song in order[at : at + 2]}
    names = {message.song_ids[int(starts[song]) : int(stops[song])] for song in alike}
    require(len(names) == len(alike), "image: a song occurs twice")
    return starts, sizes, hashes


def _read_board(
    told: pb.ImageBoard, name: str, songs: int, charts: int | None, newest_bucket: int
) -> ImageBoard:  # fmt: skip
    """A board.

    Args:
        told: what the image says.
        name: the board's.
        songs: how many there are.
        charts: how many there are besides the global one; None: this is the global board.
        newest_bucket: no cell lies in a later one.
    """
    what = f"the {name} board"
    counts = _column(told.counts, "i8", f"{what}: counts").copy()
    of_songs = _column(told.songs, "i4", f"{what}: songs", len(counts)).copy()
    if charts is None:
        require(not told.charts, f"image: {what} has charts")
        of_charts = np.zeros(len(counts), np.int32)
    else:
        of_charts = _column(told.charts, "i4", f"{what}: charts", len(counts)).copy()
        require(within(of_charts, 1, charts), f"image: {what}: an entry of an unknown chart")
    require(within(of_songs, 0, songs - 1), f"image: {what}: an entry of an unknown song")
    require(within(counts, 1, SUM_MAX), f"image: {what}: a count lies out of range")
    require(float(counts.sum(dtype=np.float64)) <= SUM_MAX, f"image: {what}: too many plays")
    _check_distinct(of_charts.astype(np.int64) << 32 | of_songs, f"image: {what}: an entry occurs twice")
    cells = _read_cells(told, what, counts, newest_bucket)
    sessions = {}
    for one in told.sessions:
        window = parse_window(one.window)
        require(isinstance(window, SessionWindow) and window not in sessions, f"image: {what}: sessions of {window}")
        sessions[window] = _read_sessions(one, f"{what}: {window}", len(counts))
    return ImageBoard(of_charts, of_songs, counts, cells, sessions)


def _read_cells(told: pb.ImageBoard, what: str, counts: NDArray[np.int64], newest_bucket: int) -> Cells:
    plays = _column(told.cell_counts, "i8", f"{what}: cell_counts")
    buckets = _column(told.cell_buckets, "i8", f"{what}: cell_buckets", len(plays))
    entries = _column(told.cell_entries, "i4", f"{what}: cell_entries", len(plays))
    if not len(plays):
        return Cells(buckets, entries, plays, 0, 0, ordered=True)
    check_cells(buckets, entries, f"image: {what}", len(counts))
    require(int(buckets[-1]) <= newest_bucket, f"image: {what}: a cell behind the newest play")
    require(within(plays, 1, SUM_MAX), f"image: {what}: a cell's count lies out of range")
    require(float(plays.sum(dtype=np.float64)) <= SUM_MAX, f"image: {what}: too many plays in cells")
    sums = np.zeros(len(counts), np.int64)
    sum_cells(entries, plays, sums, len(plays))
    require((sums <= counts).all(), f"image: {what}: cells hold more plays than their entry")
    return Cells(buckets, entries, plays, int(buckets[0]), int(buckets[-1]), ordered=True)


def _read_sessions(told: pb.ImageSessions, what: str, known: int) -> ImageSessions:
    end = integer(told.end, _BUCKET_MIN, TIME_MS_MAX, f"image: {what}: end")
    settled = integer(told.settled, _BUCKET_MIN, TIME_MS_MAX, f"image: {what}: settled")
    entries = _column(told.entries, "i4", f"{what}: entries").copy()
    parts = [told.starts, told.lasts, told.plays, told.priors]
    columns = np.array([_column(part, "i8", f"{what}: a column", len(entries)) for part in parts], np.int64)
    starts, lasts, plays, priors = columns
    _check_ascending(entries, known, what)
    for column in (starts, lasts, priors):
        require(within(column, _BUCKET_MIN, TIME_MS_MAX), f"image: {what}: a time out of range")
    require((starts <= lasts).all() and (lasts < end).all(), f"image: {what}: a session that ends where it cannot")
    require(within(plays, 1, SUM_MAX), f"image: {what}: a session's plays lie out of range")
    uncertain = _column(told.uncertain, "i4", f"{what}: uncertain").copy()
    _check_ascending(uncertain, known, what)
    return ImageSessions(end, settled, entries, columns, uncertain)


def _check_distinct(keys: NDArray[np.int64], what: str) -> None:
    keys.sort()
    require((keys[1:] != keys[:-1]).all(), what)


def _check_ascending(entries: NDArray[np.int32], known: int, what: str) -> None:
    require(within(entries, 0, known - 1), f"image: {what}: of an unknown entry")
    require((entries[1:] > entries[:-1]).all(), f"image: {what}: entries out of order")


def _read_producer(told: pb.ImageProducer) -> ImageProducer:
    rejects: dict[int, array[int]] = {}
    for one in told.rejects:
        require(one.sequence not in rejects, "image: a producer's batch occurs twice")
        packed = _column(one.packed, "u8", "a producer's rejects")
        require(within(packed, 0, (1 << 40) - 1), "image: a reject out of range")
        rejects[one.sequence] = array("Q", packed.astype("=u8").tobytes())
    require(told.producer_id, "image: a producer without an id")
    return ImageProducer(told.producer_id, told.last_seen_ms, told.permanent, rejects)


def _read_marks(told: pb.ImageMarks, slots: tuple[int, ...], producers: int) -> ImageMarks:
    of_producers = _column(told.producers, "i4", "marks: producers").copy()
    rows = len(of_producers)
    of_slots = _column(told.slots, "i4", "marks: slots", rows).copy()
    highest, bitmaps = (_column(part, "u8", "marks", rows).copy() for part in (told.highest, told.bitmaps))
    require(within(of_producers, 0, producers - 1), "image: a mark of an unknown producer")
    require(np.isin(of_slots, np.array(slots, np.int64)).all(), "image: a mark of another slot")
    _check_distinct(of_producers.astype(np.int64) << 32 | of_slots, "image: a mark occurs twice")
    require(np.bincount(of_producers, minlength=producers).all(), "image: a producer without marks")
    return ImageMarks(of_producers, of_slots, highest, bitmaps)
