"""Images of slots: what a target cannot take, what is senseless, and what damage does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.engine_shard import NOW
from tests.engine.moving_cluster import SLOTS
from tests.engine.test_single_moves import ALL, query_bounds, ranked, send, shard
from tests.oracle import slot_of
from tests.window_traffic import MINUTE, SECOND
from topk_grpc.engine import slots_image, transfer
from topk_grpc.engine.query import Scope
from topk_grpc.engine.state import ShardState
from topk_grpc.errors import (
    ForeignDirectoryError,
    InvalidArgumentError,
    ResourceExhaustedError,
    VersionError,
)
from topk_grpc.model import ClusterSettings, Play, SessionWindow, SlidingWindow
from topk_grpc.pb.topk.v1 import shard_service_pb2 as pb


def image_of(*plays: Play) -> bytes:
    source = shard()
    source.let_stand((SessionWindow(MINUTE), SlidingWindow(MINUTE, 0)))
    send(source, 1, Play("a", NOW, 3, ("US",)), Play("b", NOW - MINUTE, 1, ("rock", "US")), *plays)
    send(source, 2, Play("z", NOW + 60 * MINUTE), Play("é", NOW - 90 * MINUTE))
    source.state.move_standing(SessionWindow(MINUTE), query_bounds(SessionWindow(MINUTE), NOW))
    return transfer.export_slots(source.state, ALL)


def test_a_target_refuses_what_it_cannot_take() -> None:
    image = transfer.read_image(image_of())
    full = shard(owned=False)
    send_to = shard()
    send(send_to, 1, Play("q", NOW, 1, ("DE",)))
    cases: list[tuple[ShardState, int, int, type[Exception], str]] = [
        (send_to.state, 10_000, 0, InvalidArgumentError, "has plays or marks of slots"),
        (full.state, 1, 0, ResourceExhaustedError, "charts"),
        (full.state, 10_000, 1000, ResourceExhaustedError, "MiB"),
        (ShardState(ClusterSettings(SLOTS, "modulo", SECOND), 3), 10_000, 0, ForeignDirectoryError, "modulo"),
        (ShardState(ClusterSettings(SLOTS, "ring", MINUTE), 3), 10_000, 0, ForeignDirectoryError, "60000"),
        (ShardState(ClusterSettings(SLOTS * 2, "ring", SECOND), 3), 10_000, 0, ForeignDirectoryError, "16"),
    ]
    for state, charts_max, memory, error, says in cases:
        with pytest.raises(error, match=says):
            transfer.can_import(state, image, charts_max, memory)
    transfer.can_import(full.state, image, 2, 1 << 40)


def change(message: pb.SlotsImage, how: Callable[[pb.SlotsImage], object]) -> bytes:
    how(message)
    return message.SerializeToString()


def put(path: str, dtype: str, *values: int) -> Callable[[pb.SlotsImage], object]:
    """Puts other values into a column, given by the names of the fields that lead to it."""

    def change_column(message: Any) -> None:
        *outer, name = path.split(".")
        for part in outer:
            message = message[int(part)] if part.isdigit() else getattr(message, part)
        setattr(message, name, np.array(values, dtype).tobytes())

    return change_column


MARKS: Final = len({slot_of(song_id, SLOTS) for song_id in ("a", "b", "z", "é")})
SENSELESS: Final[dict[str, tuple[str, Callable[[pb.SlotsImage], object]]]] = {
    "no slots": ("no slots, or not in ascending order", lambda m: m.ClearField("slots")),
    "slots out of order": ("no slots, or not in ascending order", lambda m: m.slots.append(0)),
    "an unknown slot": ("a slot that the cluster does not have", lambda m: m.slots.append(SLOTS)),
    "a song of another slot": ("a song of another slot", lambda m: m.slots.remove(slot_of("a", SLOTS))),
    "no cluster": ("slots or resolution are 0", lambda m: m.ClearField("cluster_slots")),
    "no resolution": ("slots or resolution are 0", lambda m: m.ClearField("resolution_ms")),
    "tiers that are none": ("is no tier", lambda m: setattr(m, "tiers", "1s")),
    "floors of other tiers": ("not one for each tier", lambda m: m.tier_floors.append(1)),
    "a window that cannot stand": ("global cannot stand", lambda m: m.standing_windows.append("global")),
    "song ids cut off": ("the song_ids do not fit their sizes", lambda m: setattr(m, "song_ids", m.song_ids[:-1])),
    "song ids of no UTF-8": ("a song_id is no UTF-8", lambda m: setattr(m, "song_ids", b"\xff" * len(m.song_ids))),
    "a size below 0": (
        "a song_id of no bytes, or of too many",
        put("song_sizes", "<i4", -1, 2, 1, 2),
    ),
    "a column cut off": ("counts is cut off", lambda m: setattr(m.global_board, "counts", m.global_board.counts[:-1])),
    "a column too short": (
        "songs has not as many rows as the others",
        lambda m: setattr(m.global_board, "counts", m.global_board.counts[:-8]),
    ),
    "an entry of no song": (
        "an entry of an unknown song",
        put("global_board.songs", "<i4", 0, 1, 1 << 30),
    ),
    "an entry below 0": (
        "an entry of an unknown song",
        put("global_board.songs", "<i4", 0, 1, -1),
    ),
    "an entry twice": ("an entry occurs twice", put("global_board.songs", "<i4", 0, 1, 1)),
    "an entry without plays": (
        "a count lies out of range",
        put("global_board.counts", "<i8", 3, 1, 0),
    ),
    "too many plays": (
        "a count lies out of range",
        put("global_board.counts", "<i8", 3, 1, (1 << 63) - 1),
    ),
    "charts on the global board": ("the global board has charts", lambda m: setattr(m.global_board, "charts", b"1234")),
    "an unknown chart": (
        "an entry of an unknown chart",
        put("chart_board.charts", "<i4", 1, 2, 3),
    ),
    "the global chart among the others": (
        "an entry of an unknown chart",
        put("chart_board.charts", "<i4", 1, 2, 0),
    ),
    "a chart without a name": ("a chart without a name, or two of one name", lambda m: m.charts.append("")),
    "a chart twice": ("a chart without a name, or two of one name", lambda m: m.charts.append("US")),
    "cells out of order": (
        "its cells are out of order",
        lambda m: setattr(
            m.global_board, "cell_buckets", np.frombuffer(m.global_board.cell_buckets, "<i8")[::-1].tobytes()
        ),
    ),
    "a cell of no entry": (
        "of an unknown entry",
        put("global_board.cell_entries", "<i4", 0, 1, 3),
    ),
    "a cell without plays": (
        "a cell's count lies out of range",
        put("global_board.cell_counts", "<i8", 0, 1, 1),
    ),
    "cells with more than there is": (
        "cells hold more plays than their entry",
        put("global_board.cell_counts", "<i8", 9, 9, 9),
    ),
    "cells behind the newest play": (
        "a cell behind the newest play",
        lambda m: setattr(m, "newest_event_ms", NOW - MINUTE),
    ),
    "plays without a time": ("plays, and no time of the oldest", lambda m: m.ClearField("oldest_event_ms")),
    "sessions of no entry": (
        "of an unknown entry",
        put("global_board.sessions.0.entries", "<i4", 0, 9),
    ),
    "sessions that end later": (
        "a session that ends where it cannot",
        lambda m: setattr(m.global_board.sessions[0], "end", NOW // SECOND - 90),
    ),
    "sessions without plays": (
        "a session's plays lie out of range",
        put("global_board.sessions.0.plays", "<i8", 0, 1),
    ),
    "sessions of another window": (
        "sessions of a window that does not stand",
        lambda m: setattr(m.global_board.sessions[0], "window", "session:9m"),
    ),
    "sessions twice": ("sessions of session:1m", lambda m: m.global_board.sessions.append(m.global_board.sessions[0])),
    "an uncertain session of no entry": (
        "of an unknown entry",
        put("global_board.sessions.0.uncertain", "<i4", 99),
    ),
    "a mark of no producer": (
        "a mark of an unknown producer",
        put("marks.producers", "<i4", *[1] * MARKS),
    ),
    "a mark of another slot": (
        "a mark of another slot",
        put("marks.slots", "<i4", *[99] * MARKS),
    ),
    "a mark twice": (
        "a mark occurs twice",
        put("marks.slots", "<i4", *[slot_of("a", SLOTS)] * MARKS),
    ),
    "a producer without marks": (
        "a producer without marks",
        lambda m: m.producers.add(producer_id=b"x"),
    ),
    "a producer twice": ("a producer occurs twice", lambda m: m.producers.append(m.producers[0])),
    "a reject out of range": (
        "a reject out of range",
        put("producers.0.rejects.0.packed", "<u8", 1 << 60),
    ),
}


@pytest.mark.parametrize("what", SENSELESS)
def test_a_senseless_image_is_refused(what: str) -> None:
    says, how = SENSELESS[what]
    image = change(pb.SlotsImage.FromString(image_of()), how)
    with pytest.raises(InvalidArgumentError, match=says):
        transfer.read_image(image)


def test_an_image_of_another_version_or_of_no_kind_is_refused() -> None:
    with pytest.raises(VersionError, match="version 2"):
        transfer.read_image(change(pb.SlotsImage.FromString(image_of()), lambda m: setattr(m, "version", 2)))
    with pytest.raises(InvalidArgumentError):
        transfer.read_image(b"\xff" * 40)
    transfer.read_image(memoryview(image_of()))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_image_is_refused_or_harmless(data: st.DataObject) -> None:
    """Whatever is read can be imported, asked, snapshotted and dropped again."""
    image = bytearray(image_of())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(image) - 1))
        image[at] = data.draw(st.integers(0, 255))
    target = shard(owned=False)
    try:
        read = transfer.read_image(bytes(image))
        transfer.can_import(target.state, read, 10_000, 0)
    except (InvalidArgumentError, VersionError, ForeignDirectoryError, ResourceExhaustedError):
        return
    transfer.import_slots(target.state, read)
    assert transfer.slot_totals(target.state, read.slots) == transfer.image_totals(read)
    for chart in ("", "US"):
        ranked(target, Scope(chart))
    target.take_snapshot(use_blocks=True)
    target.recover()
    transfer.drop_slots(target.state, read.slots)
    assert not any(transfer.slot_totals(target.state, read.slots).entries)


def test_what_is_written_is_what_protobuf_reads_and_nothing_else() -> None:
    image = image_of()
    message = pb.SlotsImage.FromString(image)
    assert len(message.global_board.sessions) == len(message.chart_board.sessions) == 1
    message.DiscardUnknownFields()
    assert len(message.SerializeToString()) == len(image)


def test_columns_are_of_a_native_type() -> None:
    """The kernels' uncompiled form reads no others."""
    for dtype in ("i4", "u4", "i8", "u8"):
        column = slots_image._column(bytes(16), dtype, "it")
        assert column.data.tolist() == [0] * (16 // np.dtype(dtype).itemsize)
