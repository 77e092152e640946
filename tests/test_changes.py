"""Two lists and what lies between them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from topk_grpc.changes import Change, ChangeKind, apply, diff
from topk_grpc.errors import InvalidArgumentError
from topk_grpc.model import Answer, Bounds, Certificate, Entry, Finality
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.rpc import steps


@st.composite
def lists(draw: st.DrawFn) -> tuple[tuple[Entry, ...], int]:
    """The k best of some counts, and the total of all."""
    counts = draw(st.dictionaries(st.sampled_from(["a", "b", "é", "日", "x y", "z"]), st.integers(1, 4)))
    sessions = draw(st.booleans())
    total = sum(counts.values())
    ranked = sorted(counts.items(), key=lambda place: (-place[1], place[0].encode()))[: draw(st.integers(1, 6))]
    return tuple(
        Entry(rank, song, count, count / total, Bounds(draw(st.integers(0, 1)), 9) if sessions else None)
        for rank, (song, count) in enumerate(ranked, 1)
    ), total


Listed = tuple[tuple[Entry, ...], int]


@given(lists(), lists())
def test_changes_turn_one_list_into_the_other(old: Listed, new: Listed) -> None:
    changes = diff(old[0], new[0])
    assert apply(old[0], changes, new[1]) == new[0]
    certificate = Certificate(True, (), 3, 7, Finality.PRELIMINARY, new[1], len(new[0]))
    answer = Answer(Bounds(0, 10), certificate, new[0])
    written = steps.changes_to_pb(8, "token", answer, 5, changes).SerializeToString()
    read = pb.WatchTopKResponse.FromString(written)
    assert (read.number, read.resume_token, read.changes.previous_number) == (8, "token", 5)
    assert steps.bounds_from_step(read) == Bounds(0, 10)
    assert steps.changes_from_pb(read.changes) == changes


@given(lists(), lists())
def test_changes_say_what_they_should(old: Listed, new: Listed) -> None:
    before, now = ({entry.song_id: entry for entry in each[0]} for each in (old, new))
    changes = diff(old[0], new[0])
    left = [change for change in changes if change.kind is ChangeKind.LEFT]
    others = [change for change in changes if change.kind is not ChangeKind.LEFT]
    assert changes == (*left, *others)
    assert [change.entry for change in left] == [entry for entry in old[0] if entry.song_id not in now]
    assert [change.entry.rank for change in others] == sorted(change.entry.rank for change in others)
    touched = {change.entry.song_id for change in changes}
    assert len(touched) == len(changes)
    for change in others:
        was = before.get(change.entry.song_id)
        assert change.entry == now[change.entry.song_id]
        assert change.previous_rank == (None if was is None else was.rank)
        assert (change.kind is ChangeKind.ENTERED) == (was is None)
        assert (change.kind is ChangeKind.MOVED) == (was is not None and was.rank != change.entry.rank)
    for song in now.keys() - touched:
        was, is_now = before[song], now[song]
        assert (was.rank, was.count, was.session) == (is_now.rank, is_now.count, is_now.session)


def test_changes_of_another_list_are_refused() -> None:
    a, b = Entry(1, "a", 2), Entry(2, "b", 1)
    for changes in ([Change(ChangeKind.LEFT, a, 1)], [Change(ChangeKind.ENTERED, Entry(2, "c", 1))]):
        with pytest.raises(InvalidArgumentError):
            apply((a, b), changes, 3)


def test_an_unknown_kind_of_change_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="newer"):
        steps.changes_from_pb(pb.WatchChanges(changes=[pb.EntryChange()]))
