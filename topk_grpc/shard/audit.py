"""Counting a shard anew from its disk, and comparing: with what it serves, or with what a start would serve.

Each of the last two snapshots is one way to begin; the log behind it leads to the same position. Every count has to
come to what is served there (`engine/account.py` says what is compared). For a shard that runs, the position is where
it was when it answered; for one that does not, the end of its log, and what a start would serve is read as a start
reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from topk_grpc.config import ShardSettings
from topk_grpc.engine.account import Account, Copied, WindowAccount, account, copy_state, listed
from topk_grpc.engine.recount import Recount
from topk_grpc.errors import CorruptError, InvalidArgumentError, StorageError
from topk_grpc.model import ClusterSettings
from topk_grpc.pb.topk.v1 import shard_service_pb2 as pb
from topk_grpc.shard.core import APPEND, DELETE_SONG, EXPIRE, FROZEN, IMPORTED, OUTCOME, OWNED, ShardCore
from topk_grpc.storage import DataDirectory
from topk_grpc.storage.snapshot import Snapshot
from topk_grpc.storage.view import MovedOnError, View

DIFFERENCES_MAX: Final = 20
"""Entries that are named."""

_SLOTS_LISTED: Final = 8
_ENTRIES_MAX: Final = 50_000
_TRIES: Final = 5

Ask = Callable[[Sequence[int]], "Served"]
"""Asks the shard what it serves now, with the entries of some slots."""

OnBytes = Callable[[int, int], None]
"""Hears how many bytes of how many have been read."""


@dataclass(frozen=True, slots=True)
class Served:
    """What a shard serves at a position of its log."""

    position: int
    account: Account
    entries: dict[tuple[str, str], int] = field(default_factory=dict)


@dataclass(slots=True)
class Report:
    """What an audit of one shard found.

    Attributes:
        position: of the log, that everything was counted up to.
        live: whether the shard served meanwhile.
        counts: what was counted from, a few words each.
        plays: counted, in the global chart.
        notes: what is amiss and does no harm.
        differences: what differs, a sentence each; none: all counts agree.
    """

    position: int
    live: bool
    counts: list[str] = field(default_factory=list)
    plays: int = 0
    notes: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


def audit_live(path: Path, ask: Ask, on_bytes: OnBytes = lambda _done, _all: None) -> Report:
    """Audits a shard that serves.

    Args:
        path: its data directory.
        ask: how it is asked.
        on_bytes: hears of the progress.

    Raises:
        StorageError: the directory cannot be read.
    """
    directory = DataDirectory.look(path)
    report = _again(lambda: _audit(View(directory, live=True), lambda: ask(()), on_bytes, live=True))
    slots = report.slots[:_SLOTS_LISTED]
    if slots:  # once more, with the entries of some slots that differ
        named = _again(lambda: _audit(View(directory, live=True), lambda: ask(slots), on_bytes, live=True, slots=slots))
        report.report.differences += named.report.differences[len(named.plain) :]
    return report.report


def audit_stopped(
    path: Path, cluster: ClusterSettings | None = None, on_bytes: OnBytes = lambda _done, _all: None
) -> Report:
    """Audits a data directory that no process has: no shard can start on it meanwhile.

    Args:
        path: the directory.
        cluster: what is fixed in the cluster; None: as the directory says.
        on_bytes: hears of the progress.

    Raises:
        StorageError: the directory cannot be read, or is another process's.
    """
    look = DataDirectory.look(path)
    settings = ShardSettings(topology="-", shard_id="-", data_dir=str(path))
    core = ShardCore(settings, cluster or cluster_of(look))
    try:
        notes = core.read().notes
        copied = copy_state(core.state)
        served = Served(core.counted_position, account(copied))
        found = _audit(View(look, live=False), lambda: served, on_bytes, live=False)
        if found.slots:
            slots = found.slots[:_SLOTS_LISTED]
            served = Served(served.position, served.account, listed(copied, slots, _ENTRIES_MAX))
            found = _audit(View(look, live=False), lambda: served, on_bytes, live=False, slots=slots)
        found.report.notes += [note for note in notes if note not in found.report.notes]
        return found.report
    finally:
        core.close()


def cluster_of(directory: DataDirectory) -> ClusterSettings:
    """What is fixed in the cluster whose plays a data directory holds.

    Raises:
        StorageError: it holds none yet.
    """
    view = View(directory, live=True)
    for snapshot in view.generations():
        if snapshot is not None:
            return ClusterSettings(snapshot.meta["slots"], snapshot.meta["partitioner"], snapshot.meta["resolution_ms"])
        for record_type, payload, _ in view.records(0, None):
            if record_type == OWNED:
                record = pb.OwnedRecord.FromString(bytes(payload))
                return ClusterSettings(record.cluster_slots, record.partitioner, record.resolution_ms)
    raise StorageError(f"{directory.path} holds no plays of any cluster yet: there is nothing to audit")


def serve_audit(copied: Copied, coverage: pb.Coverage, request: pb.AuditRequest) -> pb.AuditResponse:
    """The answer of a shard. Takes long for many entries; on any thread."""
    served = account(copied)
    response = pb.AuditResponse(
        coverage=coverage,
        oldest_event_ms=served.oldest_event_ms,
        entries=served.entries.tolist(),
        plays=served.plays.tolist(),
        marks=served.marks.tolist(),
        producers=served.producers,
        charts=served.charts,
        best=served.best,
        windows=[
            pb.AuditedWindow(
                window=window, board=board, start=one.start, end=one.end, digest=one.digest, plays=one.plays
            )
            for (window, board), one in served.windows.items()
        ],
    )
    limit = min(request.entries_max, _ENTRIES_MAX)
    for (chart, song_id), count in listed(copied, request.slots, limit).items() if request.slots else ():
        response.listed.add(chart=chart, song_id=song_id, count=count)
    return response


def audit_request(slots: Sequence[int]) -> pb.AuditRequest:
    """The question to a shard."""
    return pb.AuditRequest(slots=slots, entries_max=_ENTRIES_MAX)


def served_of(message: pb.AuditResponse) -> Served:
    """What a shard answered."""
    return Served(
        message.coverage.log_position,
        Account(
            newest_event_ms=message.coverage.newest_event_ms,
            oldest_event_ms=message.oldest_event_ms if message.HasField("oldest_event_ms") else None,
            entries=np.array(message.entries, np.uint64),
            plays=np.array(message.plays, np.int64),
            marks=np.array(message.marks, np.uint64),
            producers=message.producers,
            charts=message.charts,
            best=message.best,
            windows={
                (one.window, one.board): WindowAccount(one.start, one.end, one.digest, one.plays)
                for one in message.windows
            },
        ),
        {(one.chart, one.song_id): one.count for one in message.listed},
    )


# --- Counting ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Found:
    report: Report
    slots: list[int]
    plain: list[str]


def _again(attempt: Callable[[], _Found]) -> _Found:
    """Until nothing is pruned in the middle of it; what is damaged is so at the same place the next time."""
    damage = ""
    for _ in range(_TRIES):
        try:
            return attempt()
        except MovedOnError as error:
            if isinstance(error.__cause__, CorruptError) and damage == str(error.__cause__):
                raise error.__cause__ from None
            damage = str(error.__cause__)
    raise StorageError(
        f"the shard took snapshots faster than they could be read, {_TRIES} times: try again under less load, or with"
        " a larger --snapshot-log-bytes"
    )


def _audit(
    view: View, ask: Callable[[], Served], on_bytes: OnBytes, *, live: bool, slots: Sequence[int] = ()
) -> _Found:
    generations = view.generations()
    if not generations:
        raise CorruptError("no snapshot is whole, and the log before them is gone. " + ". ".join(view.notes), "")
    served = ask()
    begun = [0 if one is None else one.position for one in generations]
    total = sum(served.position - start for start in begun)
    report, found, done = Report(served.position, live, notes=view.notes), set[int](), 0
    named: list[str] = []
    for snapshot, start in zip(generations, begun, strict=True):
        what = (
            f"the log from position {start}" if snapshot is None else f"the snapshot at {start} and the log behind it"
        )

        def read(position: int, start: int = start, before: int = done) -> None:
            on_bytes(before + position - start, total)

        counted = _count(view, snapshot, len(served.account.entries), start, served.position, read)
        done += served.position - start
        expected = counted.account(served.account.windows)
        report.counts.append(what)
        report.plays = int(expected.plays.sum())
        report.differences += [f"{what}: {one}" for one in (*counted.differences, *_compare(served.account, expected))]
        found |= set(np.flatnonzero(served.account.entries != expected.entries).tolist())
        if slots:
            named += _name(served.entries, counted.listed(slots), what)
    plain = report.differences
    report.differences = plain + named[:DIFFERENCES_MAX]
    return _Found(report, sorted(found), plain)


def _count(  # noqa: PLR0917
    view: View, snapshot: Snapshot | None, slots: int, start: int, end: int, on_position: Callable[[int], None]
) -> Recount:
    """One count, up to a position."""
    if snapshot is None:
        counting = Recount(ClusterSettings(slots))
    else:
        meta = snapshot.meta
        counting = Recount(ClusterSettings(slots, meta["partitioner"], meta["resolution_ms"]))
        columns = {block.block_id: block.columns for block in snapshot.blocks}
        counting.begin(
            meta,
            snapshot.arrays,
            {board: [columns[number] for number in numbers] for board, numbers in meta["blocks"].items()},
        )
    pieces: list[bytes] = []  # of an image
    for record_type, payload, position in view.records(start, end):
        try:
            if record_type == APPEND:
                counting.append(payload)
            elif record_type == DELETE_SONG:
                counting.delete_song(pb.DeleteSongRecord.FromString(bytes(payload)).song_id)
            elif record_type == EXPIRE:
                counting.forget_idle(pb.ExpireRecord.FromString(bytes(payload)).before_ms)
            elif record_type == OWNED:
                record = pb.OwnedRecord.FromString(bytes(payload))
                counting.use(ClusterSettings(record.cluster_slots, record.partitioner, record.resolution_ms))
            elif record_type == FROZEN:
                frozen = pb.FrozenRecord.FromString(bytes(payload))
                counting.hold(frozen.migration_id, frozen.slots)
            elif record_type == IMPORTED:
                imported = pb.ImportedRecord.FromString(bytes(payload))
                pieces.append(imported.piece)
                if sum(map(len, pieces)) == imported.image_bytes:
                    counting.hold(imported.migration_id, imported.slots, b"".join(pieces))
                    pieces = []
            elif record_type == OUTCOME:
                outcome = pb.OutcomeRecord.FromString(bytes(payload))
                counting.settle(outcome.migration_id, committed=outcome.committed)
        except InvalidArgumentError as error:
            counting.differences.append(f"the record that ends at position {position} makes no sense: {error}")
        on_position(position)
    return counting


def _compare(served: Account, counted: Account) -> list[str]:
    """What two accounts differ in."""
    found = []
    if served.newest_event_ms != counted.newest_event_ms or served.oldest_event_ms != counted.oldest_event_ms:
        found.append(
            f"plays from {counted.oldest_event_ms} to {counted.newest_event_ms} ms were counted, the shard says"
            f" {served.oldest_event_ms} to {served.newest_event_ms} ms"
        )
    slots = np.flatnonzero(served.entries != counted.entries)
    if len(slots):
        less = int((counted.plays - served.plays).sum())
        found.append(
            f"the plays of {len(slots)} slots differ (slots {_some(slots.tolist())}): the shard serves"
            f" {int(served.plays.sum()):,} plays, {int(counted.plays.sum()):,} were counted, {less:+,}"
        )
    elif not np.array_equal(served.plays, counted.plays):
        found.append("the sums of plays differ, though all entries agree")
    slots = np.flatnonzero(served.marks != counted.marks)
    if len(slots):
        found.append(
            f"producers' marks differ in {len(slots)} slots (slots {_some(slots.tolist())}): resends may count twice,"
            " or not at all"
        )
    if served.producers != counted.producers:
        found.append("when producers were last heard of, or whether they are permanent, differs")
    if served.charts != counted.charts:
        found.append("the totals of some chart differ")
    if served.best != counted.best:
        found.append("the best of some chart, or their order, differ")
    for key, one in served.windows.items():
        if counted.windows[key] != one:
            found.append(
                f"the standing window {key[0]} of the board {key[1]!r} differs: the shard serves {one.plays:,} plays in"
                f" it, {counted.windows[key].plays:,} were counted"
            )
    return found


def _name(served: dict[tuple[str, str], int], counted: dict[tuple[str, str], int], what: str) -> list[str]:
    """The entries that differ."""
    named = []
    for key in sorted(served.keys() | counted.keys()):
        if served.get(key, 0) != counted.get(key, 0):
            chart = f"chart {key[0]!r}" if key[0] else "the global chart"
            named.append(
                f"{what}: {key[1]!r} in {chart}: the shard serves {served.get(key, 0):,}, counted were"
                f" {counted.get(key, 0):,}"
            )
    return named


def _some(slots: Sequence[int]) -> str:
    return ", ".join(map(str, slots[:10])) + (", …" if len(slots) > 10 else "")
