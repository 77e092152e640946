"""The messages of a watch, and values of changes.py and model.py, both ways; beside rpc/convert.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from topk_grpc.changes import Change, ChangeKind
from topk_grpc.errors import InvalidArgumentError
from topk_grpc.model import Answer, Bounds, Entry
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.rpc import convert

_KIND_TO_PB: Final = {
    ChangeKind.ENTERED: pb.CHANGE_KIND_ENTERED,
    ChangeKind.LEFT: pb.CHANGE_KIND_LEFT,
    ChangeKind.MOVED: pb.CHANGE_KIND_MOVED,
    ChangeKind.COUNT: pb.CHANGE_KIND_COUNT,
}
_KIND_FROM_PB: Final = {value: kind for kind, value in _KIND_TO_PB.items()}


def snapshot_to_pb(number: int, resume_token: str, answer: Answer, *, reset: bool) -> pb.WatchTopKResponse:
    """Writes a step that carries the whole list."""
    message = _step(number, resume_token, answer)
    message.snapshot.reset = reset
    message.snapshot.entries.extend(map(convert.entry_to_pb, answer.entries))
    return message


def changes_to_pb(
    number: int, resume_token: str, answer: Answer, previous_number: int, changes: Iterable[Change]
) -> pb.WatchTopKResponse:
    """Writes a step that carries what changed; the answer's entries stay out of it."""
    message = _step(number, resume_token, answer)
    message.changes.previous_number = previous_number
    for change in changes:
        message.changes.changes.add(
            kind=_KIND_TO_PB[change.kind],
            entry=convert.entry_to_pb(change.entry),
            previous_rank=change.previous_rank,
        )
    return message


def _step(number: int, resume_token: str, answer: Answer) -> pb.WatchTopKResponse:
    return pb.WatchTopKResponse(
        number=number,
        resume_token=resume_token,
        bounds=convert.bounds_to_pb(answer.bounds),
        certificate=convert.certificate_to_pb(answer.certificate),
    )


def bounds_from_step(message: pb.WatchTopKResponse) -> Bounds | None:
    """Reads the window's bounds; None for the global one."""
    return convert.bounds_from_pb(message.bounds if message.HasField("bounds") else None)


def entries_from_snapshot(message: pb.WatchSnapshot) -> tuple[Entry, ...]:
    """Reads the whole list."""
    return tuple(map(convert.entry_from_pb, message.entries))


def changes_from_pb(message: pb.WatchChanges) -> tuple[Change, ...]:
    """Reads what changed.

    Raises:
        InvalidArgumentError: a change of a kind that this release does not know.
    """
    return tuple(_change_from_pb(change) for change in message.changes)


def _change_from_pb(message: pb.EntryChange) -> Change:
    kind = _KIND_FROM_PB.get(message.kind)
    if kind is None:
        raise InvalidArgumentError(f"a watch told of a change of the unknown kind {message.kind}: use a newer client")
    previous_rank = message.previous_rank if message.HasField("previous_rank") else None
    return Change(kind, convert.entry_from_pb(message.entry), previous_rank)
