"""What differs between two lists of the k best, and back: the arithmetic that both ends of a watch share.

For any two lists `apply(old, diff(old, new), total) == new`, where `total` is the number that the new list's shares are
shares of. A song that moves to another rank, or whose count or session changes, is one change; a song that stays as it
is is none, also where its share differs, as that follows from its count and the total.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from topk_grpc.errors import InvalidArgumentError
from topk_grpc.model import Answer, Entry


class ChangeKind(Enum):
    """How a song's place changed."""

    ENTERED = "ENTERED"
    """It was not on the list before."""

    LEFT = "LEFT"
    """It is not on the list any more."""

    MOVED = "MOVED"
    """Its rank is another; its count may be, too."""

    COUNT = "COUNT"
    """Its rank is the same; its count, or its session, is another."""


@dataclass(frozen=True, slots=True)
class Change:
    """One song that differs.

    Attributes:
        kind: how.
        entry: as it is now; of a song that left, as it was.
        previous_rank: its rank before; None for one that entered.
    """

    kind: ChangeKind
    entry: Entry
    previous_rank: int | None = None


@dataclass(frozen=True, slots=True)
class WatchUpdate:
    """A list of the k best, and what has changed since the update before.

    Attributes:
        answer: the whole list as it is now, as `top_k` gives it.
        changes: since the update before; since an empty list, for the first. Songs that left come first, then the
            others by their rank now. Empty where only totals, bounds or finality differ, or a broken connection came
            back.
        number: of the list. Numbers rise, but for a reset; those in between were passed over.
        reset: the server did not know the list of before: numbers begin anew. The changes hold nevertheless.
    """

    answer: Answer
    changes: tuple[Change, ...]
    number: int
    reset: bool = False


def diff(old: Sequence[Entry], new: Sequence[Entry]) -> tuple[Change, ...]:
    """What turns one list into another.

    Args:
        old, new: by rank.

    Returns:
        First the songs that left, by the rank they had; then the others that differ, by their rank now.
    """
    before = {entry.song_id: entry for entry in old}
    now = {entry.song_id for entry in new}
    changes = [Change(ChangeKind.LEFT, entry, entry.rank) for entry in old if entry.song_id not in now]
    for entry in new:
        was = before.get(entry.song_id)
        if was is None:
            changes.append(Change(ChangeKind.ENTERED, entry))
        elif was.rank != entry.rank:
            changes.append(Change(ChangeKind.MOVED, entry, was.rank))
        elif was.count != entry.count or was.session != entry.session:
            changes.append(Change(ChangeKind.COUNT, entry, was.rank))
    return tuple(changes)


def apply(old: Iterable[Entry], changes: Iterable[Change], total_plays: int) -> tuple[Entry, ...]:
    """The list after the changes.

    Args:
        old: the list that they begin with.
        changes: as `diff` makes them.
        total_plays: of the certificate that came with them; all shares are computed from it.

    Raises:
        InvalidArgumentError: the changes do not belong to this list: what comes out has gaps or two songs at a rank.
    """
    entries = {entry.song_id: entry for entry in old}
    for change in changes:
        if change.kind is ChangeKind.LEFT:
            entries.pop(change.entry.song_id, None)
        else:
            entries[change.entry.song_id] = change.entry
    ranked = sorted(entries.values(), key=lambda entry: entry.rank)
    if any(entry.rank != rank for rank, entry in enumerate(ranked, 1)):
        raise InvalidArgumentError("the changes of a watch do not belong to the list that they came for: watch anew")
    return tuple(
        dataclasses.replace(entry, share=entry.count / total_plays if total_plays else 0.0) for entry in ranked
    )
